"""The block tables of a step: what every row reads in every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What the rows of a step read in each of L layers, in place of everything.

    Attributes:
        block_table: int [L, R, W].
        lengths: int [L, R], tokens in those blocks. Rows that select nothing have what they had.
    """

    block_table: Tensor
    lengths: Tensor


class Choices(NamedTuple):
    """What R rows hold, and which of it they have chosen.

    Attributes:
        table: int32 [R, N], the rows' own blocks.
        slot: int64 [R], of the rows.
        selects: bool [R], whether the row reads its first block, the chosen ones and the last ones; else it reads all.
        lengths: int64 [R], tokens of each row.
        chosen: int [L, slots, at least N], the number 0 of the first block, and behind it those of the chosen ones.
        counts: int32 [L, slots], how many are chosen.
        block_size: tokens of a block.
        local: blocks before the last one that stay.
    """

    table: Tensor
    slot: Tensor
    selects: Tensor
    lengths: Tensor
    chosen: Tensor
    counts: Tensor
    block_size: int
    local: int


def local_blocks(local: int, block_size: int) -> int:
    """Blocks before the one that is being written that always stay, so that no fewer than ``local`` tokens do."""
    return -(-local // block_size)


def last_blocks(lengths: Tensor, block_size: int, local: int) -> tuple[Tensor, Tensor]:
    """Numbers of rows' last blocks, and of the first of those that stay for being recent.

    Args:
        lengths: int [R], tokens of each row.
        block_size: tokens of a block.
        local: blocks before the last one that stay.

    Returns:
        Each int like ``lengths``.
    """
    last = (lengths - 1) // block_size
    return last, (last - local).clamp(min=1)


def read_tables(choices: Choices, into: Reading | None = None, *, fixed_shapes: bool = True) -> Reading:
    """Block tables: the first block, the chosen ones, the last ones.

    Args:
        choices: of the rows.
        into: int [L, R, N] and [L, R], where to write them, with fixed shapes; by default into new tensors.
        fixed_shapes: whether shapes must not depend on what tensors hold; else tables are as wide as they need be.

    Returns:
        Lengths are int64.
    """
    table, slot, selects, lengths, chosen, counts, block_size, local = choices
    last, recent = (blocks.int() for blocks in last_blocks(lengths, block_size, local))
    counts = counts[:, slot]
    width = table.shape[1] if fixed_shapes else int(((counts + last - recent) * selects).max()) + 2
    place = torch.arange(width, dtype=torch.int32, device=slot.device)
    behind = (recent - counts - 1)[..., None] + place
    chosen = chosen.index_select(1, slot)[:, :, :width]  # in this order: of a slice, all slots would be copied
    number = torch.where(place <= counts[..., None], chosen, behind).minimum(last[:, None]).clamp_(min=0)
    own = table.expand(len(counts), -1, -1)
    tables = torch.where(selects[:, None], own.gather(2, number.long()), own[:, :, :width])
    if not fixed_shapes and not selects.all():
        tables = torch.cat((tables, own[:, :, width:]), -1)
    tokens = (counts + 1 + last - recent) * block_size + (lengths - 1) % block_size + 1
    reading = Reading(tables, torch.where(selects, tokens, lengths))
    if into is None:
        return reading
    into.block_table.copy_(reading.block_table)
    into.lengths.copy_(reading.lengths)
    return into
