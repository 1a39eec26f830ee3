"""Values from a device, and copies to it, without waiting for it."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


class Arriving:
    """A tensor on its way to the host. Asked for a step later, it is there, and nothing waits."""

    def __init__(self, values: Tensor):
        self._event = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def get(self) -> np.ndarray:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy()


def send(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Copies values of the host to a device. On CUDA by way of pinned memory: from elsewhere the copy would wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Stopwatch:
    """Laps of work on a device, without waiting for it."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """A lap ends, and the next begins."""
        if self._is_cuda:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each lap, as the device has it. On CUDA it waits for the last to end."""
        if not self._is_cuda:
            return [end - begin for begin, end in pairwise(self._times)]
        self._events[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._events)]
