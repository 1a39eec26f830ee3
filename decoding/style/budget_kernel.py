"""The largest share of a change that stays within a divergence budget, searched for by kernels of Triton.

JS(p, q_s), with q_s ∝ p · exp(s · c), grows with s. A pass over a row's scores and changes tries two shares at once,
s₀ < s₁, and leaves three sums for each tile of the row; the next pass merges them at its beginning, narrows the bracket
a ≤ s < b, and tries two more. A row whose bracket is narrow enough is settled, and later passes return at once. Their
number is fixed: nothing waits for the host, and nothing depends on the order in which programs run.

How few passes do it:

- The first one begins near the end. While the change was made, Z(s) = Σ p · exp(s · c) was summed at s = 1, ½, … 1/128
  (three exponentials and their squares). ln Z is smooth, so four of these give it at any s. With it Hellinger's
  H²(s) = 1 − Z(s/2) / √Z(s) is known, and ln 2 · H² ≤ JS ≤ H²: a bracket that is sure, and an estimate good to a few
  hundredths. Rows with H²(1) within their budget are settled before anything is tried.
- JS needs ln Z(s) before a pass can sum it, and the pass yields it only afterwards. A guess z that is off by δ is made
  good: with r = q / p, Σ p · r = e^δ, and JS = J − δ · D + δ²/2 · (D + ¼ − 0.43 J), J and D being sums of F(ln r) and
  of its derivative; what is left is some hundredths of δ² · JS. How far the interpolation was off is kept, so that δ
  shrinks with the bracket.
- ln(JS / (ln 2 − JS)) is close to a straight line in ln s. Two passes suffice for nearly all rows; `PASSES` leaves some
  for odd ones. A row that is not settled then takes the lower end, which is within the budget.

F(g) = ½ (r g − (1 + r) ln((1 + r) / 2)), with r = e^g, is what a token adds to JS for each unit of p. Near g = 0 its
terms cancel, and a series takes over: so small budgets are kept as exactly as large ones.

A pass reads 8 bytes a token and takes five special functions: at batch 64 and V=151,936 that is 78 MB, 16 µs at an
H200's 4.8 TB/s, and 49 million special functions, 12 µs at 4·10¹² a second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from decoding.style.change_kernel import FACTS, LEFT_ALONE, LEVELS, finite, log_z_of, merged

PASSES = 6
SUMS = tl.constexpr(6)
"""Numbers that a pass leaves for each tile."""
STATE = tl.constexpr(32)
"""Numbers that a pass knows of each row: the names below, then ln Z(s) / s of each level."""

_SETTLED = tl.constexpr(0)  # the share; −1 while it is searched for
_LOW = tl.constexpr(1)  # the bracket, √JS at its ends, and what ln Z was above its interpolation there
_LOW_ROOT = tl.constexpr(2)
_LOW_OFF = tl.constexpr(3)
_HIGH = tl.constexpr(4)
_HIGH_ROOT = tl.constexpr(5)  # ∞: nobody knows whether s = 1 is too much
_HIGH_OFF = tl.constexpr(6)
_FIRST = tl.constexpr(7)  # what is tried next, and the guesses of ln Z
_FIRST_LOG = tl.constexpr(8)
_SECOND = tl.constexpr(9)
_SECOND_LOG = tl.constexpr(10)
_TOP = tl.constexpr(11)  # the row's highest score
_TOTAL = tl.constexpr(12)  # Σ exp(score − top)
_GAINED = tl.constexpr(13)  # what the plausible would gain together
_STOP = tl.constexpr(14)  # the change of ids that end a text
_CURVE = tl.constexpr(24)

_LN2 = tl.constexpr(0.6931471805599453)
_GRID = tl.constexpr(64)
_NEARBY = tl.constexpr(0.05)  # of the estimate: where the first pass tries
_NOISE = tl.constexpr(2e-6)  # of H², which float32 sums yield
_MOST = tl.constexpr(80.0)  # of ln r: e⁸⁰ is finite
_NARROW = tl.constexpr(1 / 256)  # of the share: a straight line is as good as exact within
_SMALL = tl.constexpr(2e-3)  # a budget, in nats
_LEAST_NARROW = tl.constexpr(1 / 8192)


@triton.jit
def _nodes():
    """1, ½, … 1/128, float32 [LEVELS]."""
    return 1.0 / (1 << tl.arange(0, LEVELS)).to(tl.float32)


@triton.jit
def _log_z(curve, s):
    """ln Z(s) by the four levels around each s, float32 [N].

    Args:
        curve: ln Z(s) / s of each level, float32 [LEVELS].
        s: float32 [N].
    """
    node, level = _nodes()[:, None], tl.arange(0, LEVELS)[:, None]
    first = tl.minimum(tl.maximum(tl.floor(-tl.log2(tl.maximum(s, 1e-9))) - 1, 0), LEVELS - 4).to(tl.int32)[None, :]
    weight = tl.where((first <= level) & (level < first + 4), 1.0, 0.0)
    for other in tl.static_range(LEVELS):
        at = 1.0 / (1 << other)
        is_same = level == other
        is_used = (first <= other) & (other < first + 4) & (is_same == 0)
        factor = (s[None, :] - at) / tl.where(is_same, 1.0, node - at)
        weight = tl.where(is_used, weight * factor, weight)
    return tl.sum(weight * curve[:, None], 0) * s


@triton.jit
def _two(first, second):
    return tl.where(tl.arange(0, 2) == 0, first, second)


@triton.jit
def _of_two(pair, which: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 2) == which, pair, 0.0), 0)


@triton.jit
def _hellinger(log_z, log_z_of_half):
    """H² = 1 − Z(s/2) / √Z(s)."""
    exponent = log_z_of_half - log_z / 2
    exponent = tl.where(exponent > 0, 0.0, exponent)  # a minimum would make 0 of NaN, too
    return tl.where(exponent > -1e-3, -exponent * (1 + exponent / 2), 1 - tl.exp(exponent))


@triton.jit
def _begin(log_z, budget):
    """Where the search begins in one row.

    Args:
        log_z: ln Z of each level, float32 [LEVELS].
        budget: nats.

    Returns:
        settled, low, low_root, high, high_root, first, first_log, second, second_log: as the state holds them.
        curve: float32 [LEVELS].
    """
    node, level = _nodes(), tl.arange(0, LEVELS)
    curve = log_z / node
    root = tl.sqrt(budget)
    is_next = level[None, :] == level[:, None] + 1
    distance = _hellinger(log_z, tl.sum(tl.where(is_next, log_z[None, :], 0.0), 1))
    is_within = (distance + _NOISE <= budget) & (level < LEVELS - 1)
    is_beyond = (_LN2 * distance - _NOISE > budget) & (level < LEVELS - 1)
    low = tl.max(tl.where(is_within, node, 0.0), 0)
    high = tl.min(tl.where(is_beyond, node, 2.0), 0)
    high_root = tl.where(high > 1, float("inf"), 1.1 * root)
    high = tl.minimum(high, 1.0)

    place = tl.arange(0, _GRID)
    tried = tl.where(place == _GRID - 1, 1.0, tl.exp2((place - (_GRID - 1)) * ((LEVELS - 1) / (_GRID - 1))))
    distances = _hellinger(_log_z(curve, tried), _log_z(curve, tried / 2))
    roots = tl.sqrt(distances * (1 - (1 - _LN2) * distances))  # JS, nearly, between its bounds
    is_low = ((roots <= root) & (tried <= high)) | (tried <= low)
    below = tl.max(tl.where(is_low, tried, 0.0), 0)
    above = tl.min(tl.where(tried > below, tried, 2.0), 0)
    below_root = tl.max(tl.where(tried == below, roots, 0.0), 0)
    above_root = tl.max(tl.where(tried == above, roots, 0.0), 0)
    part = (root - below_root) / tl.maximum(above_root - below_root, 1e-12)
    estimate = tl.where(below >= 1, 1.0, below + (above - below) * tl.minimum(tl.maximum(part, 0.0), 1.0))
    estimate = _within(estimate, low, high)

    by = estimate * _NEARBY
    first, second = _apart(estimate, by, low, high, high_root, True, True)
    logs = _log_z(curve, _two(first, second))
    is_free = (tl.sum(tl.where(is_within & (level == 0), 1, 0), 0) > 0) | (budget == float("inf"))
    settled = tl.where(is_free, 1.0, -1.0)
    low_root = tl.where(low > 0, 0.9 * root, 0.0)
    return settled, low, low_root, high, high_root, first, _of_two(logs, 0), second, _of_two(logs, 1), curve


@triton.jit
def _within(value, low, high):
    """``value`` from ``low`` to ``high``, and their middle where it is NaN."""
    value = tl.where(value == value, value, (low + high) / 2)
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _apart(estimate, by, low, high, high_root, near_below, near_above):
    """Two shares to try: ``by`` below and above the estimate, or else halfway to the bracket's ends."""
    first = tl.where((estimate - by > low) & near_below, estimate - by, (low + estimate) / 2)
    is_open = high_root == float("inf")
    farther = tl.where(is_open & (estimate + by >= high), high, (estimate + high) / 2)
    second = tl.where((estimate + by < high) & near_above, estimate + by, farther)
    return first, second


@triton.jit
def _of_tiles(sums, which: tl.constexpr, tiles, TILES: tl.constexpr):
    lane = tl.arange(0, TILES)
    return tl.sum(tl.load(sums + which * tiles + lane, mask=lane < tiles, other=0.0), 0)


@triton.jit
def _divergence(sums, which: tl.constexpr, tiles, TILES: tl.constexpr):
    """How far the guess of ln Z was off, and JS, of what a pass tried first or second."""
    off = tl.log(_of_tiles(sums, 3 * which, tiles, TILES))
    off = tl.minimum(tl.maximum(tl.where(off == off, off, 0.0), -_MOST), _MOST)
    value, slope = _of_tiles(sums, 3 * which + 1, tiles, TILES), _of_tiles(sums, 3 * which + 2, tiles, TILES)
    curvature = slope + 0.25 - 0.43 * value
    return off, tl.maximum(value - off * slope + off * off / 2 * curvature, 0.0)


@triton.jit
def _is_sure(off, divergence, budget):
    """Whether it is known on which side of the budget a share is."""
    is_clear = off * off / 4 < tl.abs(divergence / budget - 1)
    return (tl.abs(off) <= 0.1) | ((tl.abs(off) < 0.5) & is_clear)


@triton.jit
def narrowed(state, sums, tiles, budget, TILES: tl.constexpr):
    """The bracket of one row after a pass, and what to try next.

    Args:
        state: of the pass, float32 [STATE].
        sums: what its tiles left, float32 [SUMS, tiles].
        tiles: of a row.
        budget: nats.

    Returns:
        As `_begin`, with low_off behind low_root and high_off behind high_root.
    """
    settled = tl.load(state + _SETTLED)
    low, low_root, low_off = tl.load(state + _LOW), tl.load(state + _LOW_ROOT), tl.load(state + _LOW_OFF)
    high, high_root, high_off = tl.load(state + _HIGH), tl.load(state + _HIGH_ROOT), tl.load(state + _HIGH_OFF)
    first, first_log = tl.load(state + _FIRST), tl.load(state + _FIRST_LOG)
    second, second_log = tl.load(state + _SECOND), tl.load(state + _SECOND_LOG)
    curve = tl.load(state + _CURVE + tl.arange(0, LEVELS))
    if settled < 0:
        root = tl.sqrt(budget)
        first_off, first_js = _divergence(sums, 0, tiles, TILES)
        second_off, second_js = _divergence(sums, 1, tiles, TILES)
        first_log += first_off
        second_log += second_off
        first_is_sure, second_is_sure = _is_sure(first_off, first_js, budget), _is_sure(second_off, second_js, budget)
        first_is_low, second_is_low = first_js <= budget, second_js <= budget
        both, above = first_is_sure & second_is_sure, first_is_sure & (first_is_low == 0)
        if both | above | (second_is_sure & second_is_low):
            second_is_low = second_is_low & second_is_sure & (above == 0)  # JS grows: one can speak for both
            first_is_low = first_is_low | second_is_low
            by_curve = _log_z(curve, _two(first, second))
            first_off, second_off = first_log - _of_two(by_curve, 0), second_log - _of_two(by_curve, 1)
            first_root, second_root = tl.sqrt(first_js), tl.sqrt(second_js)
            if second_is_low:
                low, low_root, low_off = second, second_root, second_off
            else:
                high, high_root, high_off = second, second_root, second_off
                if first_is_low:
                    low, low_root, low_off = first, first_root, first_off
            if first_is_low == 0:
                high, high_root, high_off = first, first_root, first_off
            if low >= 1:
                settled = 1.0
            elif high - low <= tl.maximum(low * _NARROW, _LEAST_NARROW):
                part = (root - low_root) / tl.maximum(high_root - low_root, 1e-20)
                part = tl.minimum(tl.maximum(part, 0.0), 1.0) * (63 / 64)  # a line may be too low
                settled = tl.where(low > 0, low + (high - low) * part, 0.0)  # at 0 JS may begin with a step
            else:
                is_between = first_is_low & (second_is_low == 0)
                steepness = _straightened(second_js) - _straightened(first_js)
                distance = (_straightened(budget) - _straightened(first_js)) * tl.log(second / first) / steepness
                estimate = _within(first * tl.exp(tl.minimum(distance, _MOST)), low, high)
                outside = tl.maximum(first - estimate, estimate - second)
                apart = second - first
                share = tl.minimum(tl.maximum(apart / estimate / 8, 1 / 64), 1 / 4)
                by = tl.where(is_between, apart * share, tl.maximum(outside, 0.0) / 8)
                first, second = _apart(estimate, by, low, high, high_root, first_is_low, second_is_low == 0)
                logs = _log_z(curve, _two(first, second))
                along = (_two(first, second) - low) / tl.maximum(high - low, 1e-20)
                logs += low_off + (high_off - low_off) * along
                first_log, second_log = _of_two(logs, 0), _of_two(logs, 1)
    return (
        settled, low, low_root, low_off, high, high_root, high_off, first, first_log, second, second_log, curve,
    )  # fmt: skip


@triton.jit
def _straightened(divergence):
    """What of JS is close to a straight line in ln s, near 0 as near its bound."""
    return tl.log(tl.maximum(divergence, 1e-30)) - tl.log(tl.maximum(_LN2 - divergence, 1e-7))


@triton.jit
def change_of(own, moves, least, gained, stop_change):
    """A tile's change with what is known of its row.

    Args:
        own: scores, float32 [TILE].
        moves: what the prior alone would change, `LEFT_ALONE` for ids that end a text.
        least: the score from which on a token is plausible.
        gained, stop_change: from `merged`.
    """
    return tl.where(moves == LEFT_ALONE, stop_change, tl.where(own >= least, moves - gained, 0.0))


@triton.jit
def _log_mean(log_r):
    """ln((1 + r) / 2), to 2·10⁻⁷: a polynomial of e^−|ln r|. Triton's own logarithm takes twice as many operations."""
    t = tl.exp(-tl.abs(log_r))
    value = t * -0.00615147096 + 0.0348497125
    value = value * t - 0.093252039
    value = value * t + 0.165822753
    value = value * t - 0.23982616
    value = value * t + 0.331548617
    value = value * t - 0.499838562
    value = value * t + 0.999994272
    return value * t - 0.693147147 + tl.maximum(log_r, 0.0)


@triton.jit
def _added(mass, moves, s, log_z, is_small):
    """What a tile adds to Σ p r, to J and to D, at a share s and a guess of ln Z.

    Args:
        mass: p, float32 [TILE].
        moves: the change c.
        is_small: whether the budget is so small that the terms of F would drown in rounding.
    """
    log_r = tl.minimum(s * moves - log_z, _MOST)
    r = tl.exp(log_r)
    log_mean = _log_mean(log_r)
    value = r * log_r - (1 + r) * log_mean
    if is_small:
        square = log_r * log_r / 4
        series = (1 + r) * square * (0.5 - square * (0.25 - square * (1 / 9 - square * (17 / 360))))
        value = tl.where(tl.abs(log_r) < 0.5, series, value)
    slope = r * (log_r - log_mean)
    return tl.sum(mass * r, 0), tl.sum(mass * value, 0) / 2, tl.sum(mass * slope, 0) / 2


@triton.jit
def search(
    scores,
    scores_row,
    moves,
    moves_row,
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
    next_state,
    next_sums,
    BEGINS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One pass: narrows brackets by what the last one left, and leaves the sums of what it tries. Grid: rows, tiles.

    The first one, which ``BEGINS``, takes `FACTS` in place of a state and sums.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(strength + row * strength_step) != 0:
        allowed = tl.load(budget + row * budget_step)
        next_state += row * STATE
        if BEGINS:
            facts += row * FACTS * tiles
            top, most, gained, stop_change = merged(facts, tiles, plausibility is not None, TILES)
            log_z, total = log_z_of(facts, tiles, top, most, gained, stop_change, TILES)
            settled, low, low_root, high, high_root, first, first_log, second, second_log, curve = _begin(
                log_z, allowed
            )
            low_off, high_off = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
        else:
            state += row * STATE
            top, total = tl.load(state + _TOP), tl.load(state + _TOTAL)
            gained, stop_change = tl.load(state + _GAINED), tl.load(state + _STOP)
            (
                settled, low, low_root, low_off, high, high_root, high_off, first, first_log, second, second_log, curve,
            ) = narrowed(state, sums + row * SUMS * tiles, tiles, allowed, TILES)  # fmt: skip
        if tile == 0:
            tl.store(next_state + _SETTLED, settled)
            tl.store(next_state + _LOW, low)
            tl.store(next_state + _LOW_ROOT, low_root)
            tl.store(next_state + _LOW_OFF, low_off)
            tl.store(next_state + _HIGH, high)
            tl.store(next_state + _HIGH_ROOT, high_root)
            tl.store(next_state + _HIGH_OFF, high_off)
            tl.store(next_state + _FIRST, first)
            tl.store(next_state + _FIRST_LOG, first_log)
            tl.store(next_state + _SECOND, second)
            tl.store(next_state + _SECOND_LOG, second_log)
            tl.store(next_state + _TOP, top)
            tl.store(next_state + _TOTAL, total)
            tl.store(next_state + _GAINED, gained)
            tl.store(next_state + _STOP, stop_change)
            tl.store(next_state + _CURVE + tl.arange(0, LEVELS), curve)
        if settled < 0:
            least = -float("inf")
            if plausibility is not None:
                least = top + tl.log(tl.load(plausibility + row * plausibility_step))
            column = tile * TILE + tl.arange(0, TILE)
            some = column < width
            own = tl.load(scores + row * scores_row + column, mask=some, other=-float("inf")).to(tl.float32)
            change = tl.load(moves + row * moves_row + column, mask=some, other=0.0)
            change = change_of(own, change, least, gained, stop_change)
            mass = tl.exp(own - finite(top)) * (1 / total)
            is_small = allowed < _SMALL
            next_sums += row * SUMS * tiles + tile
            z, value, slope = _added(mass, change, first, first_log, is_small)
            tl.store(next_sums, z)
            tl.store(next_sums + tiles, value)
            tl.store(next_sums + 2 * tiles, slope)
            z, value, slope = _added(mass, change, second, second_log, is_small)
            tl.store(next_sums + 3 * tiles, z)
            tl.store(next_sums + 4 * tiles, value)
            tl.store(next_sums + 5 * tiles, slope)


@triton.jit
def share_of(state, sums, tiles, allowed, TILES: tl.constexpr):
    """What the last pass found in one row: the share, and what `change_of` needs."""
    found = narrowed(state, sums, tiles, allowed, TILES)
    share = tl.where(found[0] < 0, found[1], found[0])
    return share, tl.load(state + _TOP), tl.load(state + _GAINED), tl.load(state + _STOP)
