"""Figures of a benchmark: measured in turns in one run, printed as a table, written as data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from decoding.environment import environment
from ngram.storage import write_atomically


@dataclass(frozen=True)
class Figure:
    """One line of the table. ``met`` is None where there is no target or nothing was measured."""

    what: str
    value: float | None
    shown: str
    target: str = ""
    met: bool | None = None


def not_measured(what: str, target: str, why: str) -> Figure:
    """A line without a figure."""
    return Figure(what, None, f"not measured: {why}", target)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long some work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(works: Sequence[Callable[[int], Any]], rounds: int, title: str | None = None) -> np.ndarray:
    """Seconds [works, rounds]; the works take turns, so that drifts of the machine hit all of them.

    Args:
        works: each is told the round.
        rounds: how often each is done; once more before, untimed.
        title: of a bar that moves between rounds, for what takes minutes.
    """
    for work in works:
        work(0)
    turns: Iterable[int] = range(rounds)
    if title is not None:  # nothing draws while something is timed
        turns = track(turns, title, console=Console(stderr=True), auto_refresh=False, transient=True)
    return np.array([[seconds_of(partial(work, i)) for work in works] for i in turns]).T


def ratio_of(times: np.ndarray, baseline: np.ndarray) -> tuple[float, str]:
    """The median of the rounds' ratios, and as text with their quartiles.

    Args:
        times: seconds [rounds].
        baseline: of the same rounds.
    """
    low, median, high = np.quantile(times / baseline, (0.25, 0.5, 0.75)).tolist()
    return median, f"{median:.2f}× [{low:.2f}, {high:.2f}]"


def time_of(seconds: np.ndarray, unit: str = "ms") -> tuple[float, str]:
    """The median of some times, and as text with their quartiles.

    Args:
        seconds: [rounds].
        unit: "ms" or "µs".
    """
    low, median, high = (np.quantile(seconds, (0.25, 0.5, 0.75)) * {"ms": 1e3, "µs": 1e6}[unit]).tolist()
    places = 0 if median >= 100 else 1 if median >= 10 else 2
    return median, f"{median:.{places}f} {unit} [{low:.{places}f}, {high:.{places}f}]"


def report(figures: Sequence[Figure], title: str, about: dict[str, Any], out: Path | None) -> None:
    """Prints the table; with ``out``, writes the figures, what they are about and what they ran on as JSON."""
    table = Table("measured", "figure", "target", "met", title=title)
    console = Console()
    for figure in figures:
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        table.add_row(figure.what, figure.shown, figure.target, met)
    Console(width=None if console.is_terminal else 150).print(table)
    if out is not None:
        content = {**about, **environment(), "figures": [asdict(figure) for figure in figures]}
        write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False).encode())
