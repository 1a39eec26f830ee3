"""The V1 model runner: rows are requests, which join, leave and move; histories are Python lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoding.vllm.requests import Layer, LoadedStyles, layers_of


class _Row(NamedTuple):
    styles: list[tuple[int, float]]
    prompt_tail: list[int]  # as many as can be context
    output: Sequence[int]  # the engine's own list, which grows


class Rows:
    """The styled requests by row.

    Args:
        styles: the priors.
        device: of the logits.
    """

    def __init__(self, styles: LoadedStyles, device: torch.device):
        self._styles = styles
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._layers: list[Layer] | None = None  # of the rows as they stand; None if they changed

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``: what was removed, added, moved, in that order."""
        if batch_update is None:
            return
        self._layers = None
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._rows.pop(row, None)  # an added request may take an occupied row
            if styles := self._styles.resolve(params.extra_args):
                self._rows[row] = _Row(styles, list((prompt or [])[-self._styles.context :]), output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Steers a step, in place: logits float32 [rows, W]."""
        if not self._rows:
            return logits
        count = len(logits)
        if self._layers is None or len(self._layers[0].strength) != count:
            self._layers = layers_of(
                [self._rows[row].styles if row in self._rows else [] for row in range(count)], self._device
            )
        return self._styles.add(logits, self._history(count), self._layers)

    def _history(self, count: int) -> Tensor:
        """The tokens that can be context, int64 [count, context]; −1 in unstyled rows and before a text's start."""
        context = self._styles.context
        histories = [[-1] * context] * count
        for row, request in self._rows.items():
            if row < count:
                tail = (request.prompt_tail + list(request.output[-context:]))[-context:]
                histories[row] = [-1] * (context - len(tail)) + tail
        return torch.tensor(histories).to(self._device, non_blocking=True)
