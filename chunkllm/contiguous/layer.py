"""One layer's keys and values under chunk selection: all of them, and the selected ones in one buffer beside.

A decode step writes its key and value behind the selected ones and attends to that buffer: nothing is gathered, joined
or grown. What has been written since then moves to the storage when the selection is refreshed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from chunkllm.contiguous.grouped import grouped_attention
from chunkllm.late import send

_SMALLEST_STEP = 1024
_BUFFER_STEP = 64


P = ParamSpec("P")
R = TypeVar("R")


def _lasting(make: Callable[P, R]) -> Callable[P, R]:
    """What is made in inference mode may be written to in inference mode only, but a cache outlives it."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **options)

    return made


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

    @_lasting
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

    def write(self, key_states: Tensor, value_states: Tensor, places: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, Hkv, T, D] at places of the rows, int64 [B, T]; returns all, up to ``stop``."""
        self.keys, self.values = self._grown(self.keys, stop), self._grown(self.values, stop)
        for storage, new in zip((self.keys, self.values), (key_states, value_states), strict=True):
            storage[:, :, self.stored : stop] = 0  # what shorter rows do not reach is masked, and must be finite
            storage.scatter_(2, places[:, None, :, None].expand_as(new), new)
        self.stored = stop
        return self._all(self.keys), self._all(self.values)

    def keep(self, read: int, counts: np.ndarray, length: int) -> None:
        """After a pass over ``read`` tokens, whose queries are remembered: rows keep so many of them, int64 [B].

        ``length`` is then the longest row's.
        """
        self.stored = length
        if (counts == read).all():
            return
        queries = torch.cat(self._queries, 2)
        before = queries.shape[2] - read
        if (counts == counts[0]).all():
            self._queries = [queries[:, :, : before + int(counts[0])]]
            return
        # The last ones of each row, so many as there were before.
        places = send(counts, queries.device)[:, None] + torch.arange(before, device=queries.device)
        self._queries = [queries.gather(2, places[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))]

    def abandon(self) -> None:
        """Goes back to reading everything, and forgets what was written since the selection."""
        self.selected, self.mask = False, None
        self._used = self._flushed = 0

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
        newest = queries[:, :, -count:].detach()
        self._queries = [*self._queries, newest if queries.shape[2] <= count else newest.clone()][-count:]

    def remember_all(self, queries: Tensor, count: int) -> None:
        """Keeps these queries [B, H, T, D], and the last ``count`` before them, until `keep` says which stay."""
        self._queries = [*(held[:, :, -count:] for held in self._queries[-count:]), queries]

    @property
    def has_queries(self) -> bool:
        """Whether any token's queries are known to select by."""
        return bool(self._queries)

    def last_queries(self, count: int) -> Tensor:
        """[B, H, up to count, D], oldest first."""
        return torch.cat(self._queries, 2)[:, :, -count:]

    @_lasting
    def add_features(self, features: Tensor, rows: slice, at: np.ndarray, counts: np.ndarray, room: int) -> None:
        """Keeps the features [b, Hkv, n, F] of new chunks of some rows: counts[i] of each, from number at[i] on.

        There is room for so many chunks of a row, or more.
        """
        assert self.keys is not None
        if self.features is None:
            self.features = features.new_zeros(len(self.keys), features.shape[1], 0, features.shape[3])
        if room > self.features.shape[2]:
            wider = features.new_zeros(*self.features.shape[:2], room + room // 4 + 64, features.shape[3])
            wider[:, :, : self.features.shape[2]] = self.features
            self.features = wider
        for held, new, first, count in zip(self.features[rows], features, at, counts, strict=True):
            held[:, first : first + count] = new[:, :count]

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

    def has_room(self, slots: int = 0) -> bool:
        """Whether the buffer has so many slots, and one more for the token to come."""
        return self._buffer is not None and max(self._used, slots) < self._buffer[0].shape[2]

    @_lasting
    def make_room(self, kept: int, slots: int) -> None:
        """Moves what rows read together, in a buffer with more slots where it is needed. All must be in the storage.

        Args:
            kept: the most tokens that a row reads.
            slots: that the buffer has then, or a few more.
        """
        assert self._buffer is not None
        before, mask = self._buffer, self.mask
        used = self._used if mask is None else min(kept, self._used)
        room = -(-slots // _BUFFER_STEP) * _BUFFER_STEP
        order = torch.arange(used, device=self.device).expand(len(before[0]), -1)
        if mask is not None:
            order = mask[:, : self._used].int().argsort(dim=1, descending=True, stable=True)[:, :used]
        moved = []
        for held in before:
            index = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            moved.append(held.new_zeros(*held.shape[:2], room, held.shape[3]))
            moved[-1][:, :, :used] = held.gather(2, index)
        self._buffer = moved[0], moved[1]
        if mask is not None:
            self.mask = self._open_mask()
            self.mask[:, :used] = mask.gather(1, order)
        self._used = self._flushed = used

    @_lasting
    def select(self, rows: np.ndarray, tokens: Tensor, valid: Tensor | None, spare: int) -> None:
        """Gathers the selection of some rows, all of whose keys and values must be in the storage.

        Args:
            rows: which rows; all, unless the layer has a selection already, whose buffer has so many slots.
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
        elif slots > self._used:
            mask = self._open_mask() if self.mask is None else self.mask
            mask[:, self._used : slots] = False
            self.mask = mask
            self._used = self._flushed = slots
        assert self._buffer is not None
        places = pad(tokens, (0, self._buffer[0].shape[2] - slots)).to(self.keys.device)
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
        """Fills a row of the buffer in place, spare slots with anything; index_select moves whole keys at a time."""
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

    def _open_mask(self) -> Tensor:
        assert self._buffer is not None
        batch, _, room, _ = self._buffer[0].shape
        return torch.ones(batch, room, dtype=torch.bool, device=self.device)

    def _set_mask(self, rows: np.ndarray, valid: Tensor | None, slots: int) -> None:
        assert self._buffer is not None
        if valid is None:
            self.mask = None
            return
        if self.mask is None or self.mask.shape != self._buffer[0].shape[::2]:
            self.mask = self._open_mask()
        for row, of_row in zip(rows.tolist(), valid, strict=True):
            self.mask[row, :slots] = of_row
            self.mask[row, slots : self._used] = False
            self.mask[row, self._used :] = True

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Attention of one query [B, H, 1, D] to what `update` returned from the buffer: [B, 1, H, D]."""
        mask = None if self.mask is None else self.mask[:, None, None, : keys.shape[2]]
        return grouped_attention(query, keys, values, mask, scaling)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the storage, of the buffer of selected tokens, and of the chunks' features."""
        parts = {"storage": (self.keys, self.values), "selected": self._buffer or (), "features": (self.features,)}
        return {name: sum(x.nbytes for x in tensors if x is not None) for name, tensors in parts.items()}

    def recall(self, scaling: float) -> Tensor:
        """Share of full attention that the buffer holds for the last query: float32 [B, H]. For measurements."""
        assert self._buffer is not None
        keys = self._buffer[0][:, :, : self._used]
        mask = None if self.mask is None else self.mask[:, None, None, : self._used]
        everything, _ = self.everything()
        query = self.last_queries(1).float()
        held, full = (
            self._log_mass(query * scaling, part, which) for part, which in ((keys, mask), (everything, None))
        )
        return (held - full).exp()

    def step_back(self) -> None:
        """Takes back the place that was written last, so that a step can be repeated. For measurements."""
        if self.selected:
            self._used -= 1
        else:
            self.stored -= 1

    def everything(self) -> tuple[Tensor, Tensor]:
        """All keys and values, each [B, Hkv, S, D], in the order of their places, selected or not. For measurements."""
        assert self._buffer is not None
        keys, values = (
            torch.cat((self._all(storage).to(self.device), held[:, :, self._flushed : self._used]), 2)
            for storage, held in zip((self.keys, self.values), self._buffer, strict=True)
        )
        return keys, values

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
        """Drops tokens from the end, if negative; else all but the first so many; if 0, none."""
        if tokens_to_remove == 0:
            return
        self.settle()
        length = self.stored + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, self.stored)
        removed, self.stored = self.stored - max(length, 0), max(length, 0)
        if removed and self._queries:
            left = torch.cat(self._queries, 2)
            self._queries = [left[:, :, :-removed]] if removed < left.shape[2] else []

    @_lasting
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
