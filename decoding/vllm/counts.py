"""How the figures of `decoding.vllm.metrics` are counted where an engine works, and served by ``/metrics``.

Prometheus's client knows of one process, and an engine has others than the server. It can join processes by files, if
that is said before vLLM imports it: so vLLM does with several API servers, and so it is used here then. With one API
server each process that counts keeps a file in a folder that the server's process has made, which reads them all when
it is asked.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from decoding.vllm.metrics import METRICS, Metric

logger = logging.getLogger(__name__)
COUNTS_VARIABLE = "DECODING_COUNTS"
_SHARED_BY_PROMETHEUS = "PROMETHEUS_MULTIPROC_DIR"
_Series = tuple[str, str | None]  # a metric's name, and its label's value


class Counts(Protocol):
    """Takes what is counted."""

    def add(self, metric: Metric, value: float = 1.0, label: str | None = None) -> None:
        """Adds to a counter, or takes a value into a histogram: of the label's value, if the metric has a label."""


class FileCounts:
    """Counts of one process, in a file of the folder: a line of JSON that names the series, then their numbers.

    A series begins when it is first counted. The file is then written anew, which happens as often as there are series.
    """

    def __init__(self, folder: Path):
        self._path = folder / f"{os.getpid()}.counts"
        self._places: dict[_Series, slice] = {}
        self._numbers = np.zeros(0)

    def add(self, metric: Metric, value: float = 1.0, label: str | None = None) -> None:  # noqa: D102
        place = self._places.get((metric.name, label)) or self._begin(metric, label)
        numbers = self._numbers[place]
        if metric.borders:
            numbers[np.searchsorted(metric.borders, value)] += 1
        numbers[-1] += value

    def _begin(self, metric: Metric, label: str | None) -> slice:
        end = len(self._numbers)
        places = {**self._places, (metric.name, label): slice(end, end + metric.size)}
        head = json.dumps(list(places)).encode()
        head = head.ljust(-(-(len(head) + 1) // 8) * 8 - 1) + b"\n"  # numbers lie where a number can be read at once
        new = self._path.with_suffix(".new")  # moved to its place, so that nobody reads half a file
        new.write_bytes(head + self._numbers.tobytes() + bytes(8 * metric.size))
        new.replace(self._path)
        self._numbers = np.asarray(np.memmap(self._path, np.float64, "r+", len(head)))
        self._places = places
        return places[metric.name, label]


def read_counts(path: Path) -> dict[_Series, np.ndarray]:
    """What a process counted: for each series a counter's value, or a histogram's buckets and its sum."""
    head, _, numbers = path.read_bytes().partition(b"\n")
    series = [(name, label) for name, label in json.loads(head)]
    ends = np.cumsum([METRICS[name].size for name, _ in series])[:-1]
    return dict(zip(series, np.split(np.frombuffer(numbers), ends), strict=True))


class PrometheusCounts:
    """Counts of one process, in a file of Prometheus's client."""

    def __init__(self) -> None:
        self._collectors: dict[str, Any] = {}

    def add(self, metric: Metric, value: float = 1.0, label: str | None = None) -> None:  # noqa: D102
        collector = self._collectors.get(metric.name)
        if collector is None:
            collector = self._collectors[metric.name] = _collector(metric)
        series = collector if label is None else collector.labels(label)
        (series.observe if metric.borders else series.inc)(value)


def _collector(metric: Metric) -> Any:
    from prometheus_client import Counter, Histogram

    labels = [] if metric.label is None else [metric.label]
    if metric.borders:
        return Histogram(metric.name, metric.what, labels, buckets=metric.borders)
    return Counter(metric.name, metric.what, labels)


class Counting:
    """Hands on what is counted, and raises nothing: figures are not worth an engine. The first error ends it.

    Args:
        counts: where to; None for nowhere.
    """

    def __init__(self, counts: Counts | None = None):
        self._counts = counts

    def __bool__(self) -> bool:
        """Whether anything is counted."""
        return self._counts is not None

    def add(self, metric: Metric, value: float = 1.0, label: str | None = None) -> None:
        """As `Counts.add`."""
        if self._counts is not None:
            try:
                self._counts.add(metric, value, label)
            except Exception:
                self.end()

    def end(self) -> None:
        """Counts no more, and logs the exception that is being handled."""
        logger.exception("what requests ask for is no longer counted")
        self._counts = None


NOWHERE = Counting()


@cache
def counts_of_process() -> Counting:
    """Where this process counts; nowhere if nobody reads it."""
    if _SHARED_BY_PROMETHEUS in os.environ:
        return Counting(PrometheusCounts())
    folder = os.environ.get(COUNTS_VARIABLE)
    return NOWHERE if folder is None else Counting(FileCounts(Path(folder)))


def counts_of_rank(parallel_config: Any) -> Counting:
    """Where a worker counts requests: the first of those that sample, since the others see the same ones.

    Args:
        parallel_config: vLLM's.
    """
    workers, alike = parallel_config.world_size, parallel_config.tensor_parallel_size
    return counts_of_process() if parallel_config.rank % workers == workers - alike else NOWHERE


class FolderCollector:
    """What Prometheus's client asks for the counts of all files in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def describe(self) -> Iterable[Any]:
        """Nothing, so that registering it reads nothing."""
        return []

    def collect(self) -> Iterator[Any]:
        """All metrics, with those values of labels that came."""
        totals: defaultdict[_Series, Any] = defaultdict(float)
        for path in self._folder.glob("*.counts"):
            for series, numbers in read_counts(path).items():
                totals[series] = totals[series] + numbers
        for metric in METRICS.values():
            yield _family(metric, {label: numbers for (name, label), numbers in totals.items() if name == metric.name})


def _family(metric: Metric, totals: dict[str | None, np.ndarray]) -> Any:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
    from prometheus_client.utils import floatToGoString

    kind: Any = HistogramMetricFamily if metric.borders else CounterMetricFamily
    family = kind(metric.name, metric.what, labels=[] if metric.label is None else [metric.label])
    for label, numbers in totals.items():
        labels = [] if label is None else [label]
        if metric.borders:
            ends = map(floatToGoString, (*metric.borders, np.inf))
            family.add_metric(labels, list(zip(ends, numbers[:-1].cumsum().tolist(), strict=True)), float(numbers[-1]))
        else:
            family.add_metric(labels, float(numbers[-1]))
    return family


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
        logger.exception("what requests ask for does not show in /metrics")
