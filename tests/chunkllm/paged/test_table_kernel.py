"""Block tables by Triton's kernel, run by its interpreter: against plain loops, and for whole schedules of requests."""

import importlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm.paged.tables import Choices, Reading
from tests.chunkllm.paged.engine import BLOCK, ROWS, Engine, Schedule, checker

# Kernels compile with Triton 3.6, whose interpreter fails where numpy is newer than it.
pytest.importorskip("triton", minversion="3.9", reason="no Triton whose interpreter runs the kernels")
table_kernel = importlib.import_module("chunkllm.paged.table_kernel")  # only now: it imports Triton


@pytest.fixture(autouse=True)
def poisoned():
    """What is allocated holds the largest numbers, as memory may."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("slots", [None, ROWS])
def test_requests_that_come_and_go_get_what_each_would_get_alone(slots, monkeypatch):
    monkeypatch.setattr(table_kernel, "_TILE", 16)
    engine = Engine(blocks=46, fixed_shapes=True, slots=slots, kernels=True)
    seen = []
    check = checker(1, seen)
    schedule = Schedule(engine, random.Random(0), rows=ROWS, requests=8)
    schedule.run(lambda batch: engine.step(batch, check))
    assert len(seen) > 50 and sum(seen) / len(seen) < 0.9


def plain(table, slot, selects, lengths, chosen, counts, _, local):
    """Blocks and tokens of every layer and row."""
    for layer in range(len(counts)):
        for row, own in enumerate(table.tolist()):
            length, last = int(lengths[row]), max(int(lengths[row]) - 1, 0) // BLOCK
            if not selects[row]:
                yield layer, row, own[: last + 1], length
                continue
            best = chosen[layer, slot[row], 1 : 1 + counts[layer, slot[row]]].tolist()
            numbers = [0, *best, *range(max(last - local, 1), last + 1)]
            yield layer, row, [own[i] for i in numbers], (len(numbers) - 1) * BLOCK + (length - 1) % BLOCK + 1


@st.composite
def steps(draw):
    rows, width, layers = draw(st.integers(1, 5)), draw(st.integers(2, 20)), draw(st.integers(1, 3))
    local, slots = draw(st.integers(0, 3)), 7
    lengths = torch.tensor(draw(st.lists(st.integers(0, width * BLOCK), min_size=rows, max_size=rows)))
    selects = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows))) & (
        lengths > (local + 3) * BLOCK
    )
    slot = torch.tensor(draw(st.permutations(range(slots)))[:rows])
    choose = random.Random(draw(st.integers(0, 99)))
    chosen = torch.zeros(layers, slots, width + 3, dtype=draw(st.sampled_from([torch.int16, torch.int32])))
    counts = torch.zeros(layers, slots, dtype=torch.int32)
    for layer in range(layers):
        for row in range(rows):
            may = range(1, max((int(lengths[row]) - 1) // BLOCK - local, 1))
            best = choose.sample(may, choose.randint(0, len(may)))
            chosen[layer, slot[row], 1 : 1 + len(best)] = torch.tensor(best, dtype=chosen.dtype)
            counts[layer, slot[row]] = len(best)
    wide = torch.arange(rows * (width + 2), dtype=torch.int32).view(rows, -1)
    # The table is a part of a wider one.
    return Choices(wide[:, :width], slot, selects, lengths, chosen, counts, BLOCK, local)


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_tables_are_the_first_block_the_chosen_ones_and_the_last_ones(step):
    tables, read = table_kernel.read_tables(step)
    assert tables.dtype == torch.int32 and tables.shape == (len(step.counts), *step.table.shape)
    for layer, row, blocks, tokens in plain(*step):
        assert tables[layer, row, : len(blocks) * (tokens > 0)].tolist() == blocks[: len(blocks) * (tokens > 0)]
        assert read[layer, row] == tokens


@settings(max_examples=20, deadline=None)
@given(step=steps())
def test_tables_are_written_where_one_wants_them(step):
    (rows, width), layers = step.table.shape, len(step.counts)
    shapes = (layers, rows + 2, width + 5), (layers, rows + 2)
    tables, lengths = (torch.full(shape, -7, dtype=torch.int32) for shape in shapes)
    table_kernel.read_tables(step, Reading(tables[:, :rows, :width], lengths[:, :rows]))
    for layer, row, blocks, tokens in plain(*step):
        assert tables[layer, row, : len(blocks) * (tokens > 0)].tolist() == blocks[: len(blocks) * (tokens > 0)]
        assert lengths[layer, row] == tokens
    assert (tables[:, rows:] == -7).all() and (tables[:, :, width:] == -7).all() and (lengths[:, rows:] == -7).all()


def test_what_is_written_grows_with_what_is_read():
    """Of long tables no tile is written behind what rows read."""
    width, some = 10 * table_kernel._TILE, torch.tensor([0])
    table = torch.arange(width, dtype=torch.int32)[None]
    chosen, counts = torch.zeros(1, 1, 9, dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    chosen[0, 0, 1:3] = torch.tensor([7, 4])
    lengths = torch.tensor([width * BLOCK])
    choices = Choices(table, some, torch.tensor([True]), lengths, chosen, counts, BLOCK, 1)
    tables, read = table_kernel.read_tables(choices)
    assert tables[0, 0, :5].tolist() == [0, 7, 4, width - 2, width - 1] and read.tolist() == [[5 * BLOCK]]
    # Attention may look a little further than a row's last block: what stands there are blocks of the row.
    assert (tables[0, 0, 5 : table_kernel._TILE] == width - 1).all()
    assert (tables[0, 0, table_kernel._TILE :] == torch.iinfo(torch.int32).max).all()


def test_no_rows():
    nothing = torch.zeros(0, dtype=torch.long)
    chosen, counts = torch.zeros(2, 1, 3, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32)
    table = torch.zeros(0, 4, dtype=torch.int32)
    choices = Choices(table, nothing, nothing.bool(), nothing, chosen, counts, BLOCK, 1)
    tables, read = table_kernel.read_tables(choices)
    assert tables.shape == (2, 0, 4) and read.shape == (2, 0)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from chunkllm.paged import table_kernel

kernel = table_kernel._write
types = {
    "table": "*i32", "slot": "*i64", "selects": "*i1", "lengths": "*i64", "chosen": "*i16", "counts": "*i32",
    "tables": "*i32", "read": "*i64",
}
constants = {"BLOCK": 16, "TILE": table_kernel._TILE}
for capability in (80, 90):
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": table_kernel._WARPS})
    assert len(made.asm["cubin"]) > 1000
print("compiled")
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_cards_that_are_not_here(compiles):
    compiles(COMPILED)
