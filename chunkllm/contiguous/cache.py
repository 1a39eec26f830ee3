"""The key-value cache of chunk selection: decides before every step whose chunks are chosen anew, and chooses them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Never

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from chunkllm.contiguous.budgets import layer_limits, tokens_kept
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.contiguous.summaries import summarise
from chunkllm.contiguous.table import ChunkTable
from chunkllm.errors import ChunkError
from chunkllm.late import Arriving, send
from chunkllm.scorers import Scorer, chunk_scores
from chunkllm.selection import Chunks, Rows, choose_tokens, score_per_token, selectable


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
        self._kept_later: tuple[np.ndarray, list[Arriving]] | None = None
        self._written: Tensor | None = None
        self._is_uncounted = self._is_in_pass = False
        self._lock = threading.Lock()
        self._begin_rows(0)
        counters.join(self)

    def _begin_rows(self, batch: int) -> None:
        """What is known of rows: nothing yet."""
        self._ended = np.zeros(batch, bool)
        self._summarised = np.zeros(batch, np.int64)
        self._has_chosen = np.zeros(batch, bool)
        self._since = np.zeros(batch, np.int64)
        layers = len(self.plan.shape.full_layers)
        self._limits = np.zeros((layers, batch), np.int64)
        self._kept = np.zeros((layers, batch), np.int64)

    def follow(self, plan: Plan, counters: Counters) -> None:
        """Goes on under another attachment of the same selection."""
        self.plan, self.counters = plan, counters
        counters.join(self)

    def __deepcopy__(self, memo: dict) -> ChunkCache:
        """A cache that goes on by itself, of the same selection: prompts may begin with the same text."""
        self.count_last_step()
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        lock = {"_lock": threading.Lock()}
        memo |= {id(tensor): tensor.detach().clone() for tensor in self._tensors()}  # also where gradients are recorded
        made.__dict__ |= deepcopy({k: v for k, v in vars(self).items() if k not in lock}, memo) | lock
        made.counters.join(made)
        return made

    def _tensors(self) -> Iterator[Tensor]:
        """Those of the layers."""
        for value in (value for layer in self.layers for value in vars(layer).values()):
            yield from filter(torch.is_tensor, value if isinstance(value, list | tuple) else (value,))

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ChunkError(
            "a cache with chunk selection is no file, and shares nothing: copy.deepcopy makes another of it"
        )

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

    def begin(self, batch: int, new_tokens: int, attention_mask: Any, device: torch.device, prompt: int = 0) -> None:
        """Before a forward pass of [batch, new_tokens]: refreshes the selection where a chunk has ended.

        Args:
            batch: rows.
            new_tokens: of each row. Several are read in full.
            attention_mask: int [batch, tokens], or None for no padding; or masks that a model has made of it.
            device: of keys.
            prompt: places that hold the prompt, which is read in full, even if a single token of it is left.
        """
        length = self._front.get_seq_length()
        attention_mask = _of_tokens(attention_mask)
        if self.table is None or length == 0:
            self._start(batch, attention_mask)
        elif batch != len(self.table.first):
            raise ChunkError(f"the cache holds {len(self.table.first)} rows, not {batch}")
        elif new_tokens > 1 or length < prompt:
            self._check_padding(attention_mask, length)
        self.count_last_step()
        if new_tokens > 1 or length < max(prompt, 1):
            self.settle()
            return
        due = self._due(length)
        if due is None:
            self.settle()
        elif due.any():
            self._refresh(due, device)
        self._make_room()
        self._is_uncounted = True

    def enter(self) -> None:
        """A forward pass begins: until `leave` nobody else counts what it does."""
        with self._lock:
            self._is_in_pass = True

    def leave(self) -> None:
        """The forward pass is over."""
        with self._lock:
            self._is_in_pass = False

    def count_if_resting(self) -> None:
        """As `count_last_step`, from any thread: a cache that is in a forward pass counts by itself."""
        with self._lock:
            if not self._is_in_pass:
                self.count_last_step()

    def _start(self, batch: int, attention_mask: Tensor | None) -> None:
        first = np.zeros(batch, np.int64)
        if attention_mask is not None:
            first = _padding(attention_mask)
        self.table = ChunkTable(first, self.plan.max_chunk, self.plan.sinks)
        self._begin_rows(batch)
        self._flags, self._kept_later, self._written, self._is_uncounted = None, None, None, False

    def load(self, states: Iterable[tuple[Tensor, Tensor]], boundaries: Tensor) -> None:
        """Takes the keys and values of a prompt that was read elsewhere; at least one more of its tokens must follow.

        Args:
            states: keys and values, each [B, Hkv, T, D], of every layer; of one with a sliding window the last alone
                will do.
            boundaries: bool [B, T], the tokens at which a chunk ends.
        """
        self._start(len(boundaries), None)
        length = boundaries.shape[1]
        for i, (keys, values) in enumerate(states):
            if not isinstance(self.layers[i], ChunkLayer):
                # It counts the tokens that it is given, and positions follow from that. What is beyond its window,
                # it forgets.
                keys, values = (pad(state, (0, 0, length - state.shape[2], 0)) for state in (keys, values))
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
        self._ended |= self._extended(flags)

    def _extended(self, flags: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """`ChunkTable.extend`, with the chunks that end counted."""
        assert self.table is not None
        before = int(self.table.counts.sum())
        ended = self.table.extend(flags, counts)
        self.counters.add(boundaries=int(self.table.counts.sum()) - before)
        return ended

    def _due(self, length: int) -> np.ndarray | None:
        """bool [B], rows whose selection is due, or None if everything is read."""
        assert self.table is not None
        is_long = self._has_chosen
        if not is_long.all():
            is_long = is_long | self._is_long(length - self.table.first)
        if not is_long.any() or not self._front.has_queries:
            return None
        return is_long if self.plan.every_step else is_long & (self._ended | ~self._has_chosen)

    def _is_long(self, held: np.ndarray) -> np.ndarray:
        """bool [B], rows of ``held`` tokens that keep fewer."""
        return self._slots(held) < held

    def _slots(self, held: np.ndarray) -> np.ndarray:
        """int64 [B], tokens that rows of ``held`` keep on average over layers."""
        assert self.table is not None
        return tokens_kept(self.plan, self.table, held)

    def _refresh(self, due: np.ndarray, device: torch.device) -> None:
        """Chooses the tokens of the rows that are due anew, for the queries of the last tokens, and gathers them.

        With the first of them come the others, whole: the buffer has a place for each row.
        """
        assert self.table is not None
        table, plan, layers = self.table, self.plan, self.full_layers
        rows = np.flatnonzero(due) if self._front.selected else np.arange(len(due))
        for layer in layers:
            layer.flush()
        self._summarise(device)
        every = Chunks(*(send(span[rows], device) for span in table.spans()))
        recent = np.maximum(plan.local, table.running)
        stand = Rows(*(send(x, device) for x in (table.first[rows], table.lengths[rows], recent[rows])))
        chunks = selectable(every, stand, plan.sinks)
        ranks = self._ranks(rows, every, stand.length, device)
        if plan.vote:
            ranks = [torch.stack(ranks).mean(0)] * len(layers)
        held = table.lengths - table.first
        limits = layer_limits(plan, self._slots(held), recent, held)
        self._limits[:, rows] = np.where(due[:, None], limits, held[:, None])[rows].T
        self._since[rows] = 0
        chosen = []
        for layer, rank, limit in zip(layers, ranks, self._limits[:, rows], strict=True):
            slots = int(limit.max())
            differing = None if (limit == slots).all() else send(limit, device)
            tokens, valid = choose_tokens(rank, chunks, stand, plan.sinks, slots, plan.top_k, differing)
            fills_all = plan.top_k is None and len(held) == 1 and slots <= held[0]
            if len(rows) < len(held):
                self._make_room_in(layer, slots)
            layer.select(rows, tokens, None if fills_all else valid, self._spare)
            chosen.append((tokens, valid))
        self._kept_later = (rows, [Arriving(valid.sum(-1)) for _, valid in chosen])
        self._has_chosen |= due
        self._ended &= ~due
        self.counters.add(selections=int(due.sum()))
        if self.counters.record is not None:
            mine = send(np.flatnonzero(due[rows]), device)
            self.counters.record.add(
                rows[due[rows]], table.length, [(tokens[mine], valid[mine]) for tokens, valid in chosen]
            )

    @property
    def _spare(self) -> int:
        """Slots for tokens to come: until a chunk must end, and longer where rows end theirs at different steps."""
        return self.plan.max_chunk + 1 if len(self._since) == 1 else 4 * self.plan.max_chunk

    def _make_room(self) -> None:
        """For the next token, where rows that ended chunks at different steps have filled a buffer."""
        for layer in self.full_layers:
            if layer.selected:
                self._make_room_in(layer)

    def _make_room_in(self, layer: ChunkLayer, slots: int = 0) -> None:
        if layer.has_room(slots):
            return
        layer.flush()
        kept = int((self._limits[self.plan.shape.full_layers.index(layer.place)] + self._since).max())
        layer.make_room(kept, max(kept, slots) + self._spare)

    def _summarise(self, device: torch.device) -> None:
        """Features of the chunks that have ended since the last time."""
        assert self.table is not None
        table, at = self.table, self._summarised
        counts = table.counts - at
        if not counts.any():
            return
        summarise(self.full_layers, self.plan.scorer, at, table.spans(at), device)
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
        self._has_chosen[:] = False

    def note_written(self, tokens: Tensor) -> None:
        """Takes in the text of a call that is over, int64 [B, T], whose last token was written and not read."""
        held = self.table is not None and tokens.shape == (len(self.table.first), self.get_seq_length() + 1)
        self._written = tokens[:, -1:].clone() if held else None

    def was_written(self, tokens: Tensor) -> bool:
        """Whether int64 [B, T] are what the cache holds, and the token that the last call wrote behind it."""
        if self._written is None or tokens.shape != (len(self._written), self.get_seq_length() + 1):
            return False
        return torch.equal(tokens[:, -1:].to(self._written.device), self._written)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops tokens from the end (assisted generation does)."""
        self.count_last_step()
        super().crop(int(tokens_to_remove))  # transformers 5.16 gives a tensor
        self._has_chosen &= self._front.selected
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
        for name in ("_ended", "_summarised", "_has_chosen", "_since"):
            setattr(self, name, getattr(self, name)[on_host])
        self._limits, self._kept, self._written = self._limits[:, on_host], self._kept[:, on_host], None
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
