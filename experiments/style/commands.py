"""``decoding style``, ``sweep``, ``reproduce style``, ``bench style`` and ``bench vllm``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from decoding.cli import options as shared
from decoding.cli.groups import Group
from decoding.cli.sections import Command
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.style.registered import DEFAULT_STYLE
from experiments.lab import spreading


@click.group(cls=Group)
def style() -> None:
    """Trains, inspects and evaluates style priors."""


@style.command()
@click.argument("corpora", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .safetensors file, or a folder.")
@shared.lambda_or_auto
@shared.steering
@shared.model
@shared.dtype
@shared.device
@shared.field
@shared.order
@shared.smoothing
@shared.unwrap
@click.option(
    "--prune", type=shared.CutOffs(), default="0", help="Leave out what occurs so often or less, by order: 0,0,1."
)
@spreading.workers
@click.option("--tasks", type=click.IntRange(min=1), help="Into which each step is divided. As many as workers.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what is written meanwhile: OUT.work.")
@click.option("--memory", type=shared.Size(), default="4GB", show_default=True, help="Of each worker, at most.")
@click.pass_context
def train(ctx: click.Context, corpora: tuple[str, ...], out: Path, lambda_: float | str | None, **options: Any) -> None:
    """Trains a prior for a model's tokenizer on SOURCEs: registered names, text files, folders, files with fields.

    A .safetensors file holds the n-gram model alone. A folder also holds how it steers: λ, mode and guards.

    With --executor it is trained on disk, by workers, and may outgrow memory. SOURCEs may then be addresses that fsspec
    knows too, of files or folders, with wildcards. The same command goes on where it was stopped.
    """
    from decoding.models import load_model, load_tokenizer
    from decoding.style.training import joined, train_prior

    default = click.core.ParameterSource.DEFAULT
    asked = [name for name in ("lambda_", *shared.STEERING) if ctx.get_parameter_source(name) != default]
    if out.suffix == ".safetensors" and asked:
        raise DecodingError(f"--{asked[0].strip('_').replace('_', '-')} is kept in a folder: name one with --out")
    if out.suffix != ".safetensors" and not asked:
        raise DecodingError(f"--out must end in .safetensors, not {out.name!r}; a folder also keeps --mode or --lambda")
    require_writable(out)
    if options["executor"] is not None:
        _train_on_disk(corpora, out, options)
        return
    spreading.refuse_without_executor(ctx, "tasks", "work", "memory")
    tokenizer = load_tokenizer(options["model"])
    if out.suffix == ".safetensors":
        corpus = joined([source.corpus() for source in shared.sources(corpora, options)])
        prior = train_prior(corpus, tokenizer, options["order"], options["smoothing"], options["prune"])
        prior.save(out)
        click.echo(f"{out}: {len(prior):,} n-grams, {out.stat().st_size / len(prior):.1f} bytes each")
        return
    if len(corpora) > 1:
        raise DecodingError("a folder that keeps how a style steers is made of one SOURCE: give a folder of texts")
    if any(options["prune"]):
        raise DecodingError("--prune makes a .safetensors file: name one with --out")
    steered = shared.style_prior(corpora[0], lambda_, options)
    model = load_model(options["model"], options["dtype"], options["device"]) if steered.needs_model else None
    steered.bind(tokenizer, model).save_pretrained(out)
    click.echo(f"{out}: mode {steered.mode}, λ={steered.lambda_:g}")


def _train_on_disk(corpora: tuple[str, ...], out: Path, options: dict[str, Any]) -> None:
    from decoding.style.on_disk import training_on_disk
    from experiments.style.train_on_disk import train

    if out.suffix != ".safetensors":
        raise DecodingError("--executor writes a .safetensors file: leave --lambda, --mode and guards to who uses it")
    workers = spreading.workers_of(options, options["memory"])
    work = options["work"] or out.with_name(f"{out.name}.work")
    training = training_on_disk(
        shared.sources(corpora, options),
        options["model"],
        work,
        order=options["order"],
        smoothing=options["smoothing"],
        prune=options["prune"],
        tasks=options["tasks"] or workers.count,
        memory=options["memory"],
    )
    try:
        is_written = train(training, workers, work, out)
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; what is done is kept in {work}: the same command goes on", err=True)
        sys.exit(130)
    if is_written:
        click.echo(f"{out}: {out.stat().st_size / 1e6:,.1f} MB")
    else:
        click.echo(f"handed to Slurm, which writes {out} last; the same command goes on where a job failed")


@style.command()
@click.argument("prior")
@click.option("--ngrams", required=True, type=click.IntRange(min=0), help="Of two tokens and more, that stay.")
@click.option("--histories", help="Another saved prior of the text, such as Witten-Bell's: how often contexts come.")
@click.option("--out", required=True, type=shared.Writable(), help="A .safetensors file.")
def prune(prior: str, ngrams: int, histories: str | None, out: Path) -> None:
    """Leaves out the n-grams of a saved PRIOR that it misses least, by entropy, down to a number."""
    from decoding.style.source import StyleSource

    if out.suffix != ".safetensors":
        raise DecodingError(f"--out must end in .safetensors, not {out.name!r}")
    other = None if histories is None else StyleSource.parse(histories).saved().model
    smaller = StyleSource.parse(prior).saved().model.pruned(ngrams, other)
    smaller.save(out)
    click.echo(f"{out}: {len(smaller):,} n-grams")


@style.command()
@click.argument("prior")
@shared.json_alone
def info(prior: str) -> None:
    """Prints what a saved PRIOR is, as JSON."""
    from decoding.style.source import StyleSource

    saved = StyleSource.parse(prior).saved()
    model = saved.model
    counts = [int(model.seen.sum()), *model.tables.shape.ngrams[1:]]
    about = {
        "order": model.order,
        "smoothing": model.smoothing,
        "vocab_size": model.vocab_size,
        "ngrams": {str(k): count for k, count in enumerate(counts, start=1)},
        **model.metadata,
        **({} if saved.settings is None else {"lambda": saved.lambda_, **saved.settings.as_dict()}),
    }
    click.echo(json.dumps(about, indent=2, ensure_ascii=False))


@style.command(name="eval")
@click.argument("prior")
@click.argument("text")
@shared.model
@shared.field
@shared.order
@shared.smoothing
@shared.unwrap
@shared.json_alone
def evaluate(prior: str, text: str, model: str, order: int, smoothing: str, **options: Any) -> None:
    """Perplexity of TEXT under PRIOR (saved, or trained now from a style), as JSON."""
    from decoding.models import load_tokenizer
    from decoding.style.training import resolve_style
    from decoding.tokens import tokenize

    tokenizer = load_tokenizer(model)
    judging, judged = shared.sources([prior, text], options)
    documents = [ids for ids in tokenize(judged.corpus().documents, tokenizer) if len(ids)]
    judge = resolve_style(judging, tokenizer, order=order, smoothing=smoothing)
    seen = judge.seen.numpy()
    unknown = sum(int((~seen[ids]).sum()) for ids in documents)
    result = {
        "tokens": sum(map(len, documents)),
        "unknown_tokens": unknown,
        "perplexity": judge.perplexity(documents),
        "perplexity_without_unknown": judge.perplexity(documents, oov="exclude"),
    }
    click.echo(json.dumps(result, indent=2))


@style.command(name="compare")
@click.option(
    "--style",
    "styles",
    type=shared.STYLE_NAME,
    multiple=True,
    required=True,
    help=f"{shared.style_help} NAME=SPEC. May repeat.",
)
@click.option(
    "--other",
    "others",
    type=shared.STYLE_NAME,
    multiple=True,
    required=True,
    help="More authors, for the judges. May repeat.",
)
@shared.prompts
@click.option("--method", "methods", multiple=True, help="A way to a style, by name. May repeat; by default the usual.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Texts for each prompt.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=4))
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--lora-steps", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--style-encoder", help="What verifies authors: a hub id, as LUAR's; by default character n-grams.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the style encoder.")
@shared.model
@shared.dtype
@shared.device
@shared.unwrap
@shared.out
@shared.resume
@spreading.of_cells
def compare(styles: tuple[str, ...], others: tuple[str, ...], **options: Any) -> None:
    """Priors in all modes beside prompting and LoRA: style (by a judge of its own), fluency, diversity, copying.

    Corpora are split: 70 % steers, prompts and trains, 20 % trains the judges, 10 % tests them. The first --other is
    also the general background of one mode. A run grows: --resume with more methods.
    """
    from decoding.models import load_model, load_tokenizer
    from decoding.style.source import require_distinct
    from experiments.lab.libraries import required
    from experiments.lab.prompts import read_prompts
    from experiments.lab.runs import check_unused
    from experiments.style import compare as ways
    from experiments.style import compare_report
    from experiments.style.likeness import StyleEncoder
    from experiments.style.lora import LoraRecipe

    for module in ("sklearn", "peft"):
        required(module, "compare")
    methods = options["methods"] or [method.name for method in ways.METHODS]
    ways.methods_named(methods)  # refused before anything is read
    out = shared.out_folder(options["out"], "comparisons")
    if not options["resume"]:
        check_unused(out)
    corpora, more = ([source.corpus() for source in shared.sources(specs, options)] for specs in (styles, others))
    require_distinct([corpus.name for corpus in (*corpora, *more)])
    chosen = ways.CompareOptions(
        prompts=read_prompts(options["prompts"] or ways.HELD_OUT_PROMPTS),
        other=more[0].name,
        methods=tuple(methods),
        samples=options["samples"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        lora=LoraRecipe(steps=options["lora_steps"]),
    )
    encoder = options["style_encoder"]
    embed = StyleEncoder(encoder, options["trust_remote_code"]) if encoder else None
    tokenizer = load_tokenizer(options["model"])
    model = load_model(options["model"], options["dtype"], options["device"])
    run = ways.Comparison(model, tokenizer, options["model"], corpora, more, chosen, out, options["resume"])
    shared.until_interrupted(run.run, out)
    compare_report.write(run, encoder, embed)
    click.echo(f"\nlook at {out / 'pareto.png'} and {out / 'samples.md'}; numbers: {out / 'results.md'}")


@click.command(cls=Command)
@click.option(
    "--lambda",
    "lambdas",
    type=shared.Numbers("λ"),
    default="0:1",
    show_default=True,
    help="0:1, 0:1:0.05 or 0,0.1,0.3.",
)
@click.option(
    "--style",
    "styles",
    type=shared.STYLE_NAME,
    multiple=True,
    help=f"{shared.style_help} NAME=SPEC names it. May repeat.",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=click.IntRange(0, shared.MOST_SEED),
    default=(0,),
    show_default=True,
    help="May repeat.",
)
@shared.prompts
@click.option("--max-new-tokens", default=48, show_default=True, type=click.IntRange(min=1))
@shared.batch_size
@click.option("--combine", type=click.Choice(["matching", "interpolated"]), help="matching, but for saved styles.")
@shared.mode
@click.option("--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True)
@shared.any_lambda
@shared.model
@shared.dtype
@shared.device
@shared.field
@shared.order
@shared.smoothing
@shared.unwrap
@shared.out
@shared.resume
@click.option("--json", "as_json", is_flag=True, help="Print the folder and the table's rows as JSON, for programs.")
@spreading.of_cells
def sweep(
    lambdas: tuple[float, ...], styles: tuple[str, ...], seeds: tuple[int, ...], as_json: bool, **options: Any
) -> None:
    """Generates over λ and measures style, fluency and divergence; writes a table, pictures and a page."""
    from decoding.style.strength import checked_lambda
    from experiments.lab.prompts import DEFAULT_PROMPTS, read_prompts
    from experiments.lab.vllm_runner import require_vllm
    from experiments.style.cells import DEFAULT_STYLES, SweepOptions
    from experiments.style.sweep import run as run_sweep

    for value in lambdas:
        checked_lambda(value, options["allow_any_lambda"])
    if options["engine"] == "vllm":
        require_vllm()
        if options["device"] != "auto":
            raise DecodingError("vLLM computes on the device that it was built for: leave --device out")
        if not all(0 <= value <= 1 for value in lambdas):
            raise DecodingError("requests to vLLM take λ in [0, 1]: leave --engine vllm or --allow-any-lambda out")
    prompts = read_prompts(options["prompts"] or DEFAULT_PROMPTS)
    chosen = SweepOptions(
        prompts=prompts,
        lambdas=lambdas,
        seeds=tuple(dict.fromkeys(seeds)),
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        combine=options["combine"] or "matching",
        mode=options["mode"] or "paper",
        allow_any_lambda=options["allow_any_lambda"],
    )
    run = _prepared_sweep(list(styles or DEFAULT_STYLES), chosen, options)
    _run_and_report(run, run_sweep, as_json)


def _prepared_sweep(styles: list[str], chosen: Any, options: dict[str, Any]) -> Any:
    from decoding.models import load_model, load_tokenizer
    from experiments.lab.runs import check_unused
    from experiments.style.cells import load_styles, with_ratio
    from experiments.style.sweep import Sweep

    out = shared.out_folder(options["out"], "sweeps")
    if not options["resume"]:
        check_unused(out)
    tokenizer = load_tokenizer(options["model"])
    asked = {name: options[name] for name in ("mode", "combine") if options.get(name) is not None}
    trained = {"order": options["order"], "smoothing": options["smoothing"]}
    loaded = load_styles(shared.sources(styles, options), tokenizer, **trained, asked=asked)
    model = load_model(options["model"], options["dtype"], options["device"])
    loaded = [with_ratio(style, tokenizer, model, chosen.mode) for style in loaded]
    return Sweep(model, tokenizer, options["model"], loaded, chosen, out, options["resume"], options["engine"])


def _run_and_report(run: Any, work: Callable[[Any], Any], as_json: bool = False) -> None:
    from experiments.style.sweep import report

    folder = run.folder.path
    points = shared.until_interrupted(lambda: work(run), folder)
    rows = report(run, points)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "rows": rows}, ensure_ascii=False))
        return
    _print_table(rows)
    pictures = f"{folder / 'sweep.png'} and {folder / 'texts.png'}"
    click.echo(f"\nlook at {folder / 'report.html'}, {pictures}; numbers: {folder / 'results.csv'}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from experiments.style.report import table

    keys = ("style_ppl", "base_ppl", "js", "entropy", "distinct_2", "copied_run", "speed")
    headings, *body = table(rows, keys, intervals=False)
    shown = Table(*headings)
    for line in body:
        shown.add_row(*line)
    console = Console()
    Console(width=None if console.is_terminal else 120).print(shown)


@click.command(name="style")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with the three corpora.")
@shared.prompts
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@shared.batch_size
@shared.model
@shared.dtype
@shared.device
@shared.order
@shared.smoothing
@shared.out
@shared.resume
@spreading.of_cells
def reproduce_style(data: Path, **options: Any) -> None:
    """Three corpora × eight λ × three seeds, beside unsteered texts of the same entropy (arXiv 2601.16224)."""
    from experiments.lab.prompts import DEFAULT_PROMPTS, read_prompts
    from experiments.style import paper
    from experiments.style.cells import SweepOptions

    chosen = SweepOptions(
        prompts=read_prompts(options["prompts"] or DEFAULT_PROMPTS),
        lambdas=paper.LAMBDAS,
        seeds=paper.SEEDS,
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
    )
    run = _prepared_sweep(paper.style_specs(data), chosen, options | {"unwrap": True, "engine": "transformers"})
    _run_and_report(run, paper.run)


@click.command(name="style")
@click.option(
    "--style", "spec", type=shared.STYLE_NAME, default=DEFAULT_STYLE, show_default=True, help=shared.style_help
)
@shared.model
@shared.field
@shared.unwrap
@shared.figures
@click.option("--lmplz", type=click.Path(exists=True, path_type=Path), help="KenLM's trainer, to compare with.")
def bench_style(spec: str, model: str, out: Path | None, lmplz: Path | None, **options: Any) -> None:
    """Measures the style prior. Let the machine be idle."""
    from experiments.style import bench

    (source,) = shared.sources([spec], options)
    bench.main(source.corpus(), model, out, lmplz)


@click.command(name="vllm")
@shared.model
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@shared.figures
def bench_vllm(model: str, max_new_tokens: int, rounds: int, out: Path | None) -> None:
    """Measures what styles cost in vLLM. Let the machine be idle."""
    from experiments.style import vllm_bench

    vllm_bench.main(model, max_new_tokens, rounds, out)


@click.command(name="training")
@click.option(
    "--style", "spec", type=shared.STYLE_NAME, default=DEFAULT_STYLE, show_default=True, help=shared.style_help
)
@click.option("--tokens", default=250_000_000, show_default=True, type=click.IntRange(min=1), help="To draw.")
@click.option("--workers", type=shared.Numbers("workers"), default="1,2", show_default=True, help="Numbers of them.")
@click.option("--memory", type=shared.Size(), default="1GiB", show_default=True, help="For n-grams, of each worker.")
@click.option("--in-memory/--on-disk-alone", default=True, help="Train in memory, too.")
@click.option("--lmplz", type=click.Path(exists=True, path_type=Path), help="KenLM's trainer, to compare with.")
@shared.model
@shared.figures
def bench_training(spec: str, workers: tuple[float, ...], out: Path | None, **options: Any) -> None:
    """Measures training on disk, on tokens drawn from a style's n-grams. Let the machine be idle."""
    from experiments.style import training_bench

    (source,) = shared.sources([spec], {})
    training_bench.main(
        source.corpus(),
        options["model"],
        options["tokens"],
        tuple(map(int, workers)),
        options["memory"],
        options["in_memory"],
        options["lmplz"],
        out,
    )


@click.command(name="pruning")
@click.option("--style", "specs", type=shared.STYLE_NAME, multiple=True, help=f"{shared.style_help} May repeat.")
@shared.model
@shared.field
@shared.unwrap
@shared.figures
def bench_pruning(specs: tuple[str, ...], model: str, out: Path | None, **options: Any) -> None:
    """Measures perplexity against size, of models that are pruned by counts and by entropy."""
    from experiments.style import pruning_bench
    from experiments.style.cells import DEFAULT_STYLES

    sources = shared.sources(specs or DEFAULT_STYLES, options)
    pruning_bench.main([source.corpus() for source in sources], model, out)
