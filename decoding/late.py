"""Answers from a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LateAnswer:
    """Asked at every step; true at the step that learns of a yes.

    On a host that is at once. On CUDA the answer comes at the first later step that finds it already there, and nothing
    is asked while it is on its way, or while a graph is being captured.
    """

    def __init__(self):
        self._answer: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def __call__(self, device: torch.device, question: Callable[[], Tensor]) -> bool:
        """Asks: ``question`` gives a bool scalar on the device."""
        if device.type != "cuda":
            return bool(question())
        if torch.cuda.is_current_stream_capturing() or (self._event is not None and not self._event.query()):
            return False
        known = self._event is not None and self._answer is not None and bool(self._answer)
        self._event = None
        if not known:
            if self._answer is None:
                self._answer = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._answer.copy_(question(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        return known
