"""One safetensors file per model: written atomically, validated when read, no code in it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ngram.encoding import RUN_BITS, SMALL_BIAS, SMALL_VOCAB
from ngram.errors import NGramError
from ngram.layout import pack_nodes
from ngram.tables import MAX_ORDER, TENSORS, Tables

FORMAT = "decoding-ngram/2"
_BEFORE = "decoding-ngram/1"  # counts and codes of nodes in the place of nodes and runs
_ROUNDING = 1e-4
_TOLD = ("lengths", "widest", "first_ngrams")
_DTYPES = {"int64": "I64", "float32": "F32", "int32": "I32", "int16": "I16", "bool": "BOOL"}  # the widest first


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
    tensors = {
        "unigram": tables.unigram[0],
        "seen": tables.seen[0],
        "backoff_values": tables.backoff_book,
        "nodes": tables.nodes,
        "runs": tables.runs,
        "words": tables.words,
        "deltas": tables.deltas,
    }
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    streams = {name: Stream(array.dtype, array.shape, [array]) for name, array in arrays.items()}
    save_streams(path, streams, {"lengths": list(tables.lengths), "widest": list(tables.widest), **header})


class Stream(NamedTuple):
    """A tensor that is written some of it at a time, along its first dimension."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]


def save_streams(path: str | PathLike, streams: Mapping[str, Stream], header: Mapping[str, Any]) -> None:
    """Writes the tensors of a model as a safetensors file, in the library's order, none of them held whole.

    Args:
        path: of the file.
        streams: by name.
        header: what is told of the model: ``lengths`` and ``widest`` of `Tables`, and more.
    """
    told = json.dumps({"format": FORMAT, **header})
    content: dict[str, Any] = {"__metadata__": {"ngram": told}}
    names = sorted(streams, key=lambda name: (list(_DTYPES).index(streams[name].dtype.name), name))
    at = 0
    for name in names:
        dtype, shape, _ = streams[name]
        end = at + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    front = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    front += b" " * (-len(front) % 8)
    with writing_atomically(path) as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name in names:
            for part in streams[name].parts:
                file.write(np.ascontiguousarray(part, streams[name].dtype).data)


def load(path: str | PathLike, mmap: bool = False) -> tuple[Tables, dict[str, Any]]:
    """Reads and checks what `save` wrote.

    Args:
        path: of the file.
        mmap: whether to leave n-grams in the file, which is then read where it is looked up. They are not checked. A
            file of the older format is read and checked all the same.

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
    found = header.pop("format", None) if isinstance(header, dict) else None
    if found not in (FORMAT, _BEFORE):
        raise NGramError(f"{path} is not an n-gram model of the format {FORMAT}: train it again with this version")
    try:
        lengths = tuple(header.pop("lengths"))
        _require(len(lengths) < MAX_ORDER, f"its order is {len(lengths) + 1}, and {MAX_ORDER} is the highest")
        tables = (_tables_before if found == _BEFORE else _tables)(tensors, lengths)
        _check_shapes(tables)
        if mmap and found == FORMAT:  # what would have to be read is told by the header
            vars(tables).update(widest=_widest(header, tables), first_ngrams=_first_ngrams(tables))
        else:
            _check(tables)
        header = {name: header[name] for name in ("smoothing", "bos_id", "eos_id", "metadata")}
        _check_header(header, tables.vocab_size)
        return tables, header
    except (KeyError, TypeError, AttributeError, RuntimeError, _DamagedError) as error:
        raise NGramError(f"{path} is damaged: {error}") from error


def save_tables(path: str | PathLike, tables: Tables) -> None:
    """Writes tables as they lie in memory, of several priors too, for `map_tables` of the same version."""
    told = {name: list(getattr(tables, name)) for name in _TOLD}
    save_file({name: getattr(tables, name).contiguous() for name in TENSORS}, path, {"tables": json.dumps(told)})


def map_tables(path: str | PathLike) -> Tables:
    """Tables that `save_tables` wrote, which stay in their file.

    Raises:
        NGramError: no file, or not a whole one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = {name: tuple(each) for name, each in json.loads(file.metadata()["tables"]).items()}
            tables = Tables(**{name: file.get_tensor(name) for name in TENSORS}, lengths=told.pop("lengths"))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise NGramError(f"{path} holds no tables: {error}") from error
    vars(tables).update(told)
    return tables


class _DamagedError(Exception):
    pass


def _tables(tensors: dict[str, Tensor], lengths: tuple[int, ...]) -> Tables:
    nodes = tensors["nodes"]
    return Tables(
        unigram=tensors["unigram"][None],
        seen=tensors["seen"][None],
        nodes=nodes,
        runs=tensors["runs"],
        backoff_book=tensors["backoff_values"],
        book_starts=torch.tensor([SMALL_BIAS if nodes.dtype == torch.int16 else 0], dtype=torch.int32),
        words=tensors["words"],
        deltas=tensors["deltas"],
        lengths=lengths,
    )


def _tables_before(tensors: dict[str, Tensor], lengths: tuple[int, ...]) -> Tables:
    counts, codes = tensors["counts"].to(torch.int32), tensors["backoff_codes"].to(torch.int32)
    _require(counts.ndim == 1 and counts.shape == codes.shape, "the contexts do not fit each other")
    _require(not counts.numel() or int(counts.min()) >= 0, "a context has a negative number of continuations")
    _require(not codes.numel() or int(codes.min()) >= 0, "a back-off is not in its code book")
    nodes = pack_nodes(counts, codes, [tensors["backoff_values"]])
    return _tables(tensors | {"nodes": nodes["nodes"], "runs": nodes["runs"]}, lengths)


def _check_shapes(tables: Tables) -> None:
    """What can be told of tensors without reading n-grams."""
    for name, values in (
        ("unigram", tables.unigram[0]),
        ("backoff_values", tables.backoff_book),
        ("deltas", tables.deltas),
    ):
        _require(values.dtype == torch.float32 and values.ndim == 1, f"{name} must be one-dimensional float32")
    for name, values in (("unigram", tables.unigram), ("backoff_values", tables.backoff_book)):
        _require(bool(torch.isfinite(values).all()), f"{name} holds numbers that are not finite")
    _require(bool((tables.unigram <= _ROUNDING).all()), "it holds probabilities above 1")
    size = tables.unigram.shape[1]
    _require(size > 0, "its vocabulary is empty")
    _require(tables.seen.shape == (1, size) and tables.seen.dtype == torch.bool, "seen does not fit the vocabulary")
    _require(all(isinstance(n, int) and n >= 0 for n in tables.lengths), "lengths must be whole numbers")
    _require(not tables.lengths or tables.lengths[0] == size, "lengths do not fit the vocabulary")
    nodes = sum(tables.lengths) + len(tables.lengths) + 2
    _require(tables.nodes.shape == (nodes, 2), "the contexts do not fit the lengths")
    _require(tables.nodes.dtype in (torch.int16, torch.int32), "nodes must be small integers")
    _require(tables.runs.shape == (-(-nodes // (1 << RUN_BITS)),), "the contexts do not fit their runs")
    _require(tables.runs.dtype in (torch.int32, torch.int64), "runs must be integers")
    _require(tables.words.shape == tables.deltas.shape, "the n-grams do not fit each other")
    small = size <= SMALL_VOCAB
    _require(tables.words.dtype == (torch.int16 if small else torch.int32), "words do not fit the vocabulary")


def _check(tables: Tables) -> None:
    """All else."""
    starts, codes, total = tables.starts(), tables.backoff_codes(), len(tables.words)
    counts = starts.diff()
    known = not codes.numel() or (int(codes.min()) >= 0 and int(codes.max()) < len(tables.backoff_book))
    _require(known, "a back-off is not in its code book")
    _require(bool((counts >= 0).all()), "a context has a negative number of continuations")
    _require((int(starts[0]), int(starts[-1])) == (0, total), "the n-grams do not fit the contexts")
    _require(bool(torch.isfinite(tables.deltas).all()), "deltas holds numbers that are not finite")
    ids = tables.token_ids(tables.words)
    size = tables.vocab_size
    _require(not total or (int(ids.min()) >= 0 and int(ids.max()) < size), f"it holds token ids beyond its {size}")
    empty = [0, *(first + length for first, length in zip(tables.first_nodes, tables.lengths, strict=True))]
    _require(not counts[empty].any(), "an empty context has continuations")
    ngrams = np.diff(tables.first_ngrams).tolist()
    _require(ngrams[:-1] == list(tables.lengths[1:]), "the orders do not fit each other")
    for k in range(2, tables.order + 1):
        _require(bool((tables.ngram_keys(k).diff() > 0).all()), f"its {k}-grams are not sorted")


def _widest(header: dict[str, Any], tables: Tables) -> tuple[int, ...]:
    """The header's."""
    widest = header["widest"]
    _require(isinstance(widest, list) and len(widest) == len(tables.lengths), "widest does not fit the orders")
    _require(
        all(type(most) is int and 0 <= most <= tables.vocab_size for most in widest), "widest are no whole numbers"
    )
    return tuple(widest)


def _first_ngrams(tables: Tables) -> tuple[int, ...]:
    """From the lengths: a node of two tokens and more is an n-gram."""
    ends = (*np.cumsum((0, *tables.lengths[1:])).tolist(), len(tables.words)) if tables.lengths else (0,)
    _require(all(a <= b for a, b in pairwise(ends)), "the n-grams do not fit the lengths")
    return ends


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
