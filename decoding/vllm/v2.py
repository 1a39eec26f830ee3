"""The V2 model runner: a row is a token to be sampled, requests have slots, histories are tensors on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from decoding.vllm.requests import (
    MOST_STYLES_PER_REQUEST,
    Layer,
    LoadedStyles,
    leaves_temperature_open,
    stops_table,
)
from decoding.vllm.temperatures import PromptTemperatures


class StyleSlots:
    """The styles of each request slot, on the host and on the device. No step waits for the device.

    Args:
        styles: the priors.
        req_states: vLLM's ``LogitsProcRequestState``.
    """

    def __init__(self, styles: LoadedStyles, req_states: Any):
        self._styles = styles
        self._states = req_states
        size = (req_states.max_num_reqs, MOST_STYLES_PER_REQUEST)
        self._prior, self._strength = np.zeros(size, np.int64), np.zeros(size, np.float32)
        self._depth = np.zeros(req_states.max_num_reqs, np.int64)  # number of styles
        self._own: dict[int, list[int]] = {}  # slot -> a request's own stops
        self._back = torch.arange(styles.context - 1, -1, -1, device=req_states.device)
        self._changed = True
        self.flush()

    def add(self, slot: int, params: Any) -> bool:
        """Puts a request into a slot, over whatever was there. Whether it has a style."""
        chosen = self._styles.resolve(params.extra_args)
        self._changed |= bool(chosen) or bool(self._depth[slot])
        self._strength[slot] = 0
        self._changed |= self._own.pop(slot, None) is not None
        if own := self._styles.own_stops(params):
            self._own[slot] = own
        self._depth[slot] = len(chosen)
        for depth, (index, strength) in enumerate(chosen):
            self._prior[slot, depth], self._strength[slot, depth] = index, strength
        return bool(chosen)

    def flush(self) -> None:
        """Copies what `add` changed to the device."""
        if self._changed:
            self._priors, self._strengths = self._to_device(self._prior), self._to_device(self._strength)
            table = stops_table([self._own.get(slot, []) for slot in range(len(self._depth))])
            self._own_stops = None if table is None else send(table, self._states.device)
            self._changed = False

    def _to_device(self, values: np.ndarray) -> Tensor:
        # A copy each time: the last step's may still be on its way while the host writes the next one's.
        return send(torch.from_numpy(values.copy()), self._states.device)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Steers a step, in place.

        Args:
            logits: float32 [rows, W].
            ctx: vLLM's ``LogitsContext``.
        """
        depth = int(self._depth[ctx.idx_mapping_np].max(initial=0))
        if not depth:
            return logits
        slots = ctx.expanded_idx_mapping.long()
        in_use, slots = slots >= 0, slots.clamp(min=0)  # rows that only pad a CUDA graph's batch have no slot
        strengths, priors = self._strengths[slots] * in_use[:, None], self._priors[slots]
        layers = [Layer(priors[:, i], strengths[:, i]) for i in range(depth)]
        own = None if self._own_stops is None else self._own_stops[slots].masked_fill(~in_use[:, None], -1)
        return self._styles.add(logits, self._history(slots, ctx), layers, own)

    def _history(self, slots: Tensor, ctx: Any) -> Tensor:
        """The tokens up to each row's own, int64 [rows, context]; −1 before a text's start.

        The draft tokens of this step are in ``ctx.input_ids`` alone, one row for each; earlier ones are committed.
        """
        local = ctx.expanded_local_pos.long()[:, None]
        position = ctx.pos.long()[:, None] - self._back
        rows = torch.arange(len(slots), device=slots.device)[:, None] - self._back
        drafted = ctx.input_ids[rows.clamp(min=0)].long()
        committed = self._states.all_token_ids.gpu[slots[:, None], position.clamp(min=0)].long()
        return drafted.where(self._back < local, committed).masked_fill(position < 0, -1)


class _Copy:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        self._host = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._event = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> Tensor:
        """The tensor there, once the device has got as far as it was when this was made."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class TemperatureSlots:
    """The temperatures of each request slot.

    Prompts are on the device alone. They are sent for when requests join, before the model computes, and taken in the
    same step's `apply`: for their tokens the host waits until the step before is done, not this one.

    Args:
        choose: the selector.
        req_states: vLLM's ``LogitsProcRequestState``.
    """

    def __init__(self, choose: PromptTemperatures, req_states: Any):
        self._choose = choose
        self._states = req_states
        self._is_open = np.zeros(req_states.max_num_reqs, bool)
        self._temperatures = torch.ones(req_states.max_num_reqs, device=req_states.device)
        self._joined: dict[int, int] = {}  # slot -> length of its prompt, since the last `flush`
        self._waiting: dict[int, tuple[_Copy, slice]] = {}  # slot -> where its prompt arrives

    def add(self, slot: int, params: Any) -> bool:
        """Puts a request into a slot, over whatever was there. Whether its temperature is to be chosen."""
        self._joined.pop(slot, None)
        self._waiting.pop(slot, None)
        was_open, is_open = bool(self._is_open[slot]), leaves_temperature_open(params.extra_args)
        self._is_open[slot] = is_open
        if is_open:
            self._joined[slot] = int(self._states.prompt_len.np[slot])
        elif was_open:
            self._temperatures[slot] = 1
        return is_open

    def flush(self) -> None:
        """Sends for the prompts of the requests that joined."""
        if not self._joined:
            return
        ids = self._states.all_token_ids.gpu
        copy = _Copy(torch.cat([ids[slot, :length] for slot, length in self._joined.items()]))
        end = 0
        for slot, length in self._joined.items():
            begin, end = end, end + length
            self._waiting[slot] = copy, slice(begin, end)
        self._joined.clear()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Divides the rows of a step by their temperatures, in place.

        Args:
            logits: float32 [rows, W].
            ctx: vLLM's ``LogitsContext``.
        """
        if not self._is_open[ctx.idx_mapping_np].any():
            return logits
        if self._waiting:
            self._choose_waiting()
        slots = ctx.expanded_idx_mapping.long()
        # rows that only pad a CUDA graph's batch have no slot
        return logits.div_(self._temperatures[slots.clamp(min=0)].where(slots >= 0, 1)[:, None])

    def _choose_waiting(self) -> None:
        prompts = [copy.arrived()[place].tolist() for copy, place in self._waiting.values()]
        for slot, chosen in zip(self._waiting, self._choose(prompts), strict=True):
            self._temperatures[slot] = chosen
        self._waiting.clear()
