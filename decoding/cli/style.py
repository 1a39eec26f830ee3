"""``decoding style``: priors trained, inspected, evaluated and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from decoding.cli import options as shared
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.style.source import load_corpus


@click.group()
def style() -> None:
    """Trains, inspects and evaluates style priors."""


@style.command()
@click.argument("corpus")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .safetensors file, or a folder.")
@shared.lambda_or_auto
@shared.steering
@shared.model
@shared.dtype
@shared.field
@shared.order
@shared.smoothing
@click.pass_context
def train(ctx: click.Context, corpus: str, out: Path, lambda_: float | str | None, **options: Any) -> None:
    """Trains a prior on CORPUS (a registered name, text file, folder or .jsonl file) for a model's tokenizer.

    A .safetensors file holds the n-gram model alone. A folder also holds how it steers: λ, mode and guards.
    """
    from decoding.models import load_model, load_tokenizer
    from decoding.style.training import train_prior

    default = click.core.ParameterSource.DEFAULT
    asked = [name for name in ("lambda_", *shared.STEERING) if ctx.get_parameter_source(name) != default]
    if out.suffix == ".safetensors" and asked:
        raise DecodingError(f"--{asked[0].strip('_').replace('_', '-')} is kept in a folder: name one with --out")
    if out.suffix != ".safetensors" and not asked:
        raise DecodingError(f"--out must end in .safetensors, not {out.name!r}; a folder also keeps --mode or --lambda")
    require_writable(out)
    tokenizer = load_tokenizer(options["model"])
    if out.suffix == ".safetensors":
        prior = train_prior(load_corpus(corpus, options["field"]), tokenizer, options["order"], options["smoothing"])
        prior.save(out)
        click.echo(f"{out}: {len(prior):,} n-grams, {out.stat().st_size / len(prior):.1f} bytes each")
        return
    steered = shared.style_prior(corpus, lambda_, options)
    model = load_model(options["model"], options["dtype"]) if steered.needs_model else None
    steered.bind(tokenizer, model).save_pretrained(out)
    click.echo(f"{out}: mode {steered.mode}, λ={steered.lambda_:g}")


@style.command()
@click.argument("prior", type=click.Path(path_type=Path))
def info(prior: Path) -> None:
    """Prints what a saved PRIOR is, as JSON."""
    from decoding.style.files import load_prior

    model = load_prior(prior)
    counts = [int(model.seen.sum()), *model.tables.shape.ngrams[1:]]
    about = {
        "order": model.order,
        "smoothing": model.smoothing,
        "vocab_size": model.vocab_size,
        "ngrams": {str(k): count for k, count in enumerate(counts, start=1)},
        **model.metadata,
    }
    click.echo(json.dumps(about, indent=2, ensure_ascii=False))


@style.command(name="eval")
@click.argument("prior")
@click.argument("text")
@shared.model
@shared.field
@shared.order
@shared.smoothing
def evaluate(prior: str, text: str, model: str, field: str | None, order: int, smoothing: str) -> None:
    """Perplexity of TEXT under PRIOR (saved, or trained now from a style), as JSON."""
    from decoding.models import load_tokenizer
    from decoding.style.training import resolve_style
    from decoding.tokens import tokenize

    tokenizer = load_tokenizer(model)
    documents = [ids for ids in tokenize(load_corpus(text, field).documents, tokenizer) if len(ids)]
    judge = resolve_style(prior, tokenizer, field=field, order=order, smoothing=smoothing)
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
@click.option("--style", "styles", multiple=True, required=True, help=f"{shared.style_help} NAME=SPEC. May repeat.")
@click.option("--other", "others", multiple=True, required=True, help="More authors, for the judges. May repeat.")
@shared.prompts
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Texts for each prompt.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=4))
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--lora-steps", default=300, show_default=True, type=click.IntRange(min=1))
@shared.model
@shared.dtype
@shared.out
@shared.resume
def compare(styles: tuple[str, ...], others: tuple[str, ...], **options: Any) -> None:
    """Priors in all modes beside prompting and LoRA: style (by a judge of its own), fluency, diversity, copying.

    Corpora are split: 70 % steers, prompts and trains, 20 % trains the judges, 10 % tests them. The first --other is
    also the general background of one mode.
    """
    from decoding.models import load_model, load_tokenizer
    from decoding.style.source import require_distinct
    from experiments.lab.libraries import required
    from experiments.lab.runs import check_unused
    from experiments.style import compare as style_compare
    from experiments.style import compare_report as style_compare_report
    from experiments.style.lora import LoraRecipe
    from experiments.style.sweep import read_prompts

    for module in ("sklearn", "peft"):
        required(module, "compare")
    out = shared.out_folder(options["out"], "comparisons")
    if not options["resume"]:
        check_unused(out)
    corpora, more = ([load_corpus(spec) for spec in specs] for specs in (styles, others))
    require_distinct([corpus.name for corpus in (*corpora, *more)])
    chosen = style_compare.CompareOptions(
        prompts=read_prompts(options["prompts"] or style_compare.HELD_OUT_PROMPTS),
        other=more[0].name,
        samples=options["samples"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        lora=LoraRecipe(steps=options["lora_steps"]),
    )
    tokenizer = load_tokenizer(options["model"])
    model = load_model(options["model"], options["dtype"])
    run = style_compare.Comparison(model, tokenizer, options["model"], corpora, more, chosen, out, options["resume"])
    shared.until_interrupted(run.run, out)
    style_compare_report.write(run)
    click.echo(f"\nlook at {out / 'pareto.png'} and {out / 'samples.md'}; numbers: {out / 'results.md'}")
