"""The key-value cache of the lossless mode: what is drafted reads a selection and leaves no trace, and all else reads
everything, at the end of texts of which each may be as long as it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.grouped import grouped_attention
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.late import send
from chunkllm.pace import MOST_DRAFTED


@dataclass(frozen=True)
class Verifying:
    """A pass over the last tokens of all rows, which reads everything.

    Attributes:
        stop: places that are read, of the longest row.
        places: int64 [B, T], where the tokens stand; None if all rows have them at the end of the storage.
        mask: bool [B, 1, H / Hkv · T, stop], what each query reads that shares a key-value head; None for all.
        seen: places, from the first on, that all queries read.
    """

    stop: int
    places: Tensor | None
    mask: Tensor | None
    seen: int


class VerifiedCache(ChunkCache):
    """Keys and values of the lossless mode, all of them from passes that read everything.

    Attributes:
        is_drafting: whether tokens are being drafted.
        verifying: the pass that is under way, if it is one over drafted tokens.
    """

    def __init__(self, plan: Plan, counters: Counters):
        super().__init__(plan, counters)
        self.is_drafting = False
        self.verifying: Verifying | None = None
        self._drafted = 0
        self._held = np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B], tokens that rows hold, padding on the left included."""
        assert self.table is not None
        return self.table.lengths

    @property
    def is_ragged(self) -> bool:
        """Whether rows may be of different lengths: sliding layers go forward and back all rows at once."""
        return not self._others

    @property
    def gains(self) -> bool:
        """Whether a selection leaves anything out."""
        assert self.table is not None
        return bool(self._is_long(self.table.lengths - self.table.first).any())

    def share(self, weights: int) -> float:
        """What a drafted token reads, of the bytes that one with full attention reads.

        Args:
            weights: bytes that either reads besides keys and values.
        """
        assert self.table is not None and self._front.keys is not None
        shape, held = self.plan.shape, self.table.lengths - self.table.first
        token = 2 * len(shape.full_layers) * shape.kv_heads * shape.head_dim * self._front.keys.element_size()
        kept = np.minimum(self._slots(held), held)
        return (weights + token * int(kept.sum())) / (weights + token * int(held.sum()))

    def begin(self, batch: int, new_tokens: int, attention_mask: Any, device: torch.device, prompt: int = 0) -> None:
        """Before a forward pass: see `ChunkCache.begin`."""
        if not self.is_drafting and self.verifying is None:
            super().begin(batch, new_tokens, attention_mask, device, prompt)

    def observe(self, flags: Tensor) -> None:
        """See `ChunkCache.observe`; boundaries among drafted tokens are looked for when they are verified."""
        if not self.is_drafting:
            super().observe(flags)

    def count_last_step(self) -> None:
        """See `ChunkCache.count_last_step`."""
        if not self.is_drafting and self.verifying is None:
            super().count_last_step()

    def summarise(self, device: torch.device) -> None:
        """Makes the features of the chunks that have ended, which choosing would do otherwise."""
        self.count_last_step()
        self._summarise(device)

    @contextmanager
    def drafting(self, device: torch.device) -> Iterator[None]:
        """Chooses what is read anew, and while this lasts tokens are written that leave no trace."""
        self.count_last_step()
        assert self.table is not None
        self._refresh(np.ones(len(self.table.first), bool), device)
        self._held = self.table.lengths - self.table.first
        self.is_drafting = True
        try:
            yield
        finally:
            self.is_drafting = False
            self._drafted = self._front.get_seq_length() - self._front.stored
            for layer in self.full_layers:
                layer.abandon()
            for layer in self._others:
                layer.crop(-self._drafted)

    @contextmanager
    def reading(self, tokens: int, device: torch.device) -> Iterator[None]:
        """While this lasts, a forward pass of so many tokens, [B, tokens], reads everything; `keep` must follow."""
        self.count_last_step()
        assert self.table is not None
        lengths, first = self.table.lengths, self.table.first
        stop = int(lengths.max()) + tokens
        is_even = bool((lengths == lengths[0]).all())
        seen = 0 if first.any() else int(lengths.min())
        ends = send(lengths, device)[:, None] + torch.arange(tokens, device=device)  # places of the tokens
        mask = None
        if tokens > 1 or not is_even or first.any():
            place = torch.arange(stop, device=device)
            mask = (place <= ends[:, :, None]) & (place >= send(first, device)[:, None, None])
            mask = mask[:, None].repeat(1, 1, self.plan.shape.heads // self.plan.shape.kv_heads, 1)
        self.verifying = Verifying(stop, None if is_even else ends, mask, seen)
        try:
            yield
        finally:
            self.verifying = None

    def attend(
        self, layer: ChunkLayer, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None
    ) -> Tensor | None:
        """See `ChunkCache.attend`."""
        if self.verifying is not None:
            layer.remember_all(query, self.plan.scorer.queries)
            return grouped_attention(query, keys, values, self.verifying.mask, scaling, self.verifying.seen)
        return (
            layer.attend(query, keys, values, scaling)
            if self.is_drafting
            else super().attend(layer, query, keys, values, scaling)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values; returns what attention reads."""
        layer = self.layers[layer_idx]
        if self.verifying is not None and self.verifying.places is not None and isinstance(layer, ChunkLayer):
            return layer.write(key_states, value_states, self.verifying.places, self.verifying.stop)
        return super().update(key_states, value_states, layer_idx, *args, **options)

    def keep(self, read: int, counts: np.ndarray) -> None:
        """Of the tokens of the last pass a row keeps so many, from the first on.

        Args:
            read: T, tokens of the pass.
            counts: int64 [B], 0 to T.
        """
        assert self.table is not None
        stood = int(self.table.lengths.max())
        flags = np.zeros((len(counts), read), bool) if self._flags is None else self._flags.get()
        self._extended(flags, counts)
        self._flags = None
        length = int(self.table.lengths.max())
        for layer in self.full_layers:
            layer.keep(read, counts, length)
        for layer in self._others:
            layer.crop(length - stood - read)
        self._count_drafted()

    def _count_drafted(self) -> None:
        """What the tokens drafted since the last pass read, of what they could have read."""
        if not self._drafted or self._kept_later is None:
            return
        assert self.table is not None
        each_other = self._drafted * (self._drafted + 1) // 2
        kept = np.stack([arriving.get() for arriving in self._kept_later[1]])
        self.counters.count(self._drafted * kept + each_other, self._drafted * self._held + each_other, self._drafted)
        self._drafted, self._kept_later = 0, None

    def truncate(self, length: int) -> None:
        """Forgets what rows hold beyond so many tokens."""
        assert self.table is not None
        self.crop(-max(int(self.table.lengths.max()) - length, 0))

    def _due(self, length: int) -> None:
        """None: but for what is drafted, everything is read."""

    @property
    def _spare(self) -> int:
        return MOST_DRAFTED
