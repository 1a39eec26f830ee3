"""Who may use the model: visitors one after the other, and the two texts of one visitor step by step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

_MOMENT = 0.1  # seconds between two looks


class Stopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """A text is not wanted any more."""


class Place:
    """One who waits in a `Line`, or is served.

    Attributes:
        what: it does when it is served, for those behind.
    """

    def __init__(self, what: str):
        self.what = what


class Line:
    """Those who want the model, first come, first served."""

    def __init__(self) -> None:
        self._places: deque[Place] = deque()
        self._moved = threading.Condition()

    def enter(self, what: str) -> Place:
        """A place at the end, to be left by `leave`."""
        place = Place(what)
        with self._moved:
            self._places.append(place)
        return place

    def ahead(self, place: Place, seconds: float = 0.0) -> list[str]:
        """What those before a place do, the first one now; waits so long for there to be nobody."""
        with self._moved:
            self._moved.wait_for(lambda: self._places[0] is place, seconds)
            return [each.what for each in self._places][: self._places.index(place)]

    def is_awaited(self) -> bool:
        """Whether there is more than one."""
        return len(self._places) > 1

    def leave(self, place: Place) -> None:
        """Lets the next one on."""
        with self._moved:
            self._places.remove(place)
            self._moved.notify_all()


class Turns:
    """Lets threads compute one at a time, each with random numbers of its own, as if it were alone.

    A thread is in its `turn` while it computes, and `passes` it on between two steps.

    Args:
        count: of the threads.
        device: whose random numbers they draw.
        stop: set by somebody who does not want them to go on.
    """

    def __init__(self, count: int, device: torch.device, stop: threading.Event):
        self._next = deque(range(count))
        self._device = device
        self._stop = stop
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, who: int, seed: int) -> Iterator[None]:
        """The whole of a thread's work.

        Args:
            who: 0 to ``count`` − 1.
            seed: of its random numbers, as for ``torch.manual_seed``.
        """
        try:
            self._wait(who)
            torch.manual_seed(seed)
            yield
        finally:
            with self._moved:
                self._next.remove(who)
                self._moved.notify_all()

    def passes(self, who: int) -> None:
        """Lets the others take a step each.

        Raises:
            Stopped: somebody asked for it.
        """
        mine = RandomState(self._device)
        with self._moved:
            self._next.rotate(-1)
            self._moved.notify_all()
        self._wait(who)
        mine.restore()

    def _wait(self, who: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._next[0] == who)
        if self._stop.is_set():
            raise Stopped


class RandomState:
    """The random numbers that are to come, of the host and of a device, kept to be drawn later."""

    def __init__(self, device: torch.device):
        self._device = device
        self._host = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Has them come next."""
        torch.set_rng_state(self._host)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


def until_done(work: Sequence[Future[Any]]) -> Iterator[float]:
    """Seconds, now and then, until all is done, or something failed, which is raised."""
    began = perf_counter()
    while True:
        done, others = wait(work, _MOMENT, FIRST_EXCEPTION)
        for each in done:
            each.result()
        if not others:
            return
        yield perf_counter() - began
