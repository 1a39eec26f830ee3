"""The V1 model runner: rows are requests, which join, leave and move; prompts and histories are Python lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from decoding.temperature.markers import Markers
from decoding.temperature.nucleus import cut_to_nucleus
from decoding.vllm.counters import StyleCounts
from decoding.vllm.counts import NOWHERE, Counting
from decoding.vllm.fallbacks import fell_back
from decoding.vllm.requests import UNLIMITED, Temperatures, read_admitted
from decoding.vllm.styles import Chosen, Layer, LoadedStyles, stops_table
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
    styles: list[Chosen]
    own_stops: list[int]
    prompt_tail: list[int]  # as many as can be context
    output: Sequence[int]


class StyleRows:
    """The styled requests by row.

    Args:
        styles: the priors.
        device: of the logits.
        counts: where requests are counted.
    """

    def __init__(self, styles: LoadedStyles, device: torch.device, counts: Counting = NOWHERE):
        self._styles = styles
        self._counts = StyleCounts(styles.names, counts)
        self._device = device
        self._rows: dict[int, _Styled] = {}
        self._layers: list[Layer] | None = None  # of the rows as they stand; None if they changed
        self._own_stops: Tensor | None = None  # likewise
        self._several: Tensor | None = None  # likewise

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if batch_update is not None:
            self._layers = None
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> _Styled | None:
        styles, own_stops = self._styles.asked(params)
        if not output:  # else it comes back
            self._counts.add(styles)
        if not styles:
            return None
        return _Styled(styles, own_stops, list((prompt or [])[-self._styles.context :]), output)

    def apply(self, logits: Tensor) -> Tensor:
        """Steers a step, in place: logits float32 [rows, W].

        It never raises, since the engine serves others: requests that cannot be steered go on without their styles.
        """
        try:
            return self._steered(logits)
        except Exception:  # Whatever it is.
            fell_back("style")
        self._layers = None
        try:
            self._leave_failing(logits)
            return self._steered(logits)
        except Exception:
            fell_back("style")
            self._rows.clear()
            return logits

    def _steered(self, logits: Tensor) -> Tensor:
        if not self._rows:
            return logits
        rows = [self._rows.get(row) for row in range(len(logits))]
        if not self._layers or len(self._layers[0].strength) != len(rows):
            self._layers, self._own_stops, self._several = self._layers_of(rows)
        if not self._layers:  # the styled rows are not in this step
            return logits
        return self._styles.add(logits, self._history(rows), self._layers, self._own_stops, self._several)

    def _layers_of(self, rows: Sequence[_Styled | None]) -> tuple[list[Layer], Tensor | None, Tensor | None]:
        """The layers of rows, the stops of their own, and which have several styles."""
        layers = self._styles.layers([request.styles if request else [] for request in rows])
        table = stops_table([request.own_stops if request else [] for request in rows])
        several = [row for row, request in enumerate(rows) if request and len(request.styles) > 1]
        return (
            layers,
            None if table is None else send(table, self._device),
            send(torch.tensor(several), self._device) if several else None,
        )

    def _history(self, rows: Sequence[_Styled | None]) -> Tensor:
        """The tokens that can be context, int64 [rows, context]; −1 in unstyled rows and before a text's start."""
        context = self._styles.context
        histories = [[-1] * context] * len(rows)
        for row, request in enumerate(rows):
            if request is not None:
                tail = (request.prompt_tail + list(request.output[-context:]))[-context:]
                histories[row] = [-1] * (context - len(tail)) + tail
        return torch.tensor(histories).to(self._device, non_blocking=True)

    def _leave_failing(self, logits: Tensor) -> None:
        """Leaves out the requests that cannot be steered alone, on a copy of their rows of ``logits``."""
        for row in [row for row in self._rows if row < len(logits)]:
            alone = [self._rows[row]]
            try:
                self._styles.add(logits[row : row + 1].clone(), self._history(alone), *self._layers_of(alone))
            except Exception:
                fell_back("style")
                del self._rows[row]


@dataclass
class _Request:
    """One whose temperatures are set here."""

    wanted: Temperatures
    prompt: Sequence[int] | None  # None for one of embeddings
    output: Sequence[int]
    top_p: float | None = None  # the selector's, where it is cut to that
    chosen: Tensor | None = None
    is_thinking: bool = False
    read: int | None = None  # the tokens of the output that the above knows of; None before the first step

    def temperature(self) -> Tensor | float | None:
        """That of its next token."""
        if self.is_thinking:
            return self.wanted.think
        return self.chosen if self.wanted.answer is None else self.wanted.answer

    def unread(self, reach: int) -> list[int]:
        """Tokens whose last marker decides on the phase, if they have one: those since the last call, and ``reach``
        before them.
        """
        if self.read is None or self.read > len(self.output):  # the engine may take tokens back
            self.is_thinking, tail = False, [*(self.prompt or ()), *self.output]
        else:
            new = len(self.output) - self.read + reach
            tail = [*(self.prompt or ())[-new:], *self.output[-new:]][-new:]
        self.read = len(self.output)
        return tail


class TemperatureRows:
    """The requests whose temperatures are chosen or differ by phase, by row.

    Args:
        choose: the selector, if there is one.
        device: of the logits.
        markers: of thinking, if phases are told apart.
    """

    def __init__(self, choose: PromptTemperatures | None, device: torch.device, markers: Markers | None = None):
        self._choose = choose
        self._markers = markers
        self._device = device
        self._rows: dict[int, _Request] = {}
        self._temperatures: Tensor | None = None  # of the rows as they stand; None if they changed
        self._top_p: Tensor | None = None  # likewise; None also where no row is cut

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if self._choose is not None:
            self._choose.tell()
        if batch_update is not None:
            self._temperatures = None
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> _Request | None:
        request = read_admitted(params, "temperature")
        if request.temperatures is None:
            return None
        top_p = self._choose.top_p if self._choose is not None and request.takes_top_p else None
        return _Request(request.temperatures, prompt, output, top_p)

    def apply(self, logits: Tensor) -> Tensor:
        """Divides the rows of a step by their temperatures and cuts them, in place: logits float32 [rows, W].

        It never raises, since the engine serves others: requests whose temperatures cannot be had go on at 1.
        """
        if not self._rows:
            return logits
        try:
            self._settle(len(logits))
        except Exception:  # Whatever it is.
            fell_back("temperature")
            self._leave_failing(len(logits))
        if self._temperatures is None:
            return logits
        logits.div_(self._temperatures[:, None])
        return logits if self._top_p is None else cut_to_nucleus(logits, self._top_p)

    def _settle(self, count: int) -> None:
        """Finds what a step's rows have, if it is not as it was."""
        if self._is_other_phase() or self._temperatures is None or len(self._temperatures) != count:
            self._temperatures = None
            self._temperatures, self._top_p = self._of_rows(count), self._top_p_of_rows(count)

    def _leave_failing(self, count: int) -> None:
        """Leaves out the requests whose temperatures cannot be found for them alone, and finds the others'."""
        rows, kept = self._rows, {}
        for row, request in rows.items():
            request.read, self._rows = None, {0: request}
            try:
                self._is_other_phase()
                self._of_rows(1)
                kept[row] = request
            except Exception:
                fell_back("temperature")
        self._rows, self._temperatures = kept, None
        try:
            self._settle(count)
        except Exception:
            fell_back("temperature")
            self._rows, self._temperatures = {}, None

    def _is_other_phase(self) -> bool:
        """Whether any request began or ended thinking. Reads what they wrote, on the host."""
        if self._markers is None:
            return False
        phased = [request for request in self._rows.values() if request.wanted.think is not None]
        new = [request for request in phased if request.read is None]
        old = [request for request in phased if request.read is not None]
        # Prompts one by one: padded to the longest, many would be large.
        changes = [self._read(self._markers, requests) for requests in (*([each] for each in new), old)]
        return any(changes)

    def _read(self, markers: Markers, requests: list[_Request]) -> bool:
        # One more than a marker needs: the last token may have been a placeholder, which async scheduling fills in.
        texts = [request.unread(markers.length) for request in requests]
        width = max(map(len, texts), default=0)
        ids = torch.tensor([[-1] * (width - len(text)) + text for text in texts], dtype=torch.int64)
        before = [request.is_thinking for request in requests]
        now = markers.thinking(ids.view(len(texts), width), torch.tensor(before, dtype=torch.bool)).tolist()
        for request, is_thinking in zip(requests, now, strict=True):
            request.is_thinking = is_thinking
        return before != now

    def _of_rows(self, count: int) -> Tensor:
        """Float32 [count], 1 for rows with temperatures of their own."""
        if self._choose is not None:
            new = [each for each in self._rows.values() if each.wanted.answer is None and each.chosen is None]
            for request, chosen in zip(new, self._choose([request.prompt for request in new]), strict=True):
                request.chosen = chosen
        values = [self._rows[row].temperature() if row in self._rows else None for row in range(count)]
        found = send(torch.tensor([value if isinstance(value, float) else 1.0 for value in values]), self._device)
        open_rows = {row: value for row, value in enumerate(values) if isinstance(value, Tensor)}
        if open_rows:
            found[send(torch.tensor(list(open_rows)), self._device)] = torch.stack(list(open_rows.values()))
        return found

    def _top_p_of_rows(self, count: int) -> Tensor | None:
        """Float32 [count], 1 for rows that are not cut here; None where none is."""
        cut = {row: top_p for row in range(count) if row in self._rows and (top_p := self._rows[row].top_p) is not None}
        return send(torch.tensor([cut.get(row, 1.0) for row in range(count)]), self._device) if cut else None


class BudgetRows:
    """The budgets that requests ask for, by row. A processor hears of requests, an attention backend asks for rows'.

    Attributes:
        longest: tokens that a request can have: nobody's budget is more.
    """

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self.longest = UNLIMITED

    def update(self, batch_update: Any | None) -> None:
        """Takes in a vLLM ``BatchUpdate``."""
        if batch_update is not None:
            take_in(batch_update, self._rows, self._kept)

    def _kept(self, params: Any, prompt: Sequence[int] | None, output: Sequence[int]) -> int | None:
        budget = read_admitted(params, "chunk selection").budget
        return None if budget is None else min(budget, self.longest)

    def apply(self, logits: Tensor) -> Tensor:
        """Nothing."""
        return logits

    def of(self, places: np.ndarray, default: int) -> np.ndarray:
        """Tokens, int64 like the rows in ``places``; ``default`` where a request asks for nothing."""
        return np.array([self._rows.get(row, default) for row in places.tolist()], np.int64)


@lru_cache(maxsize=16)
def budget_rows(engine: str) -> BudgetRows:
    """Those of an engine, by its ``instance_id``: one for its processor and its attention backend."""
    return BudgetRows()
