"""What a tokenizer is to this package: a fingerprint, texts as token ids, and the ids that end a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from decoding.cache import cache_file
from ngram.storage import write_atomically


def tokenizer_fingerprint(tokenizer: Any) -> tuple[str, str]:
    """A tokenizer's name, and the SHA-256 of its vocabulary (tokens with their ids)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return Path(str(tokenizer.name_or_path)).name or "unnamed", hashlib.sha256(vocabulary.encode()).hexdigest()


def text_fingerprint(documents: Sequence[str]) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def tokenize(documents: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Texts as int64 token ids, one array for each, without special tokens. Kept in the cache folder."""
    path = cache_file("tokens", f"{text_fingerprint(documents)} {tokenizer_fingerprint(tokenizer)[1]}", ".safetensors")
    if path.is_file():
        try:
            held = load_file(path)
            return np.split(held["tokens"].astype(np.int64), np.cumsum(held["lengths"])[:-1])
        except (SafetensorError, KeyError):
            path.unlink()
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    ids = [np.array(each, np.int64) for each in encoded]
    tensors = {
        "tokens": np.concatenate(ids).astype(np.int32),
        "lengths": np.array([len(each) for each in ids]),
    }
    write_atomically(path, save(tensors))
    return ids


def ends_of_sequence(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the tokenizer's, and those at which ``model.generate`` stops."""
    held = model.generation_config.eos_token_id
    stops = held if isinstance(held, list) else [] if held is None else [held]
    return sorted({tokenizer.eos_token_id, *stops})
