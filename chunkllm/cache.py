"""The key-value cache of chunk selection: all keys and values, and beside them the selected ones in one buffer.

A decode step writes its key and value behind the selected ones and attends to that buffer: nothing is gathered, joined
or grown. What has been written since then moves to the storage when the selection is refreshed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from chunkllm.errors import ChunkError
from chunkllm.scorers import Scorer, chunk_scores
from chunkllm.selection import Chunks, Rows, choose_tokens, selectable, shares_of_layers, worth
from chunkllm.table import Arriving, ChunkTable, send

if TYPE_CHECKING:
    from chunkllm.attach import Counters, Plan

_SMALLEST_STEP = 1024
_BUFFER_STEP = 64


class ChunkLayer(CacheLayerMixin):
    """One layer of full attention.

    Attributes:
        keys, values: [B, Hkv, room, D], all that were seen, but for the newest where ``selected``. Places beyond
            ``stored`` are not written yet.
        stored: places written.
        selected: whether attention reads the buffer.
        mask: bool [B, slots], the slots of the buffer that hold a token of the row, or None if all do.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, place: int, offload: bool):
        super().__init__()
        self.place = place
        self.selected = False
        self.mask: Tensor | None = None
        self.stored = 0
        self.features: Tensor | None = None
        self._offloads = offload
        self._queries: list[Tensor] = []
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._used = self._flushed = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes shapes, dtypes and device from the first keys and values."""
        self.device = key_states.device
        self.keys, self.values = (self._empty(states, 0) for states in (key_states, value_states))
        self.is_initialized = True

    def _empty(self, like: Tensor, room: int) -> Tensor:
        shape = (*like.shape[:2], room, like.shape[3])
        if not self._offloads:
            return like.new_empty(shape)
        return torch.empty(shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, Hkv, T, D]; returns what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.selected and self._buffer is not None:
            for held, new in zip(self._buffer, (key_states, value_states), strict=True):
                held[:, :, self._used : self._used + 1] = new
            self._used += 1
            return self._buffer[0][:, :, : self._used], self._buffer[1][:, :, : self._used]
        self._store(key_states, value_states)
        if self._offloads:
            if self.stored == key_states.shape[2]:
                return key_states, value_states
            return self._all(self.keys).to(self.device), self._all(self.values).to(self.device)
        return self._all(self.keys), self._all(self.values)

    def _all(self, storage: Tensor | None) -> Tensor:
        assert storage is not None
        return storage[:, :, : self.stored]

    def _store(self, keys: Tensor, values: Tensor) -> None:
        length = self.stored + keys.shape[2]
        self.keys, self.values = self._grown(self.keys, length), self._grown(self.values, length)
        self.keys[:, :, self.stored : length] = keys
        self.values[:, :, self.stored : length] = values
        self.stored = length

    def _grown(self, storage: Tensor | None, length: int) -> Tensor:
        """Storage with room for ``length`` places: an eighth more than needed, so that growing is rare."""
        assert storage is not None
        if length <= storage.shape[2]:
            return storage
        room = -(-(length + length // 8) // _SMALLEST_STEP) * _SMALLEST_STEP
        grown = self._empty(storage, room)
        grown[:, :, : self.stored] = self._all(storage)
        return grown

    def remember(self, queries: Tensor, count: int) -> None:
        """Keeps the queries [B, H, T, D] of the last ``count`` tokens."""
        newest = queries[:, :, -count:]
        self._queries = [*self._queries, newest if queries.shape[2] <= count else newest.clone()][-count:]

    def last_queries(self, count: int) -> Tensor:
        """[B, H, up to count, D], oldest first."""
        return torch.cat(self._queries, 2)[:, :, -count:]

    def add_features(self, features: Tensor, at: np.ndarray, counts: np.ndarray) -> None:
        """Keeps the features [B, Hkv, n, F] of new chunks: of row b the first counts[b], from number at[b] on."""
        total = int((at + counts).max(initial=0))
        if self.features is None:
            self.features = features.new_zeros(*features.shape[:2], 0, features.shape[3])
        if total > self.features.shape[2]:
            room = features.new_zeros(*features.shape[:2], total + total // 4 + 64, features.shape[3])
            room[:, :, : self.features.shape[2]] = self.features
            self.features = room
        for row in np.flatnonzero(counts):
            self.features[row, :, at[row] : at[row] + counts[row]] = features[row, :, : counts[row]]

    def flush(self) -> None:
        """Moves keys and values written since the last refresh to the storage."""
        if self._buffer is not None and self._used > self._flushed:
            self._store(*(held[:, :, self._flushed : self._used] for held in self._buffer))
            self._flushed = self._used

    def settle(self) -> None:
        """Goes back to reading everything."""
        self.flush()
        self.selected, self._buffer, self.mask = False, None, None
        self._used = self._flushed = 0

    @property
    def is_full(self) -> bool:
        """Whether the buffer has no slot left."""
        return self._buffer is not None and self._used >= self._buffer[0].shape[2]

    @property
    def slots(self) -> int:
        """Slots of the buffer that are in use, by selected tokens and those written since."""
        return self._used

    def select(self, rows: np.ndarray, tokens: Tensor, valid: Tensor | None, spare: int) -> None:
        """Gathers the selection of some rows, all of whose keys and values must be in the storage.

        Args:
            rows: which rows; all, unless the layer has a selection already.
            tokens: int64 [len(rows), S], places of the tokens that stay.
            valid: bool [len(rows), S], which of them there are; None if all, and all rows are given.
            spare: slots for tokens to come.
        """
        assert self.keys is not None and self.values is not None
        slots = tokens.shape[1]
        is_whole = len(rows) == len(self.keys)
        if is_whole:
            self._prepare_buffer(slots + spare)
            self._used = self._flushed = slots
        assert self._buffer is not None
        places = torch.nn.functional.pad(tokens, (0, self._buffer[0].shape[2] - slots)).to(self.keys.device)
        for row, of_row in zip(rows.tolist(), places, strict=True):
            self._gather(row, of_row)
        self._set_mask(rows, valid, slots)
        self.selected = True

    def _prepare_buffer(self, slots: int) -> None:
        room = -(-slots // _BUFFER_STEP) * _BUFFER_STEP
        if self._buffer is None or self._buffer[0].shape[2] != room:
            assert self.keys is not None and self.values is not None
            self._buffer = tuple(  # type: ignore[assignment]  # of two
                storage.new_empty((*storage.shape[:2], room, storage.shape[3]), device=self.device)
                for storage in (self.keys, self.values)
            )

    def _gather(self, row: int, places: Tensor) -> None:
        """Fills a row of the buffer, spare slots with anything: whole rows of memory at a time, straight to their place."""
        assert self._buffer is not None
        for storage, buffer in zip((self.keys, self.values), self._buffer, strict=True):
            assert storage is not None
            heads, room, width = storage.shape[1:]
            head = torch.arange(heads, device=places.device)[:, None] * room
            flat, index = storage[row].view(-1, width), (head + places).view(-1)
            target = buffer[row].view(-1, width)
            if self._offloads:
                target.copy_(flat.index_select(0, index), non_blocking=True)
            else:
                torch.index_select(flat, 0, index, out=target)

    def _set_mask(self, rows: np.ndarray, valid: Tensor | None, slots: int) -> None:
        assert self._buffer is not None
        if valid is None:
            self.mask = None
            return
        batch, room = self._buffer[0].shape[0], self._buffer[0].shape[2]
        if self.mask is None or self.mask.shape != (batch, room):
            self.mask = torch.ones(batch, room, dtype=torch.bool, device=self.device)
        for row, of_row in zip(rows.tolist(), valid, strict=True):
            self.mask[row, :slots] = of_row
            self.mask[row, slots : self._used] = False
            self.mask[row, self._used :] = True

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Attention of one query [B, H, 1, D] to the buffer, a key-value head at a time: [B, 1, H, D]."""
        batch, heads, _, width = query.shape
        groups = keys.shape[1]
        mask = None if self.mask is None else self.mask[:, None, None, : keys.shape[2]]
        grouped = query.reshape(batch, groups, heads // groups, width)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return out.reshape(batch, 1, heads, -1)

    def recall(self, scaling: float) -> Tensor:
        """Share of full attention that the buffer holds for the last query: float32 [B, H]. For measurements."""
        assert self._buffer is not None
        keys = self._buffer[0][:, :, : self._used]
        mask = None if self.mask is None else self.mask[:, None, None, : self._used]
        everything = torch.cat((self._all(self.keys).to(self.device), keys[:, :, self._flushed :]), 2)
        query = self.last_queries(1).float()
        held, full = (
            self._log_mass(query * scaling, part, which) for part, which in ((keys, mask), (everything, None))
        )
        return (held - full).exp()

    @staticmethod
    def _log_mass(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, _, width = query.shape
        logits = query.reshape(batch, keys.shape[1], -1, width) @ keys.float().transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return logits.logsumexp(-1).view(batch, heads)

    def get_seq_length(self) -> int:
        """Tokens seen, selected or not."""
        return self.stored + self._used - self._flushed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a layer that keeps everything, since attention masks are made before it is known what is read."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end, if negative; else all but the first so many."""
        self.settle()
        length = self.stored + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, self.stored)
        self.stored = max(length, 0)

    def take_rows(self, rows: Tensor) -> None:
        """Reorders, repeats or drops rows, int64 [rows]."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        on_storage = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, on_storage), self.values.index_select(0, on_storage)
        self._queries = [queries.index_select(0, rows) for queries in self._queries]
        if self.features is not None:
            self.features = self.features.index_select(0, rows)
        if self._buffer is not None:
            self._buffer = tuple(held.index_select(0, rows) for held in self._buffer)  # type: ignore[assignment]
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__(self.place, self._offloads)  # type: ignore[misc]


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
        self._shares: np.ndarray | None = None
        self._placed: list[int] = []
        self._kept = np.zeros((0, 0), np.int64)
        self._kept_later: tuple[np.ndarray, list[Arriving]] | None = None
        self._since = np.zeros(0, np.int64)
        self._is_uncounted = False

    @property
    def full_layers(self) -> list[ChunkLayer]:
        """The layers in which chunks are selected."""
        return [layer for layer in self.layers if isinstance(layer, ChunkLayer)]

    @property
    def _front(self) -> ChunkLayer:
        return self.layers[self.plan.shape.full_layers[0]]  # type: ignore[return-value]

    def begin(self, batch: int, new_tokens: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Before a forward pass of [batch, new_tokens]: refreshes the selection where a chunk has ended."""
        length = self._front.get_seq_length()
        if self.table is None or length == 0:
            self._start(batch, attention_mask)
        elif batch != len(self.table.first):
            raise ChunkError(f"the cache holds {len(self.table.first)} rows, not {batch}")
        elif new_tokens > 1:
            self._check_padding(attention_mask)
        self._read_flags(length)
        self.count_last_step()
        if new_tokens > 1 or length == 0:
            self.settle()
            self._shares = None
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
        self.table = ChunkTable(first, self.plan.max_chunk)
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
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            layer.update(keys, values)
        assert self.table is not None
        self.table.extend(boundaries.cpu().numpy())

    def _check_padding(self, attention_mask: Tensor | None) -> None:
        assert self.table is not None
        if attention_mask is not None and (_padding(attention_mask) != self.table.first).any():
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
            return None if self._slots(held) >= held else every
        if self.plan.every_step or any(layer.is_full for layer in self.full_layers):
            return every
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
        assert self.table is not None
        table, plan, layers = self.table, self.plan, self.full_layers
        for layer in layers:
            layer.flush()
        self._summarise(device)
        starts, lengths = (send(span[rows], device) for span in table.spans())
        recent = np.maximum(plan.local, table.running[rows])
        stand = Rows(*(send(x, device) for x in (table.first[rows], np.full(len(rows), table.length), recent)))
        chunks = selectable(Chunks(starts, lengths), stand, plan.sinks)
        scores = self._scores(rows, Chunks(starts, lengths), device)
        scorer = plan.scorer
        ranks = scores
        if scorer.is_distribution and plan.top_k is None:
            ranks = [worth(score, lengths) for score in scores]
        held = table.length - table.first
        slots = [self._slots(int(held.max()))] * len(layers)
        is_exact = plan.top_k is None and len(held) == 1
        if plan.adaptive:
            slots = self._divided(slots[0], ranks, chunks, recent, int(held.max()))
        if not layers[0].selected or len(rows) == len(held):
            self._placed = slots
        if plan.vote:
            ranks = [torch.stack(ranks).mean(0)] * len(layers)
        kept = []
        for layer, rank, size in zip(layers, ranks, self._placed, strict=True):
            tokens, valid = choose_tokens(rank, chunks, stand, plan.sinks, size, plan.top_k)
            layer.select(rows, tokens, None if is_exact and size <= held[0] else valid, self._spare(len(held)))
            kept.append(Arriving(valid.sum(-1)))
        self._kept_later = (rows, kept)
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

    def _scores(self, rows: np.ndarray, chunks: Chunks, device: torch.device) -> list[Tensor]:
        assert self.table is not None
        scorer: Scorer = self.plan.scorer
        lengths = chunks.lengths.float()
        distances = (self.table.length - chunks.starts - chunks.lengths + 1).clamp(min=1).float()
        everything = len(rows) == len(self.table.first)
        index = None if everything else send(rows, device)
        scores = []
        for layer in self.full_layers:
            queries, features = layer.last_queries(scorer.queries), layer.features
            assert features is not None
            features = features[:, :, : lengths.shape[1]]
            if index is not None:
                queries, features = queries.index_select(0, index), features.index_select(0, index)
            scores.append(chunk_scores(scorer, layer.place, queries, features, lengths, distances))
        return scores

    def _divided(self, slots: int, ranks: list[Tensor], chunks: Chunks, recent: np.ndarray, held: int) -> list[int]:
        """Slots of each layer, as the worth of the chunks at the end of the prompt divides them."""
        always = self.plan.sinks + int(recent.max())
        if self._shares is None:
            shares = shares_of_layers(torch.stack(ranks), chunks.lengths, max(slots - always, 0))
            self._shares = Arriving(shares).get()
        return [min(always + round(float(share) * (slots - always)), held) for share in self._shares]

    def count_last_step(self) -> None:
        """Tokens that the last step kept, of those that it could have read."""
        if not self._is_uncounted or self.table is None:
            return
        self._read_flags(self._front.get_seq_length())
        self._is_uncounted = False
        layers = self.full_layers
        total = self.table.length - self.table.first
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

    def settle(self) -> None:
        """Goes back to full attention: as after a forward pass of several tokens."""
        for layer in self.full_layers:
            layer.settle()

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end (assisted generation does)."""
        self._read_flags(self._front.get_seq_length())
        super().crop(tokens_to_remove)
        if self.table is not None:
            self.table.truncate(self._front.get_seq_length())
            self._summarised = np.minimum(self._summarised, self.table.counts)

    def _take_rows(self, rows: Tensor) -> None:
        """The rows of everything that is kept per row."""
        if self.table is None:
            return
        self._read_flags(self._front.get_seq_length())
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
        for layer in self.layers:
            if not isinstance(layer, ChunkLayer):
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.table is not None:
            self._take_rows(torch.arange(len(self.table.first)).repeat_interleave(repeats))
        for layer in self.layers:
            if not isinstance(layer, ChunkLayer):
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows."""
        self._take_rows(indices)
        for layer in self.layers:
            if not isinstance(layer, ChunkLayer):
                layer.batch_select_indices(indices)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.table = None


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
