"""A run is a folder of cells: settings in, numbers out, each written when it is finished.

An interrupted run goes on where it stopped, and reports are drawn from what is on disk.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.models import cpu_capabilities
from ngram.storage import write_atomically

_HEADER = "run.json"


class RunFolder:
    """The cells of one run on disk.

    What it ran on stands in its settings as "environments": more than one if it was resumed elsewhere.

    Args:
        path: the folder.
        settings: what all cells have in common. A run goes on only under the same settings.
        resume: whether the folder may hold a run already.

    Raises:
        DecodingError: the folder cannot be written, holds a run or other files, or a run with other settings.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], resume: bool):
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        held = self._held_settings()
        environments = held.pop("environments", []) if held else []
        if held is None or not resume:
            check_unused(self.path)
        elif differing := sorted(key for key in held.keys() | settings if held.get(key) != settings.get(key)):
            raise DecodingError(
                f"the run in {self.path} has another {differing[0]} ({_shown(held.get(differing[0]))}, "
                f"not {_shown(settings.get(differing[0]))}): choose another --out"
            )
        here = environment()
        self.settings = {**settings, "environments": [*(other for other in environments if other != here), here]}
        self._cells = self.path / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / _HEADER, json.dumps(self.settings, indent=1, ensure_ascii=False).encode())

    def _held_settings(self) -> dict[str, Any] | None:
        header = self.path / _HEADER
        if not header.is_file():
            return None
        try:
            return json.loads(header.read_bytes())
        except (OSError, ValueError) as error:
            raise DecodingError(f"{header} is damaged: choose another --out") from error

    def read(self, key: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        path = self._cells / f"{key}.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Keeps a finished cell."""
        write_atomically(self._cells / f"{key}.json", json.dumps(record, ensure_ascii=False).encode())


def progress_of_cells() -> Progress:
    """A bar that counts cells, with the time spent and left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn())


def finish(
    folder: RunFolder,
    cells: Sequence[Any],
    records: dict[Any, dict[str, Any]],
    measured: Callable[[Any], dict[str, Any]],
    summary: Callable[[Any, dict[str, Any]], str] | None = None,
) -> None:
    """Measures the cells that are not on disk yet, with progress, and keeps each.

    Args:
        folder: of the run.
        cells: each has a ``key``, the name of its record.
        records: by cell; afterwards it holds all of ``cells``.
        measured: makes a cell's record.
        summary: a line to print of each.
    """
    records |= {cell: record for cell in cells if (record := folder.read(cell.key)) is not None}
    todo = [cell for cell in cells if cell not in records]
    with progress_of_cells() as progress:
        task = progress.add_task("cells", total=len(todo))
        for cell in todo:
            record = measured(cell)
            folder.write(cell.key, record)
            records[cell] = record
            progress.advance(task)
            if summary is not None:
                progress.console.print(summary(cell, record), highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def check_unused(path: Path) -> None:
    """Refuses a folder that holds a run or other files, or that cannot be made or written.

    Raises:
        DecodingError: as said.
    """
    if (path / _HEADER).is_file():
        raise DecodingError(f"{path} holds a run already: add --resume to go on with it, or choose another --out")
    if path.exists() and not path.is_dir():
        raise DecodingError(f"{path} is a file: choose another --out")
    if path.is_dir() and any(path.iterdir()):
        raise DecodingError(f"{path} holds other files: choose a new folder with --out")
    require_writable(path)


def environment() -> dict[str, Any]:
    """What a run ran on: versions, processor, threads and accelerator."""
    packages = {name: version(name) for name in ("decoding-middleware", "torch", "transformers", "numpy")}
    return {
        "versions": packages | {"python": platform.python_version()},
        "cpu": cpu_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
