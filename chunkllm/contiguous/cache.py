"""The key-value cache of chunk selection: decides before every step whose chunks are chosen anew, and chooses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.contiguous.table import ChunkTable
from chunkllm.errors import ChunkError
from chunkllm.late import Arriving, send
from chunkllm.scorers import Scorer, chunk_scores
from chunkllm.selection import Chunks, Rows, choose_tokens, divide, score_per_token, selectable

_GROWTH = 1.01


class ChunkCache(Cache):
    """Keys and values of a model with a selection attached. `ChunkSelection.attach` makes it; ``generate`` returns it.

    Layers with sliding windows keep the cache that transformers gives them.

    Args:
        plan: what is selected, and how.
        counters: where it is counted.
    """

    def __init__(self, plan: Plan, counters: Counters):
        others = DynamicCache(config=plan.config).layers
        layers = [
            ChunkLayer(i, plan.offload) if i in plan.shape.full_layers else other for i, other in enumerate(others)
        ]
        super().__init__(layers=layers)
        self.plan = plan
        self.counters = counters
        self.table: ChunkTable | None = None
        self._flags: Arriving | None = None
        self._ended = np.zeros(0, bool)
        self._summarised = np.zeros(0, np.int64)
        self._shares: list[int] = []
        self._placed_for = 0
        self._has_short_rows = False
        self._kept = np.zeros((0, 0), np.int64)
        self._kept_later: tuple[np.ndarray, list[Arriving]] | None = None
        self._since = np.zeros(0, np.int64)
        self._is_uncounted = False

    @property
    def full_layers(self) -> list[ChunkLayer]:
        """The layers in which chunks are selected."""
        return [layer for layer in self.layers if isinstance(layer, ChunkLayer)]

    @property
    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, ChunkLayer)]

    @property
    def _front(self) -> ChunkLayer:
        return self.layers[self.plan.shape.full_layers[0]]  # type: ignore[return-value]

    def begin(self, batch: int, new_tokens: int, attention_mask: Any, device: torch.device) -> None:
        """Before a forward pass of [batch, new_tokens]: refreshes the selection where a chunk has ended."""
        length = self._front.get_seq_length()
        attention_mask = _of_tokens(attention_mask)
        if self.table is None or length == 0:
            self._start(batch, attention_mask)
        elif batch != len(self.table.first):
            raise ChunkError(f"the cache holds {len(self.table.first)} rows, not {batch}")
        elif new_tokens > 1:
            self._check_padding(attention_mask, length)
        self.count_last_step()
        if new_tokens > 1 or length == 0:
            self.settle()
            return
        rows = self._rows_to_refresh(length)
        if rows is None:
            self.settle()
        elif len(rows):
            self._refresh(rows, device)
        self._is_uncounted = True

    def _start(self, batch: int, attention_mask: Tensor | None) -> None:
        first = np.zeros(batch, np.int64)
        if attention_mask is not None:
            first = _padding(attention_mask)
        self.table = ChunkTable(first, self.plan.max_chunk, self.plan.sinks)
        self._ended = np.zeros(batch, bool)
        self._summarised = np.zeros(batch, np.int64)
        self._flags = None

    def load(self, states: Iterable[tuple[Tensor, Tensor]], boundaries: Tensor) -> None:
        """Takes the keys and values of a prompt that was read elsewhere; at least one more of its tokens must follow.

        Args:
            states: keys and values, each [B, Hkv, T, D], of every layer.
            boundaries: bool [B, T], the tokens at which a chunk ends.
        """
        self._start(len(boundaries), None)
        for i, (keys, values) in enumerate(states):
            self.update(keys, values, i)
        assert self.table is not None
        self.table.extend(boundaries.cpu().numpy())

    def _check_padding(self, attention_mask: Tensor | None, length: int) -> None:
        assert self.table is not None
        if attention_mask is None:
            return
        first = _padding(attention_mask)
        # Rows of whose prompt nothing but padding was read so far.
        begins_later = (self.table.first >= length) & (first >= length)
        self.table.first = np.where(begins_later, first, self.table.first)
        if (first != self.table.first).any():
            raise ChunkError("the attention mask has another padding than the one that the cache was begun with")

    def observe(self, flags: Tensor) -> None:
        """Takes the boundaries among the tokens of this forward pass, bool [B, T], without waiting for them."""
        self._flags = Arriving(flags)

    def _read_flags(self, length: int) -> None:
        """Brings the table up to date; tokens whose boundaries nobody looked for have none."""
        assert self.table is not None
        missing = length - self.table.length
        if missing <= 0:
            return
        flags = np.zeros((len(self.table.first), missing), bool)
        if self._flags is not None:
            known = self._flags.get()
            flags[:, -known.shape[1] :] = known[:, -missing:]
            self._flags = None
        before = int(self.table.counts.sum())
        self._ended |= self.table.extend(flags)
        self.counters.boundaries += int(self.table.counts.sum()) - before

    def _rows_to_refresh(self, length: int) -> np.ndarray | None:
        """Rows whose selection is due, or None if everything is read."""
        assert self.table is not None
        held = length - int(self.table.first.min())
        every = np.arange(len(self.table.first))
        if not self._front.selected:
            return None if self._slots(held) >= held or not self._front.has_queries else every
        if self.plan.every_step or any(layer.is_full for layer in self.full_layers):
            return every
        if self._ended.any() and self._slots(held) > _GROWTH * self._placed_for:
            return every  # a share of a longer text is more; all rows have as many slots
        return np.flatnonzero(self._ended)

    def _slots(self, held: int) -> int:
        """S, tokens that a row of ``held`` keeps on average over layers."""
        assert self.table is not None
        plan, table = self.plan, self.table
        least = plan.sinks + max(plan.local, plan.max_chunk)
        if plan.top_k is not None:
            return min(least + table.longest(plan.top_k), held)
        wanted = plan.budget if plan.budget is not None else round(plan.retention * held)
        return max(wanted, least)

    def _refresh(self, rows: np.ndarray, device: torch.device) -> None:
        """Chooses the tokens of some rows anew, for the queries of the last tokens, and gathers them."""
        assert self.table is not None
        table, plan, layers = self.table, self.plan, self.full_layers
        for layer in layers:
            layer.flush()
        self._summarise(device)
        every = Chunks(*(send(span[rows], device) for span in table.spans()))
        recent = np.maximum(plan.local, table.running[rows])
        stand = Rows(*(send(x, device) for x in (table.first[rows], table.lengths[rows], recent)))
        chunks = selectable(every, stand, plan.sinks)
        ranks = self._ranks(rows, every, stand.length, device)
        held = table.lengths - table.first
        if len(rows) == len(held):
            self._placed_for = self._slots(int(held.max()))
            self._shares = self._divided(self._placed_for, plan.sinks + int(recent.max()), int(held.max()))
            self._has_short_rows = bool((held <= self._placed_for).any())
        is_short = held[rows] <= self._placed_for
        if plan.vote:
            ranks = [torch.stack(ranks).mean(0)] * len(layers)
        chosen = []
        for layer, rank, share in zip(layers, ranks, self._shares, strict=True):
            slots, limits = share, None
            if self._has_short_rows and share < self._placed_for:  # rows within the budget keep all in every layer
                slots = self._placed_for
                limits = send(np.where(is_short, slots, share), device)
            tokens, valid = choose_tokens(rank, chunks, stand, plan.sinks, slots, plan.top_k, limits)
            fills_all = plan.top_k is None and len(held) == 1 and slots <= held[0]
            layer.select(rows, tokens, None if fills_all else valid, self._spare(len(held)))
            chosen.append((tokens, valid))
        self._kept_later = (rows, [Arriving(valid.sum(-1)) for _, valid in chosen])
        if self.counters.record is not None:
            self.counters.record.add(rows, table.length, chosen)
        self.counters.selections += len(rows)
        self._ended[rows] = False
        if len(self._since) != len(held):
            self._since = np.zeros(len(held), np.int64)
        self._since[rows] = 0

    def _spare(self, batch: int) -> int:
        """Slots for tokens to come: until a chunk must end, and longer where rows end theirs at different steps."""
        return self.plan.max_chunk + 1 if batch == 1 else 4 * self.plan.max_chunk

    def _summarise(self, device: torch.device) -> None:
        """Features of the chunks that have ended since the last time."""
        assert self.table is not None
        table, at = self.table, self._summarised
        counts = table.counts - at
        if not counts.any():
            return
        starts, lengths = table.spans(at)
        begin = int(starts[:, 0][counts > 0].min())
        stop = int((starts + lengths).max())
        chunk_of = np.full((len(at), stop - begin), starts.shape[1], np.int64)
        for row in np.flatnonzero(counts):
            number = np.repeat(np.arange(starts.shape[1]), lengths[row])
            chunk_of[row, starts[row, 0] - begin : starts[row, 0] - begin + len(number)] = number
        ends = send(np.maximum(starts + lengths - 1 - begin, 0), device)
        places = send(chunk_of, device)
        for layer in self.full_layers:
            assert layer.keys is not None
            keys = layer.keys[:, :, begin:stop].to(device)
            features = self.plan.scorer.summarise(layer.place, keys, places, ends)
            layer.add_features(features.to(keys.dtype), at, counts)
        self._summarised = table.counts.copy()

    def _ranks(self, rows: np.ndarray, chunks: Chunks, held: Tensor, device: torch.device) -> list[Tensor]:
        """What chunks are chosen by, float [rows, C] for each layer: scores, or scores per token under a budget."""
        assert self.table is not None
        scorer: Scorer = self.plan.scorer
        lengths = chunks.lengths.float()
        distances = (held[:, None] - chunks.starts - chunks.lengths + 1).clamp(min=1).float()
        everything = len(rows) == len(self.table.first)
        index = None if everything else send(rows, device)
        by_token = scorer.is_distribution and self.plan.top_k is None
        ranks = []
        for layer in self.full_layers:
            queries, features = layer.last_queries(scorer.queries), layer.features
            assert features is not None
            features = features[:, :, : lengths.shape[1]]
            if index is not None:
                queries, features = queries.index_select(0, index), features.index_select(0, index)
            scores = chunk_scores(scorer, layer.place, queries, features, lengths, distances)
            ranks.append(score_per_token(scores, chunks.lengths) if by_token else scores)
        return ranks

    def _divided(self, slots: int, always: int, held: int) -> list[int]:
        """Slots of each layer, ``slots`` on average, ``always`` at least, and no more than there are tokens."""
        to_choose, most = torch.tensor([max(slots - always, 0)]), torch.tensor([held - always])
        return (always + divide(to_choose, self.plan.weights, most)[0]).tolist()

    def count_last_step(self) -> None:
        """Tokens that the last step kept, of those that it could have read."""
        if self.table is None:
            return
        self._read_flags(self._front.get_seq_length())
        if not self._is_uncounted:
            return
        self._is_uncounted = False
        layers = self.full_layers
        total = self.table.lengths - self.table.first
        if not self._front.selected:
            self.counters.count(np.broadcast_to(total, (len(layers), len(total))), total)
            return
        if self._kept_later is not None:
            rows, kept = self._kept_later
            if self._kept.shape != (len(layers), len(total)):
                self._kept = np.zeros((len(layers), len(total)), np.int64)
            self._kept[:, rows] = np.stack([arriving.get() for arriving in kept])
            self._kept_later = None
        self._since += 1
        self.counters.count(self._kept + self._since, total)

    def attend(
        self, layer: ChunkLayer, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None
    ) -> Tensor | None:
        """Attention [B, T, H, D] of queries [B, H, T, D] to what a layer has returned; None for the model's own."""
        layer.remember(query, self.plan.scorer.queries)
        return layer.attend(query, keys, values, scaling) if layer.selected else None

    def settle(self) -> None:
        """Goes back to full attention: as after a forward pass of several tokens."""
        for layer in self.full_layers:
            layer.settle()

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end (assisted generation does)."""
        self.count_last_step()
        super().crop(int(tokens_to_remove))  # transformers 5.16 gives a tensor
        if self.table is not None:
            self.table.truncate(self._front.get_seq_length())
            self._summarised = np.minimum(self._summarised, self.table.counts)

    def _take_rows(self, rows: Tensor) -> None:
        """The rows of everything that is kept per row."""
        if self.table is None:
            return
        self.count_last_step()
        on_host = rows.cpu().numpy()
        self.table.take_rows(on_host)
        self._ended, self._summarised = self._ended[on_host], self._summarised[on_host]
        if len(self._since):
            self._since, self._kept = self._since[on_host], self._kept[:, on_host]
        for layer in self.full_layers:
            layer.take_rows(rows.to(layer.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        self._take_rows(beam_idx)
        for layer in self._others:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.table is not None:
            self._take_rows(torch.arange(len(self.table.first)).repeat_interleave(repeats))
        for layer in self._others:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._take_rows(indices)
        for layer in self._others:
            layer.batch_select_indices(indices)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.table = None


def _of_tokens(attention_mask: Any) -> Tensor | None:
    """A mask of tokens [B, places], also where a model has made masks of it before it calls its decoder.

    Those come by kind of layer. Full attention's is [B, 1, T, places], whose last token reads all but padding; or None,
    where there is no padding.
    """
    if not isinstance(attention_mask, Mapping):
        return attention_mask
    made = attention_mask.get("full_attention")
    if made is None or made.dim() != 4:
        return made
    return made[:, 0, -1] if made.dtype == torch.bool else made[:, 0, -1] == 0


def _padding(attention_mask: Tensor) -> np.ndarray:
    """int64 [B], places before each row's first token.

    Raises:
        ChunkError: padding elsewhere than on the left, or a mask that is not two-dimensional.
    """
    if attention_mask.dim() != 2:
        raise ChunkError("chunk selection takes attention masks of two dimensions [batch, tokens] only")
    held = attention_mask.cpu().numpy().astype(bool)
    first = np.where(held.any(1), held.argmax(1), held.shape[1])
    if (np.arange(held.shape[1]) >= first[:, None]).sum() != held.sum():
        raise ChunkError("chunk selection takes padding on the left only: set tokenizer.padding_side = 'left'")
    return first
