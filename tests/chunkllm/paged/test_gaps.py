"""Steps that lack a call, or have one twice: the next one says so, and nobody reads by what was missed."""

import random

import pytest

from chunkllm import ChunkError
from tests.chunkllm.paged.engine import BLOCK, ROWS, Engine, L, M, Schedule, last_blocks, of_row, reads_everything

KINDS = ["no ends", "ends twice", "no layer", "layer twice", "fails within", "fails later"]


class Faulty:
    """An engine whose steps go wrong now and then, and an account of what is known in spite of that."""

    def __init__(self, engine, kind, monkeypatch):
        self.engine, self.kind, self.monkeypatch = engine, kind, monkeypatch
        self.choose = random.Random(1)
        self.noted = set()  # full blocks whose last token came in a step that went well
        self.gaps = 0  # that were found
        self.known = {}  # request -> gaps before, and tokens known since
        self.had_gap = False
        self.selected = self.unsummarised = 0

    def step(self, batch):
        step, ids = self.engine.step_of(batch)
        selection = self.engine.selection
        if self.had_gap:
            with pytest.raises(ChunkError, match="a step had a gap"):
                selection.begin(step)
            if self.choose.random() < 0.5:
                self.engine.tell(ids)  # of no effect
            self.gaps += 1
            self.engine.left.clear()
            self.note(batch, is_well=False)
            self.had_gap = False
        else:
            self.had_gap = self.choose.random() < 0.04
            if self.had_gap and self.kind == "fails within":
                with self.monkeypatch.context() as patch, pytest.raises(MemoryError):
                    patch.setattr(selection, "_expect", no_memory)
                    patch.setattr(selection, "_rest", no_memory)
                    selection.begin(step)
            else:
                reading = selection.begin(step)
                for row, (request, count) in enumerate(batch):
                    self.check(request, count, None if reading is None else of_row(reading, row))
                self.tell(ids)
            self.note(batch, is_well=not self.had_gap)
        self.engine.done(batch)

    def tell(self, ids):
        """The step's calls, with a fault if it is to have one."""
        selection, engine = self.engine.selection, self.engine
        often = {"no": 0, "ends": 2, "layer": 2}[self.kind.split()[0]] if self.is_miscounted() else 1
        what = self.kind.split()[-1 if often == 0 else 0]
        faulty = self.choose.randrange(L)
        for layer in range(L):
            for _ in range(often if layer == faulty and what == "layer" else 1):
                selection.add(layer, engine.keys[layer, ids], engine.queries[layer, ids])
            for _ in range(0 if layer else often if what == "ends" else 1):
                if self.had_gap and self.kind == "fails later":
                    with self.monkeypatch.context() as patch, pytest.raises(MemoryError):
                        patch.setattr(selection.summaries, "cut", no_memory)
                        selection.note_ends(engine.ends[ids])
                else:
                    selection.note_ends(engine.ends[ids])

    def is_miscounted(self):
        return self.had_gap and not self.kind.startswith("fails")

    def note(self, batch, is_well):
        for request, count in batch:
            gaps, known = self.known.get(request, (self.gaps, request.known))
            known = known if gaps == self.gaps else 0
            self.known[request] = self.gaps, known + count * is_well
            for place in range(request.held, request.held + count):
                block = request.blocks[place // BLOCK]
                if not is_well or place % BLOCK == 0:
                    self.noted.discard(block)
                if is_well and place % BLOCK == BLOCK - 1:
                    self.noted.add(block)

    def check(self, request, count, got):
        gaps, known = self.known.get(request, (self.gaps, request.known))
        known = min(known, request.known)
        is_step = count == 1 and request.held >= request.prompt
        is_long = is_step and request.held + 1 > request.budget and gaps == self.gaps and known >= M
        is_summarised = self.engine.rests or self.noted.issuperset(request.blocks[: request.held // BLOCK])
        self.unsummarised += is_long and not is_summarised
        if not (is_long and is_summarised):
            assert reads_everything(request, count, got)
            return
        self.selected += 1
        if self.engine.rests and request.held >= request.budget + BLOCK:  # keys were read again
            assert not reads_everything(request, count, got)
        table, lengths = got
        last, recent = last_blocks(request)
        for layer in range(L):
            blocks = -(-int(lengths[layer]) // BLOCK)
            numbers = [request.blocks.index(block) for block in table[layer, :blocks].tolist()]
            assert len(set(numbers)) == blocks
            assert numbers[0] == 0 and numbers[recent - last - 1 :] == list(range(recent, last + 1))


def no_memory(*_):
    raise MemoryError


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize(("fixed_shapes", "slots"), [(False, None), (True, ROWS)])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_gap_rows_read_everything_until_they_are_known_again(monkeypatch, kind, fixed_shapes, slots, rests):
    monkeypatch.setattr("chunkllm.paged.blocks._TOKENS_PER_PIECE", BLOCK // 2)
    engine = Engine(blocks=46, fixed_shapes=fixed_shapes, slots=slots, rests=rests)
    faulty = Faulty(engine, kind, monkeypatch)
    Schedule(engine, random.Random(3), rows=ROWS, requests=25).run(faulty.step)
    assert faulty.gaps > 4 and faulty.selected > 50
    assert rests or faulty.unsummarised > 20  # else keys are read again
