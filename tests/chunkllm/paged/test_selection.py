"""Selection over a paged cache against a plain account of each request by itself."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from chunkllm.paged.blocks import BlockSummaries, tokens_of_step
from chunkllm.paged.selection import PagedSelection, Step, local_blocks
from chunkllm.scorers import PooledScorer, chunk_scores, chunk_statistics
from chunkllm.selection import divide

L, H, HKV, D, M = 3, 4, 2, 8, 4
V, BLOCK, ROWS, ROW_BLOCKS = 50, 8, 4, 20
SINKS, LOCAL, BUDGET = 2, 8, 48
WEIGHTS = torch.tensor([2.0, 0.5, 0.5])
PIECES = 1  # of a block of 8


class Engine:
    """Keys, queries and ends of chunks follow from tokens; blocks are given, shared, taken back and reused."""

    def __init__(self, blocks, seed=0, fixed_shapes=False):
        draw = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(L, V, HKV, D, generator=draw)
        self.queries = torch.randn(L, V, H, D, generator=draw)
        self.ends = torch.rand(V, generator=draw) < 0.15
        self.scorer = PooledScorer(D, queries=M)
        self.selection = PagedSelection(
            self.scorer,
            range(L),
            WEIGHTS,
            heads=H,
            kv_heads=HKV,
            head_dim=D,
            blocks=blocks,
            block_size=BLOCK,
            rows=ROWS,
            row_blocks=ROW_BLOCKS,
            sinks=SINKS,
            local=LOCAL,
            dtype=torch.float32,
            device=torch.device("cpu"),
            fixed_shapes=fixed_shapes,
        )
        self.free = list(range(blocks))
        self.owners = {}  # block -> number of requests
        self.cached = {}  # what full blocks hold -> block

    def admit(self, request):
        """Takes over full blocks that hold the same beginning; at least one token is left to compute."""
        request.blocks, request.held, request.known = [], 0, 0
        request.chosen = None
        while (request.held + BLOCK) < len(request.tokens):
            block = self.cached.get(tuple(request.tokens[: request.held + BLOCK]))
            if block is None:
                return
            request.blocks.append(block)
            self.owners[block] = self.owners.get(block, 0) + 1
            request.held += BLOCK

    def release(self, request):
        for block in request.blocks:
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
                self.cached = {text: held for text, held in self.cached.items() if held != block}
                self.free.append(block)
        request.blocks = []

    def step(self, batch, check):
        """Computes (request, tokens) pairs; hands each row's reading to ``check``."""
        for request, count in batch:
            while len(request.blocks) * BLOCK < request.held + count:
                block = self.free.pop(0)
                self.owners[block] = 1
                request.blocks.append(block)
        lengths = torch.tensor([request.held + count for request, count in batch])
        sizes = torch.tensor([count for _, count in batch])
        starts = torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))
        table = torch.zeros(len(batch), ROW_BLOCKS, dtype=torch.int32)
        for row, (request, _) in enumerate(batch):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        prompt = torch.tensor([request.held < request.prompt for request, _ in batch])
        budgets = torch.tensor([request.budget for request, _ in batch])
        step = Step(table, lengths.int(), starts.int(), int(sizes.sum()), prompt, budgets)
        reading = self.selection.begin(step)
        for row, (request, count) in enumerate(batch):
            got = None if reading is None else (reading.block_table[:, row], reading.lengths[:, row])
            check(self, request, count, got)
        ids = torch.tensor([t for request, count in batch for t in request.tokens[request.held : request.held + count]])
        for layer in range(L):
            self.selection.add_keys(layer, self.keys[layer, ids])
            self.selection.add_queries(layer, self.queries[layer, ids])
            if layer == 0:
                self.selection.note_ends(self.ends[ids])
        for request, count in batch:
            request.held += count
            request.known += count
            for end in range(BLOCK, request.held + 1, BLOCK):
                self.cached.setdefault(tuple(request.tokens[:end]), request.blocks[end // BLOCK - 1])


@dataclass
class Request:
    tokens: list
    prompt: int
    budget: int = BUDGET
    held: int = 0
    known: int = 0
    blocks: list = field(default_factory=list)
    chosen: list | None = None  # of each layer, blocks by number


def pieces_of(tokens, ends, pieces):
    """(start, stop) of every piece that is whole."""
    found, start, number = [], 0, 0
    for i, token in enumerate(tokens):
        is_edge = i % BLOCK == BLOCK - 1
        if is_edge or ((ends[token] or i == SINKS - 1) and number < pieces - 1):
            found.append((start, i + 1))
            start, number = i + 1, 0 if is_edge else number + 1
    return found


def expected(engine, request, pieces):
    """Blocks that each layer reads for a request's next token, by number; None for all."""
    n = request.held + 1
    last = (n - 1) // BLOCK
    recent = max(1, last - local_blocks(LOCAL, BLOCK))
    if n <= request.budget:
        return None
    held = request.tokens[: request.held]
    whole = pieces_of(held, engine.ends, pieces)
    has_ended = request.known and whole and whole[-1][1] == request.held
    if request.chosen is None and request.known < M:
        return None
    if request.chosen is None or has_ended:
        total = torch.tensor([max(request.budget // BLOCK - (last - recent + 2), 0)])
        shares = divide(total, WEIGHTS, torch.tensor([recent - 1]))[0].clamp(max=recent - 1)
        request.chosen = []
        for layer in range(L):
            keys = engine.keys[layer, held].transpose(0, 1)[None]
            chunk_of = torch.full((1, len(held)), len(whole))
            for i, (start, stop) in enumerate(whole):
                chunk_of[0, start:stop] = i
            stops = torch.tensor([[stop for _, stop in whole]])
            lengths = torch.tensor([[float(stop - start) for start, stop in whole]])
            features = engine.scorer.chunk_features(layer, chunk_statistics(keys, chunk_of, stops - 1))
            queries = engine.queries[layer, held[-M:]].transpose(0, 1)[None]
            distances = (len(held) + 1 - stops).float()
            scores = chunk_scores(engine.scorer, layer, queries, features, lengths, distances)[0]
            worth = torch.zeros(last + 1)
            for (start, _), score in zip(whole, scores, strict=True):
                worth[start // BLOCK] += score
            order = worth[1:recent].argsort(descending=True)[: shares[layer]] + 1
            request.chosen.append(order.tolist())
    return [[0, *chosen, *range(recent, last + 1)] for chosen in request.chosen]


def checker(pieces, seen):
    def check(engine, request, count, got):
        is_step = count == 1 and request.held >= request.prompt
        if not is_step:
            request.chosen = None
        wanted = expected(engine, request, pieces) if is_step else None
        n = request.held + count
        if wanted is None:
            if got is not None:
                table, lengths = got
                assert lengths.tolist() == [n] * L
                blocks = -(-n // BLOCK)
                assert table[:, :blocks].tolist() == [request.blocks[:blocks]] * L
            return
        table, lengths = got
        for layer, numbers in enumerate(wanted):
            assert int(lengths[layer]) == (len(numbers) - 1) * BLOCK + (n - 1) % BLOCK + 1
            physical = table[layer, : len(numbers)].tolist()
            assert physical[-1] == request.blocks[numbers[-1]]
            assert sorted(physical) == sorted(request.blocks[number] for number in numbers)
        seen.append(sum(map(len, wanted)) / L / -(-n // BLOCK))

    return check


@pytest.fixture
def engine(monkeypatch):
    def made(pieces=PIECES, **options):
        monkeypatch.setattr("chunkllm.paged.blocks._TOKENS_PER_PIECE", BLOCK // pieces)
        return Engine(**options)

    return made


def random_request(choose, beginnings):
    tokens = list(choose.choice(beginnings)) if choose.random() < 0.5 else []
    prompt = choose.randint(max(len(tokens) + 1, 6), 90)
    tokens += choose.choices(range(V), k=prompt + choose.randint(5, 60) - len(tokens))
    return Request(tokens[: ROW_BLOCKS * BLOCK], min(prompt, 100), choose.choice([BUDGET, BUDGET, 64, 2**31 - 1]))


@pytest.mark.parametrize(("pieces", "fixed_shapes"), [(1, False), (2, False), (4, False), (2, True)])
@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_get_what_each_would_get_alone(engine, pieces, fixed_shapes, seed):
    """In pieces, in any order, left out of steps, with shared beginnings, preempted, in blocks that others had."""
    choose = random.Random(seed)
    engine = engine(pieces, blocks=46, seed=seed, fixed_shapes=fixed_shapes)
    beginnings = [choose.choices(range(V), k=k) for k in (24, 40)]
    waiting = [random_request(choose, beginnings) for _ in range(40)]
    running, seen, preempted, shared = [], [], 0, 0
    check = checker(pieces, seen)
    while waiting or running:
        while waiting and len(running) < ROWS and choose.random() < 0.7:
            engine.admit(waiting[0])
            shared += bool(waiting[0].blocks)
            running.append(waiting.pop(0))
        batch, room = [], len(engine.free)
        for request in choose.sample(running, len(running)):
            if choose.random() < 0.1:
                continue  # left out
            left = (request.prompt if request.held < request.prompt else request.held + 1) - request.held
            count = min(left, choose.choice([1, 3, 17, 64]))
            needs = -(-(request.held + count) // BLOCK) - len(request.blocks)
            if needs > room:
                engine.release(request)
                running.remove(request)
                request.prompt = max(request.prompt, request.held)  # read anew, with what was written
                waiting.insert(0, request)
                preempted += 1
                continue
            batch.append((request, count))
            room -= needs
        if batch:
            engine.step(batch, check)
        for request in [request for request in running if request.held >= len(request.tokens)]:
            engine.release(request)
            running.remove(request)
    assert preempted and shared and len(seen) > 200
    assert sum(seen) / len(seen) < 0.9


class NoLooking(TorchDispatchMode):
    """Refuses operators whose results, or their shapes, the host would have to wait for."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in self.waits and not by_mask, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_with_fixed_shapes_nothing_waits_for_the_device(engine):
    engine = engine(blocks=40, fixed_shapes=True)
    selection = engine.selection
    table = torch.arange(20, dtype=torch.int32)[None]
    selected = []
    for held, count in [(0, 100), *((100 + i, 1) for i in range(20))]:
        ids = torch.randint(0, V, (count,))
        step = Step(table, torch.tensor([held + count]), torch.tensor([0, count]), count, torch.tensor([count > 1]),
                    torch.tensor([BUDGET]))  # fmt: skip
        keys, queries, ends = engine.keys[:, ids], engine.queries[:, ids], engine.ends[ids]
        with NoLooking():
            reading = selection.begin(step)
            for layer in range(L):
                selection.add_keys(layer, keys[layer])
                selection.add_queries(layer, queries[layer])
                if layer == 0:
                    selection.note_ends(ends)
        selected.append(int(reading.lengths[0]) < held + count)
    assert selected == [False] + [True] * 20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 1000))
def test_features_do_not_depend_on_how_a_text_is_cut_into_steps(first, second, seed):
    draw = torch.Generator().manual_seed(seed)
    total = first + second + 1
    keys, ends = torch.randn(L, total, HKV, D, generator=draw), torch.rand(total, generator=draw) < 0.2
    table = torch.arange(10)[None]

    def summarised(sizes):
        summaries = BlockSummaries(
            PooledScorer(D), range(L), blocks=10, block_size=BLOCK, slots=2, kv_heads=HKV, head_dim=D,
            dtype=torch.float32, device=torch.device("cpu"), fixed_shapes=seed % 2 == 0,
        )  # fmt: skip
        at = 0
        for size in sizes:
            start = torch.tensor([0, size])
            tokens = tokens_of_step(table, torch.tensor([at + size]), start, BLOCK, size)
            pieces = summaries.cut(tokens, ends[at : at + size], torch.tensor([0]))
            summaries.add(pieces, keys[:, at : at + size], range(L))
            at += size
        return summaries

    whole, parts = summarised([total]), summarised([size for size in (first, second, 1) if size])
    assert torch.equal(whole.lengths, parts.lengths)
    for a, b in zip(whole.features, parts.features, strict=True):
        torch.testing.assert_close(a[:, :10], b[:, :10], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summaries_of_keys_with_a_large_bias_are_those_of_float64(dtype, fixed_shapes):
    """Read in steps of several sizes, so that pieces go on; one dimension turns by more than float16 has squares of."""
    torch.manual_seed(0)
    count, sizes = 6 * BLOCK, [5, 1, 1, 9, 1, 1, 1, 12, 17]
    turned = 300.0 * torch.arange(count).mul(2.5).cos()[:, None, None] * (torch.arange(D) == 0)
    keys = (torch.randn(count, HKV, D) + 300.0 * (torch.arange(D) > 3) + turned).to(dtype)
    made = BlockSummaries(
        PooledScorer(D),
        [0],
        blocks=8,
        block_size=BLOCK,
        slots=2,
        kv_heads=HKV,
        head_dim=D,
        dtype=dtype,
        device=torch.device("cpu"),
        fixed_shapes=fixed_shapes,
    )
    table, at = torch.arange(1, 7)[None], 0
    for size in sizes:
        tokens = tokens_of_step(table, torch.tensor([at + size]), torch.tensor([0, size]), BLOCK, size)
        pieces = made.cut(tokens, torch.zeros(size, dtype=torch.bool), torch.tensor([0]))
        made.add(pieces, keys[None, at : at + size], range(1))
        at += size
    assert at == count
    of_blocks = keys.double().unflatten(0, (-1, BLOCK)).permute(2, 0, 1, 3)  # [Hkv, blocks, tokens, D]
    wanted = torch.cat((of_blocks.mean(2), of_blocks.var(2, unbiased=False)), -1)
    got = made.features[0][:, 1:7, 0]
    assert (wanted > 4e4).any() and got.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
