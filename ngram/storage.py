"""One safetensors file per model: written atomically, validated when read, no code in it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ngram.encoding import SMALL_VOCAB
from ngram.errors import NGramError
from ngram.layout import pack_nodes
from ngram.tables import MAX_ORDER, Tables

FORMAT = "decoding-ngram/1"
_ROUNDING = 1e-4
_DTYPES = {"float32": "F32", "int32": "I32", "uint16": "U16", "int16": "I16", "bool": "BOOL"}  # the widest first


def write_atomically(path: str | PathLike, content: bytes) -> None:
    """Writes a whole file beside its place, then moves it there."""
    with writing_atomically(path) as file:
        file.write(content)


@contextmanager
def writing_atomically(path: str | PathLike) -> Iterator[BinaryIO]:
    """A file to write to, beside its place. It is moved there if nothing is raised, else removed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise NGramError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError):
            raise NGramError(f"cannot write {path}: {error.strerror}") from error
        raise


def umask() -> int:
    """Of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(path: str | PathLike, tables: Tables, header: dict[str, Any]) -> None:
    """Writes the tables and a JSON header.

    Back-offs follow from a handful of small counts, so few values of them differ: they are kept in a code book.
    """
    codes, counts = tables.backoff_codes(), tables.counts()
    tensors = {
        "unigram": tables.unigram[0],
        "seen": tables.seen[0],
        "backoff_values": tables.backoff_book,
        "backoff_codes": codes,
        "counts": counts,
        "words": tables.words,
        "deltas": tables.deltas,
    }
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    for name in ("backoff_codes", "counts"):
        arrays[name] = arrays[name].astype(narrow(int(arrays[name].max())))
    streams = {name: Stream(array.dtype, len(array), [array]) for name, array in arrays.items()}
    save_streams(path, streams, tables.lengths, header)


class Stream(NamedTuple):
    """A one-dimensional tensor that is written some of it at a time."""

    dtype: np.dtype
    length: int
    parts: Iterable[np.ndarray]


def save_streams(
    path: str | PathLike, streams: Mapping[str, Stream], lengths: Iterable[int], header: Mapping[str, Any]
) -> None:
    """Writes the tensors of a model as a safetensors file, in the library's order, none of them held whole.

    Args:
        path: of the file.
        streams: by name.
        lengths: as `Tables.lengths`.
        header: what else is told of the model.
    """
    told = json.dumps({"format": FORMAT, "lengths": list(lengths), **header})
    content: dict[str, Any] = {"__metadata__": {"ngram": told}}
    names = sorted(streams, key=lambda name: (list(_DTYPES).index(streams[name].dtype.name), name))
    at = 0
    for name in names:
        dtype, length, _ = streams[name]
        end = at + length * dtype.itemsize
        content[name] = {"dtype": _DTYPES[dtype.name], "shape": [length], "data_offsets": [at, end]}
        at = end
    front = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    front += b" " * (-len(front) % 8)
    with writing_atomically(path) as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name in names:
            for part in streams[name].parts:
                file.write(np.ascontiguousarray(part, streams[name].dtype).data)


def narrow(most: int) -> np.dtype:
    """The dtype in which a file has numbers from 0 to this one."""
    return np.dtype(np.uint16 if most < 1 << 16 else np.int32)


def load(path: str | PathLike) -> tuple[Tables, dict[str, Any]]:
    """Reads and checks what `save` wrote.

    Raises:
        NGramError: no file, or not a whole and consistent one.
    """
    path = Path(path)
    if not path.is_file():
        raise NGramError(f"no n-gram model at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("ngram", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise NGramError(f"{path} is not a whole n-gram model file: {error}") from error
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise NGramError(f"{path} is not an n-gram model of the format {FORMAT}: train it again with this version")
    try:
        tables = _tables(tensors, tuple(header.pop("lengths")))
        header = {name: header[name] for name in ("smoothing", "bos_id", "eos_id", "metadata")}
        _check_header(header, tables.vocab_size)
        return tables, header
    except (KeyError, TypeError, AttributeError, RuntimeError, _DamagedError) as error:
        raise NGramError(f"{path} is damaged: {error}") from error


class _DamagedError(Exception):
    pass


def _tables(tensors: dict[str, Tensor], lengths: tuple[int, ...]) -> Tables:
    _require(len(lengths) < MAX_ORDER, f"its order is {len(lengths) + 1}, and {MAX_ORDER} is the highest")
    counts, codes = tensors["counts"].to(torch.int32), tensors["backoff_codes"].to(torch.int32)
    values = tensors["backoff_values"]
    _require(counts.ndim == 1 and counts.shape == codes.shape, "the contexts do not fit each other")
    _require(values.dtype == torch.float32 and values.ndim == 1, "backoff_values must be one-dimensional float32")
    known = not codes.numel() or (int(codes.min()) >= 0 and int(codes.max()) < values.numel())
    _require(known, "a back-off is not in its code book")
    _require(not counts.numel() or int(counts.min()) >= 0, "a context has a negative number of continuations")
    _require(int(counts.sum()) < 1 << 31, "it has too many continuations")
    tables = Tables(
        unigram=tensors["unigram"][None],
        seen=tensors["seen"][None],
        **pack_nodes(counts, codes, [values]),
        words=tensors["words"],
        deltas=tensors["deltas"],
        lengths=lengths,
    )
    _check(tables, counts)
    return tables


def _check(tables: Tables, counts: Tensor) -> None:
    unigram = tables.unigram[0]
    for name, values in (("unigram", unigram), ("backoff_values", tables.backoff_book), ("deltas", tables.deltas)):
        _require(values.dtype == torch.float32 and values.ndim == 1, f"{name} must be one-dimensional float32")
        _require(bool(torch.isfinite(values).all()), f"{name} holds numbers that are not finite")
    _require(bool((unigram <= _ROUNDING).all()), "it holds probabilities above 1")
    size = len(unigram)
    _require(size > 0, "its vocabulary is empty")
    _require(tables.seen.shape == (1, size) and tables.seen.dtype == torch.bool, "seen does not fit the vocabulary")
    _require(all(isinstance(n, int) and n >= 0 for n in tables.lengths), "lengths must be whole numbers")
    _require(not tables.lengths or tables.lengths[0] == size, "lengths do not fit the vocabulary")
    nodes = sum(tables.lengths) + len(tables.lengths) + 1
    _require(counts.shape == (nodes,), "the contexts do not fit the lengths")
    total = int(counts.sum())
    _require(tables.words.shape == (total,) == tables.deltas.shape, "the n-grams do not fit the contexts")
    small = size <= SMALL_VOCAB
    _require(tables.words.dtype == (torch.int16 if small else torch.int32), "words do not fit the vocabulary")
    ids = tables.token_ids(tables.words)
    _require(not total or (int(ids.min()) >= 0 and int(ids.max()) < size), f"it holds token ids beyond its {size}")
    empty = [0, *(first + length for first, length in zip(tables.first_nodes, tables.lengths, strict=True))]
    _require(not counts[empty].any(), "an empty context has continuations")
    ngrams = np.diff(tables.first_ngrams).tolist()
    _require(ngrams[:-1] == list(tables.lengths[1:]), "the orders do not fit each other")
    for k in range(2, tables.order + 1):
        _require(bool((tables.ngram_keys(k).diff() > 0).all()), f"its {k}-grams are not sorted")


def _check_header(header: dict[str, Any], vocab_size: int) -> None:
    for name in ("bos_id", "eos_id"):
        marker = header[name]
        _require(marker is None or (type(marker) is int and 0 <= marker < vocab_size), f"{name} is no token id")
    markers = header["bos_id"], header["eos_id"]
    _require(None in markers or markers[0] != markers[1], "bos_id and eos_id are one")
    texts = [header["smoothing"], *header["metadata"].items()]
    _require(all(isinstance(text, str) for pair in texts for text in pair), "its metadata is no text")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _DamagedError(message)
