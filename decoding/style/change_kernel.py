"""What a prior would change in a batch of scores, and what guards ask of a row, by kernels of Triton.

A row is cut into tiles. What concerns the row as a whole, such as its entropy or its highest score, is left tile by
tile and merged by whoever needs it next, always in the same order. So a single row keeps a whole card busy, and results
depend neither on the batch nor on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ngram.prior_kernel import add_to_row, tile_of

LOOKS = tl.constexpr(3)
"""Numbers that `look` leaves for each tile: the highest score m, Σ e^(score − m), Σ e^(score − m) · (score − m)."""

LEVELS = tl.constexpr(8)
"""At which Z(s) = Σ p · exp(s · c) is known: s = 1, ½, … 1/128."""
FACTS = tl.constexpr(18)
"""Numbers that `change` leaves for each tile, in this order; before them, Z at each level."""
_HIGHEST = tl.constexpr(8)  # score, m
_MOST = tl.constexpr(9)  # change of what is plausible; that of the levels is less by it
_ALL = tl.constexpr(10)  # Σ e^(score − m), as the sums that follow
_OTHERS = tl.constexpr(11)  # that are not plausible
_STOPS = tl.constexpr(12)  # of ids that end a text
_PLAUSIBLE = tl.constexpr(13)
_GROWN = tl.constexpr(14)  # the same, times e^(change)
BEFORE = tl.constexpr(15)  # the highest score of an id that ends no text
_AFTER = tl.constexpr(16)  # that of a plausible one, steered
_UNMOVED = tl.constexpr(17)  # that of one that is not plausible

LEFT_ALONE = tl.constexpr(float("inf"))
"""What stands for the change of an id that ends a text, until the row's own is known."""


@triton.jit
def look(scores, scores_row, strength, strength_step, looks, width, tiles, TILE: tl.constexpr):
    """Leaves what the entropy gate and the plausible set need. Grid: rows, tiles."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(strength + row * strength_step) != 0:
        tile = tl.program_id(1)
        column = tile * TILE + tl.arange(0, TILE)
        own = tl.load(scores + row * scores_row + column, mask=column < width, other=-float("inf")).to(tl.float32)
        top = tl.max(own, 0)
        less = own - finite(top)
        mass = tl.exp(less)
        looks += row * LOOKS * tiles + tile
        tl.store(looks, top)
        tl.store(looks + tiles, tl.sum(mass, 0))
        tl.store(looks + 2 * tiles, tl.sum(tl.where(mass > 0, mass * less, 0.0), 0))


@triton.jit
def finite(value):
    """The value, and 0 for −∞: what to subtract from scores of which all are −∞."""
    return tl.where(value == -float("inf"), 0.0, value)


@triton.jit
def of_tiles(facts, which, tiles, other: tl.constexpr, TILES: tl.constexpr):
    """One of the numbers that the tiles of a row left, [TILES], with ``other`` behind the last."""
    lane = tl.arange(0, TILES)
    return tl.load(facts + which * tiles + lane, mask=lane < tiles, other=other)


@triton.jit
def _looked(looks, tiles, TILES: tl.constexpr):
    """The highest score of a row, and its entropy in nats."""
    tops = of_tiles(looks, 0, tiles, -float("inf"), TILES)
    top = tl.max(tops, 0)
    less = tops - finite(top)
    scale = tl.exp(less)
    mass = of_tiles(looks, 1, tiles, 0.0, TILES)
    weighted = of_tiles(looks, 2, tiles, 0.0, TILES) + tl.where(scale > 0, mass * less, 0.0)
    total = tl.sum(scale * mass, 0)
    return top, tl.maximum(tl.log(total) - tl.sum(scale * weighted, 0) / total, 0.0)


@triton.jit
def ends_text(column, begin, stops, count, TILE: tl.constexpr, STOPS: tl.constexpr):
    """Which columns of a tile, from ``begin`` on, are ids that end a text, int1 [TILE].

    Args:
        stops: these ids, int64 [count], and room for ``STOPS``.
    """
    ends = column < 0
    if STOPS > 0:
        lane = tl.arange(0, STOPS)
        ids = tl.load(stops + lane, mask=lane < count, other=-1)
        if tl.sum(((ids >= begin) & (ids < begin + TILE)).to(tl.int32), 0) > 0:
            for which in range(count):
                ends |= column == tl.load(stops + which)
    return ends


@triton.jit
def row_of(values, step, row):
    """A row's own of values that rows have, or share."""
    return tl.load(values + row * step)


@triton.jit(
    do_not_specialize=[
        "tiles_each", "history_row", "history_step", "tokens", "prior", "vocab_size", "joined", "stop_count",
    ]
)  # fmt: skip
def change(
    scores,
    scores_row,
    out,
    out_row,
    width,
    tiles,
    tiles_each,
    history,
    history_row,
    history_step,
    tokens,
    strength,
    strength_step,
    priors,
    priors_step,
    prior,
    mixture,
    unigram,
    nodes,
    runs,
    words,
    deltas,
    book,
    book_starts,
    vocab_size,
    joined,
    looks,
    gate,
    gate_step,
    plausibility,
    plausibility_step,
    stops,
    stop_count,
    leave,
    leave_step,
    kept,
    facts,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    ROUNDS: tl.constexpr,
    SHIFT: tl.constexpr,
    ALONE: tl.constexpr,
    BUDGET: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STOPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Writes a prior's change, ``ALONE`` or added to the scores, and leaves what follows from it.

    Alone: ids that end a text hold `LEFT_ALONE` in rows that leave them alone, and of each tile there are `FACTS`.
    Added: of each tile there are the highest score of what ends no text before and after, and ``kept`` holds the scores
    before of what does.

    Grid: rows, parts of ``tiles_each`` tiles.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tiles_each * TILE
    end = tl.minimum(begin + tiles_each * TILE, width)
    scores += row * scores_row
    out += row * out_row
    weight = row_of(strength, strength_step, row).to(tl.float32)
    if priors is not None:
        prior = tl.load(priors + row * priors_step)
    if weight == 0:
        if (not ALONE) and (not IN_PLACE):
            for at in range(begin, end, TILE):
                column = at + tl.arange(0, TILE)
                own = tl.load(scores + column, mask=column < end)
                tl.store(out + column, own.to(out.dtype.element_ty), mask=column < end)
    else:
        least = -float("inf")
        if looks is not None:
            top, entropy = _looked(looks + row * LOOKS * tiles, tiles, TILES)
            if gate is not None:
                needed = row_of(gate, gate_step, row)
                share = entropy / tl.maximum(needed, 1e-30)
                weight *= tl.where((needed > 0) & (share < 1), share, 1.0)
            if plausibility is not None:
                least = top + tl.log(row_of(plausibility, plausibility_step, row))
        is_left = tl.full([1], 1, tl.int32)
        if leave is not None:
            is_left *= row_of(leave, leave_step, row).to(tl.int32)
        if not ALONE:
            facts += row * 2 * tiles
            for at in range(begin, end, TILE):
                column = at + tl.arange(0, TILE)
                ends = ends_text(column, at, stops, stop_count, TILE, STOPS)
                top_before = _top_of(scores, column, (column < end) & (ends == 0))
                tl.store(facts + at // TILE, top_before)
            if STOPS > 0:
                lane = tl.arange(0, STOPS)
                ids = tl.load(stops + lane, mask=lane < stop_count, other=-1)
                here = (ids >= begin) & (ids < end)
                tl.store(kept + row * stop_count + lane, tl.load(scores + ids, mask=here), mask=here)
            tl.debug_barrier()  # ``out`` may be the scores
        unigram += prior.to(tl.int64) * width
        under = None if ALONE else scores
        own, base = tile_of(under, unigram, begin, end, TILE)
        add_to_row(
            under, out, own, base, begin, end, weight, history + row * history_row, history_step, tokens, prior,
            mixture, unigram, nodes, runs, words, deltas, book, book_starts, vocab_size, joined,
            ORDER, PLACES, ROUNDS, SHIFT, TILE,
        )  # fmt: skip
        tl.debug_barrier()  # what follows reads what other threads wrote
        for at in range(begin, end, TILE):
            column = at + tl.arange(0, TILE)
            ends = ends_text(column, at, stops, stop_count, TILE, STOPS)
            if ALONE:
                left = ends & (is_left != 0)
                _leave_facts(
                    scores, out, column, end, left, least, facts + row * FACTS * tiles + at // TILE, tiles,
                    plausibility is not None, BUDGET,
                )  # fmt: skip
                if STOPS > 0:
                    tl.store(out + column, tl.full([TILE], LEFT_ALONE, tl.float32), mask=left & (column < end))
            else:
                tl.store(facts + tiles + at // TILE, _top_of(out, column, (column < end) & (ends == 0)))


@triton.jit
def _top_of(scores, column, some):
    """The highest score of some columns; NaN if one is."""
    own = tl.load(scores + column, mask=some, other=-float("inf"))
    top = tl.max(own, 0)
    return tl.where(tl.sum((own != own).to(tl.int32), 0) > 0, float("nan"), top)


@triton.jit
def _leave_facts(scores, out, column, end, left, least, facts, tiles, PLAUSIBLE: tl.constexpr, BUDGET: tl.constexpr):
    """Leaves `FACTS` of one tile, whose changes are in ``out``."""
    some = column < end
    own = tl.load(scores + column, mask=some, other=-float("inf")).to(tl.float32)
    moves = tl.load(out + column, mask=some, other=0.0)
    is_plausible = (own >= least) & (own > -float("inf"))
    is_moved = is_plausible & (left == 0)
    unmoved = (is_plausible == 0) & (left == 0)
    top = tl.max(own, 0)
    mass = tl.exp(own - finite(top))
    most = tl.max(tl.where(is_plausible, moves, -float("inf")), 0)
    less = tl.where(is_plausible, moves - finite(most), 0.0)
    tl.store(facts + _HIGHEST * tiles, top)
    tl.store(facts + _MOST * tiles, most)
    if PLAUSIBLE:
        tl.store(facts + _PLAUSIBLE * tiles, tl.sum(tl.where(is_plausible, mass, 0.0), 0))
        tl.store(facts + _GROWN * tiles, tl.sum(tl.where(is_plausible, mass * tl.exp(less), 0.0), 0))
    before = tl.max(tl.where(left, -float("inf"), own), 0)
    before = tl.where(tl.sum(((own != own) & (left == 0)).to(tl.int32), 0) > 0, float("nan"), before)
    tl.store(facts + BEFORE * tiles, before)
    tl.store(facts + _AFTER * tiles, tl.max(tl.where(is_moved, own + moves, -float("inf")), 0))
    tl.store(facts + _UNMOVED * tiles, tl.max(tl.where(unmoved, own, -float("inf")), 0))
    if BUDGET:
        tl.store(facts + _ALL * tiles, tl.sum(mass, 0))
        tl.store(facts + _OTHERS * tiles, tl.sum(tl.where(unmoved, mass, 0.0), 0))
        tl.store(facts + _STOPS * tiles, tl.sum(tl.where(left, mass, 0.0), 0))
        moved = tl.where(is_moved, mass, 0.0)
        tl.store(facts, tl.sum(moved * tl.exp(less), 0))
        power = tl.exp(less / 8)
        for level in tl.static_range(3, 0, -1):
            tl.store(facts + level * tiles, tl.sum(moved * power, 0))
            power *= power
        power = tl.exp(less / 128)
        for level in tl.static_range(7, 3, -1):
            tl.store(facts + level * tiles, tl.sum(moved * power, 0))
            power *= power


@triton.jit
def merged(facts, tiles, PLAUSIBLE: tl.constexpr, TILES: tl.constexpr):
    """What the facts of a row's tiles say of the row.

    Args:
        facts: float32 [FACTS, tiles].
        tiles: how many.
        PLAUSIBLE: whether rows have a plausible set.

    Returns:
        top: the highest score.
        most: the highest change of what is plausible.
        gained: what the plausible would gain together, in nats.
        stop_change: the change of ids that end a text, which keeps their odds against the likeliest other one.
    """
    tops = of_tiles(facts, _HIGHEST, tiles, -float("inf"), TILES)
    mosts = of_tiles(facts, _MOST, tiles, -float("inf"), TILES)
    top, most = tl.max(tops, 0), finite(tl.max(mosts, 0))
    gained = tl.full([], 0.0, tl.float32)
    if PLAUSIBLE:
        scale = tl.exp(tops - finite(top))
        own = tl.sum(scale * of_tiles(facts, _PLAUSIBLE, tiles, 0.0, TILES), 0)
        grown = tl.sum(scale * tl.exp(mosts - most) * of_tiles(facts, _GROWN, tiles, 0.0, TILES), 0)
        gained = tl.where((own > 0) & (grown > 0), tl.log(grown / own) + most, 0.0)
    before = tl.max(of_tiles(facts, BEFORE, tiles, -float("inf"), TILES), 0)
    after = tl.max(of_tiles(facts, _AFTER, tiles, -float("inf"), TILES), 0) - gained
    after = tl.maximum(after, tl.max(of_tiles(facts, _UNMOVED, tiles, -float("inf"), TILES), 0))
    return top, most, gained, none_for_nan(after - before)


@triton.jit
def none_for_nan(moved):
    """What ids that end a text move by: −∞ less −∞ is 0, where nothing else can be chosen."""
    return tl.where(moved == moved, moved, 0.0)


@triton.jit
def log_z_of(facts, tiles, top, most, gained, stop_change, TILES: tl.constexpr):
    """ln Z of each level, float32 [LEVELS], and Σ exp(score − top).

    Args:
        facts, tiles: as for `merged`, the others from it.
    """
    level = tl.arange(0, LEVELS)
    part = 1.0 / (1 << level).to(tl.float32)
    scale = tl.exp(of_tiles(facts, _HIGHEST, tiles, -float("inf"), TILES) - finite(top))
    less = of_tiles(facts, _MOST, tiles, -float("inf"), TILES) - most
    lane = tl.arange(0, TILES)
    levels = tl.load(facts + level[:, None] * tiles + lane[None, :], mask=(lane < tiles)[None, :], other=0.0)
    moved = tl.sum(levels * scale[None, :] * tl.exp(less[None, :] * part[:, None]), 1)
    logs = tl.log(moved) + (most - gained) * part
    others = tl.log(tl.sum(scale * of_tiles(facts, _OTHERS, tiles, 0.0, TILES), 0))
    stops = tl.log(tl.sum(scale * of_tiles(facts, _STOPS, tiles, 0.0, TILES), 0)) + stop_change * part
    highest = tl.maximum(logs, tl.maximum(others, stops))
    total = tl.sum(scale * of_tiles(facts, _ALL, tiles, 0.0, TILES), 0)
    summed = tl.exp(logs - highest) + tl.exp(others - highest) + tl.exp(stops - highest)
    return highest + tl.log(summed) - tl.log(total), total
