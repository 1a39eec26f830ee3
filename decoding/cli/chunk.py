"""``decoding chunk``: trains the adapters of chunk selection."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from chunkllm.lessons import ReadingOptions
from chunkllm.training import TrainingOptions
from decoding.cli import options as shared

_number = partial(click.option, show_default=True, type=click.IntRange(min=1))


@click.group()
def chunk() -> None:
    """Trains the adapters of chunk selection."""


@chunk.command()
@click.argument("data", nargs=-1, required=True)
@click.option("--held-out", "judge", multiple=True, required=True, help="A text to judge by, as DATA. May repeat.")
@shared.model
@shared.dtype
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
@click.option("--learning-rate", default=TrainingOptions.learning_rate, show_default=True, help="AdamW's, at its peak.")
@click.option("--weight-decay", default=TrainingOptions.weight_decay, show_default=True, help="AdamW's.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the adapters.")
@shared.resume
def train(
    data: tuple[str, ...], judge: tuple[str, ...], model: str, dtype: str, out: Path, resume: bool, **chosen: Any
) -> None:
    """Trains adapters for a model on DATA: registered names, text files, folders, .jsonl files.

    The model reads the texts once; its readings are kept in OUT/checkpoint, some 30 MB each for the default model.
    """
    from decoding.models import load_model, load_tokenizer
    from experiments import chunk_train

    options = _options(chosen)
    chunk_train.require_folder(out)
    texts = chunk_train.load_texts(data, judge)
    tokenizer, loaded = load_tokenizer(model), load_model(model, dtype)
    try:
        table = chunk_train.train(loaded, tokenizer, model, texts, options, out, resume, _command())
    except KeyboardInterrupt:
        click.echo(f"\ninterrupted; what was read and learnt is kept: go on with --resume --out {out}", err=True)
        sys.exit(130)
    click.echo(table)
    kept = out / chunk_train.CHECKPOINT
    click.echo(f"{out}: look at {out / 'training.png'}. {kept} is needed no more, but for --resume.")


def _options(chosen: dict[str, Any]) -> TrainingOptions:
    reading = {field.name: chosen.pop(field.name) for field in fields(ReadingOptions) if field.name in chosen}
    return TrainingOptions(**chosen, reading=ReadingOptions(**reading))


def _command() -> str:
    """As it was typed, but for where things lie: of an absolute path its last part stays."""
    parts = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    return shlex.join(["decoding", *parts])
