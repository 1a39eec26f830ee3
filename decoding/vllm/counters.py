"""What of requests and of steps is counted. Knows nothing of vLLM's runners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import Arriving, send
from chunkllm.paged.selection import Step
from chunkllm.paged.tables import Reading
from decoding.vllm.counts import Counting
from decoding.vllm.metrics import LAMBDA, NONE, REQUESTS, SELECTIONS, TOKENS_HELD, TOKENS_READ
from decoding.vllm.styles import Chosen

_STEPS_AT_ONCE = 32


class StyleCounts:
    """Counts requests by their styles, and λ.

    Args:
        names: of the server's styles.
        counts: where to.
    """

    def __init__(self, names: Sequence[str], counts: Counting):
        self._names, self._counts = names, counts
        for name in (*names, NONE):  # what rises from 0 can be told from what was there before
            counts.add(REQUESTS, 0, name)

    def add(self, chosen: Sequence[Chosen]) -> None:
        """Counts a request: its styles, those with λ = 0 left out."""
        for each in chosen:
            self._counts.add(REQUESTS, 1, self._names[each.prior])
            self._counts.add(LAMBDA, each.strength, self._names[each.prior])
        if not chosen:
            self._counts.add(REQUESTS, 1, NONE)


class ChunkCounts:
    """Counts what chunk selection reads of what requests hold. No step waits for the device.

    Figures are added up on the device, and sent to the host once in a while. They are taken in the next time that some
    are sent: by then they have arrived.

    Args:
        layers: L, that select.
        counts: where to.
        device: of the steps' tensors.
        steps_at_once: how many are sent together: by default 32, and on a CPU each one as it comes, without a wait.
    """

    def __init__(self, layers: int, counts: Counting, device: torch.device, steps_at_once: int | None = None):
        self._layers, self._counts = layers, counts
        self._steps_at_once = steps_at_once or (1 if device.type == "cpu" else _STEPS_AT_ONCE)
        self._sums = torch.zeros(2, dtype=torch.long, device=device)  # tokens held, and read in all layers, so far
        self._told = np.zeros(3, np.int64)
        self._steps = 0
        self._arriving: Arriving | None = None

    def add(self, step: Step, reading: Reading | None, selections: Tensor) -> None:
        """Counts a step. Raises nothing.

        Args:
            step: what is computed.
            reading: what `PagedSelection.begin` gave for it.
            selections: how often a row has chosen anew so far, an int64 scalar on the device.
        """
        if not self._counts:
            return
        try:
            if step.most_long:
                self._add_up(step, reading)
                self._send_in_time(selections)
        except Exception:
            self._counts.end()

    def _add_up(self, step: Step, reading: Reading | None) -> None:
        device = step.lengths.device
        is_long = step.lengths > send(step.budgets, device)
        held = step.lengths * (is_long & ~send(step.is_prompt, device))
        read = held * self._layers if reading is None else (reading.lengths * (held > 0)).sum(0)
        self._sums += torch.stack((held.sum(), read.sum()))
        self._steps += 1

    def _send_in_time(self, selections: Tensor) -> None:
        if self._steps % self._steps_at_once:
            return
        sent = Arriving(torch.cat((self._sums, selections[None])))
        arrived = sent if self._steps_at_once == 1 else self._arriving
        self._arriving = sent
        if arrived is not None:
            self._tell(arrived.get())

    def _tell(self, sums: np.ndarray) -> None:
        held, read, selections = (sums - self._told).tolist()
        self._counts.add(TOKENS_HELD, held)
        self._counts.add(TOKENS_READ, read / self._layers)
        self._counts.add(SELECTIONS, selections)
        self._told = sums
