"""Times a logits processor inside a run, without making the device wait."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import LogitsProcessor


class TimedProcessor(LogitsProcessor):
    """Calls another processor and adds up the time that it takes.

    Compared with a second run without the processor, this is free of the machine's drift from run to run.
    """

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor
        self._host_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Calls the processor."""
        on_cuda = scores.device.type == "cuda"
        if on_cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
        began = time.perf_counter()
        result = self.processor(input_ids, scores)
        self._host_seconds += time.perf_counter() - began
        if on_cuda:
            pair[1].record()
            self._events.append(pair)
        return result

    @property
    def seconds(self) -> float:
        """On a CPU the time spent; on CUDA the host's or the device's, whichever is more. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        device_seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        return max(self._host_seconds, device_seconds)
