"""Rows that rested: what they hold is summarised when they come near their budgets, from the keys in the cache.

Then their slots know, and their blocks have, what they would have if every step had been taken in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chunkllm.paged.blocks import BlockSummaries, Tokens

_BLOCKS_AT_ONCE = 512  # whose keys are in memory, in float32


class HeldTokens:
    """Where chunks end in every block, and a way to summarise what a row holds.

    Args:
        summaries: of the blocks.
        read_keys: keys [n, block size, Hkv, D] of a layer, by its number, and int64 [n] blocks.
        layers: L.
        slots: S, that rows have. Slot S belongs to nobody.
        block_size: tokens of a block.
        sinks: first tokens, a chunk of their own.
        fixed_shapes: whether shapes must not depend on what tensors hold.
    """

    def __init__(
        self,
        summaries: BlockSummaries,
        read_keys: Callable[[int, Tensor], Tensor],
        layers: int,
        *,
        slots: int,
        block_size: int,
        sinks: int,
        fixed_shapes: bool,
    ):
        self._summaries, self._read_keys = summaries, read_keys
        self._layers, self._nobody, self._block_size, self._sinks = layers, slots, block_size, sinks
        self._fixed_shapes = fixed_shapes
        self._ends = torch.zeros(summaries.nowhere + 1, block_size, dtype=torch.bool, device=summaries.lengths.device)

    def note(self, places: Tensor, ends: Tensor) -> None:
        """Where chunks end, bool [T], at int [T] places of the cache."""
        self._ends.view(-1)[places] = ends

    def forget(self, blocks: Tensor) -> None:
        """Nobody said where chunks end in these blocks, int [T]."""
        self._ends[blocks] = False

    def take_in(self, blocks: Tensor, held: Tensor, slot: Tensor) -> None:
        """Summarises what a row holds, as far as its blocks have no summaries yet.

        Args:
            blocks: int64 [N], the row's; those behind its last token do not count.
            held: int64 scalar, its tokens, at least one.
            slot: int64 scalar, its slot; nobody's if nothing is to be done.
        """
        nowhere, size = self._summaries.nowhere, self._block_size
        number, last = torch.arange(len(blocks), device=blocks.device), (held - 1) // size
        has_summary = (self._summaries.lengths[blocks].sum(1) == size) & (number != last)
        is_wanted = (number <= last) & ~has_summary & (slot < self._nobody)
        if not self._fixed_shapes:
            number = number[is_wanted]
        for some in number.split(_BLOCKS_AT_ONCE):
            is_there = is_wanted[some]
            of_slot = torch.where((is_there & (some == last)).any(), slot, self._nobody)
            self._summarise(torch.where(is_there, blocks[some], nowhere), some, held, of_slot)

    def _summarise(self, blocks: Tensor, number: Tensor, held: Tensor, slot: Tensor) -> None:
        """Blocks of a row, as if its tokens in them came now. With the row's last one the slot goes on."""
        size, nowhere = self._block_size, self._summaries.nowhere
        position = (number[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
        is_held = position < held
        ends = self._ends[blocks].flatten() | (position == self._sinks - 1)
        block = torch.where(is_held, blocks.repeat_interleave(size), nowhere)
        if not self._fixed_shapes:
            count = int(is_held.sum())
            position, ends, block, is_held = position[:count], ends[:count], block[:count], is_held[:count]
        token = torch.arange(len(position), device=blocks.device)
        is_first = (token == 0) | (position == held)  # behind the last one comes what belongs nowhere
        last = (is_held.sum() - 1).clamp(min=0)[None]
        tokens = Tokens(torch.zeros_like(token), position, block, is_first, last)
        pieces = self._summaries.cut(tokens, ends, slot[None], torch.ones_like(last, dtype=torch.bool))
        read = blocks.clamp(max=nowhere - 1)
        for layer in range(self._layers):
            keys = self._read_keys(layer, read).flatten(0, 1)[: len(position)]
            self._summaries.add(pieces, keys[None], range(layer, layer + 1))
