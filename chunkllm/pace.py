"""How many tokens to draft before they are verified: as many as make most tokens a second, by what was measured."""

from __future__ import annotations

import numpy as np

# With these a pass is over 1, 2, 4, 8 … tokens. Matrix products of other heights take longer: of 7 than of 8 on a CPU.
_LENGTHS = np.array([0, 1, 3, 7, 11, 15])
MOST_DRAFTED = int(_LENGTHS[-1])
_FIRST = 2  # costs of a kind that are slow for reasons of their own
_TRIED = 3
# So many cycles draft if that seems nearly as fast: what is accepted is known only then.
_TRIALS, _NEARLY = 4, 0.8
_EXPECTED, _WEIGHT, _MEMORY = 0.94, 12.0, 0.98
_NEWEST = 0.3
_FIRST_REST, _LONGEST_REST = 64, 1024
# Before anything is measured: what a drafted token takes beside what it reads, and choosing once, both in plain steps;
# the gain that must be in sight for a draft to be tried at once; else the plain steps of which a trial is a small part.
_BESIDE, _CHOOSING = 0.05, 0.25
_PROMISE, _UNPROMISING_REST = 1.25, 256


class Pace:
    """Adapts a draft's length to what was accepted and to what the parts of a cycle cost.

    A cycle drafts k tokens, reads them all in one pass, and keeps 1 to k + 1. If a row's drafted tokens are right with
    probability α each, it keeps (1 − α^(k+1)) / (1 − α) of them on average (arXiv 2211.17192, equation 1). A pass over
    one token takes v, one over k + 1 what it took before, a drafted token d, and choosing what drafts read s.

    Args:
        rows: B, texts that are written.
        share: what a drafted token reads, of the bytes that one with full attention reads.
    """

    def __init__(self, rows: int, share: float):
        self._right = np.full(rows, _EXPECTED * _WEIGHT)
        self._tried = np.full(rows, _WEIGHT)
        self._plain, self._draft, self._choice = _Cost(), _Cost(), _Cost()  # v, d and s
        self._passes = _unknown()
        self._rest, self._rested = 0 if _promised(share) >= _PROMISE else _UNPROMISING_REST, 0

    @property
    def acceptance(self) -> np.ndarray:
        """float64 [B], the estimates of α."""
        return self._right / self._tried

    def length(self, active: np.ndarray, most: int) -> int:
        """k for the next cycle; 0 if full attention, a token at a time, is faster.

        Args:
            active: bool [B], rows that still write.
            most: of tokens that there are to write.
        """
        if self._plain.count < _FIRST or most < 1:
            return 0
        best = 0 if self.is_untried else self._best(active)
        if best:
            self._rest = _FIRST_REST
        elif self._rested >= self._rest:  # nothing is known yet, or the text has grown, and what is may be old
            self._rest = min(max(2 * self._rest, _FIRST_REST), _LONGEST_REST)
            best, self._passes = _TRIED, _unknown()
        self._rested = 0 if best else self._rested + 1
        return min(best, most)

    @property
    def is_untried(self) -> bool:
        """Whether nothing was drafted yet."""
        return not self._draft.count

    def _best(self, active: np.ndarray) -> int:
        """The fastest length; while there were few trials, that of a draft if it is nearly as fast as none."""
        speeds = self._speeds(active)
        if self._draft.count < _TRIALS:
            speeds[0] *= _NEARLY
        return int(_LENGTHS[np.argmax(speeds)])

    def _speeds(self, active: np.ndarray) -> np.ndarray:
        """float64, tokens a second for each of `_LENGTHS`, of all rows that still write."""
        plain, k = self._plain.value, _LENGTHS
        kept = _kept(self.acceptance[active, None]).sum(0)
        return kept / np.where(k > 0, self._of_passes() + k * self._draft.value + self._choice.value, plain)

    def _of_passes(self) -> np.ndarray:
        """float64, seconds of a pass for each of `_LENGTHS`.

        One that was not tried is taken to grow in a line from one over a single token, through the longest that was
        tried below it, or else the shortest above it: costs jump, so that longer passes say little of shorter ones.
        """
        plain, found = self._plain.value, []
        slopes = {k: max((cost.value - plain) / k, 0.0) for k, cost in self._passes.items() if cost.count}
        slope = next(iter(slopes.values()), 0.0)
        for k in self._passes:
            slope = slopes.get(k, slope)
            found.append(plain + slope * k)
        return np.array(found)

    def saw(self, drafted: int, right: np.ndarray) -> None:
        """Takes what a cycle found.

        Args:
            drafted: k.
            right: int64 [B], the drafted tokens before the first wrong one; −1 for rows that no longer write.
        """
        if not drafted:
            return
        counts = right >= 0
        tried = np.minimum(right + 1, drafted)
        kept = _MEMORY**tried
        self._right = np.where(counts, kept * self._right + right, self._right)
        self._tried = np.where(counts, kept * self._tried + tried, self._tried)

    def took(self, drafted: int, choosing: float, drafting: float, reading: float) -> None:
        """Takes what a cycle cost, in seconds: of choosing what drafts read, of drafting, and of the rest."""
        if not drafted:
            self._plain.add(reading)
            return
        if drafted in self._passes:  # else there was no more to write
            self._passes[drafted].add(reading)
        self._choice.add(choosing)
        self._draft.add(drafting / drafted)


class _Cost:
    """Seconds, the newest counting most. The first are slow for reasons of their own: of them the fastest counts.

    Attributes:
        value: 0 before the first.
        count: of costs taken.
    """

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, seen: float) -> None:
        """Takes a cost."""
        self.count += 1
        if self.count == 1:
            self.value = seen
        elif self.count <= _FIRST:
            self.value = min(self.value, seen)
        else:
            self.value = (1 - _NEWEST) * self.value + _NEWEST * seen


def _kept(right: np.ndarray | float) -> np.ndarray:
    """Tokens that a cycle keeps for each of `_LENGTHS`, if drafted ones are right with such a probability."""
    right = np.minimum(right, 0.999)
    return (1 - right ** (_LENGTHS + 1)) / (1 - right)


def _promised(share: float) -> float:
    """Tokens for the time of one plain step, at the best length, if as many are right as usual."""
    return float((_kept(_EXPECTED) / (1 + _LENGTHS * (share + _BESIDE) + _CHOOSING * (_LENGTHS > 0))).max())


def _unknown() -> dict[int, _Cost]:
    """Costs of passes, by the tokens that are drafted for them."""
    return {int(k): _Cost() for k in _LENGTHS}
