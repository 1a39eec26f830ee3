"""Priors of corpora that outgrow memory: `ngram.distributed` on the texts of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from decoding.files import exists
from decoding.models import load_tokenizer
from decoding.style.source import StyleSource
from decoding.style.sources import Pieces
from decoding.style.training import DEFAULT_ORDER, DEFAULT_SMOOTHING, check_training, options_of
from decoding.tokens import control_ids, encoding_fingerprint, texts_within, tokenized
from ngram import NGramError
from ngram.distributed import Training

RESERVED = 768 << 20
"""Bytes that a process takes before it has seen a text: libraries, and a tokenizer."""
_SHARE = 0.75  # of the rest that is said to be for n-grams: what they take besides is about a third of that


def training_on_disk(
    specs: Sequence[str | StyleSource],
    tokenizer: str,
    work: str | PathLike,
    *,
    name: str | None = None,
    field: str | None = None,
    unwrap: bool | None = None,
    order: int = DEFAULT_ORDER,
    smoothing: str = DEFAULT_SMOOTHING,
    prune: Sequence[int] = (0,),
    tasks: int = 1,
    memory: int = 4 << 30,
) -> Training:
    """The training of a prior like that of `decoding.style.training.train_prior`, in steps on disk.

    Args:
        specs: where the texts are, as `Pieces.of` has them.
        tokenizer: the generating model's: a folder, or a hub id.
        work: a folder for what is written meanwhile; one that holds a part of this training is gone on with.
        name: of the style; that of the first source by default.
        field: of texts, in files that have fields.
        unwrap: as `StyleSource` has it.
        order: of the prior.
        smoothing: of the prior.
        prune: its cut-offs, as for `NGramModel.train`.
        tasks: into which each step is divided.
        memory: bytes that a process may take, with all that it is made of.

    Returns:
        Steps to run, in any processes that see the files; then a model to write. It can be pickled.

    Raises:
        DecodingError: unusable parameters, no text, a text that is too long to be held, or another training's folder.
    """
    check_training(order, smoothing, prune)
    pieces = Pieces.of(specs, tasks, field, unwrap=unwrap)
    if memory <= RESERVED:
        raise DecodingError(f"--memory must be more than {RESERVED >> 20} MiB, which libraries and a tokenizer take")
    for piece in pieces.pieces:
        piece.check_memory(memory)
    loaded = load_tokenizer(tokenizer)
    encoding = encoding_fingerprint(loaded)
    where = str(Path(tokenizer).absolute()) if exists(tokenizer) else tokenizer
    try:
        return Training(
            Path(work).absolute(),
            _Documents(pieces, where, encoding),
            order=order,
            smoothing=smoothing,  # type: ignore[arg-type]  # checked above
            prune=prune,
            tasks=tasks,
            memory=int((memory - RESERVED) * _SHARE),
            source=f"{pieces.fingerprint} {encoding}",
            **options_of(name or pieces.pieces[0].source.name, loaded),
        )
    except NGramError as error:
        raise DecodingError(str(error)) from error


@dataclass(frozen=True)
class _Documents:
    """Token ids of a task's texts.

    Attributes:
        pieces: where the texts are.
        tokenizer: its folder or hub id.
        encoding: the tokenizer's fingerprint where the training was begun.
    """

    pieces: Pieces
    tokenizer: str
    encoding: str

    def __call__(self, task: int) -> Iterator[np.ndarray]:
        tokenizer = _loaded(self.tokenizer)
        if encoding_fingerprint(tokenizer) != self.encoding:
            raise DecodingError(
                f"tokenizer {self.tokenizer} is another here than where the training was begun: install the same "
                "versions and files on all machines"
            )
        controls = control_ids(tokenizer)
        for ids in tokenized(self.pieces.texts(task), tokenizer):
            yield from texts_within(ids, controls)


@lru_cache(maxsize=1)
def _loaded(tokenizer: str) -> Any:
    return load_tokenizer(tokenizer)
