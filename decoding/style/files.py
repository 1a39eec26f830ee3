"""Saved priors: an n-gram model alone, or a folder that also says how it steers. Read with checks."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from decoding.errors import DecodingError
from decoding.files import exists
from decoding.hub import find_file
from decoding.style.settings import Settings
from decoding.tokens import id_count, tokenizer_fingerprint
from ngram import NGramError, NGramModel
from ngram.storage import write_atomically

PRIOR_FILE = "prior.safetensors"
CONFIG_FILE = "style_prior.json"
RATIO_FILE = "ratio.safetensors"
_WHAT = "style prior"
MAPPED = 1 << 30
"""Bytes from which a file's n-grams stay in it, and are not checked."""


class SavedStyle(NamedTuple):
    """What a folder holds. A file of `NGramModel.save` has the model alone."""

    model: NGramModel
    lambda_: float | None = None
    settings: Settings | None = None
    log_ratio: Tensor | None = None  # the row r of mode "ratio", float32 [V]


def write_folder(style: SavedStyle, folder: str | PathLike) -> None:
    """Writes a folder."""
    assert style.settings is not None
    style.model.save(Path(folder) / PRIOR_FILE)
    if style.log_ratio is not None:
        write_atomically(Path(folder) / RATIO_FILE, save({"log_ratio": style.log_ratio}))
    config = {"lambda": style.lambda_, **style.settings.as_dict()}
    write_atomically(Path(folder) / CONFIG_FILE, json.dumps(config, indent=2).encode())


def read_folder(name_or_path: str | PathLike, tokenizer: Any | None, hub: dict[str, Any]) -> SavedStyle:
    """Opens a folder, or a repository on the hub.

    Args:
        name_or_path: which.
        tokenizer: checked against the prior's fingerprint, if given.
        hub: options of ``hf_hub_download``.

    Raises:
        DecodingError: nothing there, damaged, or of another tokenizer.
    """
    model = load_prior(find_file(name_or_path, PRIOR_FILE, _WHAT, hub), tokenizer)
    path = find_file(name_or_path, CONFIG_FILE, _WHAT, hub)
    try:
        config = json.loads(path.read_bytes())
        lambda_, settings = config["lambda"], Settings.read(config)
    except (OSError, ValueError, KeyError, TypeError, DecodingError) as error:
        raise DecodingError(f"{path} is damaged: {error!r}") from error
    has_ratio = settings.mode == "ratio"
    log_ratio = _log_ratio(find_file(name_or_path, RATIO_FILE, _WHAT, hub), model) if has_ratio else None
    return SavedStyle(model, lambda_, settings, log_ratio)


def _log_ratio(path: Path, model: NGramModel) -> Tensor:
    try:
        row = load_file(path)["log_ratio"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DecodingError(f"{path} is damaged: {error}") from error
    if row.dtype != torch.float32 or row.shape != (model.vocab_size,) or not torch.isfinite(row).all():
        raise DecodingError(f"{path} is damaged: it must hold one finite float32 number for each of the prior's ids")
    return row


def saved_kind(path: str | PathLike) -> Literal["prior", "style"] | None:
    """Whether a path names a saved prior (a .safetensors file, or a folder with one alone), a saved style, or none."""
    if exists(Path(path) / PRIOR_FILE):
        return "style" if any(exists(Path(path) / file) for file in (CONFIG_FILE, RATIO_FILE)) else "prior"
    return "prior" if Path(path).suffix == ".safetensors" else None


def load_prior(path: str | PathLike, tokenizer: Any | None = None) -> NGramModel:
    """Opens a saved prior, and checks it against a tokenizer if one is given.

    Raises:
        DecodingError: no such prior, a damaged one, or one of another tokenizer.
    """
    path = Path(path)
    file = path / PRIOR_FILE if path.is_dir() else path
    try:
        model = NGramModel.load(file, mmap=file.is_file() and file.stat().st_size >= MAPPED)
    except NGramError as error:
        raise DecodingError(str(error)) from error
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    return model


def check_tokenizer(model: NGramModel, tokenizer: Any) -> None:
    """Refuses a prior whose token ids mean something else. A model without a fingerprint is taken at its word.

    Ids that the tokenizer has above the prior's, such as a padding token added later, do not count.

    Raises:
        DecodingError: another tokenizer's prior, or one with more ids than the tokenizer.
    """
    name, sha256 = tokenizer_fingerprint(tokenizer, model.vocab_size)
    if model.metadata.get("tokenizer_sha256", sha256) != sha256:
        raise DecodingError(
            f"the prior was trained with tokenizer {model.metadata.get('tokenizer')!r}, and this one, {name!r}, has "
            "another vocabulary: give the style's text, or train it again with `decoding style train`"
        )
    if model.vocab_size > (size := id_count(tokenizer)):
        raise DecodingError(f"the prior has {model.vocab_size} token ids, tokenizer {name!r} has {size}")
