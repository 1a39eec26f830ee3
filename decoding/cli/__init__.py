"""The command line: ``decoding``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from decoding.cli import options as shared
from decoding.cli.chunk import chunk
from decoding.cli.style import style
from decoding.cli.temperature import temperature
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.style.registered import DEFAULT_STYLE
from decoding.style.strength import checked_lambda


@click.group(cls=shared.Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="decoding-middleware")
def cli() -> None:
    """Inference-time decoding middleware for large language models."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@cli.command()
@click.argument("prompt")
@shared.model
@shared.dtype
@click.option("--style", default=DEFAULT_STYLE, show_default=True, help=shared.style_help)
@shared.lambda_or_auto
@shared.any_lambda
@shared.steering
@shared.field
@shared.order
@shared.smoothing
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default="1",
    show_default=True,
    type=shared.TemperatureOrAuto(),
    help='"auto" has it chosen for the prompt; 0 takes the most probable token at every step.',
)
@click.option("--seed", default=0, show_default=True)
def generate(
    prompt: str, style: str, lambda_: float | str | None, seed: int, temperature: float | str, **options: Any
) -> None:
    """Continues PROMPT in a style."""
    import torch

    from decoding import AutoTemperature, FixedTemperature
    from decoding import generate as continue_text
    from decoding.models import load_model, load_tokenizer

    if not prompt.strip():
        raise DecodingError("the prompt is empty")
    prior = shared.style_prior(style, lambda_, options)
    tokenizer = load_tokenizer(options["model"])
    if not prior.needs_model:
        prior.bind(tokenizer)
    model = load_model(options["model"], options["dtype"])
    processors: list[Any] = [prior]
    if temperature != 0:
        processors.append(AutoTemperature() if temperature == "auto" else FixedTemperature(float(temperature)))
    torch.manual_seed(seed)
    text = continue_text(
        model,
        prompt,
        tokenizer=tokenizer,
        logits_processor=processors,
        max_new_tokens=options["max_new_tokens"],
        **({} if temperature else {"do_sample": False}),
    )
    click.echo(prompt + text)


@cli.command()
@click.option(
    "--lambda",
    "lambdas",
    type=shared.Numbers("λ"),
    default="0:1",
    show_default=True,
    help="0:1, 0:1:0.05 or 0,0.1,0.3.",
)
@click.option("--style", "styles", multiple=True, help=f"{shared.style_help} NAME=SPEC names it. May repeat.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True, help="May repeat.")
@shared.prompts
@click.option("--max-new-tokens", default=48, show_default=True, type=click.IntRange(min=1))
@shared.batch_size
@click.option("--combine", type=click.Choice(["matching", "interpolated"]), default="matching", show_default=True)
@shared.mode
@click.option("--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True)
@shared.any_lambda
@shared.model
@shared.dtype
@shared.field
@shared.order
@shared.smoothing
@shared.out
@shared.resume
def sweep(lambdas: tuple[float, ...], styles: tuple[str, ...], seeds: tuple[int, ...], **options: Any) -> None:
    """Generates over λ and measures style, fluency and divergence; writes a table, pictures and a page."""
    from experiments.style import sweep as style_sweep
    from experiments.style.engines import require_engine

    for value in lambdas:
        checked_lambda(value, options["allow_any_lambda"])
    require_engine(options["engine"])
    if options["engine"] == "vllm" and not all(0 <= value <= 1 for value in lambdas):
        raise DecodingError("requests to vLLM take λ in [0, 1]: leave --engine vllm or --allow-any-lambda out")
    prompts = style_sweep.read_prompts(options["prompts"] or style_sweep.DEFAULT_PROMPTS)
    chosen = style_sweep.SweepOptions(
        prompts=prompts,
        lambdas=lambdas,
        seeds=tuple(dict.fromkeys(seeds)),
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        combine=options["combine"],
        mode=options["mode"],
        allow_any_lambda=options["allow_any_lambda"],
    )
    run = _prepared_sweep(list(styles or style_sweep.DEFAULT_STYLES), chosen, options)
    _run_and_report(run, style_sweep.run)


def _prepared_sweep(styles: list[str], chosen: Any, options: dict[str, Any]) -> Any:
    from decoding.models import load_model, load_tokenizer
    from experiments.lab.runs import check_unused
    from experiments.style import sweep as style_sweep

    out = shared.out_folder(options["out"], "sweeps")
    if not options["resume"]:
        check_unused(out)
    tokenizer = load_tokenizer(options["model"])
    loaded = style_sweep.load_styles(styles, tokenizer, options["field"], options["order"], options["smoothing"])
    model = load_model(options["model"], options["dtype"])
    if chosen.mode == "ratio":
        loaded = [style_sweep.with_ratio(style, tokenizer, model) for style in loaded]
    return style_sweep.Sweep(
        model, tokenizer, options["model"], loaded, chosen, out, options["resume"], options["engine"]
    )


def _run_and_report(run: Any, work: Callable[[Any], Any]) -> None:
    from experiments.style import sweep as style_sweep

    folder = run.folder.path
    points = shared.until_interrupted(lambda: work(run), folder)
    _print_table(style_sweep.report(run, points))
    click.echo(f"\nlook at {folder / 'report.html'} and {folder / 'sweep.png'}; numbers: {folder / 'results.csv'}")


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


@cli.command(context_settings={"ignore_unknown_options": True})
@shared.model
@click.option("--style", "styles", multiple=True, help=f"NAME=SPEC. SPEC: {shared.style_help} May repeat.")
@shared.order
@shared.smoothing
@click.option("--temperature-selector", help='"default" (the embedded one), a folder or a hub id; none by default.')
@click.option("--temperature-policy", type=click.Choice(["ability", "curve"]), help="Of the selector.")
@click.option("--model-size", type=click.Choice(["small", "medium", "large"]), help="By its parameters by default.")
@click.option("--chunk-adapters", help='Select chunks: "default" (SmolLM2-135M\'s), a folder or a hub id.')
@click.option("--kv-budget", type=click.IntRange(min=1), help="Select chunks: tokens to read, 2048 with adapters.")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
def serve(model: str, styles: tuple[str, ...], vllm_options: tuple[str, ...], **options: Any) -> None:
    """Serves a model over HTTP: vLLM's OpenAI-compatible server, which takes all of its own options.

    A request names its style in vllm_xargs, {"style": "NAME", "lambda": 0.1}, has its temperature chosen with
    {"temperature": "auto"}, and reads another number of tokens with {"kv_budget": 4096}, or all with "full".
    """
    from decoding.models import load_tokenizer, resolve_model
    from decoding.style.source import require_distinct
    from decoding.style.training import name_and_file
    from decoding.vllm import engine_args
    from decoding.vllm.server import serve as run_server

    path = resolve_model(model)
    tokenizer = load_tokenizer(model)
    trained = {"order": options["order"], "smoothing": options["smoothing"]}
    named = [name_and_file(spec, tokenizer, **trained) for spec in styles]
    require_distinct([name for name, _ in named])
    selector = options["temperature_selector"]
    engine = engine_args(
        dict(named),
        temperature=True if selector == "default" else selector,
        model_size=options["model_size"],
        policy=options["temperature_policy"],
        chunk_adapters=options["chunk_adapters"],
        kv_budget=options["kv_budget"],
    )
    run_server(path, model, engine, vllm_options)


@cli.group()
def bench() -> None:
    """Measures speed, as ratios against a baseline in the same process."""


@bench.command(name="style")
@click.option("--style", "spec", default=DEFAULT_STYLE, show_default=True, help=shared.style_help)
@shared.model
@shared.field
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--lmplz", type=click.Path(exists=True, path_type=Path), help="KenLM's trainer, to compare with.")
def bench_style(spec: str, model: str, field: str | None, out: Path | None, lmplz: Path | None) -> None:
    """Measures the style prior. Let the machine be idle."""
    from experiments.style import bench as style_bench

    if out is not None:
        require_writable(out)
    style_bench.main(spec, model, field, out, lmplz)


@bench.command(name="vllm")
@shared.model
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here.")
def bench_vllm(model: str, max_new_tokens: int, rounds: int, out: Path | None) -> None:
    """Measures what styles cost in vLLM. Let the machine be idle."""
    from experiments.style import vllm_bench

    if out is not None:
        require_writable(out)
    vllm_bench.main(model, max_new_tokens, rounds, out)


@bench.command(name="temperature")
@shared.model
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here.")
def bench_temperature(model: str, rounds: int, out: Path | None) -> None:
    """Measures what choosing a temperature costs. Let the machine be idle."""
    from experiments.temperature import bench as temperature_bench

    if out is not None:
        require_writable(out)
    temperature_bench.main(model, rounds, out)


@bench.command(name="long-context")
@click.option(
    "--contexts", type=shared.Numbers("contexts"), default="8192,32768,120000", show_default=True, help="Cached tokens."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw speed over context here, a .png file.")
def bench_long_context(
    contexts: tuple[float, ...], dtype: str, rounds: int, out: Path | None, picture: Path | None
) -> None:
    """Measures chunk selection behind long contexts, by random weights. Let the machine be idle."""
    from experiments.long_context import bench as chunk_bench

    lengths = tuple(map(int, contexts))
    if min(lengths) <= chunk_bench.BUDGET:
        raise DecodingError(f"contexts must be longer than the {chunk_bench.BUDGET} tokens that selection keeps")
    for path in (out, picture):
        if path is not None:
            require_writable(path)
    chunk_bench.main(lengths, dtype, rounds, out, picture)


@bench.command(name="vllm-long-context")
@shared.model
@click.option("--chunk-adapters", default="default", show_default=True, help="A folder or a hub id.")
@click.option(
    "--contexts", type=shared.Numbers("contexts"), default="4096,8192,16384,32768", show_default=True, help="In tokens."
)
@click.option("--batches", type=shared.Numbers("batches"), default="1,4", show_default=True, help="Requests at a time.")
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--picture", type=click.Path(path_type=Path), help="Also draw speed over context here, a .png file.")
def bench_vllm_long_context(
    model: str,
    chunk_adapters: str,
    contexts: tuple[float, ...],
    batches: tuple[float, ...],
    rounds: int,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Measures chunk selection behind long contexts in vLLM. Let the machine be idle."""
    from experiments.long_context import vllm_bench as vllm_chunk_bench

    lengths, counts = tuple(map(int, contexts)), tuple(map(int, batches))
    if min(lengths) <= vllm_chunk_bench.BUDGET or min(counts) < 1:
        raise DecodingError(
            f"contexts must be longer than the {vllm_chunk_bench.BUDGET} tokens read, batches at least 1"
        )
    for path in (out, picture):
        if path is not None:
            require_writable(path)
    vllm_chunk_bench.main(model, chunk_adapters, lengths, counts, rounds, out, picture)


@cli.group()
def reproduce() -> None:
    """Reproduces the papers' experiments."""


@reproduce.command(name="style")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with the three corpora.")
@shared.prompts
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@shared.batch_size
@shared.model
@shared.dtype
@shared.order
@shared.smoothing
@shared.out
@shared.resume
def reproduce_style(data: Path, **options: Any) -> None:
    """Three corpora × eight λ × three seeds, beside unsteered texts of the same entropy (arXiv 2601.16224)."""
    from experiments.style import paper as style_paper
    from experiments.style import sweep as style_sweep

    chosen = style_sweep.SweepOptions(
        prompts=style_sweep.read_prompts(options["prompts"] or style_sweep.DEFAULT_PROMPTS),
        lambdas=style_paper.LAMBDAS,
        seeds=style_paper.SEEDS,
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
    )
    run = _prepared_sweep(style_paper.style_specs(data), chosen, options | {"field": None, "engine": "transformers"})
    _run_and_report(run, style_paper.run)


cli.add_command(chunk)
cli.add_command(style)
cli.add_command(temperature)


def main() -> None:
    """Entry point."""
    cli(prog_name="decoding")
