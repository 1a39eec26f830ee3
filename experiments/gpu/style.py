"""What a step of a style takes: every way, by torch's operations and by Triton's kernels, called and replayed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from experiments.gpu.record import Record
from experiments.gpu.ways import (
    MANY,
    ONE,
    TORCH,
    TRITON,
    WAYS,
    Priors,
    Steered,
    Way,
    about,
    as_on_host,
    kernels,
    paths,
)
from experiments.lab.device import device_seconds, free, replayed
from experiments.lab.figures import Figure, ratio_of, time_of

_TITLES = {TORCH: "torch", TRITON: "kernels"}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        vocabularies: ids that are scored, the one with goals first.
        batches: rows, likewise.
        order: of the priors.
        tokens: of each prior's text.
        rounds: in which ways of computing take turns.
        checked: rows that are compared with the host's.
    """

    vocabularies: tuple[int, ...] = (151_936, 128_256, 49_152)
    batches: tuple[int, ...] = (64, 1, 8, 256)
    order: int = 3
    tokens: int = 100_000
    rounds: int = 30
    checked: int = 8


CARD = Sizes()
TOY = Sizes(vocabularies=(96,), batches=(2,), tokens=400, rounds=1, checked=2)
_MOST_OF_ONE = 1.5


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds what each way takes, at each vocabulary and batch."""
    found, why_not = paths(device)
    record.note(paths=list(found), without_kernels=why_not, cold="caches are cleared before each step")
    with torch.inference_mode():
        for vocabulary in sizes.vocabularies:
            priors = Priors(vocabulary, sizes.order, sizes.tokens)
            record.note(**about(priors))
            for way in WAYS:
                _check(way, priors, found, sizes, device, record)
            for batch in sizes.batches:
                _measure_batch(batch, priors, found, sizes, device, record)
                free()


def _check(
    way: Way, priors: Priors, found: tuple[str, ...], sizes: Sizes, device: torch.device, record: Record
) -> None:
    """Each path against torch's operations on the host, and that none waits."""
    with kernels(TORCH):
        wanted = Steered(way, priors, sizes.checked, torch.device("cpu"))()
    here = Steered(way, priors, sizes.checked, device)
    for path in found:
        check = partial(as_on_host, here, way, path, wanted, device)
        record.check(_checked(path, way, priors.vocabulary), check)


def _checked(path: str, way: Way, vocabulary: int) -> str:
    return f"{_TITLES[path]}: {way.name}, V={vocabulary:,}, as on the host, and without a wait"


@dataclass(frozen=True)
class _Step:
    """What is timed."""

    way: Way
    path: str
    where: str
    needs: str  # the check

    @property
    def what(self) -> str:
        return f"{self.where}: {_TITLES[self.path]}"


def _measure_batch(
    batch: int, priors: Priors, found: tuple[str, ...], sizes: Sizes, device: torch.device, record: Record
) -> None:
    """One prior beside many, and every other way by itself; the paths take turns."""
    vocabulary = priors.vocabulary
    has_goals = (batch, vocabulary) == (sizes.batches[0], sizes.vocabularies[0])
    for ways in ((ONE, MANY), *((way,) for way in WAYS if way not in (ONE, MANY))):
        steps = [
            _Step(way, path, f"{way.name}, batch {batch}, V={vocabulary:,}", _checked(path, way, vocabulary))
            for way in ways
            for path in found
        ]
        for step in steps:
            if not record.passed(step.needs):  # it may not even run
                record.figure(Figure(f"{step.what}, replayed", None, ""), step.needs)
        steps = [step for step in steps if record.passed(step.needs)]
        times = _seconds(steps, priors, batch, sizes.rounds, device) if steps else {}
        for step, (called, graph) in times.items():
            goal = step.way.most if has_goals and step.path == found[-1] else None
            value, shown = time_of(graph, "µs")
            target, met = ("", None) if goal is None else (f"≤ {1e6 * goal:g} µs", value <= 1e6 * goal)
            record.figure(Figure(f"{step.what}, replayed", value, shown, target, met), step.needs)
            record.figure(Figure(f"{step.what}, called", *time_of(called, "µs")), step.needs)
        _add_ratios({step: graph for step, (_, graph) in times.items()}, found[-1] if has_goals else None, record)


def _add_ratios(graphs: dict[_Step, np.ndarray], has_goal: str | None, record: Record) -> None:
    """Of many priors against one, and of the kernels against torch.

    Args:
        graphs: seconds of replays [rounds], measured in turns.
        has_goal: the path that has goals here.
        record: where to.
    """
    steps = {(step.way, step.path): step for step in graphs}
    for (way, path), step in steps.items():
        if way == MANY and (one := steps.get((ONE, path))) is not None:
            ratio, shown = ratio_of(graphs[step], graphs[one])
            target, met = (f"≤ {_MOST_OF_ONE}×", ratio <= _MOST_OF_ONE) if path == has_goal else ("", None)
            record.figure(Figure(f"{step.what}, against one prior", ratio, shown, target, met), step.needs, one.needs)
        if path == TRITON and (torchs := steps.get((way, TORCH))) is not None:
            what = f"{step.where}: kernels against torch"
            record.figure(Figure(what, *ratio_of(graphs[torchs], graphs[step])), step.needs, torchs.needs)


def _seconds(
    steps: list[_Step], priors: Priors, batch: int, rounds: int, device: torch.device
) -> dict[_Step, tuple[np.ndarray, np.ndarray]]:
    """Seconds of calls and of replays, each [rounds]."""
    steered = {way: Steered(way, priors, batch, device) for way in {step.way for step in steps}}

    def call(step: _Step) -> None:
        with kernels(step.path):
            steered[step.way]()

    calls = [partial(call, step) for step in steps]
    seconds = device_seconds([*calls, *(replayed(each, device) for each in calls)], rounds, device, cold=True)
    return {step: (seconds[i], seconds[len(steps) + i]) for i, step in enumerate(steps)}
