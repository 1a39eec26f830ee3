"""What a tokenizer is to this package: a fingerprint, texts as token ids, and the ids that end a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from decoding.cache import Key, kept
from decoding.errors import DecodingError

_UNFINISHED = "\ufffd"


def tokenizer_fingerprint(tokenizer: Any) -> tuple[str, str]:
    """A tokenizer's name, and the SHA-256 of its vocabulary (tokens with their ids)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return Path(str(tokenizer.name_or_path)).name or "unnamed", hashlib.sha256(vocabulary.encode()).hexdigest()


def require_text(text: str, what: str) -> None:
    """Refuses halves of characters, such as the shell's bytes that are no UTF-8.

    Raises:
        DecodingError: as said.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DecodingError(f"{what} is no text: character {error.start + 1} is half of one, or no UTF-8") from error


def text_fingerprint(documents: Sequence[str]) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def encoding_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a tokenizer reads a text: its pieces, rules and special tokens, not just ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = [sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "init_kwargs", ""))]
    else:
        state = json.loads(backend.to_str())
        state |= {"padding": None, "truncation": None}  # what the last call asked for
    about = [type(tokenizer).__name__, getattr(tokenizer, "eos_token_id", None), state]
    return hashlib.sha256(json.dumps(about, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class _TokensKey(Key):
    folder: ClassVar[str] = "tokens"
    suffix: ClassVar[str] = ".safetensors"
    text: str
    tokenizer: str


def tokenize(documents: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Texts as int64 token ids, one array for each, without special tokens. Kept in the cache folder."""

    def encoded() -> list[np.ndarray]:
        ids = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(each, np.int64) for each in ids]

    key = _TokensKey(text_fingerprint(documents), encoding_fingerprint(tokenizer))
    return kept(key, encoded, partial(_unpacked, count=len(documents)), _packed)


def _packed(ids: Sequence[np.ndarray]) -> bytes:
    lengths = np.array([len(each) for each in ids])
    return save({"tokens": np.concatenate(ids).astype(np.int32), "lengths": lengths})


def _unpacked(content: bytes, count: int) -> list[np.ndarray]:
    held = load(content)
    tokens, lengths = held["tokens"].astype(np.int64), held["lengths"]
    if len(lengths) != count or lengths.sum() != len(tokens):
        raise ValueError("not the tokens of these documents")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to a text. Characters stay whole: a token that only begins one adds nothing yet.

    Args:
        ids: of a text that goes on from another.
        decode: a tokenizer's.
    """
    texts: list[str] = []
    ids = [ids[0], *ids] if len(ids) else []  # decoders take the space off a text's first token
    begin, known = 0, 1  # tokens whose text the next one is compared with
    for stop in range(2, len(ids) + 1):
        before, after = decode(ids[begin:known]), decode(ids[begin:stop])
        is_whole = len(after) > len(before) and not after.endswith(_UNFINISHED)
        if is_whole or stop == len(ids):
            texts.append(after[len(before) :])
            begin, known = known, stop
        else:
            texts.append("")
    return texts


def pad_id(tokenizer: Any) -> int:
    """What rows of a batch are filled up with: the padding token, or the end of sequence where there is none."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in ids if each is not None)


def padded(texts: Sequence[str], tokenizer: Any, device: Any, *, on_the_left: bool = True) -> dict[str, Tensor]:
    """Texts as one batch, with the special tokens that the tokenizer adds. Leaves the tokenizer as it is.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [B, L] on the device, filled up with `pad_id`.
    """
    rows = [torch.tensor(ids, dtype=torch.long) for ids in tokenizer(list(texts))["input_ids"]]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id(tokenizer))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if on_the_left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def continuations(sequences: Tensor, width: int, tokenizer: Any) -> list[str]:
    """What follows the first ``width`` tokens, as text without special tokens.

    Args:
        sequences: prompts and what was written, int64 [B, L]; nothing but what was written if ``width`` is 0.
    """
    if not width:
        return tokenizer.batch_decode(sequences, skip_special_tokens=True)
    last = sequences[:, width - 1 : width]  # decoders take the space off a text's first token
    before = tokenizer.batch_decode(last, skip_special_tokens=True)
    after = tokenizer.batch_decode(sequences[:, width - 1 :], skip_special_tokens=True)
    return [text[len(first) :] for first, text in zip(before, after, strict=True)]


def ends_of_sequence(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the tokenizer's, and those at which ``model.generate`` stops."""
    held = model.generation_config.eos_token_id
    stops = held if isinstance(held, list) else [] if held is None else [held]
    return sorted({tokenizer.eos_token_id, *stops})
