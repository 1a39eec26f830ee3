"""GGUF files: unpacked once, into a folder of safetensors that everything else opens as it opens any model."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from decoding.cache import cache_dir, kept_folder
from decoding.errors import DecodingError

SUFFIX = ".gguf"
# What transformers and the package gguf raise for files that they cannot read.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error)


def unpacked(file: Path) -> Path:
    """A GGUF file as a folder with the model in bfloat16, two bytes a parameter, and its tokenizer. Made once.

    A file that was written anew or moved is another one.

    Raises:
        DecodingError: no such file, what reads it is not installed, or transformers cannot read it.
    """
    if not file.is_file():
        raise DecodingError(f"no model file {file}")
    about = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()
    return unpacked_into(cache_dir() / "models" / digest[:16] / file.stem, lambda: file, file.name)


def unpacked_into(folder: Path, file: Callable[[], Path], name: str, eos_token: str | None = None) -> Path:
    """As `unpacked`, into a folder that is known beforehand.

    Args:
        folder: where it is kept.
        file: finds the GGUF file, where there is no such folder yet.
        name: what the user is told that is being unpacked.
        eos_token: what ends a text, instead of what the file says.
    """
    return kept_folder(folder, lambda path: _unpack(file(), name, eos_token, path), is_whole)


def is_whole(folder: Path) -> bool:
    """Whether a folder has all of a model that is opened by it."""
    weights = list(folder.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, "pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return bool(weights) and (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def _unpack(file: Path, name: str, eos_token: str | None, folder: Path) -> None:
    with Console(stderr=True).status(f"unpacking {name}, once …"):
        model, tokenizer = _read(file, name)
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(file: Path, name: str) -> tuple[Any, Any]:
    """The model in bfloat16, and its tokenizer.

    Raises:
        DecodingError: as `unpacked`.
    """
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, output_loading_info=True, **_dequantized()
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise DecodingError(f"{name} needs more packages: pip install accelerate gguf ({error})") from error
    except _UNREADABLE as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DecodingError(f"transformers cannot read {name} ({why}): take the model's folder or hub id") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise DecodingError(
            f"{name} is not a whole model: {len(missing)} of its weights are missing, {missing[0]} first of all; "
            "join the parts of a split file with llama-gguf-split --merge"
        )
    return model, tokenizer


def _dequantized() -> dict[str, Any]:
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # before transformers 5.20 or so, a GGUF file is always dequantized
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
