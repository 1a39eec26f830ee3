"""Chunk selection over a paged key-value cache, for engines that serve many requests at a time.

An engine keeps keys and values in blocks, and reads those that a request's block table lists. Here chunks are scored,
as everywhere in this package, and blocks are read: a block is worth the attention that its chunks are expected to get,
and the best blocks make a shorter block table, another for each layer. What is kept of a request lies in a slot, chosen
blocks by their places in the request's own table. So whatever is remembered, and whoever had a block before, a request
reads no block but its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunkllm.paged.blocks import BlockSummaries, Pieces, Tokens, tokens_of_step
from chunkllm.scorers import Scorer, chunk_scores
from chunkllm.selection import divide

_AT_ONCE = 4  # rows that choose anew in a step, where shapes are fixed


class Step(NamedTuple):
    """What an engine is about to compute, for R rows (requests) with T tokens in all.

    Attributes:
        block_table: int [R, N], the blocks of each row.
        lengths: int [R], tokens of each row, those of this step included.
        query_start: int [R + 1], where each row's tokens begin among the step's.
        tokens: T, known to the host.
        is_prompt: bool [R], whether the row's prompt is still being read.
        budgets: int64 [R], tokens that the row reads at most, on average over layers; rows with no more read all.
        may_select: False if the host knows that no row is longer than its budget.
    """

    block_table: Tensor
    lengths: Tensor
    query_start: Tensor
    tokens: int
    is_prompt: Tensor
    budgets: Tensor
    may_select: bool = True


class Reading(NamedTuple):
    """What the rows of a step read in each of L layers, in place of everything.

    Attributes:
        block_table: int [L, R, W].
        lengths: int [L, R], tokens in those blocks. Rows that select nothing have what they had.
    """

    block_table: Tensor
    lengths: Tensor


class PagedSelection:
    """Chunk selection for the requests of an engine.

    In every step an engine calls `begin`, then for every layer `add_keys` and `add_queries`, and `note_ends` as soon as
    it knows where chunks end. Prompts, and whatever else a row gets several tokens of in one step, are read in full. A
    row selects anew in the first step behind the end of a chunk or a block.

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
        sinks: first tokens, a chunk of their own.
        local: last tokens that always stay, with the rest of their blocks.
        dtype: of keys and queries.
        device: of everything.
        fixed_shapes: whether shapes must not depend on what tensors hold, so that no step waits for the device: by
            default, except on a CPU, where nothing has to wait and shapes are as small as they can be.
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
        sinks: int,
        local: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed_shapes: bool | None = None,
    ):
        self._scorer, self._layers = scorer, layers
        self._weights = weights.to(device)
        self._block_size, self._sinks = block_size, sinks
        self._local_blocks = local_blocks(local, block_size)
        self._fixed_shapes = device.type != "cpu" if fixed_shapes is None else fixed_shapes
        # Rows can be left out of a step and come back: twice as many slots keep what is known of them.
        self._slots = _Slots(2 * rows, device)
        slots = self._slots.count + 1  # the last takes what belongs nowhere
        self.summaries = BlockSummaries(
            scorer,
            layers,
            blocks=blocks,
            block_size=block_size,
            slots=slots,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            fixed_shapes=self._fixed_shapes,
        )
        count = len(layers)
        queries = torch.zeros(count, slots * scorer.queries, heads, head_dim, dtype=dtype, device=device)
        self._queries = list(queries)
        self._known = torch.zeros(slots, dtype=torch.long, device=device)  # last tokens whose queries are there
        self._ended = torch.zeros(slots, dtype=torch.bool, device=device)  # a chunk, since the last selection
        self._has_chosen = torch.zeros(slots, dtype=torch.bool, device=device)
        self._chosen = torch.zeros(count, slots, row_blocks, dtype=torch.int32, device=device)
        self._counts = torch.zeros(count, slots, dtype=torch.long, device=device)
        self._pending = torch.zeros(count, rows, kv_heads, head_dim, dtype=dtype, device=device)
        self._pending_of_layer = list(self._pending)
        self._undivided: list[tuple[int, Tensor]] = []  # layers' keys that came before the step's pieces were known
        self._pieces: Pieces | None = None
        self._defers = False  # a step of few tokens: its keys are taken in with the next

    def begin(self, step: Step) -> Reading | None:
        """Before a step: takes in the one before, and says what to read in each layer; None for everything."""
        self._take_in()
        tokens = tokens_of_step(step.block_table, step.lengths, step.query_start, self._block_size, step.tokens)
        lengths = step.lengths.long()
        sizes = (step.query_start[1:] - step.query_start[:-1]).long()
        slot, is_new = self._slots.assign(step.block_table, lengths - sizes, sizes, step.is_prompt, self._block_size)
        self._forget(torch.zeros_like(self._ended).index_put_((slot,), is_new))
        is_step = (sizes == 1) & ~step.is_prompt
        self._has_chosen[slot] &= is_step
        is_long = is_step & (lengths > step.budgets)
        reading = self._read(step, slot, is_long, lengths) if step.may_select else None
        self._expect(tokens, slot, sizes)
        return reading

    def _forget(self, slots: Tensor) -> None:
        self.summaries.forget(slots)
        for state in (self._known, self._ended, self._has_chosen):
            state.masked_fill_(slots, 0)

    def _expect(self, tokens: Tokens, slot: Tensor, sizes: Tensor) -> None:
        """Where the queries of this step go: of each row the last ones, in place of its oldest."""
        recent = self._scorer.queries
        back = torch.arange(recent if self._fixed_shapes else min(recent, int(sizes.max())), device=slot.device)
        token, there = tokens.last[:, None] - back, back < sizes[:, None]
        place = slot[:, None] * recent + tokens.position[token.clamp(min=0)] % recent
        if self._fixed_shapes:
            nowhere = self._slots.count * recent
            self._query_tokens = token.clamp(min=0).flatten()
            self._query_places = torch.where(there, place, nowhere).flatten()
        else:
            self._query_tokens, self._query_places = token[there], place[there]
        self._takes_every_query = not self._fixed_shapes and len(self._query_tokens) == len(tokens.row) == len(slot)
        self._known[slot] += sizes
        self._tokens, self._slot = tokens, slot
        self._defers = len(tokens.row) <= len(self._pending[0])
        self._pieces = None
        self._undivided.clear()

    def note_ends(self, ends: Tensor | None) -> None:
        """Takes in where chunks end, bool [T]; None if nobody looks for that: then they end with their blocks."""
        position = self._tokens.position
        is_sink_end = position == self._sinks - 1
        ends = is_sink_end if ends is None else ends | is_sink_end
        self._pieces = self.summaries.cut(self._tokens, ends, self._slot)
        self._ended[self._slot] |= self._pieces.is_whole[self._pieces.running]
        for layer, keys in self._undivided:
            self.summaries.add(self._pieces, keys[None], range(layer, layer + 1))
        self._undivided.clear()

    def add_keys(self, layer: int, keys: Tensor) -> None:
        """Takes in the keys [T, Hkv, D], post-RoPE, of the layer with this number among the L."""
        if self._defers:
            self._pending_of_layer[layer].narrow(0, 0, len(keys)).copy_(keys)
        elif self._pieces is None:
            self._undivided.append((layer, keys))
        else:
            self.summaries.add(self._pieces, keys[None], range(layer, layer + 1))

    def add_queries(self, layer: int, queries: Tensor) -> None:
        """Takes in the queries [T, H, D], post-RoPE."""
        if not self._takes_every_query:  # else they are in order
            queries = queries.index_select(0, self._query_tokens)
        self._queries[layer].index_copy_(0, self._query_places, queries)

    def _take_in(self) -> None:
        """The keys of a step of few tokens, of all layers at once."""
        if self._defers and self._pieces is not None:
            count = len(self._pieces.of_token)
            self.summaries.add(self._pieces, self._pending[:, :count], range(len(self._layers)))
        self._pieces = None

    def _read(self, step: Step, slot: Tensor, is_long: Tensor, lengths: Tensor) -> Reading | None:
        is_due = is_long & (self._known[slot] >= self._scorer.queries) & (self._ended | ~self._has_chosen)[slot]
        if self._fixed_shapes:  # so many, whether they are due or not; more have to wait, with the selection they have
            rows = is_due.sort(descending=True, stable=True).indices[:_AT_ONCE]
        else:
            rows = is_due.nonzero()[:, 0]
        if len(rows):
            self._choose(step, rows, torch.where(is_due, slot, self._slots.count)[rows], lengths[rows])
        is_long = is_long & self._has_chosen[slot]
        if not self._fixed_shapes and not is_long.any():
            return None
        return self._tables(step, slot, is_long, lengths)

    def _choose(self, step: Step, rows: Tensor, slot: Tensor, lengths: Tensor) -> None:
        """Chooses the blocks of some rows anew, for the queries of their last tokens."""
        last, recent = self._last_blocks(lengths)
        count = step.block_table.shape[1] if self._fixed_shapes else int(last.max()) + 1
        blocks = step.block_table[rows, :count].long()
        number = torch.arange(count, device=slot.device)
        may = (number >= 1) & (number < recent[:, None])
        # Not the block that this step begins: what is said of that is of whoever had it before.
        scores = self._block_scores(blocks, slot, lengths - 1, number * self._block_size < lengths[:, None] - 1)
        total = step.budgets[rows] // self._block_size - (last - recent + 2)
        shares = divide(total.clamp(min=0), self._weights, recent - 1).minimum(recent[:, None] - 1).T
        most = min(count, self._chosen.shape[2]) if self._fixed_shapes else int(shares.max())
        best = scores.masked_fill(~may, -torch.inf).sort(descending=True, stable=True).indices
        self._chosen[:, slot, :most] = best[:, :, :most].int()
        self._counts[:, slot] = shares
        self._has_chosen[slot], self._ended[slot] = True, False

    def _last_blocks(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of rows' last blocks, and of the first of those that stay for being recent; each int64 like it."""
        last = (lengths - 1) // self._block_size
        return last, (last - self._local_blocks).clamp(min=1)

    def _block_scores(self, blocks: Tensor, slot: Tensor, held: Tensor, there: Tensor) -> Tensor:
        """The share of attention that each block is expected to get, float32 [L, K, N].

        Args:
            blocks: int64 [K, N], of K rows.
            slot: int64 [K].
            held: int64 [K], tokens cached.
            there: bool [K, N], the blocks that hold any of them.
        """
        lengths = self.summaries.lengths[blocks] * there[:, :, None]
        start = torch.arange(blocks.shape[1], device=blocks.device)[:, None] * self._block_size
        distances = (held[:, None, None] + 1 - start - lengths.cumsum(-1)).clamp(min=1)
        flat = lengths.flatten(1).float(), distances.flatten(1).float()
        recent = self._scorer.queries
        places = slot[:, None] * recent + torch.arange(recent, device=slot.device)
        by_layer = []
        for i, layer in enumerate(self._layers):
            features = self.summaries.features[i].index_select(1, blocks.flatten()).unflatten(1, blocks.shape)
            features = features.flatten(2, 3).transpose(0, 1)
            queries = self._queries[i][places].transpose(1, 2)
            scores = chunk_scores(self._scorer, layer, queries, features, *flat)
            by_layer.append(scores.view(lengths.shape).sum(-1))
        return torch.stack(by_layer)

    def _tables(self, step: Step, slot: Tensor, selects: Tensor, lengths: Tensor) -> Reading:
        """Block tables: the first block, the chosen ones, the last ones."""
        last, recent = self._last_blocks(lengths)
        counts = self._counts[:, slot]
        width = min(step.block_table.shape[1], self._chosen.shape[2])
        if not self._fixed_shapes:
            width = int(((counts + last - recent) * selects).max()) + 2
        place = torch.arange(width, device=slot.device)
        chosen = torch.cat((torch.zeros_like(self._chosen[:, slot, :1]), self._chosen[:, slot, : width - 1]), -1)
        behind = recent[:, None] + place - counts[..., None] - 1
        number = torch.where(place <= counts[..., None], chosen, behind).minimum(last[:, None]).clamp(min=0)
        own = step.block_table.expand(len(counts), -1, -1)
        tables = own.gather(2, number)
        if self._fixed_shapes or not selects.all():
            tables = own.clone().index_copy_(2, place, torch.where(selects[:, None], tables, own[:, :, :width]))
        tokens = (counts + 1 + last - recent) * self._block_size + (lengths - 1) % self._block_size + 1
        return Reading(tables, torch.where(selects, tokens, lengths).to(step.lengths.dtype))


class _Slots:
    """Finds rows again, step after step, by the block that holds their last token.

    Args:
        count: S.
        device: of everything.
    """

    def __init__(self, count: int, device: torch.device):
        self.count = count
        self._block = torch.full((count + 1,), -1, dtype=torch.long, device=device)
        self._length = torch.zeros(count + 1, dtype=torch.long, device=device)
        self._used = torch.zeros(count + 1, dtype=torch.long, device=device)
        self._step = 0

    def assign(
        self, block_table: Tensor, held: Tensor, sizes: Tensor, is_prompt: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Slots of rows.

        A row that begins with blocks of another's prompt can look like that one going on. What is kept is right for
        both, since it follows from the tokens before; but only one can have the slot, and that is the one that writes.

        Args:
            block_table: int [R, N].
            held: int64 [R], tokens before this step.
            sizes: int64 [R], tokens of this step; rows without any get slot S.
            is_prompt: bool [R].
            block_size: tokens of a block.

        Returns:
            int64 [R], and bool [R], whether the row is new there.
        """
        rows = torch.arange(len(held), device=held.device)
        before = block_table[rows, (held - 1).clamp(min=0) // block_size].long()
        same = (self._block == before[:, None]) & (self._length == held[:, None]) & ((held > 0) & (sizes > 0))[:, None]
        same &= rows[:, None] == (same * (2 - is_prompt[:, None].long())).argmax(0)
        newest = same * (1 + self._used)
        is_new, slot = ~same.any(1), newest.argmax(1)
        free = torch.where(same.any(0), self._step + 1, self._used)[: self.count].argsort(stable=True)
        slot = torch.where(is_new, free[(is_new & (sizes > 0)).cumsum(0) - 1], slot)
        slot = torch.where(sizes > 0, slot, self.count)
        self._step += 1
        lengths = held + sizes
        self._block[slot] = block_table[rows, (lengths - 1).clamp(min=0) // block_size].long()
        self._length[slot], self._used[slot] = lengths, self._step
        self._block[self.count] = -1
        return slot, is_new


def local_blocks(local: int, block_size: int) -> int:
    """Blocks before the one that is being written that always stay, so that no fewer than ``local`` tokens do."""
    return -(-local // block_size)
