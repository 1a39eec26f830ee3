"""The V1 model runner: rows are requests, which join, leave and move; prompts and histories are Python lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from chunkllm.late import send
from decoding.vllm.requests import (
    Layer,
    LoadedStyles,
    layers_of,
    leaves_temperature_open,
    requested_budget,
    stops_table,
)
from decoding.vllm.temperatures import PromptTemperatures

Kept = TypeVar("Kept")


def take_in(
    batch_update: Any, rows: dict[int, Kept], kept: Callable[[Any, Sequence[int] | None, Sequence[int]], Kept | None]
) -> None:
    """Takes a vLLM ``BatchUpdate`` into ``rows``: what was removed, added, moved, in that order.

    Args:
        batch_update: the changes of a step.
        rows: what is kept of the requests that matter, by row.
        kept: makes that of a request's parameters, its prompt, and its output, the engine's own list, which grows; None
            for a request that does not matter.
    """
    for row in batch_update.removed:
        rows.pop(row, None)
    for row, params, prompt, output in batch_update.added:
        rows.pop(row, None)  # an added request may take an occupied row
        if (keep := kept(params, prompt, output)) is not None:
            rows[row] = keep
    for source, target, direction in batch_update.moved:
        moved, replaced = rows.pop(source, None), rows.pop(target, None)
        if moved is not None:
            rows[target] = moved
        if replaced is not None and direction.name == "SWAP":
            rows[source] = replaced


class _Styled(NamedTuple):
    styles: list[tuple[int, float]]
    own_stops: list[int]
    prompt_tail: list[int]  # as many as can be context
    output: Sequence[int]


class StyleRows:
    """The styled requests by row.

    Args:
        styles: the priors.
        device: of the logits.
    """

    def __init__(self, styles: LoadedStyles, device: torch.device):
        self._styles = styles
        self._device = device
        self._rows: dict[int, _Styled] = {}
        self._layers: list[Layer] | None = None  # of the rows as they stand; None if they changed
        self._own_stops: Tensor | None = None  # likewise

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if batch_update is not None:
            self._layers = None
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> _Styled | None:
        styles = self._styles.resolve(params.extra_args)
        if not styles:
            return None
        tail = list((prompt or [])[-self._styles.context :])
        return _Styled(styles, self._styles.own_stops(params), tail, output)

    def apply(self, logits: Tensor) -> Tensor:
        """Steers a step, in place: logits float32 [rows, W]."""
        if not self._rows:
            return logits
        count = len(logits)
        if self._layers is None or len(self._layers[0].strength) != count:
            requests = [self._rows.get(row) for row in range(count)]
            self._layers = layers_of([request.styles if request else [] for request in requests], self._device)
            table = stops_table([request.own_stops if request else [] for request in requests])
            self._own_stops = None if table is None else send(table, self._device)
        return self._styles.add(logits, self._history(count), self._layers, self._own_stops)

    def _history(self, count: int) -> Tensor:
        """The tokens that can be context, int64 [count, context]; −1 in unstyled rows and before a text's start."""
        context = self._styles.context
        histories = [[-1] * context] * count
        for row, request in self._rows.items():
            if row < count:
                tail = (request.prompt_tail + list(request.output[-context:]))[-context:]
                histories[row] = [-1] * (context - len(tail)) + tail
        return torch.tensor(histories).to(self._device, non_blocking=True)


@dataclass
class _Open:
    """A request whose temperature is for the selector to choose."""

    prompt: Sequence[int] | None  # None for one of embeddings
    chosen: Tensor | None = None


class TemperatureRows:
    """The requests whose temperatures are chosen, by row.

    Args:
        choose: the selector.
        device: of the logits.
    """

    def __init__(self, choose: PromptTemperatures, device: torch.device):
        self._choose = choose
        self._one = torch.ones((), device=device)
        self._rows: dict[int, _Open] = {}
        self._temperatures: Tensor | None = None  # of the rows as they stand; None if they changed

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if batch_update is not None:
            self._temperatures = None
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, _: Sequence[int]) -> _Open | None:
        return _Open(prompt) if leaves_temperature_open(params.extra_args) else None

    def apply(self, logits: Tensor) -> Tensor:
        """Divides the rows of a step by their temperatures, in place: logits float32 [rows, W]."""
        if not self._rows:
            return logits
        if self._temperatures is None or len(self._temperatures) != len(logits):
            self._temperatures = self._of_rows(len(logits))
        return logits.div_(self._temperatures[:, None])

    def _of_rows(self, count: int) -> Tensor:
        """Float32 [count], 1 for rows with temperatures of their own."""
        new = [request for request in self._rows.values() if request.chosen is None]
        for request, chosen in zip(new, self._choose([request.prompt for request in new]), strict=True):
            request.chosen = chosen
        open_rows = {row: request.chosen for row, request in self._rows.items() if request.chosen is not None}
        return torch.stack([open_rows.get(row, self._one) for row in range(count)])


class BudgetRows:
    """The budgets that requests ask for, by row. A processor hears of requests, an attention backend asks for rows'."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if batch_update is not None:
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> int | None:
        return requested_budget(params.extra_args, is_served=True)

    def apply(self, logits: Tensor) -> Tensor:
        """Nothing."""
        return logits

    def tensor(self, count: int, default: int, device: torch.device) -> Tensor:
        """Int64 [count], in tokens; ``default`` where a request asks for nothing."""
        if not self._rows:
            return torch.full((count,), default, device=device)
        return send(torch.tensor([self._rows.get(row, default) for row in range(count)]), device)

    def least(self, default: int) -> int:
        """The least that any row may have."""
        return min(default, *self._rows.values()) if self._rows else default


@lru_cache(maxsize=16)
def budget_rows(engine: str) -> BudgetRows:
    """Those of an engine, by its ``instance_id``: one for its processor and its attention backend."""
    return BudgetRows()
