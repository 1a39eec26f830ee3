"""What a training is told, and where its parts lie."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ngram.distributed.packing import Packing
from ngram.distributed.runs import damaged, record
from ngram.smoothing import Floats, Smoothing, checked_weights

COUNT, PLAN, ADJUST, DISCOUNT = "count", "plan", "adjust", "discount"
CONTEXT, INTERPOLATE, ASSEMBLE = "context", "interpolate", "assemble"
_COPIES = 10  # of records that are being sorted, at most, with their order and their keys


@dataclass(frozen=True)
class Settings:
    """Of a training. `NGramModel.train` documents those that it has too.

    Attributes:
        cutoffs: one for each order.
        tasks: into which the documents are divided.
        parts: into which n-grams are divided, by their first or last token.
        memory: bytes that a task may take for n-grams.
    """

    vocab_size: int
    order: int
    smoothing: Smoothing
    bos_id: int | None
    eos_id: int | None
    pad_vocab: bool
    delta: float
    interpolation: tuple[float, ...] | None
    cutoffs: tuple[int, ...]
    tasks: int
    parts: int
    memory: int


@dataclass(frozen=True)
class Place:
    """Settings, and the folder of a training.

    Attributes:
        settings: what it is told.
        work: the folder.
    """

    settings: Settings
    work: Path

    def folder(self, step: str, task: int = 0) -> Path:
        """Of a task that is done."""
        return self.work / step / f"{task:05}"

    def folders(self, step: str, of: str = "") -> list[Path]:
        """Of all tasks of a step, or what lies in them."""
        tasks = self.settings.tasks if step == COUNT else self.settings.parts
        return [self.folder(step, task) / of for task in range(tasks)]

    def packing(self, length: int) -> Packing:
        """Of n-grams of a length."""
        return Packing(self.settings.vocab_size, length)

    def rows(self, dtype: np.dtype, users: int) -> int:
        """Records that each of so many may hold and sort at a time."""
        return max(self.settings.memory // (_COPIES * dtype.itemsize * users), 1 << 10)

    def counted(self, length: int) -> np.dtype:
        """Of n-grams of a length, and windows of the longest: what they count."""
        return record(self.packing(length), count=np.int64)

    def adjusted(self, length: int) -> np.dtype:
        """The same, and whether they are kept."""
        return record(self.packing(length), count=np.int64, kept=np.bool_)

    @property
    def weights(self) -> Floats:
        """One for each order."""
        told = self.settings
        return checked_weights(told.smoothing, told.interpolation, told.order, told.delta)

    @cached_property
    def ranges(self) -> list[range]:
        """The tokens of each part, from what was planned."""
        bounds = load(self.folder(PLAN) / "plan.safetensors")["bounds"].tolist()
        return [range(*pair) for pair in pairwise(bounds)]


def save(path: Path, **arrays: np.ndarray) -> None:
    """Arrays in one file, with what it is checked by."""
    save_file(arrays, path, {"crc32": _checksum(arrays)})


def load(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote.

    Raises:
        NGramError: that is not there, or not whole.
    """
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            told = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        raise damaged(path) from error
    if told != _checksum(arrays):
        raise damaged(path)
    return arrays


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    return str(zlib.crc32(b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))))


def said(settings: Settings) -> dict[str, Any]:
    """As JSON has them."""
    return json.loads(json.dumps(asdict(settings)))


def whole_ranges(amounts: np.ndarray, parts: int) -> Sequence[int]:
    """Bounds of as many ranges of tokens, of which each has about as much as another, int [parts + 1]."""
    until = np.cumsum(amounts)
    inner = np.searchsorted(until, until[-1] * np.arange(1, parts) / parts) + 1
    return [0, *np.minimum(inner, len(amounts)).tolist(), len(amounts)]
