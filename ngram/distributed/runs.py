"""Sorted records on disk: written a run at a time, checked when they are read, merged without being held."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngram.distributed.packing import Keys, Packing, begins, lower_bound, order_of, upper_bound
from ngram.errors import NGramError

Records = NDArray[Any]
"""Structured [N]: ``key``, uint64 [W], and values."""
_BLOCK = 1 << 12  # records of which a checksum is kept: the least that is read of a run


def record(packing: Packing, **values: type) -> np.dtype:
    """The dtype of records."""
    return np.dtype([("key", "<u8", (packing.words,)), *((name, np.dtype(kind)) for name, kind in values.items())])


def records_of(dtype: np.dtype, key: Keys, **values: NDArray[Any]) -> Records:
    """Records of their columns."""
    made = np.empty(len(key), dtype)
    made["key"] = key
    for name, value in values.items():
        made[name] = value
    return made


class RunWriter:
    """Writes one file of records, in the order in which they come.

    Args:
        path: of the file; beside it comes what it is checked by.
        dtype: of its records.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._file = path.open("wb")
        self._rest = np.empty(0, dtype)
        self._sums: list[int] = []
        self._rows = 0

    def add(self, records: Records) -> None:
        """Behind those that there are."""
        self._rest = np.concatenate((self._rest, records))
        whole = len(self._rest) // _BLOCK * _BLOCK
        for begin in range(0, whole, _BLOCK):
            self._write(self._rest[begin : begin + _BLOCK])
        self._rest = self._rest[whole:].copy()

    def _write(self, block: Records) -> None:
        content = block.tobytes()
        self._sums.append(zlib.crc32(content))
        self._rows += len(block)
        self._file.write(content)

    def close(self) -> None:
        """Writes the rest."""
        if len(self._rest):
            self._write(self._rest)
        self._file.close()
        self._path.with_suffix(".json").write_text(json.dumps({"rows": self._rows, "crc32": self._sums}))


class Run:
    """A file that `RunWriter` wrote.

    Args:
        path: of the file.
        dtype: of its records.

    Raises:
        NGramError: it is not there, or not whole.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, self._path = dtype, path
        try:
            told = json.loads(path.with_suffix(".json").read_text())
            self._rows, self._sums = int(told["rows"]), list(told["crc32"])
            whole = path.stat().st_size == self._rows * dtype.itemsize
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path) from error
        if not whole:
            raise damaged(path)

    def __len__(self) -> int:
        return self._rows

    def blocks(self, begin: int, end: int, rows: int) -> Iterator[Records]:
        """The records from one place to another, about so many at a time."""
        step = max(rows // _BLOCK, 1) * _BLOCK
        for at in range(begin // _BLOCK * _BLOCK, end, step):
            block = self._read(at, min(step, self._rows - at))
            for place in range(0, len(block), _BLOCK):
                if zlib.crc32(block[place : place + _BLOCK].tobytes()) != self._sums[(at + place) // _BLOCK]:
                    raise damaged(self._path)
            block = block[max(begin - at, 0) : end - at]
            if len(block):
                yield block

    def _read(self, at: int, rows: int) -> Records:
        """Not by a memory map: its pages would count as this process's memory."""
        return np.fromfile(self._path, self.dtype, rows, offset=at * self.dtype.itemsize)

    def place(self, word: int) -> int:
        """How many records have a smaller first word in their key."""
        low, high = 0, self._rows
        while low < high:
            middle = (low + high) // 2
            if int(self._read(middle, 1)[0]["key"][0]) < word:
                low = middle + 1
            else:
                high = middle
        return low


def damaged(path: Path) -> NGramError:
    """What is raised for a file that is not what was written."""
    return NGramError(f"{path} is damaged: remove the folder {path.parent}, and run again to write it anew")


class Sorter:
    """Writes records that come in any order as sorted runs.

    Args:
        folder: for the files, which are numbered.
        dtype: of records.
        rows: that are sorted at a time.
        sums: whether records of one key become one; else no key comes twice.
    """

    def __init__(self, folder: Path, dtype: np.dtype, rows: int, sums: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype, self._most, self._sums = folder, dtype, rows, sums
        self._parts: list[Records] = []
        self._held = self._written = 0

    def add(self, records: Records) -> None:
        """Some more."""
        self._parts.append(records)
        self._held += len(records)
        if self._held >= self._most:
            self.flush()

    def flush(self) -> None:
        """Writes what is held."""
        if not self._held:
            return
        records = np.concatenate(self._parts)
        self._parts, self._held = [], 0
        records = records[order_of(records["key"])]
        writer = RunWriter(self._folder / f"{self._written:05}.run", self._dtype)
        writer.add(summed(records) if self._sums else records)
        writer.close()
        self._written += 1


def summed(records: Records) -> Records:
    """Sorted records, those of one key as one with the sums of their values."""
    if not len(records):
        return records
    starts = np.flatnonzero(begins(records["key"]))
    made = records[starts]
    for name in list(records.dtype.fields or ())[1:]:
        made[name] = np.add.reduceat(records[name], starts)
    return made


def runs_in(folders: Iterable[Path], dtype: np.dtype) -> list[Run]:
    """What sorters wrote to some folders."""
    return [Run(path, dtype) for folder in folders for path in sorted(folder.glob("*.run"))]


def merged(runs: Sequence[Run], packing: Packing, tokens: range, rows: int) -> Iterator[Records]:
    """Records of all runs whose first token is one of a range, sorted, some at a time. Equal keys come together.

    Args:
        runs: each sorted, with a key but once.
        packing: of the keys.
        tokens: the first tokens, without gaps.
        rows: records to hold, about.
    """
    bounds = packing.first(tokens.start), packing.first(tokens.stop)
    spans = [(run, run.place(bounds[0]), run.place(bounds[1])) for run in runs]
    spans = [(run, begin, end) for run, begin, end in spans if begin < end]
    each = max(rows // max(len(spans), 1), 1)
    streams = [run.blocks(begin, end, each) for run, begin, end in spans]
    held = [next(stream) for stream in streams]
    while held:
        cut = min((block["key"][-1] for block in held), key=lambda key: key.tolist())
        ends = [upper_bound(block["key"], cut) for block in held]
        together = np.concatenate([block[:end] for block, end in zip(held, ends, strict=True)])
        yield together[order_of(together["key"])]
        left = []
        for stream, block, end in zip(streams, held, ends, strict=True):
            rest = block[end:] if end < len(block) else next(stream, None)
            if rest is not None:
                left.append((stream, rest))
        streams, held = [list(part) for part in zip(*left, strict=True)] if left else ([], [])


class Passing:
    """Goes through a sorted file beside records that are sorted the same way.

    Args:
        run: the file.
        rows: to read at a time.
    """

    def __init__(self, run: Run, rows: int):
        self._blocks = run.blocks(0, len(run), rows)
        self._held = np.empty(0, run.dtype)

    def between(self, first: Keys, last: Keys) -> Records:
        """Records whose keys lie between two, these included; those before are left behind."""
        while not len(self._held) or self._held["key"][-1].tolist() < last.tolist():
            more = next(self._blocks, None)
            if more is None:
                break
            self._held = np.concatenate((self._from(first), more))
        self._held = self._from(first)
        return self._held[: upper_bound(self._held["key"], last)]

    def _from(self, first: Keys) -> Records:
        return self._held[lower_bound(self._held["key"], first) :]
