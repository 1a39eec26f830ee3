"""Chunk selection for engines that replay steps, as CUDA graphs are: with the same tensors each time, without Python.

What the calls of such a step write, and what its attention reads, lies where it lay when the step was captured. Whether
all calls came shows in what they left behind: before a step its places hold what no call writes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm.paged.blocks import Tokens
from chunkllm.paged.selection import PagedSelection, Step
from chunkllm.paged.tables import Reading

_MISSING = 2  # in place of whether a chunk ends at a token


class ReplayedSelection(PagedSelection):
    """`PagedSelection`, with fixed shapes, for steps of single tokens that are captured and then replayed.

    Call `capture`, and then capture the other calls of a step. From then on `begin` is called for every step, and where
    no row has more than one token, what was captured can be replayed in place of the other calls. If anything of such
    a step is missing, the next one goes on, and all slots are forgotten. If `begin` fails, `read_all` has those who
    replay read everything. There is a block table of N numbers for each layer and row.

    Args:
        rows: that a step can have.
        row_blocks: N, that a row can have.
        slots: places in the engine's table of requests.
        others: as `PagedSelection`'s.
    """

    def __init__(self, *args: Any, rows: int, row_blocks: int, slots: int, **others: Any):
        super().__init__(*args, rows=rows, row_blocks=row_blocks, slots=slots, fixed_shapes=True, **others)
        zeros = self._weights.new_zeros
        shapes = (len(self._layers), rows, row_blocks), (len(self._layers), rows)
        self._held_reading = Reading(*(zeros(shape, dtype=torch.int32) for shape in shapes))
        self._ends = zeros(rows, dtype=torch.uint8)  # 1 at the end of a chunk
        self._is_single = False  # whether no row of the step under way has more than one token

    def begin(self, step: Step) -> Reading | None:
        """See `PagedSelection.begin`."""
        return super().begin(step._replace(places=step.places.clone()))  # engines write there before it is taken in

    def capture(self, rows: int) -> Reading:
        """What so many rows read in every step, where it will be. The calls that are captured then are of no step."""
        self.forget()
        self._await(rows)
        self._defers = self._is_single = True
        self._calls.open(wants_keys=True)
        return self._reading_of(rows)

    def read_all(self, table: Tensor, lengths: Tensor) -> None:
        """Has a step that could not begin read everything, and take in nothing, if it is replayed.

        Args:
            table: int [R, N], blocks of its rows.
            lengths: int [R], tokens of its rows.
        """
        rows, width = len(table), min(table.shape[1], self._row_blocks)
        self._held_reading.block_table[:, :rows, :width] = table[:, :width]
        self._held_reading.lengths[:, :rows] = lengths
        self._reading_of(rows)

    def _is_whole(self) -> bool:
        return self._calls.close(self._is_single)

    def _wants(self, step: Step, is_awake: np.ndarray) -> bool:
        self._is_single = bool((step.sizes <= 1).all())
        return self._is_single or super()._wants(step, is_awake)

    def _reading(self, step: Step, slot: Tensor, is_step: Tensor, lengths: Tensor) -> Reading | None:
        if not self._is_single:
            return super()._reading(step, slot, is_step, lengths)
        choices = self._choices(step, slot, is_step, lengths)
        rows, width = choices.table.shape
        tables, tokens = self._held_reading
        self._read_tables(choices, Reading(tables[:, :rows, :width], tokens[:, :rows]))
        return self._reading_of(rows)

    def _reading_of(self, rows: int) -> Reading:
        """What so many rows read. Those behind them, which only pad, read nothing."""
        tables, tokens = self._held_reading
        tokens[:, rows:] = 0
        return Reading(tables[:, :rows], tokens[:, :rows])

    def _expect_queries(self, tokens: Tokens, slot: Tensor, sizes: Tensor, most: int) -> None:
        super()._expect_queries(tokens, slot, sizes, most)
        if self._is_single:
            self._pending[:, : len(tokens.row), 0, 0] = torch.nan
            self._ends.fill_(_MISSING)

    def _note_ends(self, ends: Tensor | None) -> None:
        if not self._is_single:
            super()._note_ends(ends)
        elif ends is None:
            self._ends.zero_()
        else:
            self._ends[: len(ends)] = ends

    def _take_in(self) -> None:
        if not self._is_single:
            super()._take_in()
        elif len(self._written) > 1:  # what was captured is of no step
            self._take_in_single()

    def _take_in_single(self) -> None:
        """A step of single tokens of which nothing was taken in yet; nor will be, if anything of it is missing."""
        count = len(self._tokens.row)
        is_missing = self._is_missing(count)
        ends = self._ends[:count] == 1
        if self._held is not None:
            self._held.note(self._places, ends)
        self._cut(ends)
        self._pending[:, :count].masked_fill_(is_missing, 0)
        super()._take_in()
        self._discard(torch.where(is_missing, self._written[-2], self.summaries.nowhere))
        self._slots.forget(is_missing)

    def _is_missing(self, count: int) -> Tensor:
        """Whether anything of a step with so many tokens did not come, a bool scalar."""
        return self._pending[:, :count, 0, 0].isnan().any() | (self._ends[:count] == _MISSING).any()
