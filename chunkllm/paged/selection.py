"""Chunk selection over a paged key-value cache, for engines that serve many requests at a time.

An engine keeps keys and values in blocks, and reads those that a request's block table lists. Here chunks are scored,
as everywhere in this package, and blocks are read: a block is worth the attention that its chunks are expected to get,
and the best blocks make a shorter block table, another for each layer. What is kept of a request lies in a slot, chosen
blocks by their places in the request's own table. So whatever is remembered, and whoever had a block before, a request
reads no block but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from chunkllm.paged.blocks import BlockSummaries, Pieces, Tokens, tokens_of_step
from chunkllm.paged.calls import Calls, GapError
from chunkllm.paged.held import HeldTokens
from chunkllm.paged.slots import FoundSlots, GivenSlots, Rows, Slots
from chunkllm.paged.tables import Choices, Reading, last_blocks, local_blocks, read_tables
from chunkllm.scorers import Scorer, scores_of_layers
from chunkllm.selection import divide

_LEAST_AT_ONCE = 4  # rows that choose anew in a step, where shapes are fixed
_BYTES_AT_ONCE = 1 << 24  # of features in float32, of the layers that are scored together
_NEVER = -(1 << 40)  # tokens known, of a row that holds blocks that nobody summarised


class Step(NamedTuple):
    """What an engine is about to compute, for R rows (requests) with T tokens in all.

    Tensors are on the device. Arrays hold what the host knows.

    Attributes:
        block_table: int [R, N], the blocks of each row.
        lengths: int [R], tokens of each row, those of this step included.
        query_start: int [R + 1], where each row's tokens begin among the step's.
        places: int [T], where in the cache each token's key goes: block · block size + place in the block.
        sizes: int64 [R], the row's tokens in this step; 0 for rows that only pad.
        is_prompt: bool [R], whether the row's prompt is still being read.
        budgets: int64 [R], tokens that the row reads at most, on average over layers; rows with no more read all.
        most: int64 [R], tokens of each row, or more. What is computed is as wide as the largest.
        slots: int64 [R], the row's place in the engine's table of requests, its own as long as the request is there;
            None if the engine does not say. With several rows of one request, these read everything.
    """

    block_table: Tensor
    lengths: Tensor
    query_start: Tensor
    places: Tensor
    sizes: np.ndarray
    is_prompt: np.ndarray
    budgets: np.ndarray
    most: np.ndarray
    slots: np.ndarray | None = None

    @property
    def most_long(self) -> int:
        """Rows that are longer than their budgets, or more."""
        return int((self.most > self.budgets).sum())


class PagedSelection:
    """Chunk selection for the requests of an engine.

    In every step an engine calls `begin`, then `add` for every layer, and `note_ends` as soon as it knows where chunks
    end, each of these once. Prompts, and whatever else a row gets several tokens of in one step,
    are read in full. A row selects anew in the first step behind the end of a chunk or a block. With fixed shapes, some
    rows do at a time, those first that have waited longest; so many that none waits for more tokens than a piece of a
    chunk has on average (16, or a block if that is shorter). Until then a row reads what it read before.

    Rows that are not near their budgets *rest*: of them nothing is kept but where chunks end, and a step of such rows
    alone wants no keys and no queries (`wants_keys`). When a row comes near, its keys are read again from the cache.

    If a step lacks a call or has one twice, the next `begin` raises, and that step is to be read in full, without any
    calls. All slots are forgotten then, and so are the blocks that the two steps wrote: a row reads everything until it
    has as many new queries as the scorer wants. Where keys cannot be read again, it does so for good if one of its full
    blocks has no summary.

    Args:
        scorer: scores chunks.
        layers: places in the model of the L layers.
        weights: float [L], in what proportion layers share a budget.
        heads: H, query heads.
        kv_heads: Hkv, key-value heads.
        head_dim: D.
        blocks: of the cache.
        block_size: tokens of a block.
        rows: that a step can have.
        row_blocks: N, that a row can have.
        slots: places in the engine's table of requests, if it tells each row's; else rows are found by their blocks.
        kernels: whether tables are written by a kernel of Triton, with fixed shapes.
        read_keys: reads the cache: keys [n, block size, Hkv, D] of a layer, by its number, and int64 [n] blocks. None
            if that cannot be done: then no row rests. With fixed shapes none does either if the engine tells no slots.
        sinks: first tokens, a chunk of their own.
        local: last tokens that always stay, with the rest of their blocks.
        dtype: of keys and queries.
        device: of everything.
        fixed_shapes: whether shapes must not depend on what tensors hold, so that no step waits for the device: by
            default, except on a CPU, where nothing has to wait and shapes are as small as they can be.

    Attributes:
        selections: how often a row has chosen anew so far, an int64 scalar on the device.
    """

    def __init__(
        self,
        scorer: Scorer,
        layers: Sequence[int],
        weights: Tensor,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block_size: int,
        rows: int,
        row_blocks: int,
        slots: int | None = None,
        sinks: int,
        local: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed_shapes: bool | None = None,
        kernels: bool = False,
        read_keys: Callable[[int, Tensor], Tensor] | None = None,
    ):
        self._scorer, self._layers = scorer, layers
        self._weights = weights.to(device)
        self._block_size, self._sinks = block_size, sinks
        self._local_blocks, self._row_blocks = local_blocks(local, block_size), row_blocks
        self._fixed_shapes = device.type != "cpu" if fixed_shapes is None else fixed_shapes
        self._read_tables = _tables_by(kernels, self._fixed_shapes)
        # Rows can be left out of a step and come back: twice as many slots keep what is known of them.
        self._slots: Slots = FoundSlots(2 * rows, device) if slots is None else GivenSlots(slots, device)
        places = self._slots.count + 1  # the last takes what belongs nowhere
        self.summaries = BlockSummaries(
            scorer,
            layers,
            blocks=blocks,
            block_size=block_size,
            slots=places,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            fixed_shapes=self._fixed_shapes,
        )
        self._held: HeldTokens | None = None
        if read_keys is not None and (slots is not None or not self._fixed_shapes):
            self._held = HeldTokens(
                self.summaries,
                read_keys,
                len(layers),
                slots=self._slots.count,
                block_size=block_size,
                sinks=sinks,
                fixed_shapes=self._fixed_shapes,
            )
        self._awake_slots: dict[int, int] = {}  # of the step before, and tokens of each row there, or more
        count = len(layers)
        queries = torch.zeros(count, places * scorer.queries, heads, head_dim, dtype=dtype, device=device)
        self._queries, self._queries_of_layer = queries, queries.unbind()
        self._known = torch.zeros(places, dtype=torch.long, device=device)  # last tokens whose queries are there
        self._ended = torch.zeros(places, dtype=torch.bool, device=device)  # a chunk, since the last selection
        self._has_chosen = torch.zeros(places, dtype=torch.bool, device=device)
        self._waited = torch.zeros(places, dtype=torch.long, device=device)  # steps since it had to choose anew
        # The first block and behind it the chosen ones; as wide as was needed so far, since limits are long.
        number = torch.int16 if row_blocks <= torch.iinfo(torch.int16).max else torch.int32
        self._chosen = torch.zeros(count, places, 1, dtype=number, device=device)
        self._counts = torch.zeros(count, places, dtype=torch.int32, device=device)
        # Of a step of few tokens, keys and behind them queries, of all heads: taken in with the next.
        self._pending = torch.zeros(count, rows, kv_heads + heads, head_dim, dtype=dtype, device=device)
        self._kv_heads = kv_heads
        self._await(rows)
        self._undivided: list[tuple[int, Tensor]] = []  # layers' keys that came before the step's pieces were known
        self._pieces: Pieces | None = None
        self._defers = False  # a step of few tokens
        self._calls = Calls(count)
        self._written: list[Tensor] = []  # blocks of steps that are not taken in
        self.selections = torch.zeros((), dtype=torch.long, device=device)

    @property
    def wants_keys(self) -> bool:
        """Whether the step under way wants each layer's keys and queries; else it wants `note_ends` alone."""
        return self._calls.wants_keys

    def begin(self, step: Step) -> Reading | None:
        """Before a step: takes in the one before, and says what to read in each layer; None for everything.

        Raises:
            GapError: the step before had a gap.
            ChunkError: this one's slots are missing.
        """
        has_gap = not self._is_whole() and bool(self._written)
        self._written.append(step.places // self._block_size)
        if has_gap:
            self._forget_gap()
            raise GapError(
                "a step had a gap: note where chunks end, and add keys and queries of each layer, once in every step"
            )
        self._take_in()
        del self._written[:-1]
        self._places = step.places
        is_awake = self._are_awake(step)
        wants_keys, reading = self._wants(step, is_awake), None
        if wants_keys:
            reading = self._begin_awake(step, is_awake)
        else:
            self._rest()
        self._calls.open(wants_keys)
        return reading

    def forget(self) -> None:
        """Nothing is known any more, neither of rows nor of blocks."""
        self._calls.close()
        self._written.append(torch.arange(self.summaries.nowhere, device=self._weights.device))
        self._forget_gap()

    def _is_whole(self) -> bool:
        """The step under way ends: whether all of its calls came."""
        return self._calls.close()

    def _wants(self, step: Step, is_awake: np.ndarray) -> bool:
        """Whether a step wants keys and queries."""
        return bool(is_awake.any())

    def _are_awake(self, step: Step) -> np.ndarray:
        """Rows of which more is kept, bool [R]: before they may select, the scorer wants some queries."""
        if self._held is None:
            return np.ones(len(step.most), bool)
        return (step.sizes > 0) & (step.most + self._scorer.queries > step.budgets)

    def _rest(self) -> None:
        """A step of rows that rest: what others knew, their blocks may have, too."""
        self.summaries.discard(self._written[-1])
        self._slots.forget()
        self._awake_slots.clear()

    def _begin_awake(self, step: Step, is_awake: np.ndarray) -> Reading | None:
        device = self._weights.device
        awake, is_prompt = send(is_awake, device), send(step.is_prompt, device)
        tokens = tokens_of_step(step.lengths, step.query_start, step.places, self._block_size)
        lengths = step.lengths.long()
        sizes = (step.query_start[1:] - step.query_start[:-1]).long()
        slot, is_new = self._slots.assign(self._rows_of(step, lengths, sizes, awake, is_prompt))
        self._forget(slot, is_new)
        if not is_awake.all():
            resting, nowhere = ~awake[tokens.row], self.summaries.nowhere
            self.summaries.discard(torch.where(resting, tokens.block, nowhere))
            tokens = tokens._replace(block=torch.where(resting, nowhere, tokens.block))
        is_new = self._catch_up(step, is_awake, slot, is_new, lengths - sizes)
        is_step = (sizes == 1) & ~is_prompt & (slot < self._slots.count)
        self._has_chosen[slot] &= is_step
        reading = self._reading(step, slot, is_step, lengths)
        self._expect(tokens, slot, is_new, sizes, int(step.sizes.max(initial=0)))
        return reading

    def _rows_of(self, step: Step, lengths: Tensor, sizes: Tensor, awake: Tensor, is_prompt: Tensor) -> Rows:
        held = lengths - sizes
        last = (torch.stack((held, lengths), 1) - 1).clamp(min=0) // self._block_size
        block, next_block = step.block_table.gather(1, last).long().unbind(1)
        given = None if step.slots is None else send(step.slots, awake.device)
        return Rows(held, sizes, block, next_block, is_prompt, awake, given)

    def _forget(self, slot: Tensor, is_new: Tensor) -> None:
        if not self._fixed_shapes and not is_new.any():
            return
        self.summaries.forget(slot, is_new)
        for state in (self._known, self._ended, self._has_chosen, self._waited):
            state[slot] = state[slot].masked_fill(is_new, 0)

    def _catch_up(self, step: Step, is_awake: np.ndarray, slot: Tensor, is_new: Tensor, held: Tensor) -> Tensor:
        """Takes in what new rows hold already. Returns which rows, bool [R], begin their slots with this step."""
        if self._held is None:
            return is_new
        wanted = is_new & (held > 0) & (slot < self._slots.count)
        rows = self._may_be_new(step, is_awake) if self._fixed_shapes else wanted.nonzero()[:, 0].tolist()
        if not rows:
            return is_new
        for row in rows:
            blocks = step.block_table[row, : -(-int(step.most[row]) // self._block_size)].long()
            self._held.take_in(blocks, held[row], torch.where(wanted[row], slot[row], self._slots.count))
        is_caught = np.isin(np.arange(len(is_awake)), rows)
        return is_new & ~(send(is_caught, is_new.device) & wanted)

    def _may_be_new(self, step: Step, is_awake: np.ndarray) -> list[int]:
        """Rows that rested before or were not there, as far as the host knows: of prompts it knows all lengths."""
        assert step.slots is not None
        rows = is_awake.nonzero()[0].tolist()
        before = [self._awake_slots.get(int(step.slots[row])) for row in rows]
        self._awake_slots = {int(step.slots[row]): int(step.most[row]) for row in rows}
        return [
            row
            for row, most in zip(rows, before, strict=True)
            if most is None or (step.is_prompt[row] and most != step.most[row] - step.sizes[row])
        ]

    def _forget_gap(self) -> None:
        """Some calls of a step are missing: whatever may depend on them is forgotten."""
        for blocks in self._written:
            self._discard(blocks)
        self._written.clear()
        self._awake_slots.clear()
        self._undivided.clear()
        self._pieces = None
        self._slots.forget()

    def _discard(self, blocks: Tensor) -> None:
        """Nothing is known of these blocks, int [T], nor where chunks end in them."""
        self.summaries.discard(blocks)
        if self._held is not None:
            self._held.forget(blocks)

    def _expect(self, tokens: Tokens, slot: Tensor, is_new: Tensor, sizes: Tensor, most: int) -> None:
        """A step's keys, queries and ends of chunks are to come; a row has at most so many tokens in it."""
        self._known[slot] += sizes
        self._tokens, self._slot, self._is_new = tokens, slot, is_new
        count = len(tokens.row)
        self._defers = count <= self._pending.shape[1]
        if self._defers and count != len(self._pending_of_layer[0]):
            self._await(count)
        self._pieces = None
        self._undivided.clear()
        self._expect_queries(tokens, slot, sizes, most)

    def _expect_queries(self, tokens: Tokens, slot: Tensor, sizes: Tensor, most: int) -> None:
        """Where the queries of this step go: of each row the last ones, in place of its oldest."""
        recent = self._scorer.queries
        back = torch.arange(min(recent, most), device=slot.device)
        token, there = tokens.last[:, None] - back, back < sizes[:, None]
        place = slot[:, None] * recent + tokens.position[token.clamp(min=0)] % recent
        if self._fixed_shapes:
            nowhere = self._slots.count * recent
            self._query_tokens = token.clamp(min=0).flatten()
            self._query_places = torch.where(there, place, nowhere).flatten()
        else:
            self._query_tokens, self._query_places = token[there], place[there]

    def _await(self, count: int) -> None:
        """Keys and queries of so many tokens are to come."""
        self._pending_of_layer = self._pending[:, :count].unbind()

    def note_ends(self, ends: Tensor | None) -> None:
        """Takes in where chunks end, bool [T]; None if nobody looks for that: then they end with their blocks."""
        if not self._calls.is_open:
            return
        self._note_ends(ends)
        self._calls.note_ends()

    def _note_ends(self, ends: Tensor | None) -> None:
        if ends is not None and self._held is not None:
            self._held.note(self._places, ends)
        if self._calls.wants_keys:
            self._cut(ends)

    def _cut(self, ends: Tensor | None) -> None:
        position = self._tokens.position
        is_sink_end = position == self._sinks - 1
        ends = is_sink_end if ends is None else ends | is_sink_end
        self._pieces = self.summaries.cut(self._tokens, ends, self._slot, self._is_new)
        self._ended[self._slot] |= self._pieces.is_whole[self._pieces.running]
        for layer, keys in self._undivided:
            self.summaries.add(self._pieces, keys[None], range(layer, layer + 1))
        self._undivided.clear()

    def add(self, layer: int, keys: Tensor, queries: Tensor) -> None:
        """Takes in keys [T, Hkv, D] and queries [T, H, D], post-RoPE, of the layer with this number among the L."""
        if not self._calls.wants_keys:
            return
        if self._defers:
            torch.cat((keys, queries), 1, out=self._pending_of_layer[layer])
        else:
            self._add_many(layer, keys, queries)
        self._calls.add(layer)

    def _add_many(self, layer: int, keys: Tensor, queries: Tensor) -> None:
        queries = queries.index_select(0, self._query_tokens)
        self._queries_of_layer[layer].index_copy_(0, self._query_places, queries)
        if self._pieces is None:
            self._undivided.append((layer, keys))
        else:
            self.summaries.add(self._pieces, keys[None], range(layer, layer + 1))

    def _take_in(self) -> None:
        """The keys and queries of a step of few tokens, of all layers at once."""
        if self._defers and self._pieces is not None:
            keys = self._pending[:, : len(self._pieces.of_token), : self._kv_heads]
            queries = self._pending.index_select(1, self._query_tokens)[:, :, self._kv_heads :]
            self.summaries.add(self._pieces, keys, range(len(self._layers)))
            self._queries.index_copy_(1, self._query_places, queries)
        self._pieces = None

    def _reading(self, step: Step, slot: Tensor, is_step: Tensor, lengths: Tensor) -> Reading | None:
        """What a step reads, of whose rows these, bool [R], may select."""
        if not step.most_long:
            return None
        choices = self._choices(step, slot, is_step, lengths)
        if not self._fixed_shapes and not choices.selects.any():
            return None
        reading = self._read_tables(choices)
        return reading._replace(lengths=reading.lengths.to(step.lengths.dtype))

    def _choices(self, step: Step, slot: Tensor, is_step: Tensor, lengths: Tensor) -> Choices:
        """What the rows have chosen, after those that are due have chosen anew."""
        budgets = send(step.budgets, lengths.device)
        is_long = is_step & (lengths > budgets)
        table = step.block_table[:, : -(-int(step.most.max()) // self._block_size)]
        is_known = self._known[slot] >= self._scorer.queries
        is_due = is_long & is_known & (self._ended[slot] | ~self._has_chosen[slot])
        if self._fixed_shapes:
            waited = torch.where(is_due, self._waited[slot] + 1, 0)
            self._waited[slot] = waited
            rows = waited.sort(descending=True, stable=True).indices[: self._at_once(step)]
        else:
            rows = is_due.nonzero()[:, 0]
        if len(rows):
            nowhere = self._slots.count  # for rows that fill up a fixed number
            self._choose(table[rows], budgets[rows], torch.where(is_due, slot, nowhere)[rows], lengths[rows])
        of_slots = self._chosen, self._counts, self._block_size, self._local_blocks
        return Choices(table, slot, is_long & self._has_chosen[slot], lengths, *of_slots)

    def _at_once(self, step: Step) -> int:
        """Rows that choose anew in a step, where shapes are fixed: all of a batch in as many steps as pieces are long.

        A row cannot have to more often than that, and those that have waited longest go first: none is left behind.
        """
        rows = len(step.lengths)
        most = max(_LEAST_AT_ONCE, -(-rows // self.summaries.tokens_per_piece))
        return min(most, step.most_long)

    def _choose(self, table: Tensor, budgets: Tensor, slot: Tensor, lengths: Tensor) -> None:
        """Chooses the blocks of K rows anew, for the queries of their last tokens; table is int [K, N]."""
        last, recent = last_blocks(lengths, self._block_size, self._local_blocks)
        count = table.shape[1] if self._fixed_shapes else int(last.max()) + 1
        blocks = table[:, :count].long()
        number = torch.arange(count, device=slot.device)
        may = (number >= 1) & (number < recent[:, None])
        held = lengths - 1
        # Not the block that this step begins: what is said of that is of whoever had it before.
        there = number * self._block_size < held[:, None]
        pieces = self.summaries.lengths[blocks] * there[:, :, None]
        is_full = number < (held // self._block_size)[:, None]
        is_known = (~is_full | (pieces.sum(-1) == self._block_size)).all(1)
        scores = self._block_scores(blocks, slot, held, pieces)
        total = budgets // self._block_size - (last - recent + 2)
        shares = divide(total.clamp(min=0), self._weights, recent - 1).minimum(recent[:, None] - 1).T
        most = count if self._fixed_shapes else int(shares.max())
        best = scores.masked_fill(~may, -torch.inf).sort(descending=True, stable=True).indices
        self._make_room(most)
        self._chosen[:, slot, 1 : most + 1] = best[:, :, :most].to(self._chosen.dtype)
        self._counts[:, slot] = shares.int()
        self._has_chosen[slot] = is_known
        self._known[slot] = self._known[slot].masked_fill(~is_known, _NEVER)
        self._ended[slot], self._waited[slot] = False, 0
        self.selections += (is_known & (slot < self._slots.count)).sum()

    def _make_room(self, most: int) -> None:
        """For as many chosen blocks, and for those read behind them."""
        wanted, width = most + self._local_blocks + 2, self._chosen.shape[2]
        if wanted > width:  # twice as many, lest each step of a long text copies everything
            width = min(max(wanted, 2 * width), self._row_blocks + self._local_blocks + 2)
            self._chosen = torch.nn.functional.pad(self._chosen, (0, width - self._chosen.shape[2]))

    def _block_scores(self, blocks: Tensor, slot: Tensor, held: Tensor, lengths: Tensor) -> Tensor:
        """The share of attention that each block is expected to get, float32 [L, K, N].

        Args:
            blocks: int64 [K, N], of K rows.
            slot: int64 [K].
            held: int64 [K], tokens cached.
            lengths: int64 [K, N, M], of the pieces in the blocks, 0 where there is none.
        """
        start = torch.arange(blocks.shape[1], device=blocks.device)[:, None] * self._block_size
        distances = (held[:, None, None] + 1 - start - lengths.cumsum(-1)).clamp(min=1)
        flat = lengths.flatten(1).float(), distances.flatten(1).float()
        recent = self._scorer.queries
        places = slot[:, None] * recent + torch.arange(recent, device=slot.device)
        at_once = max(1, _BYTES_AT_ONCE // (4 * blocks.numel() * self.summaries.features[0, :, 0].numel()))
        by_layer = []
        for first in range(0, len(self._layers), at_once):
            some = slice(first, first + at_once)
            features = self.summaries.features[some].index_select(2, blocks.flatten()).unflatten(2, blocks.shape)
            features = features.flatten(3, 4).transpose(1, 2)
            queries = self._queries[some, places].transpose(2, 3)
            by_layer.append(scores_of_layers(self._scorer, self._layers[some], queries, features, *flat))
        return torch.cat(by_layer).unflatten(2, lengths.shape[1:]).sum(-1)


def _tables_by(kernels: bool, fixed_shapes: bool) -> Callable[..., Reading]:
    if not (kernels and fixed_shapes):
        return partial(read_tables, fixed_shapes=fixed_shapes)
    from chunkllm.paged import table_kernel  # which imports Triton

    return table_kernel.read_tables
