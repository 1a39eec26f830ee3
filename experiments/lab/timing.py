"""Times work inside a run, without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Timer:
    """Adds up the time of some work, on the host and on a CUDA device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins at 0 again."""
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Times what is done inside, which works on ``device``."""
        on_cuda = device.type == "cuda"
        if on_cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
        began = time.perf_counter()
        yield
        self._host_seconds += time.perf_counter() - began
        if on_cuda:
            pair[1].record()
            self._events.append(pair)

    @property
    def seconds(self) -> float:
        """On a CPU the time spent; on CUDA the host's or the device's, whichever is more. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        device_seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        return max(self._host_seconds, device_seconds)


class TimedProcessor(LogitsProcessor):
    """Calls another processor and adds up the time that it takes.

    Compared with a second run without the processor, this is free of the machine's drift from run to run.
    """

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor
        self._timer = Timer()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Calls the processor."""
        with self._timer.measuring(scores.device):
            return self.processor(input_ids, scores)

    @property
    def seconds(self) -> float:
        """See `Timer`."""
        return self._timer.seconds
