"""What a step computes and keeps follows from its rows and what they hold, not from an engine's limits."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunkllm.paged.selection import PagedSelection, Step
from chunkllm.scorers import PooledScorer

L, H, HKV, D, BLOCK, BUDGET = 2, 2, 1, 4, 16, 192
VIEWS = ("_unsafe_view", "_reshape_alias")
BY_INDEX = {"index_put_": 2, "index_copy_": 3, "index_add_": 3}  # where the argument with the values is


class Written(TorchDispatchMode):
    """Counts the bytes that operators write: their results, and of what is written by index the values."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if name in BY_INDEX:
            values, index = args[BY_INDEX[name]], args[1] if name == "index_put_" else [args[2]]
            self.bytes += max([values.numel(), *(i.numel() for i in index if i is not None)]) * values.element_size()
        elif name not in VIEWS:
            several = results if isinstance(results, (tuple, list)) else (results,)
            for result, declared in zip(several, function._schema.returns, strict=False):
                is_new = declared.alias_info is None or declared.alias_info.is_write
                self.bytes += result.nbytes if isinstance(result, torch.Tensor) and is_new else 0
        return results


def written(lengths, rows=4, limit=512, fixed_shapes=True, given=True, steps=4):
    """Bytes that the last of some decode steps of rows of these lengths writes before attention, and the selection."""
    blocks = -(-(max(lengths) + steps) // BLOCK)
    selection = PagedSelection(
        PooledScorer(D, queries=2),
        range(L),
        torch.ones(L),
        heads=H,
        kv_heads=HKV,
        head_dim=D,
        blocks=len(lengths) * blocks,
        block_size=BLOCK,
        rows=rows,
        row_blocks=limit // BLOCK,
        slots=rows if given else None,
        sinks=4,
        local=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
        fixed_shapes=fixed_shapes,
    )
    count = len(lengths)
    table = torch.zeros(count, limit // BLOCK, dtype=torch.int32)
    table[:, :blocks] = torch.arange(count * blocks).view(count, blocks)
    selection.summaries.lengths.fill_(BLOCK)  # as if prompts had been read
    for i in range(steps):
        now = torch.tensor(lengths) + i + 1
        step = Step(
            table,
            now.int(),
            torch.arange(count + 1, dtype=torch.int32),
            table[:, 0].long() * BLOCK,  # what is written does not matter here
            np.ones(count, int),
            np.zeros(count, bool),
            np.full(count, BUDGET),
            now.numpy(),
            slots=np.arange(count) if given else None,
        )
        with Written() as counted:
            selection.begin(step)
        selection.note_ends(None)
        for layer in range(L):
            selection.add(layer, torch.ones(count, HKV, D), torch.ones(count, H, D))
    return counted.bytes, selection


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("lengths", [[40], [400], [40, 500, 300]])
def test_a_step_writes_no_more_where_more_or_longer_requests_were_allowed(lengths, fixed_shapes):
    few, _ = written(lengths, rows=4, limit=512, fixed_shapes=fixed_shapes)
    many, _ = written(lengths, rows=256, limit=512, fixed_shapes=fixed_shapes)
    long, _ = written(lengths, rows=4, limit=65536, fixed_shapes=fixed_shapes)
    assert few == many == long


def test_a_step_writes_more_for_more_rows_and_longer_ones():
    of_one, _ = written([200])
    assert written([2000], limit=65536)[0] > 3 * of_one
    assert written([200] * 4)[0] > 2 * of_one


def test_chosen_blocks_take_no_more_room_than_there_were():
    def room(**options):
        _, selection = written([400], limit=65536, **options)
        return selection._chosen.shape[-1]

    assert room(fixed_shapes=False) <= 2 * BUDGET // BLOCK
    assert room(fixed_shapes=True) <= 2 * (400 // BLOCK + 2)
