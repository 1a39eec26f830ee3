"""`decoding.style.steering.steer` as kernels of Triton, whose meaning it has, in few launches.

- A prior alone: `ngram.prior_kernel`, one launch.
- With ids that end a text, or an entropy gate: the same, which looks at the highest scores before and after; one small
  launch puts these ids right, and one before reads the entropy. So ids that end a text cost one launch of a program for
  each row, and no pass of their own over the scores.
- With a plausible set or a divergence budget: the change is written by itself (to the result, or, where that is the
  scores themselves or has another dtype, to one float32 tensor of their shape), the budget is searched for
  (`decoding.style.budget_kernel`), and the last launch adds what is left of the change.

At batch 64 and V=151,936 scores are 39 MB. Entropy or plausible set read them once; the change reads them and writes as
much; a pass of the search reads both, and two passes suffice for nearly all rows; the last launch reads both and writes
the result. That is 430 MB, 90 µs at an H200's 4.8 TB/s, if nothing stays in its cache.

Importing this module imports Triton, and fails where that is not installed: ask `ngram.kernels.uses_triton` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoding.errors import DecodingError
from decoding.style.budget_kernel import PASSES, STATE, SUMS, change_of, search, share_of
from decoding.style.change_kernel import BEFORE, FACTS, LOOKS, change, look, merged, none_for_nan, of_tiles
from ngram.prior_kernel import add_log_prior, arguments_of, constants_of, held_at_once
from ngram.tables import Tables

_TILE, _SMALL_TILE = 4096, 1024
_WARPS = 8


class _Guards(Protocol):
    """What is read of `decoding.style.steering.Guards`."""

    @property
    def entropy_gate(self) -> Tensor | None: ...
    @property
    def plausibility(self) -> Tensor | None: ...
    @property
    def max_js(self) -> Tensor | None: ...


class _Stops(Protocol):
    """What is read of `decoding.style.steering.Stops`."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def leave(self) -> Tensor | None: ...


def steer(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None,
    guards: _Guards | None,
    stops: _Stops | None,
    *,
    prior: int | Tensor = 0,
    shift: bool = True,
    out: Tensor | None = None,
    highest: Tensor | None = None,
) -> Tensor:
    """`decoding.style.steering.steer`, whose arguments and result these are.

    Raises:
        DecodingError: shapes that do not belong together, or an ``out`` whose columns are not adjacent.
    """
    if not scores.numel() or (guards is None and stops is None):
        if highest is not None and scores.numel():
            highest.copy_(scores.amax(-1))
        return add_log_prior(tables, scores, history, strength, mixture, prior=prior, shift=shift, out=out)
    _check(tables, scores, history, strength, guards, stops, prior, out)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    arguments = arguments_of(tables, history, strength, mixture, prior)
    step = _Step(scores, strength, guards, stops, arguments, {**constants_of(tables), "SHIFT": shift})
    with torch.cuda.device_of(scores) if scores.is_cuda else nullcontext():
        return step.steered(out, highest)


def _check(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    guards: _Guards | None,
    stops: _Stops | None,
    prior: int | Tensor,
    out: Tensor | None,
) -> None:
    """Refuses what a kernel would read beyond its end."""
    rows, width = scores.shape
    own = [history, strength, *([prior] if isinstance(prior, Tensor) else [])]
    held = [None if stops is None else stops.leave]
    if guards is not None:
        held += [guards.entropy_gate, guards.plausibility, guards.max_js]
    if any(len(each) != rows for each in own) or any(len(each) not in (1, rows) for each in held if each is not None):
        raise DecodingError(f"each of {rows} rows of scores needs a history, a strength, a prior and guards of its own")
    if tables.unigram.shape[1] != width:
        raise DecodingError(f"scores have {width} columns, tables {tables.unigram.shape[1]}: see Tables.widened")
    if out is not None and out.stride(1) != 1:
        raise DecodingError(f"out must have its columns side by side, not {out.stride(1)} apart")


class _Step:
    """What the launches of one step share.

    Args:
        scores, strength, guards, stops: as for `steer`.
        arguments: `ngram.prior_kernel.arguments_of` rows and their priors.
        constants: that the change is compiled for.
    """

    def __init__(
        self,
        scores: Tensor,
        strength: Tensor,
        guards: _Guards | None,
        stops: _Stops | None,
        arguments: Sequence[Any],
        constants: Mapping[str, int],
    ):
        self.scores, self.strength = scores, strength
        self.arguments, self.constants = arguments, constants
        self.gate = None if guards is None else guards.entropy_gate
        self.plausibility = None if guards is None else guards.plausibility
        self.budget = None if guards is None else guards.max_js
        self.stops = None if stops is None else stops.ids
        self.leave = None if stops is None else stops.leave
        self.rows, self.width = scores.shape
        self.programs = held_at_once(scores.device)
        self.tile = _TILE if self.rows * triton.cdiv(self.width, _TILE) >= self.programs else _SMALL_TILE
        self.tiles = triton.cdiv(self.width, self.tile)
        self.grid = (self.rows, self.tiles)
        self.shape = {"TILE": self.tile, "TILES": triton.next_power_of_2(self.tiles)}

    def steered(self, out: Tensor | None, highest: Tensor | None) -> Tensor:
        looks = self._looks() if self.gate is not None or self.plausibility is not None else None
        dtype = self.scores.dtype
        if self.plausibility is None and self.budget is None:
            narrow = dtype in (torch.float16, torch.bfloat16)  # rounded once, at the end
            result = self._empty(torch.float32 if narrow else dtype, self.width) if out is None or narrow else out
            facts, kept = self._change(looks, result, is_alone=False)
            self._put_stops_right(result, facts, kept, highest)
            return result.to(dtype) if narrow else result
        result = self._empty(dtype, self.width) if out is None else out
        fits = result is not self.scores and dtype == torch.float32
        moves = result if fits else self._empty(torch.float32, self.width)
        facts, _ = self._change(looks, moves, is_alone=True)
        state, sums = self._searched(moves, facts) if self.budget is not None else (None, None)
        self._apply(moves, facts, state, sums, result, highest)
        return result

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((self.rows, *shape), dtype=dtype, device=self.scores.device)

    def _looks(self) -> Tensor:
        """float32 [B, LOOKS, tiles]."""
        looks = self._empty(torch.float32, LOOKS.value, self.tiles)
        look[self.grid](
            self.scores, self.scores.stride(0), self.strength, self.strength.stride(0), looks, self.width, self.tiles,
            TILE=self.tile, num_warps=_WARPS,
        )  # fmt: skip
        return looks

    def _change(self, looks: Tensor | None, out: Tensor, is_alone: bool) -> tuple[Tensor, Tensor | None]:
        """The facts of every tile, [B, FACTS or 2, tiles], and the scores before of ids that end a text, [B, K]."""
        count = 0 if self.stops is None else len(self.stops)
        facts = self._empty(torch.float32 if is_alone else out.dtype, FACTS.value if is_alone else 2, self.tiles)
        kept = None if is_alone or self.stops is None else self._empty(out.dtype, count)
        each = triton.cdiv(self.tiles, max(self.programs // self.rows, 1))
        change[(self.rows, triton.cdiv(self.tiles, each))](
            self.scores,
            self.scores.stride(0),
            out,
            out.stride(0),
            self.width,
            self.tiles,
            each,
            *self.arguments,
            looks,
            self.gate,
            _step(self.gate),
            self.plausibility,
            _step(self.plausibility),
            self.stops,
            count,
            self.leave,
            _step(self.leave),
            kept,
            facts,
            **self.constants,
            ALONE=is_alone,
            BUDGET=self.budget is not None,
            IN_PLACE=out is self.scores,
            STOPS=triton.next_power_of_2(count) if count else 0,
            num_warps=_WARPS,
            **self.shape,
        )
        return facts, kept

    def _put_stops_right(self, result: Tensor, facts: Tensor, kept: Tensor | None, highest: Tensor | None) -> None:
        count = 0 if self.stops is None else len(self.stops)
        if not count and highest is None:
            return
        put_stops_right[(self.rows,)](
            result, result.stride(0), self.strength, self.strength.stride(0), self.tiles, facts, self.stops, count,
            self.leave, _step(self.leave), kept, highest,
            STOPS=triton.next_power_of_2(count) if count else 0, TILES=self.shape["TILES"], num_warps=1,
        )  # fmt: skip

    def _searched(self, moves: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """State and sums of the last pass, float32 [B, STATE] and [B, SUMS, tiles]."""
        states = [self._empty(torch.float32, STATE.value) for _ in range(PASSES)]
        sums = [self._empty(torch.float32, SUMS.value, self.tiles) for _ in range(PASSES)]
        for number in range(PASSES):
            last = max(number - 1, 0)
            search[self.grid](
                self.scores, self.scores.stride(0), moves, moves.stride(0), self.width, self.tiles,
                self.strength, self.strength.stride(0), self.budget, _step(self.budget),
                self.plausibility, _step(self.plausibility), facts, states[last], sums[last], states[number],
                sums[number], BEGINS=number == 0, num_warps=_WARPS, **self.shape,
            )  # fmt: skip
        return states[-1], sums[-1]

    def _apply(
        self,
        moves: Tensor,
        facts: Tensor,
        state: Tensor | None,
        sums: Tensor | None,
        result: Tensor,
        highest: Tensor | None,
    ) -> None:
        apply[self.grid](
            self.scores, self.scores.stride(0), moves, moves.stride(0), result, result.stride(0), self.width,
            self.tiles, self.strength, self.strength.stride(0), self.budget, _step(self.budget), self.plausibility,
            _step(self.plausibility), facts, state, sums, highest,
            IN_PLACE=result is self.scores, num_warps=_WARPS, **self.shape,
        )  # fmt: skip


def _step(values: Tensor | None) -> int:
    """From one row's value to the next one's; 0 where they share it."""
    return 0 if values is None or len(values) == 1 else values.stride(0)


@triton.jit(do_not_specialize=["count"])
def put_stops_right(
    out,
    out_row,
    strength,
    strength_step,
    tiles,
    facts,
    stops,
    count,
    leave,
    leave_step,
    kept,
    highest,
    STOPS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Gives ids that end a text their odds of before against the likeliest other one, in place. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    is_steered = tl.load(strength + row * strength_step) != 0
    facts += row * 2 * tiles
    befores = of_tiles(facts, 0, tiles, -float("inf"), TILES)
    if highest is not None:
        _report(highest + row, befores, is_steered)
    if STOPS > 0:
        is_left = is_steered
        if leave is not None:
            is_left = is_left & (tl.load(leave + row * leave_step) != 0)
        if is_left:
            moved = tl.max(of_tiles(facts, 1, tiles, -float("inf"), TILES), 0) - tl.max(befores, 0)
            lane = tl.arange(0, STOPS)
            some = lane < count
            before = tl.load(kept + row * count + lane, mask=some)
            ids = tl.load(stops + lane, mask=some, other=0)
            tl.store(out + row * out_row + ids, before + none_for_nan(moved), mask=some)


@triton.jit
def _report(highest, befores, is_steered):
    """Writes the highest of a row's scores; NaN if one is, −∞ for rows that nothing looked at."""
    top = tl.where(tl.sum((befores != befores).to(tl.int32), 0) > 0, float("nan"), tl.max(befores, 0))
    tl.store(highest, tl.where(is_steered, top, -float("inf")))


@triton.jit
def apply(
    scores,
    scores_row,
    moves,
    moves_row,
    out,
    out_row,
    width,
    tiles,
    strength,
    strength_step,
    budget,
    budget_step,
    plausibility,
    plausibility_step,
    facts,
    state,
    sums,
    highest,
    IN_PLACE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Adds what is left of the change to the scores. Grid: rows, tiles."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    facts += row * FACTS * tiles
    is_steered = tl.load(strength + row * strength_step) != 0
    if highest is not None and tile == 0:
        _report(highest + row, of_tiles(facts, BEFORE, tiles, -float("inf"), TILES), is_steered)
    share = tl.full([], 0.0, tl.float32)
    top, gained, stop_change = share, share, share
    if is_steered:
        if budget is not None:
            allowed = tl.load(budget + row * budget_step)
            share, top, gained, stop_change = share_of(
                state + row * STATE, sums + row * SUMS * tiles, tiles, allowed, TILES
            )
        else:
            share += 1.0
            top, _, gained, stop_change = merged(facts, tiles, plausibility is not None, TILES)
    if (share != 0) | (not IN_PLACE):
        least = -float("inf")
        if plausibility is not None:
            least = top + tl.log(tl.load(plausibility + row * plausibility_step))
        column = tile * TILE + tl.arange(0, TILE)
        some = column < width
        is_moved = tl.full([TILE], share, tl.float32) != 0
        own = tl.load(scores + row * scores_row + column, mask=some, other=0.0)
        change = tl.load(moves + row * moves_row + column, mask=some & is_moved, other=0.0)
        change = share * change_of(own.to(tl.float32), change, least, gained, stop_change)
        wide = tl.float64 if own.dtype == tl.float64 else tl.float32
        result = tl.where(is_moved, own.to(wide) + change.to(wide), own.to(wide))
        tl.store(out + row * out_row + column, result.to(out.dtype.element_ty), mask=some)
