"""A run is a folder of cells: settings in, numbers out, each written when it is finished.

An interrupted run goes on where it stopped, and reports are drawn from what is on disk.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from decoding.environment import environment
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.models import model_fingerprint
from decoding.tokens import tokenizer_fingerprint
from experiments.lab.cells import Cell
from experiments.lab.progress import progress_of_cells
from ngram.storage import write_atomically

HEADER, CELLS, LOCK = "run.json", "cells", ".lock"
ADDED_SINCE_0_1_0 = (
    *("tokenizer_sha256", "definitions"),
    *("suites", "budgets", "lengths", "examples", "lossless", "tasks", "data", "methods"),
)
C = TypeVar("C", bound=Cell)

Elsewhere = Callable[[Path, Sequence[str], Callable[[], int], str], None]
"""Has cells done by other processes: the run's folder, the cells' keys, what counts those done, and a title."""
elsewhere: ContextVar[Elsewhere | None] = ContextVar("elsewhere", default=None)
"""What does the cells of this command, if it does not do them itself."""
part: ContextVar[frozenset[str] | None] = ContextVar("part", default=None)
"""The keys of the cells that this process does, for a command that has them done elsewhere."""


class PartDone(Exception):  # noqa: N818 (no error)
    """Ends a command that had a part of its cells to do, and did it."""


def settings_of(name: str, model: Any, tokenizer: Any | None = None) -> dict[str, Any]:
    """What results say of the model that they were measured on. (What it ran on is `RunFolder`'s to say.)

    Args:
        name: how the user called it.
        model: a causal language model.
        tokenizer: its tokenizer, where results depend on more of it than the ids of texts that they name.
    """
    settings = {
        "model": name,
        "model_fingerprint": model_fingerprint(model),
        "dtype": dtype_of(model),
    }
    return settings if tokenizer is None else settings | {"tokenizer_sha256": tokenizer_fingerprint(tokenizer)[1]}


def dtype_of(model: Any) -> str:
    """Of its parameters, by name."""
    return str(model.dtype).removeprefix("torch.")


class RunFolder:
    """The cells of one run on disk.

    What it ran on stands in its settings as "environments": more than one if it was resumed elsewhere.

    Args:
        path: the folder.
        settings: what all cells have in common. A run goes on only under the same settings.
        resume: whether the folder may hold a run already.
        growing: names of settings that may be others when it goes on, since they say which cells there are.

    Raises:
        DecodingError: the folder cannot be written, holds a run or other files, or a run with other settings.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], resume: bool, growing: Collection[str] = ()):
        self.path, self._growing = Path(path), growing
        settings = json.loads(json.dumps(settings))
        if part.get() is None:
            self._begin(settings, resume)
            return
        with FileLock(self.path / ".header.lock"):  # other parts come to the same folder
            self._begin(settings, resume)

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        held = self._held_settings()
        environments = held.pop("environments", []) if held else []
        if held is None or not resume:
            check_unused(self.path)
        elif differing := [name for name in _differing(held, settings) if name not in self._growing]:
            raise DecodingError(
                f"the run in {self.path} has another {differing[0]} ({_shown(held.get(differing[0]))}, "
                f"not {_shown(settings.get(differing[0]))}): choose another --out"
            )
        here = environment()
        self.settings = {**settings, "environments": [*(other for other in environments if other != here), here]}
        self._cells = self.path / CELLS
        self._cells.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / HEADER, json.dumps(self.settings, indent=1, ensure_ascii=False).encode())

    def _held_settings(self) -> dict[str, Any] | None:
        header = self.path / HEADER
        if not header.is_file():
            return None
        try:
            return json.loads(header.read_bytes())
        except (OSError, ValueError) as error:
            raise DecodingError(f"{header} is damaged: choose another --out") from error

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's record, or None."""
        path = self._file(cell)
        if path is None:
            return None
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DecodingError(f"{path} is damaged ({error}): remove it and go on with --resume") from error

    def holds(self, cell: Cell) -> bool:
        """Whether a cell is finished, without reading its record."""
        return self._file(cell) is not None

    def _file(self, cell: Cell) -> Path | None:
        paths = (self._cells / f"{name}.json" for name in (cell.key, cell.label))
        return next((path for path in paths if path.is_file()), None)

    def write(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keeps a finished cell."""
        write_atomically(self._cells / f"{cell.key}.json", json.dumps(record, ensure_ascii=False).encode())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder's lock.

    Raises:
        DecodingError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DecodingError(f"another run works in {folder}: wait for it, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def finish(
    folder: RunFolder,
    cells: Sequence[C],
    measured: Callable[[C], dict[str, Any]],
    records: dict[C, dict[str, Any]] | None = None,
    summary: Callable[[C, dict[str, Any]], str] | None = None,
    title: str = "cells",
) -> dict[C, dict[str, Any]]:
    """Measures the cells that are not on disk yet, with progress, and keeps each.

    Under `elsewhere` others measure them, and under `part` these alone are measured here.

    Args:
        folder: of the run.
        cells: all of them.
        measured: makes a cell's record.
        records: where to put all records, as soon as they are there; a new dictionary by default.
        summary: a line to print of each.
        title: of the bar.

    Returns:
        ``records``.

    Raises:
        DecodingError: another process works on this run.
    """
    records = {} if records is None else records
    records |= _held(folder, cells)
    todo = [cell for cell in cells if cell not in records]
    mine, send = part.get(), elsewhere.get()
    if mine is not None and not mine.isdisjoint(cell.key for cell in cells):
        for cell in (cell for cell in todo if cell.key in mine):
            records[cell] = _measure(folder, cell, measured)
        raise PartDone
    with nullcontext() if mine is not None else alone_in(folder.path):
        if send is not None and todo:
            keys = [cell.key for cell in todo]
            send(folder.path, keys, lambda: sum(map(folder.holds, todo)), title)
            records |= _held(folder, todo)
            todo = [cell for cell in todo if cell not in records]
        with progress_of_cells() as progress:
            task = progress.add_task(title, total=len(todo))
            for cell in todo:
                record = records[cell] = _measure(folder, cell, measured)
                progress.advance(task)
                if summary is not None:
                    progress.console.print(summary(cell, record), highlight=False, soft_wrap=True)
    return records


def _measure(folder: RunFolder, cell: C, measured: Callable[[C], dict[str, Any]]) -> dict[str, Any]:
    """Measures a cell and keeps it. The record says what it cost this process's threads in all."""
    begun = time.process_time()
    record = measured(cell)
    record = record | {"cpu_seconds": time.process_time() - begun}
    folder.write(cell, record)
    return record


def cpu_hours(records: Iterable[Mapping[str, Any]]) -> float:
    """What records cost. Those of versions up to 0.1.0 do not say."""
    return sum(record.get("cpu_seconds", 0.0) for record in records) / 3600


def _held(folder: RunFolder, cells: Sequence[C]) -> dict[C, dict[str, Any]]:
    return {cell: record for cell in cells if (record := folder.read(cell)) is not None}


def _differing(held: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Names of settings that are not those of the run. One that its version did not keep yet is taken for the same."""
    settings = {key: value for key, value in settings.items() if key in held or key not in ADDED_SINCE_0_1_0}
    return sorted(key for key in held.keys() | settings if held.get(key) != settings.get(key))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def check_unused(path: Path) -> None:
    """Refuses a folder that holds a run or other files, or that cannot be made or written.

    Raises:
        DecodingError: as said.
    """
    if (path / HEADER).is_file():
        raise DecodingError(f"{path} holds a run already: add --resume to go on with it, or choose another --out")
    if path.exists() and not path.is_dir():
        raise DecodingError(f"{path} is a file: choose another --out")
    if path.is_dir() and any(path.iterdir()):
        raise DecodingError(f"{path} holds other files: choose a new folder with --out")
    require_writable(path)
