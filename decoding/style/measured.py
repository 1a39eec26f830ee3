"""Styles that a model is needed for, as folders for engines in which it is not at hand. Kept in the cache folder."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from decoding.cache import Key, kept_file
from decoding.errors import DecodingError
from decoding.models import load_model, load_tokenizer
from decoding.style.files import read_folder
from decoding.style.prior import StylePrior


def measured_elsewhere(style: str, parameters: Mapping[str, Any], model: str) -> str:
    """`measured_folder`, in a process of its own, which leaves nothing of the model in memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured_folder, style, dict(parameters), model).result()


def measured_folder(style: str, parameters: Mapping[str, Any], model: str) -> str:
    """A folder with a style as it is for a model: mode "ratio" of a text, or λ="auto".

    Args:
        style: as for `StylePrior`.
        parameters: more of `StylePrior`'s.
        model: a folder or a hub id.

    Raises:
        DecodingError: as of `StylePrior.bound`, or the model cannot be loaded.
    """
    tokenizer = load_tokenizer(model)
    bound = StylePrior(style, **parameters).bound(tokenizer, load_model(model))
    about = bound.model.metadata
    row = b"" if bound.log_ratio is None else bound.log_ratio.numpy().tobytes()
    key = _MeasuredKey(
        about["corpus_sha256"],
        about["tokenizer_sha256"],
        bound.model.order,
        bound.lambda_,
        bound.settings.as_dict(),
        hashlib.sha256(row).hexdigest(),
    )
    return str(kept_file(key.path, bound.save_pretrained, _opens))


@dataclass(frozen=True)
class _MeasuredKey(Key):
    folder: ClassVar[str] = "measured"
    suffix: ClassVar[str] = ""
    text: str
    tokenizer: str
    order: int
    lambda_: float
    settings: Mapping[str, Any]
    log_ratio: str


def _opens(folder: Path) -> bool:
    try:
        read_folder(folder, None, {})
    except DecodingError:
        return False
    return True
