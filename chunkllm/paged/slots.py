"""Where an engine's rows are remembered: what is known of a request lies in a slot, from step to step.

An engine that says which row is whose gives the slots itself (`GivenSlots`). Where it does not, rows are found again by
what they hold (`FoundSlots`). Either way a row goes on in its slot only if the slot knows of just as many tokens, and
of the same block for the last of them. Then what the slot knows follows from the row's own tokens. Any other row is new
there, be it that its request has just come, was preempted and is computed anew, or was missed in a step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chunkllm.errors import ChunkError


class Rows(NamedTuple):
    """The R rows of a step, as far as slots care.

    Attributes:
        held: int64 [R], tokens before this step.
        sizes: int64 [R], tokens of this step; 0 for rows that only pad.
        block: int64 [R], the block that holds the last token before this step; any where there is none.
        next_block: int64 [R], the block that holds the last token of this step.
        is_prompt: bool [R], whether the row's prompt is still being read.
        is_awake: bool [R], whether the row is to have a slot. Others are only there to write blocks.
        given: int64 [R], the row's place in the engine's table of requests; None if the engine does not say.
    """

    held: Tensor
    sizes: Tensor
    block: Tensor
    next_block: Tensor
    is_prompt: Tensor
    is_awake: Tensor
    given: Tensor | None


class Slots(Protocol):
    """Finds the slots of rows.

    Attributes:
        count: S. Slot S takes the rows that have none: those that only pad, that rest, or that cannot be told apart.
    """

    count: int

    def assign(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Slots of a step's rows, int64 [R], and bool [R], whether the row is new there. Slot S is new to every row."""
        ...

    def forget(self, is_lost: Tensor | None = None) -> None:
        """Whatever row comes next is new in its slot; with a bool scalar, if that is true."""
        ...


class GivenSlots:
    """Slots are the places in an engine's table of requests.

    A place stays a request's own as long as that is in the table. In a step, no two rows have the same: those that do
    get none, and the slot is forgotten. Nor do rows that have no place in the table.

    Args:
        count: S, places in the table.
        device: of everything.
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._block = torch.full((count + 1,), -1, dtype=torch.long, device=device)
        self._length = torch.full_like(self._block, -1)
        self._rows = torch.zeros_like(self._block)  # of the step

    def assign(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Slots`.

        Raises:
            ChunkError: the engine does not give slots.
        """
        if rows.given is None:
            raise ChunkError("the slots of a step are missing: give them, or leave out the number of slots")
        has_one = (rows.sizes > 0) & (rows.given >= 0) & (rows.given < self.count)
        self._length[torch.where(has_one & ~rows.is_awake, rows.given, self.count)] = -1
        has_one &= rows.is_awake
        slot = torch.where(has_one, rows.given, self.count)
        self._rows[slot] = 0
        self._rows.index_add_(0, slot, torch.ones_like(slot))
        is_alone = has_one & (self._rows[slot] == 1)
        goes_on = is_alone & (self._length[slot] == rows.held) & (self._block[slot] == rows.block) & (rows.held > 0)
        self._length[slot] = torch.where(is_alone, rows.held + rows.sizes, -1)
        self._block[slot] = rows.next_block
        return torch.where(is_alone, slot, self.count), ~goes_on

    def forget(self, is_lost: Tensor | None = None) -> None:
        """See `Slots`."""
        _forget(self._length, is_lost)


class FoundSlots:
    """Finds rows again, step after step, by the block that holds their last token.

    A row that begins with blocks of another's prompt can look like that one going on. What is kept is right for both,
    since it follows from the tokens before; but only one can have the slot, and that is the one that writes. A row that
    is new gets the slot that has been left alone for the longest time.

    Args:
        count: S, at least the rows of a step. Rows can be left out of a step and come back: more keep what is known.
        device: of everything.
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._block = torch.full((count + 1,), -1, dtype=torch.long, device=device)
        self._length = torch.full_like(self._block, -1)
        self._used = torch.zeros_like(self._block)
        self._step = 0

    def assign(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Slots`."""
        row, is_there = torch.arange(len(rows.held), device=rows.held.device), rows.is_awake & (rows.sizes > 0)
        rests = ~rows.is_awake & (rows.sizes > 0)  # nobody else goes on in a block that such a row writes
        self._length.masked_fill_(((self._block[:, None] == rows.next_block) & rests).any(1), -1)
        same = (self._block == rows.block[:, None]) & (self._length == rows.held[:, None])
        same &= ((rows.held > 0) & is_there)[:, None]
        same &= row[:, None] == (same * (2 - rows.is_prompt[:, None].long())).argmax(0)
        newest = same * (1 + self._used)
        is_new, slot = ~same.any(1), newest.argmax(1)
        free = torch.where(same.any(0), self._step + 1, self._used)[: self.count].argsort(stable=True)
        slot = torch.where(is_new, free[(is_new & is_there).cumsum(0) - 1], slot)
        slot = torch.where(is_there, slot, self.count)
        self._step += 1
        self._block[slot], self._length[slot] = rows.next_block, rows.held + rows.sizes
        self._used[slot] = self._step
        self._block[self.count] = -1
        return slot, is_new

    def forget(self, is_lost: Tensor | None = None) -> None:
        """See `Slots`."""
        _forget(self._length, is_lost)


def _forget(lengths: Tensor, is_lost: Tensor | None) -> None:
    """No row has as many tokens as the slots say then."""
    if is_lost is None:
        lengths.fill_(-1)
    else:
        lengths.masked_fill_(is_lost, -1)
