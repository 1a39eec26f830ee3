"""The block tables of a step as one kernel of Triton: `chunkllm.paged.tables.read_tables`, in a single launch.

By tensor operations a step writes several tensors of L · R · N numbers, whatever its rows read. Here a table is written
as far as its row reads, and what lies behind is left as it was: engines read no further.

Importing this module imports Triton, and fails where that is not installed.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from chunkllm.paged.tables import Choices, Reading

_TILE = 256  # numbers of blocks; tables are written by whole tiles, since attention may look a little further
_WARPS = 4


def read_tables(choices: Choices, into: Reading | None = None) -> Reading:
    """`chunkllm.paged.tables.read_tables` with fixed shapes.

    Behind the last tile of blocks that a row reads, its table has no values.

    Args:
        choices: of the rows.
        into: int [L, R, N] and [L, R], where to write; by default new tensors.
    """
    table, slot, selects, lengths, chosen, counts, block_size, local = choices
    (rows, width), layers = table.shape, len(counts)
    tables, read = into or (table.new_empty(layers, rows, width), lengths.new_empty(layers, rows))
    if not tables.numel():
        return Reading(tables, lengths.expand(layers, -1))
    with torch.cuda.device_of(table) if table.is_cuda else nullcontext():
        _write[(rows, layers, triton.cdiv(width, _TILE))](
            table,
            *table.stride(),
            width,
            slot,
            selects,
            lengths,
            chosen,
            *chosen.stride(),
            counts,
            *counts.stride(),
            tables,
            *tables.stride()[:2],
            read,
            *read.stride()[:1],
            local,
            BLOCK=block_size,
            TILE=_TILE,
            num_warps=_WARPS,
        )
    return Reading(tables, read)


@triton.jit(
    do_not_specialize=[
        "table_row",
        "width",
        "chosen_layer",
        "chosen_slot",
        "counts_layer",
        "tables_layer",
        "tables_row",
        "read_layer",
        "local",
    ]
)
def _write(
    table,
    table_row,
    table_step,
    width,
    slot,
    selects,
    lengths,
    chosen,
    chosen_layer,
    chosen_slot,
    chosen_step,
    counts,
    counts_layer,
    counts_step,
    tables,
    tables_layer,
    tables_row,
    read,
    read_layer,
    local,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of the table of a row in a layer. Grid: rows, layers, tiles."""
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * TILE
    length = tl.load(lengths + row)
    is_selecting = tl.load(selects + row)
    of_slot = tl.load(slot + row)
    count = tl.load(counts + layer * counts_layer + of_slot * counts_step)
    last = tl.maximum(length - 1, 0) // BLOCK
    recent = tl.maximum(last - local, 1)
    ends = last + 1
    tokens = length
    if is_selecting:
        ends = count + 2 + last - recent
        tokens = (ends - 1) * BLOCK + (length - 1) % BLOCK + 1
    if begin == 0:
        tl.store(read + layer * read_layer + row, tokens)
    if begin < ends:
        place = begin + tl.arange(0, TILE)
        number = place.to(tl.int64)
        if is_selecting:
            row_of_chosen = chosen + layer * chosen_layer + of_slot * chosen_slot
            best = tl.load(row_of_chosen + place * chosen_step, mask=place <= count, other=0)
            number = tl.where(place <= count, best.to(tl.int64), recent - count - 1 + place)
            number = tl.minimum(number, last)
        some = place < width
        block = tl.load(table + row * table_row + number * table_step, mask=some, other=0)
        tl.store(tables + layer * tables_layer + row * tables_row + place, block, mask=some)
