"""``decoding chunk``, ``bench long-context`` and ``bench vllm-long-context``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkllm.training import ReadingOptions, TrainingOptions
from decoding.cli import options as shared
from decoding.cli.groups import Group
from decoding.errors import DecodingError
from experiments.lab import spreading

if TYPE_CHECKING:
    from experiments.long_context.asked import EvalOptions

# Which options of `chunk eval` belong to which suites.
_OF_SUITES = {
    ("perplexity",): ("pieces", "context", "scored"),
    ("passkey",): ("passkey_lengths", "passkey_depths", "passkey_keys"),
    ("ruler",): ("questions",),
    ("longbench",): ("longbench",),
    ("ruler", "longbench", "completion"): ("lengths", "examples", "tasks", "lossless"),
}
_number = partial(click.option, show_default=True, type=click.IntRange(min=1))


@click.group(cls=Group)
def chunk() -> None:
    """Trains adapters of chunk selection, calibrates models without, and evaluates it."""


@chunk.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--held-out", "judge", multiple=True, required=True, help="A text to judge by, as DATA. May repeat.")
@shared.field
@shared.unwrap
@shared.model
@shared.dtype
@shared.device
@_number("--tokens", default=TrainingOptions.tokens, help="To read of DATA, in pieces of --context.")
@_number("--held-out-pieces", "held_out", default=TrainingOptions.held_out, help="To read of held-out texts.")
@_number("--context", default=ReadingOptions.context, help="Tokens of a piece: adapters work at lengths they saw.")
@_number("--boundaries", default=ReadingOptions.boundaries, help="Of a piece, at which attention is learnt.")
@_number("--queries", default=ReadingOptions.queries, help="Of the last tokens, that score chunks.")
@_number("--max-chunk", default=ReadingOptions.max_chunk, help="A chunk's most tokens.")
@click.option("--language", default=ReadingOptions.language, show_default=True, help="Of the texts, for pysbd.")
@click.option("--seed", default=ReadingOptions.seed, show_default=True, help="Of the choice of pieces.")
@_number("--width", default=TrainingOptions.width, type=click.IntRange(min=0), help="Features a head; 0: gains alone.")
@_number("--detector-width", default=TrainingOptions.detector_width, help="Of the boundary detector.")
@_number("--epochs", default=TrainingOptions.epochs, help="How often each piece is learnt from.")
@_number("--calibration", default=TrainingOptions.calibration, help="Pieces to measure layers' sensitivities on.")
@click.option(
    "--ablate-width",
    "widths",
    multiple=True,
    type=click.IntRange(min=0),
    help="Also learn with this width from the same readings, for the table alone. May repeat.",
)
@click.option("--learning-rate", default=TrainingOptions.learning_rate, show_default=True, help="AdamW's, at its peak.")
@click.option("--weight-decay", default=TrainingOptions.weight_decay, show_default=True, help="AdamW's.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapters.")
@shared.resume
def train(
    data: tuple[str, ...],
    judge: tuple[str, ...],
    field: str | None,
    unwrap: bool | None,
    model: str,
    dtype: str,
    device: str,
    widths: tuple[int, ...],
    out: Path,
    resume: bool,
    **chosen: Any,
) -> None:
    """Trains adapters for a model on DATA: registered names, text files, folders, files with fields.

    The model reads the texts once; its readings are kept in OUT/checkpoint, some 30 MB each for the default model.
    """
    from decoding.models import load_model, load_tokenizer
    from experiments.long_context.train import CHECKPOINT, load_texts, require_folder
    from experiments.long_context.train import train as run

    options = _options(chosen)
    require_folder(out, resume)
    told = {"field": field, "unwrap": unwrap}
    texts = load_texts(shared.sources(data, told), shared.sources(judge, told))
    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
    work = partial(run, loaded, tokenizer, model, texts, options, out, resume, _command(), widths)
    click.echo(shared.until_interrupted(work, out, "what was read and learnt is kept"))
    kept = out / CHECKPOINT
    click.echo(f"{out}: look at {out / 'training.png'}. {kept} is needed no more, but for --resume.")


def _options(chosen: dict[str, Any]) -> TrainingOptions:
    reading = {field.name: chosen.pop(field.name) for field in fields(ReadingOptions) if field.name in chosen}
    return TrainingOptions(**chosen, reading=ReadingOptions(**reading))


def _command() -> str:
    """As it was typed, but for where things lie (of absolute paths the last part stays) and --resume."""
    typed = [part for part in sys.argv[1:] if part != "--resume"]
    parts = [Path(part).name if Path(part).is_absolute() else part for part in typed]
    return shlex.join(["decoding", *parts])


@chunk.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, required=True, help="Of the kind to be read. May repeat.")
@shared.field
@shared.unwrap
@shared.device
@_number("--pieces", default=TrainingOptions.calibration, help="Of text to measure on, as many of each --text.")
@_number("--context", default=ReadingOptions.context, help="Tokens of a piece.")
@_number("--max-chunk", default=ReadingOptions.max_chunk, help="A chunk's most tokens.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the calibration.")
@shared.resume
def calibrate(
    model: str,
    texts: tuple[str, ...],
    field: str | None,
    unwrap: bool | None,
    device: str,
    pieces: int,
    context: int,
    max_chunk: int,
    out: Path,
    resume: bool,
) -> None:
    """Measures how much of a budget each layer of MODEL needs: for models without adapters. Nothing is trained.

    MODEL is a folder, a GGUF file or a hub id. It computes in float32.
    """
    from decoding.models import load_model, load_tokenizer
    from decoding.style.source import load_corpus
    from experiments.lab.runs import HEADER
    from experiments.long_context.calibrate import calibrate as run
    from experiments.long_context.train import require_folder

    options = ReadingOptions(context=context, max_chunk=max_chunk)
    require_folder(out, resume, HEADER, "calibration")
    corpora = [load_corpus(source) for source in shared.sources(texts, {"field": field, "unwrap": unwrap})]
    tokenizer, loaded = load_tokenizer(model), load_model(model, "float32", device)
    work = partial(run, loaded, tokenizer, model, corpora, options, pieces, out, resume, _command())
    click.echo(shared.until_interrupted(work, out, "what was measured is kept"))
    click.echo(f'ChunkSelection("{out}") divides budgets so')


@chunk.command(name="eval")
@click.argument("texts", nargs=-1)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice(["perplexity", "passkey", "ruler", "longbench", "completion"]),
    default=("perplexity", "passkey"),
    show_default=True,
    help="What to measure. May repeat.",
)
@click.option("--adapters", help="A folder or a hub id, also of a calibration; the embedded ones by default.")
@click.option("--no-adapters", is_flag=True, help="Leave out what needs some: for models without.")
@click.option("--method", "methods", multiple=True, help="Of the table's methods. May repeat; all by default.")
@click.option(
    "--retention",
    "retentions",
    type=shared.Numbers("retention"),
    default="0.25,0.5,0.75",
    show_default=True,
    help="Shares of keys and values to keep.",
)
@click.option("--budget", "budgets", type=shared.Numbers("budget"), help="Numbers of tokens to keep. [default: none]")
@_number("--pieces", default=8, help="Perplexity: of text, as many of each of TEXTS.")
@_number("--context", default=8192, help="Perplexity: tokens of a piece.")
@_number("--scored", default=512, help="Perplexity: of them predicted, the last.")
@click.option(
    "--passkey-lengths", type=shared.Numbers("lengths"), default="1000,2000,4000", show_default=True, help="In tokens."
)
@_number("--passkey-depths", default=6, help="Places for the key, from first to last.")
@_number("--passkey-keys", default=2, help="Prompts for each length and place.")
@click.option(
    "--lengths",
    type=shared.Numbers("lengths"),
    default="4096,8192",
    show_default=True,
    help="Suites of tasks: of prompts with their answers, in tokens.",
)
@_number("--examples", default=10, help="Suites of tasks: of each task and length.")
@click.option("--task", "tasks", multiple=True, help="Of the suites' tasks. May repeat; all by default.")
@click.option("--questions", metavar="NAME=FILE", multiple=True, help="RULER: JSON lines for the task qa_NAME.")
@click.option("--longbench", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Its folder.")
@click.option("--lossless", is_flag=True, help="Suites of tasks: also what the lossless mode's drafts get right.")
@shared.model
@shared.dtype
@shared.device
@shared.field
@shared.unwrap
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@shared.resume
@spreading.of_cells
def evaluate(texts: tuple[str, ...], adapters: str | None, no_adapters: bool, out: Path, **chosen: Any) -> None:
    """Perplexity, passkeys and suites of tasks on held-out TEXTS, for chunk selection and other ways to select.

    RULER hides its needles in TEXTS; completion goes on with them, which should be code; LongBench needs none.
    """
    from chunkllm.calibration import open_saved
    from decoding.models import load_model, load_tokenizer
    from decoding.style.source import load_corpus
    from experiments.lab.runs import check_unused, settings_of
    from experiments.long_context import report
    from experiments.long_context.asked import chosen_methods
    from experiments.long_context.evaluate import fingerprint, prepare
    from experiments.long_context.suites.answering import add_others
    from experiments.long_context.suites.opening import digests, open_tasks

    if not chosen["resume"]:
        check_unused(out)
    _refuse_without_suite(chosen["suites"])
    opened = None if no_adapters else open_saved(adapters)
    options = _eval_options(chosen, chosen_methods(chosen["methods"], opened))
    if not texts and set(options.suites) - {"longbench", "passkey"}:
        raise DecodingError("give TEXTS: to predict, to hide things in, or to complete")
    questions = {name: Path(path) for name, path in map(_named, chosen["questions"])}
    corpora = [load_corpus(source) for source in shared.sources(texts, chosen)]
    as_they_stand = shared.sources(texts, chosen | {"unwrap": False}) if "completion" in options.suites else ()
    code = list(map(load_corpus, as_they_stand))
    tasks = open_tasks(options.suites, corpora, code, questions, chosen["longbench"], chosen["tasks"])
    tokenizer = load_tokenizer(chosen["model"])
    model = load_model(chosen["model"], chosen["dtype"], chosen["device"])
    about = settings_of(chosen["model"], model, tokenizer)
    about |= {"adapters": fingerprint(opened), "data": digests(questions, chosen["longbench"])}
    evaluation = prepare(
        corpora, chosen["pieces"], tasks, model, tokenizer, about, opened, options, out, chosen["resume"]
    )
    cells = shared.until_interrupted(evaluation.run, out)
    others = add_others(out, cells, tasks)
    click.echo(report.write(cells, options, evaluation.folder.settings, out, others))
    click.echo(f"look at the pictures in {out}")


def _eval_options(chosen: dict[str, Any], methods: tuple[str, ...]) -> EvalOptions:
    from experiments.long_context.asked import EvalOptions, checked_retentions

    whole: dict[str, Any] = {
        name: tuple(map(int, chosen[name] or ())) for name in ("budgets", "passkey_lengths", "lengths")
    }
    numbers = ("context", "scored", "passkey_depths", "passkey_keys", "examples", "lossless")
    return EvalOptions(
        suites=tuple(dict.fromkeys(chosen["suites"])),
        methods=methods,
        retentions=checked_retentions(chosen["retentions"]),
        **whole,
        **{name: chosen[name] for name in numbers},
    )


def _refuse_without_suite(suites: Sequence[str]) -> None:
    """Refuses options of suites that are not measured.

    Raises:
        DecodingError: names one.
    """
    ctx = click.get_current_context(silent=True)  # none in a process that measures a part of the cells
    if ctx is None:
        return
    for wanted, names in _OF_SUITES.items():
        for name in () if set(wanted) & set(suites) else names:
            if ctx.get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
                option = next(param.opts[0] for param in ctx.command.params if param.name == name)
                raise DecodingError(f"{option} goes with --suite {' or '.join(wanted)}")


def _named(told: str) -> tuple[str, str]:
    name, equals, path = told.partition("=")
    if not (name and equals and path):
        raise DecodingError(f"--questions must read like squad=questions.jsonl, not {told!r}")
    return name, path


@chunk.command(name="picture")
@click.argument("text")
@click.option("--adapters", help="A folder or a hub id, also of a calibration; the embedded ones by default.")
@click.option("--no-adapters", is_flag=True, help="Select without: for models that have none.")
@_number("--context", default=6000, help="Tokens of TEXT.")
@_number("--budget", default=1024, help="Tokens to read of it.")
@_number("--tokens", default=64, type=click.IntRange(min=2), help="To write; the end of the text is ruled out.")
@click.option(
    "--fact",
    default="The name of the ship was Aurora Borealis, and her captain was Mary Whitfield of Nantucket.",
    show_default=True,
    help="A sentence that is put into the text.",
)
@click.option("--depth", default=0.25, show_default=True, help="Where, as a share of the text.")
@click.option(
    "--question",
    default="Question: What was the name of the ship, and who was her captain?\nAnswer:",
    show_default=True,
    help="What stands behind the text.",
)
@shared.model
@shared.dtype
@shared.field
@shared.unwrap
@click.option("--out", required=True, type=shared.Writable(), help="A .png file.")
def draw_reading(text: str, adapters: str | None, no_adapters: bool, out: Path, **chosen: Any) -> None:
    """Hides a fact in TEXT, asks for it behind the text, and draws which places are read for the answer."""
    import numpy as np

    from chunkllm.calibration import open_saved
    from decoding.models import load_model, load_tokenizer
    from decoding.tokens import tokenize
    from experiments.long_context.heat_map import PictureOptions, picture

    opened = None if no_adapters else open_saved(adapters)
    (source,) = shared.sources([text], chosen)
    tokenizer = load_tokenizer(chosen["model"])
    ids = np.concatenate(tokenize(source.corpus().documents, tokenizer))
    options = PictureOptions(**{field.name: chosen[field.name] for field in fields(PictureOptions)})
    answer = picture(load_model(chosen["model"], chosen["dtype"]), tokenizer, opened, ids, options, out)
    click.echo(f"{answer}\n\nlook at {out}")


@click.command(name="long-context")
@click.option(
    "--contexts", type=shared.Numbers("contexts"), default="8192,32768,120000", show_default=True, help="Cached tokens."
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@shared.figures
@shared.picture
def bench_long_context(
    contexts: tuple[float, ...], dtype: str, rounds: int, out: Path | None, picture: Path | None
) -> None:
    """Measures chunk selection behind long contexts, by random weights. Let the machine be idle."""
    from experiments.long_context import bench

    lengths = tuple(map(int, contexts))
    if min(lengths) <= bench.BUDGET:
        raise DecodingError(f"contexts must be longer than the {bench.BUDGET} tokens that selection keeps")
    bench.main(lengths, dtype, rounds, out, picture)


@click.command(name="lossless")
@click.argument("texts", nargs=-1)
@click.option("--adapters", help="A folder or a hub id; the embedded ones by default.")
@click.option("--no-adapters", is_flag=True, help="Select without: for models that have none.")
@click.option("--contexts", type=shared.Numbers("contexts"), default="8192", show_default=True, help="In tokens.")
@click.option("--batches", type=shared.Numbers("batches"), default="1", show_default=True, help="Without TEXTS: rows.")
@click.option(
    "--acceptance",
    type=click.FloatRange(0, 1),
    help="Without TEXTS, where it must be given: how often a drafted token is right.",
)
@_number("--tokens", default=128, type=click.IntRange(min=8), help="To write.")
@_number("--budget", default=1024, help="Tokens that a selection keeps.")
@_number("--rounds", default=3, help="Times that each way writes.")
@shared.model
@shared.dtype
@shared.field
@shared.unwrap
@shared.figures
def bench_lossless(
    texts: tuple[str, ...],
    adapters: str | None,
    no_adapters: bool,
    contexts: tuple[float, ...],
    acceptance: float | None,
    out: Path | None,
    **chosen: Any,
) -> None:
    """Measures the lossless mode behind TEXTS, or without any, by random weights. Let the machine be idle."""
    from chunkllm.calibration import open_saved
    from experiments.long_context import lossless

    if bool(texts) == (acceptance is not None):
        raise DecodingError("with texts acceptance is measured: give TEXTS, or --acceptance, and not both")
    setting = lossless.Setting(chosen["tokens"], chosen["budget"], chosen["rounds"])
    lengths = tuple(map(int, contexts))
    if min(lengths) <= setting.budget:
        raise DecodingError(f"contexts must be longer than the {setting.budget} tokens that a selection keeps")
    if acceptance is not None:
        lossless.measure_random(lengths, tuple(map(int, chosen["batches"])), acceptance, setting, chosen["dtype"], out)
        return
    opened = None if no_adapters else open_saved(adapters)
    sources = shared.sources(texts, chosen)
    lossless.measure_texts(sources, lengths, chosen["model"], chosen["dtype"], opened, setting, out)


@click.command(name="vllm-long-context")
@shared.model
@click.option("--chunk-adapters", default="default", show_default=True, help="A folder or a hub id.")
@click.option(
    "--contexts", type=shared.Numbers("contexts"), default="4096,8192,16384,32768", show_default=True, help="In tokens."
)
@click.option("--batches", type=shared.Numbers("batches"), default="1,4", show_default=True, help="Requests at a time.")
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(min=1))
@shared.figures
@shared.picture
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
    from experiments.long_context import vllm_bench

    lengths, counts = tuple(map(int, contexts)), tuple(map(int, batches))
    if min(lengths) <= vllm_bench.BUDGET or min(counts) < 1:
        raise DecodingError(f"contexts must be longer than the {vllm_bench.BUDGET} tokens read, batches at least 1")
    vllm_bench.main(model, chunk_adapters, lengths, counts, rounds, out, picture)
