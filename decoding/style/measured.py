"""Styles that a model is needed for, as folders for engines in which it is not at hand. Kept in the cache folder."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import try_to_load_from_cache

from decoding.cache import Key, kept, kept_file
from decoding.errors import DecodingError
from decoding.models import load_model, load_tokenizer, resolve_model
from decoding.style.files import read_folder
from decoding.style.prior import StylePrior
from decoding.style.source import StyleSource


def measured_elsewhere(style: str, parameters: Mapping[str, Any], model: str) -> str:
    """`measured_folder`, in a process of its own, which leaves nothing of the model in memory.

    What was measured before is found without the model, by the files that it and the style are in.
    """

    def measure() -> str:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(measured_folder, style, dict(parameters), model).result()

    files, texts = _model_files(model), _style_files(style)
    if files is None or texts is None:
        return measure()
    said = {name: str(value) for name, value in parameters.items()}
    return kept(_FoundKey(version("decoding-middleware"), texts, said, files), measure, _found, str.encode)


@dataclass(frozen=True)
class _FoundKey(Key):
    """Where what was measured lies: told by what is quick to look at."""

    folder: ClassVar[str] = "measured"
    suffix: ClassVar[str] = ".path"
    version: str
    style: list[Any]
    parameters: Mapping[str, str]
    model: list[Any]


def _model_files(model: str) -> list[Any] | None:
    """A model's folder and what is in it, as `_stamps`; None if it is not on this machine yet."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        config = try_to_load_from_cache(model, "config.json")
        if not isinstance(config, str):
            return None
        folder = Path(config).parent  # its name is the commit
    return _stamps(folder)


def _style_files(style: str) -> list[Any] | None:
    """A text's fingerprint, or the files of what is saved; None for what is on the hub, and may change there."""
    source = StyleSource.parse(style)
    if source.kind == "hub":
        return None
    return [source.name, source.corpus().sha256] if source.is_text else [source.name, *_stamps(Path(source.where))]


def _stamps(path: Path) -> list[Any]:
    """A path, and the name, size and time of each of its files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in files if file.is_file()]
    return [str(path.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _found(content: bytes) -> str:
    folder = content.decode()
    if not _opens(Path(folder)):
        raise ValueError(f"{folder} is gone or damaged")
    return folder


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
