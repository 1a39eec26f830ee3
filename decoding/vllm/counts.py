"""How often each temperature was chosen: counted where an engine samples, served by ``/metrics``.

Prometheus's client knows of one process, and an engine has others than the server. It can join processes by files, if
that is said before vLLM imports it: so vLLM does with several API servers, and so it is used here then. With one API
server each process that samples keeps its counts in a file of a folder that the server's process has made, which reads
them all when it is asked.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from decoding.temperature.abilities import ABILITIES

logger = logging.getLogger(__name__)
COUNTS_VARIABLE = "DECODING_TEMPERATURE_COUNTS"
KINDS = (*ABILITIES, "unknown")
BORDERS = tuple(tenth / 10 for tenth in range(1, 21))  # upper ends of buckets
_SHARED_BY_PROMETHEUS = "PROMETHEUS_MULTIPROC_DIR"
_NAME, _LABEL = "decoding:chosen_temperature", "ability"
_WHAT = "Temperatures chosen for requests by their prompts, by the prompt's most probable ability."
_SHAPE = (len(KINDS), len(BORDERS) + 2)  # for each kind its buckets, the last without end, and the sum


class Counts(Protocol):
    """Takes what was chosen."""

    def add(self, kind: str, temperature: float) -> None:
        """Counts one choice, for a prompt of one of `KINDS`."""


class FileCounts:
    """Counts of one process, in a file of the folder."""

    def __init__(self, folder: Path):
        self._table = np.memmap(folder / f"{os.getpid()}.counts", np.float64, "w+", shape=_SHAPE)

    def add(self, kind: str, temperature: float) -> None:  # noqa: D102
        row = self._table[KINDS.index(kind)]
        row[np.searchsorted(BORDERS, temperature)] += 1
        row[-1] += temperature


class PrometheusCounts:
    """Counts of one process, in a file of Prometheus's client."""

    def __init__(self) -> None:
        from prometheus_client import Histogram

        self._histogram = Histogram(_NAME, _WHAT, [_LABEL], buckets=BORDERS)

    def add(self, kind: str, temperature: float) -> None:  # noqa: D102
        self._histogram.labels(kind).observe(temperature)


@cache
def counts_of_process() -> Counts | None:
    """Where this process counts what it chooses; None where nobody reads it."""
    try:
        if _SHARED_BY_PROMETHEUS in os.environ:
            return PrometheusCounts()
        folder = os.environ.get(COUNTS_VARIABLE)
        return None if folder is None else FileCounts(Path(folder))
    except Exception:  # An engine without figures is better than none.
        logger.exception("chosen temperatures are not counted")
        return None


class FolderCollector:
    """What Prometheus's client asks for the counts of all files in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def describe(self) -> Iterable[Any]:
        """Nothing, so that registering it reads nothing."""
        return []

    def collect(self) -> Iterator[Any]:
        """One histogram, with those kinds that came."""
        from prometheus_client.core import HistogramMetricFamily
        from prometheus_client.utils import floatToGoString

        tables = [np.fromfile(path, np.float64).reshape(_SHAPE) for path in self._folder.glob("*.counts")]
        family = HistogramMetricFamily(_NAME, _WHAT, labels=[_LABEL])
        for kind, row in zip(KINDS, sum(tables, np.zeros(_SHAPE)), strict=True):
            if row.any():
                ends = map(floatToGoString, (*BORDERS, np.inf))
                buckets = list(zip(ends, row[:-1].cumsum().tolist(), strict=True))
                family.add_metric([kind], buckets, float(row[-1]))
        yield family


def publish() -> None:
    """Has this process's ``/metrics`` show what its engines count. To be called before they start.

    Processes that vLLM has started count for the one that started them.
    """
    if multiprocessing.parent_process() is not None or _SHARED_BY_PROMETHEUS in os.environ:
        return
    try:
        from prometheus_client import REGISTRY

        folder = tempfile.mkdtemp(prefix="decoding-counts-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        REGISTRY.register(FolderCollector(Path(folder)))
        os.environ[COUNTS_VARIABLE] = folder
    except Exception:  # A server without figures is better than none.
        logger.exception("chosen temperatures do not show in /metrics")
