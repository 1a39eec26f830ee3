"""Styles that a model is needed for, as folders for engines in which it is not at hand. Kept in the cache folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from decoding.cache import Key, kept_folder
from decoding.errors import DecodingError
from decoding.models import files_fingerprint, load_model, load_tokenizer
from decoding.style.files import read_folder
from decoding.style.prior import StylePrior
from decoding.style.source import load_corpus


def measured_elsewhere(style: str, parameters: Mapping[str, Any], model: str) -> str:
    """A folder with a style as it is for a model: mode "ratio" of a text, or λ="auto".

    Measured once, by a process of its own, which leaves nothing of the model in memory. What is kept is found by the
    text and the model's files, and nothing is loaded.

    Args:
        style: a registered name, or what else names a text.
        parameters: λ, mode and guards, as of `StylePrior`.
        model: a folder or a hub id.

    Raises:
        DecodingError: as of `StylePrior.bound`, no text, or the model cannot be loaded.
    """
    corpus = load_corpus(style)
    versions = tuple(map(version, _MEASURE))
    key = _MeasuredKey(versions, corpus.name, corpus.sha256, parameters, files_fingerprint(model))

    def measure(folder: Path) -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(_measure, style, dict(parameters), model, folder).result()

    return str(kept_folder(key.path, measure, _opens))


_MEASURE = ("decoding-middleware", "transformers")
"""Distributions whose other versions may measure something else."""


@dataclass(frozen=True)
class _MeasuredKey(Key):
    folder: ClassVar[str] = "measured"
    suffix: ClassVar[str] = ""
    versions: tuple[str, ...]
    name: str
    text: str
    parameters: Mapping[str, Any]
    model: str


def _measure(style: str, parameters: Mapping[str, Any], model: str, folder: Path) -> None:
    tokenizer = load_tokenizer(model)
    StylePrior(style, **parameters).bound(tokenizer, load_model(model)).save_pretrained(folder)


def _opens(folder: Path) -> bool:
    try:
        read_folder(folder, None, {})
    except DecodingError:
        return False
    return True
