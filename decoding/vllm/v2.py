"""The V2 model runner: a row is a token to be sampled, requests have slots, histories are tensors on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from decoding.temperature.markers import Markers
from decoding.temperature.nucleus import cut_to_nucleus
from decoding.vllm.counters import StyleCounts
from decoding.vllm.counts import NOWHERE, Counting
from decoding.vllm.fallbacks import fell_back
from decoding.vllm.requests import MOST_STYLES_PER_REQUEST, PLAIN, Held, Request, read_admitted
from decoding.vllm.styles import Chosen, Holds, Layer, LoadedStyles, stops_table
from decoding.vllm.temperatures import PromptTemperatures


class StyleSlots:
    """The styles of each request slot, on the host and on the device. No step waits for the device.

    Args:
        styles: the priors.
        req_states: vLLM's ``LogitsProcRequestState``.
        counts: where requests are counted.
    """

    def __init__(self, styles: LoadedStyles, req_states: Any, counts: Counting = NOWHERE):
        self._styles = styles
        self._counts = StyleCounts(styles.names, counts)
        self._states = req_states
        size = (req_states.max_num_reqs, MOST_STYLES_PER_REQUEST)
        self._prior, self._strength = np.zeros(size, np.int64), np.zeros(size, np.float32)  # the last one comes first
        self._depth = np.zeros(req_states.max_num_reqs, np.int64)  # number of styles
        self._is_held = np.zeros(req_states.max_num_reqs, bool)  # otherwise than its styles are by themselves
        self._chosen: dict[int, list[Chosen]] = {}  # of slots with styles
        self._own: dict[int, list[int]] = {}  # slot -> a request's own stops
        self._back = torch.arange(styles.context - 1, -1, -1, device=req_states.device)
        self._changed = True
        self.flush()

    def add(self, slot: int, params: Any) -> bool:
        """Puts a request into a slot, over whatever was there. Whether it has a style."""
        chosen, own_stops = self._styles.asked(params)
        if self._states.prefill_len.np[slot] == self._states.prompt_len.np[slot]:  # else it comes back
            self._counts.add(chosen)
        self._changed |= bool(chosen) or bool(self._depth[slot])
        self._strength[slot] = 0
        self._own.pop(slot, None)
        self._chosen.pop(slot, None)
        self._depth[slot], self._is_held[slot] = len(chosen), any(each.held is not None for each in chosen)
        if not chosen:
            return False
        self._chosen[slot] = chosen
        if own_stops:
            self._own[slot] = own_stops
        for behind, each in enumerate(reversed(chosen)):
            self._prior[slot, behind], self._strength[slot, behind] = each.prior, each.strength
        return True

    def _leave(self, slot: int) -> None:
        """Has a request go on without its styles."""
        self._strength[slot], self._depth[slot], self._is_held[slot], self._changed = 0, 0, False, True
        self._own.pop(slot, None)
        self._chosen.pop(slot, None)

    def flush(self) -> None:
        """Copies what `add` changed to the device. It never raises."""
        try:
            self._send()
        except Exception:  # Whatever it is.
            fell_back("style")
            for slot in list(self._chosen):
                self._leave(slot)
            self._send()

    def _send(self) -> None:
        if self._changed:
            self._priors, self._strengths = self._to_device(self._prior), self._to_device(self._strength)
            table = stops_table([self._own.get(slot, []) for slot in range(len(self._depth))])
            self._own_stops = None if table is None else send(table, self._states.device)
            self._holds = self._holds_of_places() if self._is_held.any() else None
            self._changed = False

    def _holds_of_places(self) -> Holds:
        """What holds the styles of all slots back, one slot behind the other, each with `MOST_STYLES_PER_REQUEST`."""
        held = [Held()] * self._prior.size
        for slot, chosen in self._chosen.items():
            for behind, each in enumerate(reversed(chosen)):
                held[slot * MOST_STYLES_PER_REQUEST + behind] = self._styles.held(each)
        return self._styles.holds(held)

    def _to_device(self, values: np.ndarray) -> Tensor:
        # A copy each time: the last step's may still be on its way while the host writes the next one's.
        return send(torch.from_numpy(values.copy()), self._states.device)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Steers a step, in place.

        It never raises, since the engine serves others: requests that cannot be steered go on without their styles.

        Args:
            logits: float32 [rows, W].
            ctx: vLLM's ``LogitsContext``.
        """
        try:
            return self._steered(logits, ctx)
        except Exception:  # Whatever it is.
            fell_back("style")
        try:
            self._leave_failing(logits, ctx)
            return self._steered(logits, ctx)
        except Exception:
            fell_back("style")
            for slot in ctx.idx_mapping_np.tolist():
                self._leave(slot)
            return logits

    def _steered(self, logits: Tensor, ctx: Any) -> Tensor:
        depths = self._depth[ctx.idx_mapping_np]
        depth = int(depths.max(initial=0))
        if not depth:
            return logits
        slots = ctx.expanded_idx_mapping.long()
        in_use, slots = slots >= 0, slots.clamp(min=0)  # rows that only pad a CUDA graph's batch have no slot
        strengths, priors = self._strengths[slots] * in_use[:, None], self._priors[slots]
        layers = {i: Layer(priors[:, i], strengths[:, i]) for i in reversed(range(depth))}
        if self._holds is not None and self._is_held[ctx.idx_mapping_np].any():
            first = slots * MOST_STYLES_PER_REQUEST
            layers = {i: layer._replace(holds=self._holds.of(first + i)) for i, layer in layers.items()}
        own = None if self._own_stops is None else self._own_stops[slots].masked_fill(~in_use[:, None], -1)
        several = None
        if depth > 1 and len(depths) == len(logits):  # with drafts the device alone knows which rows are whose
            several = send(torch.from_numpy(np.flatnonzero(depths > 1)), self._states.device)
        history = tokens_before(self._states, slots, ctx, self._back)
        return self._styles.add(logits, history, list(layers.values()), own, several)

    def _leave_failing(self, logits: Tensor, ctx: Any) -> None:
        """Leaves out the requests that cannot be steered alone, on a copy of one of their rows of ``logits``."""
        slots = ctx.expanded_idx_mapping.tolist()
        history = tokens_before(self._states, ctx.expanded_idx_mapping.long().clamp(min=0), ctx, self._back)
        for slot in [slot for slot in ctx.idx_mapping_np.tolist() if self._depth[slot]]:
            try:
                row = slots.index(slot)
                layers = self._styles.layers([self._chosen[slot]])
                self._styles.add(logits[row : row + 1].clone(), history[row : row + 1], layers)
            except Exception:
                fell_back("style")
                self._leave(slot)
        self.flush()


def tokens_before(states: Any, slots: Tensor, ctx: Any, back: Tensor) -> Tensor:
    """The tokens up to each row's own.

    The draft tokens of this step are in ``ctx.input_ids`` alone, one row for each; earlier ones are committed.

    Args:
        states: vLLM's ``LogitsProcRequestState``.
        slots: of the rows, int64 [rows].
        ctx: vLLM's ``LogitsContext``.
        back: how far back to look, int64 [W], falling to 0.

    Returns:
        int64 [rows, W]; −1 before a text's start.
    """
    local = ctx.expanded_local_pos.long()[:, None]
    position = ctx.pos.long()[:, None] - back
    rows = torch.arange(len(slots), device=slots.device)[:, None] - back
    drafted = ctx.input_ids[rows.clamp(min=0)].long()
    committed = states.all_token_ids.gpu[slots[:, None], position.clamp(min=0)].long()
    return drafted.where(back < local, committed).masked_fill(position < 0, -1)


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

    Prompts are on the device alone. For the selector they are sent for when requests join, before the model computes,
    and taken in the same step's `apply`: for their tokens the host waits until the step before is done, not this one.
    Phases are found on the device.

    Args:
        choose: the selector, if there is one.
        req_states: vLLM's ``LogitsProcRequestState``.
        phases: of the slots, if phases are told apart.
    """

    def __init__(self, choose: PromptTemperatures | None, req_states: Any, phases: PhaseSlots | None = None):
        self._choose = choose
        self._states = req_states
        self._phases = phases
        self._is_ours = np.zeros(req_states.max_num_reqs, bool)
        self._is_cut = np.zeros(req_states.max_num_reqs, bool)
        self._top_p = torch.ones(req_states.max_num_reqs, device=req_states.device)
        self._temperatures = torch.ones(req_states.max_num_reqs, device=req_states.device)
        self._joined: dict[int, int] = {}  # slot -> length of its prompt, since the last `flush`
        self._waiting: dict[int, tuple[_Copy, slice]] = {}  # slot -> where its prompt arrives

    def add(self, slot: int, params: Any) -> bool:
        """Puts a request into a slot, over whatever was there. Whether its temperatures are set here."""
        try:
            return self._add(slot, read_admitted(params, "temperature"))
        except Exception:  # Whatever it is.
            fell_back("temperature")
            return self._add(slot, PLAIN)

    def _add(self, slot: int, request: Request) -> bool:
        self._joined.pop(slot, None)
        self._waiting.pop(slot, None)
        wanted = request.temperatures
        if self._phases is not None:
            self._phases.add(slot, None if wanted is None else wanted.think)
        was_ours, self._is_ours[slot] = bool(self._is_ours[slot]), wanted is not None
        if was_ours:
            self._temperatures[slot] = 1
        if wanted is not None and wanted.answer is not None:
            self._temperatures[slot] = wanted.answer
        elif wanted is not None and self._choose is not None:
            self._joined[slot] = int(self._states.prompt_len.np[slot])
        self._cut(slot, self._choose.top_p if self._choose is not None and request.takes_top_p else None)
        return wanted is not None

    def _cut(self, slot: int, top_p: float | None) -> None:
        """Has a slot's rows cut to a top-p, or not."""
        was_cut, self._is_cut[slot] = bool(self._is_cut[slot]), top_p is not None
        if top_p is not None or was_cut:
            self._top_p[slot] = 1.0 if top_p is None else top_p

    def flush(self) -> None:
        """Sends for the prompts of the requests that joined. It never raises: they go on at 1 then."""
        if self._choose is not None:
            self._choose.tell()
        joined = [*self._joined, *([] if self._phases is None else self._phases.joined)]
        try:
            if self._phases is not None:
                self._phases.flush()
            self._send_for_prompts()
        except Exception:  # Whatever it is.
            fell_back("temperature")
            for slot in joined:
                self._add(slot, PLAIN)

    def _send_for_prompts(self) -> None:
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
        """Divides the rows of a step by their temperatures and cuts them, in place.

        Args:
            logits: float32 [rows, W].
            ctx: vLLM's ``LogitsContext``.
        """
        if not self._is_ours[ctx.idx_mapping_np].any():
            return logits
        try:
            temperatures, top_p = self._settings(ctx)
        except Exception:  # Whatever it is.
            fell_back("temperature")
            return logits
        logits.div_(temperatures[:, None])
        return logits if top_p is None else cut_to_nucleus(logits, top_p)

    def _settings(self, ctx: Any) -> tuple[Tensor, Tensor | None]:
        """The temperatures of a step's rows and, if any is cut, their top-p, float32 [rows]."""
        if self._choose is not None and self._waiting:
            self._choose_waiting(self._choose)
        slots = ctx.expanded_idx_mapping.long()
        in_use, slots = slots >= 0, slots.clamp(min=0)  # rows that only pad a CUDA graph's batch have no slot
        temperatures = self._temperatures[slots]
        if self._phases is not None:
            try:
                temperatures = self._phases.mix(temperatures, slots, in_use, ctx)
            except Exception:
                fell_back("temperature")
                temperatures = temperatures.where(self._phases.think[slots] == 0, 1)
        is_cut = self._is_cut[ctx.idx_mapping_np].any()
        return temperatures.where(in_use, 1), self._top_p[slots].where(in_use, 1) if is_cut else None

    def _choose_waiting(self, choose: PromptTemperatures) -> None:
        waiting, self._waiting = self._waiting, {}
        try:
            prompts = [copy.arrived()[place].tolist() for copy, place in waiting.values()]
            for slot, chosen in zip(waiting, choose(prompts), strict=True):
                self._temperatures[slot] = chosen
        except Exception:  # Whatever it is.
            fell_back("temperature")
            for slot in waiting:
                self._add(slot, PLAIN)


class PhaseSlots:
    """Which request slots are thinking, and at which temperature. No step waits for the device.

    What a request begins with is read when it joins, or comes back after a preemption; then each step reads the last
    tokens, as many as may have come since the step before.

    Args:
        markers: of thinking.
        req_states: vLLM's ``LogitsProcRequestState``.
        drafts: the most tokens that are drafted for a request in a step.

    Attributes:
        joined: slot -> tokens that its request begins with, since the last `flush`.
        think: the temperature of each slot for thinking, float32 [slots]; 0 for requests without phases.
    """

    def __init__(self, markers: Markers, req_states: Any, drafts: int = 0):
        self._markers = markers
        self._states = req_states
        count, device = req_states.max_num_reqs, req_states.device
        self._is_phased = np.zeros(count, bool)
        self.think = torch.zeros(count, device=device)
        self._is_thinking = torch.zeros(count + 1, dtype=torch.bool, device=device)  # by committed tokens; one to spare
        # A step commits one token and accepted drafts, and drafts others, behind which rows may stand.
        self._back = torch.arange(markers.length + 2 * drafts - 1, -1, -1, device=device)
        self.joined: dict[int, int] = {}

    def add(self, slot: int, think: float | None) -> None:
        """Puts a request into a slot: its temperature for thinking, None for no phases."""
        self.joined.pop(slot, None)
        was_phased, self._is_phased[slot] = bool(self._is_phased[slot]), think is not None
        if think is not None:
            self.joined[slot] = int(self._states.prefill_len.np[slot])
        if think is not None or was_phased:
            self.think[slot] = think or 0.0

    def flush(self) -> None:
        """Reads what the requests that joined begin with."""
        for slot, length in self.joined.items():
            text = self._states.all_token_ids.gpu[slot : slot + 1, :length]
            self._is_thinking[slot : slot + 1] = self._markers.thinking(text)
        self.joined.clear()

    def mix(self, temperatures: Tensor, slots: Tensor, in_use: Tensor, ctx: Any) -> Tensor:
        """A step's temperatures, thinking's where rows are thinking.

        Args:
            temperatures: those of answers, float32 [rows].
            slots: of the rows, int64 [rows].
            in_use: whether rows have a slot, bool [rows].
            ctx: vLLM's ``LogitsContext``.

        Returns:
            float32 [rows].
        """
        if not self._is_phased[ctx.idx_mapping_np].any():
            return temperatures
        tokens = tokens_before(self._states, slots, ctx, self._back)
        is_thinking = self._markers.thinking(tokens, self._is_thinking[slots])
        # Not by pieces of a prompt: `flush` has read it to its end.
        is_committed = (ctx.expanded_local_pos == 0) & (ctx.pos + 1 >= self._states.prefill_len.gpu[slots])
        spare = len(self._is_thinking) - 1
        self._is_thinking[slots.where(is_committed & in_use, spare)] = is_thinking
        think = self.think[slots]
        return think.where(is_thinking & (think > 0), temperatures)
