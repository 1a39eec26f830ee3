"""An engine with a paged cache, and a plain account of what each of its requests reads."""

import random
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chunkllm.paged.replayed import ReplayedSelection
from chunkllm.paged.selection import PagedSelection, Step
from chunkllm.paged.tables import local_blocks
from chunkllm.scorers import PooledScorer, chunk_scores, chunk_statistics
from chunkllm.selection import divide

L, H, HKV, D, M = 3, 4, 2, 8, 4
V, BLOCK, ROWS, ROW_BLOCKS = 50, 8, 4, 20
SINKS, LOCAL, BUDGET = 2, 8, 48
WEIGHTS = torch.tensor([2.0, 0.5, 0.5])
PIECES = 1  # of a block of 8


@dataclass(eq=False)
class Request:
    tokens: list
    prompt: int
    budget: int = BUDGET
    held: int = 0
    known: int = 0  # tokens whose queries are known
    ended: bool = False  # a piece, since the last selection
    waited: int = 0  # steps, for a selection
    slot: int = -1
    rested: bool = False  # in its last step
    quiet: int = 0  # steps of the engine before that in which all rested
    blocks: list = field(default_factory=list)
    chosen: list | None = None  # of each layer, blocks by number


def step_of_one(table, held, count, budget, *, most=None, is_prompt=None, slots=None):
    """A step of one row, with ``count`` tokens behind the ``held`` ones, whose blocks [N] follow each other."""
    length = held + count
    return Step(
        table[None],
        torch.tensor([length], dtype=torch.int32),
        torch.tensor([0, count], dtype=torch.int32),
        torch.arange(held, length),
        np.array([count]),
        np.array([count > 1 if is_prompt is None else is_prompt]),
        np.array([budget]),
        np.array([length if most is None else most]),
        slots=slots,
    )


class NoLooking(TorchDispatchMode):
    """Refuses operators whose results, or their shapes, the host would have to wait for."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert name not in self.waits and not by_mask, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Operators as a CUDA graph has them: replayed with the tensors that they had, and without any Python of theirs."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self._calls:
            again = function(*args, **kwargs)
            several = [each if isinstance(each, (tuple, list)) else (each,) for each in (results, again)]
            for held, new, declared in zip(*several, function._schema.returns, strict=False):
                if declared.alias_info is None and isinstance(held, torch.Tensor):  # else it is there already
                    held.copy_(new)


class Engine:
    """Keys, queries and ends of chunks follow from tokens; blocks are given, shared, taken back and reused.

    With ``slots``, so many requests have places in a table, which are taken back and reused in any order. With
    ``rests`` the selection can read keys again, and rows rest that are not near their budgets. With ``kernels`` Triton
    writes the tables. With ``replays``, steps of single tokens can be replayed.
    """

    def __init__(
        self, blocks, seed=0, fixed_shapes=False, rows=ROWS, slots=None, rests=False, kernels=False, replays=False
    ):
        draw = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(L, V, HKV, D, generator=draw)
        self.queries = torch.randn(L, V, H, D, generator=draw)
        self.ends = torch.rand(V, generator=draw) < 0.15
        self.scorer = PooledScorer(D, queries=M)
        self.replays, fixed_shapes = replays, fixed_shapes or replays
        self.fixed_shapes, self.rests = fixed_shapes, rests and not (fixed_shapes and slots is None)
        self.cache = torch.full((L, blocks, BLOCK, HKV, D), torch.nan)
        self.quiet = 0  # steps in which all rested
        self.choose = random.Random(seed)
        self.selection = (ReplayedSelection if replays else partial(PagedSelection, fixed_shapes=fixed_shapes))(
            self.scorer,
            range(L),
            WEIGHTS,
            heads=H,
            kv_heads=HKV,
            head_dim=D,
            blocks=blocks,
            block_size=BLOCK,
            rows=rows,
            row_blocks=ROW_BLOCKS,
            slots=slots,
            sinks=SINKS,
            local=LOCAL,
            dtype=torch.float32,
            device=torch.device("cpu"),
            kernels=kernels,
            read_keys=(lambda layer, blocks: self.cache[layer, blocks]) if rests else None,
        )
        self.free = list(range(blocks))
        self.owners = {}  # block -> number of requests
        self.cached = {}  # what full blocks hold -> block
        self.slots = slots
        self.free_slots = list(range(slots or 0))
        self.left = {}  # slot -> the request that had it, and its last block

    def admit(self, request):
        """Takes over full blocks that hold the same beginning; at least one token is left to compute."""
        request.blocks, request.held, request.known = [], 0, 0
        request.chosen, request.ended, request.waited, request.quiet = None, False, 0, self.quiet
        if self.slots is not None:
            request.slot = self.free_slots.pop(self.choose.randrange(len(self.free_slots)))
        while (request.held + BLOCK) < len(request.tokens):
            block = self.cached.get(tuple(request.tokens[: request.held + BLOCK]))
            if block is None:
                break
            request.blocks.append(block)
            self.owners[block] = self.owners.get(block, 0) + 1
            request.held += BLOCK
        before, last = self.left.get(request.slot, (None, None))
        if before and request.held and before.held == request.held and last == request.blocks[-1]:
            assert before.tokens[: before.held] == request.tokens[: request.held]
            request.known, request.ended = before.known, before.ended  # what is known is right for it as well

    def release(self, request):
        if self.slots is not None:
            self.free_slots.append(request.slot)
            self.left[request.slot] = (
                Request(request.tokens, 0, 0, request.held, request.known, request.ended),
                (request.blocks[-1] if request.blocks and not request.rested else None),
            )
        for block in request.blocks:
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
                self.cached = {text: held for text, held in self.cached.items() if held != block}
                self.free.append(block)
        request.blocks = []

    def step_of(self, batch):
        """What the engine says of a step of (request, tokens) pairs, and the ids of its tokens; takes blocks for it."""
        for request, count in batch:
            while len(request.blocks) * BLOCK < request.held + count:
                block = self.free.pop(0)
                self.owners[block] = 1
                request.blocks.append(block)
        padding = self.choose.randint(0, 3) if self.slots is not None else 0  # as a CUDA graph's batch has it
        self.rows = len(batch) + padding
        rows = batch + [(None, 0)] * padding
        sizes = torch.tensor([count for _, count in rows])
        lengths = torch.tensor([request.held + count if request else 0 for request, count in rows])
        limit = 0 if self.rests and self.fixed_shapes else self.choose.choice([0, 0, 40])
        most = np.array([min(int(n) + limit, ROW_BLOCKS * BLOCK) if n else 0 for n in lengths])
        self.places = [
            request.blocks[at // BLOCK] * BLOCK + at % BLOCK
            for request, count in batch
            for at in range(request.held, request.held + count)
        ]
        starts = torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)))
        table = torch.zeros(len(rows), ROW_BLOCKS, dtype=torch.int32)
        for row, (request, _) in enumerate(batch):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        step = Step(
            table,
            lengths.int(),
            starts.int(),
            torch.tensor(self.places),
            sizes.numpy(),
            np.array([request is not None and request.held < request.prompt for request, _ in rows]),
            np.array([request.budget if request else 0 for request, _ in rows]),
            most,
        )
        if self.slots is not None:
            given = [request.slot if request else self.choose.randint(-1, self.slots - 1) for request, _ in rows]
            step = step._replace(slots=np.array(given))
        ids = [token for request, count in batch for token in request.tokens[request.held : request.held + count]]
        self.ids = torch.tensor(ids)
        if self.rests:
            self.rest(batch, most)
        return step, self.ids

    def rest(self, batch, most):
        """Slots of rows that rest know nothing, and after a step in which all do, none does."""
        for (request, _), n in zip(batch, most, strict=False):
            request.rested = bool(n + M <= request.budget)
            if request.rested:
                self.left.pop(request.slot, None)
        all_rest = all(request.rested for request, _ in batch)
        if self.replays and all(count <= 1 for _, count in batch):
            all_rest = False  # such a step is told of all the same
        for request, _ in batch:
            if request.quiet != self.quiet:  # it was left out then
                request.known, request.chosen = 0, None
            request.quiet = self.quiet + all_rest
        if all_rest:
            self.quiet += 1
            self.left.clear()

    def tell(self, ids):
        """The calls that a step owes."""
        for layer in range(L):
            self.selection.add(layer, self.keys[layer, ids], self.queries[layer, ids])
            if layer == 0:
                self.selection.note_ends(self.ends[ids])

    def done(self, batch):
        """The step was computed."""
        self.cache.flatten(1, 2)[:, self.places] = self.keys[:, self.ids]
        for request, count in batch:
            request.held += count
            request.known += count
            for end in range(BLOCK, request.held + 1, BLOCK):
                self.cached.setdefault(tuple(request.tokens[:end]), request.blocks[end // BLOCK - 1])

    def step(self, batch, check):
        """Computes (request, tokens) pairs; hands each row's reading, or None, to ``check``."""
        step, ids = self.step_of(batch)
        reading = self.selection.begin(step)
        check(self, batch, [None if reading is None else of_row(reading, row) for row in range(len(batch))])
        self.tell(ids)
        self.done(batch)


def of_row(reading, row):
    """The block tables and lengths of a row in each layer."""
    return reading.block_table[:, row], reading.lengths[:, row]


def pieces_of(tokens, ends, pieces):
    """(start, stop) of every piece that is whole."""
    found, start, number = [], 0, 0
    for i, token in enumerate(tokens):
        is_edge = i % BLOCK == BLOCK - 1
        if is_edge or ((ends[token] or i == SINKS - 1) and number < pieces - 1):
            found.append((start, i + 1))
            start, number = i + 1, 0 if is_edge else number + 1
    return found


def chosen_blocks(engine, request, pieces):
    """The blocks that each layer chooses for a request's next token, by number."""
    last, recent = last_blocks(request)
    held = request.tokens[: request.held]
    whole = pieces_of(held, engine.ends, pieces)
    total = torch.tensor([max(request.budget // BLOCK - (last - recent + 2), 0)])
    shares = divide(total, WEIGHTS, torch.tensor([recent - 1]))[0].clamp(max=recent - 1)
    chosen = []
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
        chosen.append(order.tolist())
    return chosen


def last_blocks(request):
    """Numbers of the block of a request's next token, and of the first of those that stay for being recent."""
    last = request.held // BLOCK
    return last, max(1, last - local_blocks(LOCAL, BLOCK))


def expected(engine, batch, pieces):
    """Blocks that each layer reads for each row's next token, by number; None for all.

    Whoever has waited longest chooses first; with fixed shapes, as many as keep a batch from waiting for long.
    """
    is_long, due = [], []
    for request, count in batch:
        is_step = count == 1 and request.held >= request.prompt
        if not is_step:
            request.chosen = None
        is_long.append(is_step and request.held + 1 > request.budget)
        if is_long[-1] and request.known >= M and (request.ended or request.chosen is None):
            due.append(request)
            request.waited += 1
        else:
            request.waited = 0
    due.sort(key=lambda request: -request.waited)
    if engine.fixed_shapes:
        due = due[: max(4, -(-engine.rows // (BLOCK // pieces)))]
    for request in due:
        request.chosen, request.ended, request.waited = chosen_blocks(engine, request, pieces), False, 0
    wanted = []
    for (request, count), long in zip(batch, is_long, strict=True):
        last, recent = last_blocks(request)
        some = long and request.chosen is not None
        wanted.append([[0, *chosen, *range(recent, last + 1)] for chosen in request.chosen] if some else None)
        whole = pieces_of(request.tokens[: request.held + count], engine.ends, pieces)
        request.ended |= bool(whole) and whole[-1][1] == request.held + count
    return wanted


def reads_everything(request, count, got):
    """Whether a row reads all that it holds; ``got`` is its reading, or None."""
    if got is None:
        return True
    table, lengths = got
    n, blocks = request.held + count, -(-(request.held + count) // BLOCK)
    return lengths.tolist() == [n] * L and table[:, :blocks].tolist() == [request.blocks[:blocks]] * L


def checker(pieces, seen):
    """Checks what rows read; appends the share of blocks that a row read to ``seen``."""

    def check(engine, batch, readings):
        for (request, count), got, wanted in zip(batch, readings, expected(engine, batch, pieces), strict=True):
            if wanted is None:
                assert reads_everything(request, count, got)
                continue
            table, lengths = got
            n = request.held + count
            for layer, numbers in enumerate(wanted):
                assert int(lengths[layer]) == (len(numbers) - 1) * BLOCK + (n - 1) % BLOCK + 1
                physical = table[layer, : len(numbers)].tolist()
                assert physical[-1] == request.blocks[numbers[-1]]
                assert sorted(physical) == sorted(request.blocks[number] for number in numbers)
            seen.append(sum(map(len, wanted)) / L / -(-n // BLOCK))

    return check


def random_request(choose, beginnings):
    tokens = list(choose.choice(beginnings)) if choose.random() < 0.5 else []
    prompt = choose.randint(max(len(tokens) + 1, 6), 90)
    tokens += choose.choices(range(V), k=prompt + choose.randint(5, 60) - len(tokens))
    return Request(tokens[: ROW_BLOCKS * BLOCK], min(prompt, 100), choose.choice([BUDGET, BUDGET, 64, 2**31 - 1]))


@dataclass
class Schedule:
    """Requests that come and go, in pieces, in any order, left out of steps, with shared beginnings, preempted."""

    engine: Engine
    choose: random.Random
    rows: int
    requests: int
    preempted: int = 0
    shared: int = 0

    def run(self, step):
        """Hands every step's batch to ``step``, which computes it."""
        engine, choose = self.engine, self.choose
        beginnings = [choose.choices(range(V), k=k) for k in (24, 40)]
        waiting = [random_request(choose, beginnings) for _ in range(self.requests)]
        running = []
        while waiting or running:
            while waiting and len(running) < self.rows and choose.random() < max(0.7, 1 - 2 / self.rows):
                engine.admit(waiting[0])
                self.shared += bool(waiting[0].blocks)
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
                    self.preempted += 1
                    continue
                batch.append((request, count))
                room -= needs
            if batch:
                step(batch)
            for request in [request for request in running if request.held >= len(request.tokens)]:
                engine.release(request)
                running.remove(request)
