"""What a tokenizer is to this package: fingerprints, texts as token ids and back, and the ids that end a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.numpy import load, save
from torch import Tensor

from decoding.cache import Key, kept
from decoding.errors import DecodingError

_UNFINISHED = "\ufffd"


def tokenizer_fingerprint(tokenizer: Any, size: int | None = None) -> tuple[str, str]:
    """A tokenizer's name, and the SHA-256 of its vocabulary (tokens with their ids), or of its ids below ``size``."""
    known = _facts(tokenizer)
    size = known.id_count if size is None else min(size, known.id_count)
    if size not in known.vocabularies:
        vocabulary = sorted(pair for pair in tokenizer.get_vocab().items() if pair[1] < size)
        text = json.dumps(vocabulary, ensure_ascii=False)
        known.vocabularies[size] = hashlib.sha256(text.encode()).hexdigest()
    return Path(str(getattr(tokenizer, "name_or_path", ""))).name or "unnamed", known.vocabularies[size]


def id_count(tokenizer: Any) -> int:
    """The highest token id, and 1: more than the tokens, where ids have holes."""
    return _facts(tokenizer).id_count


def encoding_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a tokenizer reads a text: its pieces, rules and special tokens, not just ids."""
    return _facts(tokenizer).encoding


@dataclass(frozen=True)
class _Facts:
    """What takes long to find out of a tokenizer, and what it was like then."""

    signature: tuple[Any, ...]
    id_count: int
    encoding: str
    vocabularies: dict[int, str] = field(default_factory=dict)  # fingerprints, by how many ids are looked at


_known: WeakKeyDictionary[Any, _Facts] = WeakKeyDictionary()


def _facts(tokenizer: Any) -> _Facts:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = [repr(getattr(backend, part, None)) for part in ("normalizer", "pre_tokenizer", "decoder")]
    eos = getattr(tokenizer, "eos_token_id", None)
    signature = (len(tokenizer), id(backend), eos, *rules)
    known = _known.get(tokenizer)
    if known is None or known.signature != signature:
        # some classes leave ids out of the one, some out of the other
        highest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values(), -1 if eos is None else eos)
        known = _known[tokenizer] = _Facts(signature, highest + 1, _encoding_fingerprint(tokenizer))
    return known


def _encoding_fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = [sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "init_kwargs", ""))]
    else:
        state = json.loads(backend.to_str())
        state |= {"padding": None, "truncation": None}  # what the last call asked for
    about = [type(tokenizer).__name__, getattr(tokenizer, "eos_token_id", None), state]
    return hashlib.sha256(json.dumps(about, ensure_ascii=False).encode()).hexdigest()


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


@dataclass(frozen=True)
class _TokensKey(Key):
    folder: ClassVar[str] = "tokens"
    suffix: ClassVar[str] = ".safetensors"
    text: str
    tokenizer: str
    way: str


_WAY = "plain text, in slices"
_SLICE = 1 << 20  # characters that a tokenizer gets at once: it takes some 600 bytes for a token
_PARAGRAPH, _LINE, _WORD = "\n\n", "\n", " "


def tokenize(documents: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Texts as int64 token ids, one array for each. Kept in the cache folder.

    Special tokens are neither added nor read: a text that spells ``<|im_end|>`` has the tokens of these letters, where
    the tokenizer can do so. A long text is read in slices that end with a paragraph.
    """
    key = _TokensKey(text_fingerprint(documents), encoding_fingerprint(tokenizer), _WAY)
    return kept(key, lambda: _encoded(documents, tokenizer), partial(_unpacked, count=len(documents)), _packed)


def _encoded(documents: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    batches = list(_batches(documents))
    shown = track(
        batches, "reading tokens", console=Console(stderr=True), transient=True, disable=len(batches) < _MANY_SLICES
    )
    return list(_encoded_batches(shown, tokenizer))


def tokenized(documents: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """What `tokenize` gives, a document at a time, of texts that need not fit into memory. Nothing is kept."""
    return _encoded_batches(_batches(documents), tokenizer)


def _encoded_batches(batches: Iterable[list[_Slice]], tokenizer: Any) -> Iterator[np.ndarray]:
    parts: list[np.ndarray] = []
    for batch in batches:
        encoded = _plain(tokenizer, [each.text for each in batch])
        for each, ids in zip(batch, encoded, strict=True):
            parts.append(np.array(ids, np.int64))
            if each.is_last:
                yield np.concatenate(parts)
                parts = []


_MANY_SLICES = 8


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "encode_special_tokens", None)
    try:
        return _first_way(tokenizer, texts)
    finally:
        if before is not None:  # the call below would leave it changed
            backend.encode_special_tokens = before  # type: ignore[union-attr]


def _first_way(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ways: tuple[dict[str, bool], ...] = ({"split_special_tokens": True, "verbose": False}, {"verbose": False}, {})
    for options in ways:  # not every tokenizer takes all options
        try:
            return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
        except (TypeError, ValueError, NotImplementedError):
            if not options:
                raise
    raise AssertionError


class _Slice(NamedTuple):
    """Of a document."""

    text: str
    is_last: bool


def _batches(documents: Iterable[str]) -> Iterator[list[_Slice]]:
    """Slices of documents, in batches of `_SLICE` characters or little more."""
    batch: list[_Slice] = []
    size = 0
    for document in documents:
        for each in _slices(document):
            batch.append(each)
            size += len(each.text)
            if size >= _SLICE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _slices(text: str) -> Iterator[_Slice]:
    """What covers a text, cut before a paragraph's break, or else a line's or a word's."""
    begin = 0
    while len(text) - begin > _SLICE:
        found = (text.rfind(mark, begin + 1, begin + _SLICE) for mark in (_PARAGRAPH, _LINE, _WORD))
        stop = next((place for place in found if place > 0), begin + _SLICE)
        yield _Slice(text[begin:stop], False)
        begin = stop
    yield _Slice(text[begin:], True)


def _packed(ids: Sequence[np.ndarray]) -> bytes:
    lengths = np.array([len(each) for each in ids])
    return save({"tokens": np.concatenate(ids).astype(np.int32), "lengths": lengths})


def _unpacked(content: bytes, count: int) -> list[np.ndarray]:
    held = load(content)
    tokens, lengths = held["tokens"].astype(np.int64), held["lengths"]
    if len(lengths) != count or lengths.sum() != len(tokens):
        raise ValueError("not the tokens of these documents")
    return np.split(tokens, np.cumsum(lengths)[:-1])


def added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    """Tokens beside a tokenizer's own pieces, by id, where it tells."""
    added = getattr(tokenizer, "added_tokens_decoder", None)  # a method, in some classes
    return added if isinstance(added, Mapping) else {}


def control_ids(tokenizer: Any) -> list[int]:
    """Ids that are no text: the special tokens, but for the one that stands for unknown words."""
    special = {id_ for id_, token in added_tokens(tokenizer).items() if getattr(token, "special", False)}
    special |= {*getattr(tokenizer, "all_special_ids", ()), *ends_of_sequence(None, tokenizer)}
    return sorted(special - {getattr(tokenizer, "unk_token_id", None)})


def texts_within(ids: np.ndarray, controls: Sequence[int]) -> list[np.ndarray]:
    """The runs of tokens between control tokens, none empty: each is a text of its own."""
    is_control = np.isin(ids, controls)
    parts = np.split(ids, np.flatnonzero(is_control))
    runs = (part[np.isin(part[:1], controls).sum() :] for part in parts)
    return [run for run in runs if len(run)]


class TokenTexts:
    """What each token adds to a text, as it comes. Characters stay whole: what only begins one adds nothing yet.

    Args:
        decode: a tokenizer's.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._begin, self._known = 0, 1  # tokens whose text the next one is compared with

    def add(self, id_: int) -> str:
        """What one more token adds, of a text that goes on from another."""
        if not self._ids:
            self._ids = [id_]  # twice: decoders take the space off a text's first token
        self._ids.append(id_)
        added, is_whole = self._added()
        if not is_whole:
            return ""
        self._begin, self._known = self._known, len(self._ids)
        return added

    def rest(self) -> str:
        """What the tokens at the end begin and do not end."""
        return self._added()[0]

    def _added(self) -> tuple[str, bool]:
        before = self._decode(self._ids[self._begin : self._known])
        after = self._decode(self._ids[self._begin :])
        return after[len(before) :], len(after) > len(before) and not after.endswith(_UNFINISHED)


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to a text, the last one with all that is left.

    Args:
        ids: of a text that goes on from another.
        decode: a tokenizer's.
    """
    texts = TokenTexts(decode)
    added = [texts.add(each) for each in ids]
    return [*added[:-1], added[-1] + texts.rest()] if added else []


def pad_id(tokenizer: Any) -> int:
    """What rows of a batch are filled up with: the padding token, or the end of sequence where there is none."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(each for each in ids if each is not None)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a model is one to talk to."""
    return bool(getattr(tokenizer, "chat_template", None))


Conversation = list[dict[str, Any]]
"""Messages, oldest first, each with a role ("system", "user", "assistant") and its content."""


def as_chats(chats: Sequence[str | Conversation], tokenizer: Any) -> list[str]:
    """What a user says, in the model's chat template, up to where the answer begins; special tokens written out.

    Args:
        chats: texts, each all that was said, or conversations.
        tokenizer: the model's.

    Raises:
        DecodingError: the tokenizer has no template, or one that cannot be filled in.
    """
    if not has_chat_template(tokenizer):
        raise DecodingError("this model has no chat template: leave chat (--chat) out, and give a text to continue")
    try:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": chat}] if isinstance(chat, str) else chat,
                tokenize=False,
                add_generation_prompt=True,
            )
            for chat in chats
        ]
    except Exception as error:  # templates are programs, and raise what they like
        raise DecodingError(f"the model's chat template cannot be filled in: {error}") from error


def padded(
    texts: Sequence[str],
    tokenizer: Any,
    device: Any,
    *,
    on_the_left: bool = True,
    add_special_tokens: bool = True,
) -> dict[str, Tensor]:
    """Texts as one batch. Leaves the tokenizer as it is.

    Args:
        texts: the rows.
        tokenizer: the model's.
        device: where to.
        on_the_left: where rows are filled up.
        add_special_tokens: whether to add those that the tokenizer adds.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [B, L] on the device, filled up with `pad_id`.
    """
    encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded]
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


def ends_of_sequence(model: Any | None, tokenizer: Any, asked: Any = None) -> list[int]:
    """The ids that end a text: the tokenizer's, those at which ``model.generate`` stops, and those asked for."""
    held = None if model is None else getattr(model.generation_config, "eos_token_id", None)
    return sorted({int(each) for ids in (tokenizer.eos_token_id, held, asked) for each in np.ravel(_of_none(ids))})


def _of_none(ids: Any) -> Any:
    return [] if ids is None else ids.tolist() if isinstance(ids, Tensor) else ids
