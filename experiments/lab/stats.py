"""Means and their bootstrap intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


def resampled_rows(count: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Which of ``count`` values each resample holds: int64 [RESAMPLES, count].

    Args:
        count: of values.
        rng: by default a new one with seed 0, so that equally many values are resampled alike.
    """
    return (rng or np.random.default_rng(0)).integers(0, count, (RESAMPLES, count))


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, resampled: np.ndarray) -> Estimate:
        """From the bootstrap's means."""
        low, high = np.quantile(resampled, (0.025, 0.975))
        return cls(float(mean), float(low), float(high))

    def shown(self, factor: float = 1.0, places: int = 1) -> str:
        """As text."""
        mean, low, high = (f"{factor * value:.{places}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def interval(key: str, values: np.ndarray | None, is_log: bool) -> dict[str, float | None]:
    """The mean as ``key`` and its 95 % bootstrap interval as ``key_low`` and ``key_high``.

    Args:
        key: what it is called.
        values: float [N], one for each prompt; None if unknown. Of a single one the interval is unknown.
        is_log: give exponentials.
    """
    names = (key, f"{key}_low", f"{key}_high")
    if values is None or np.isnan(values).any():
        return dict.fromkeys(names)
    found = Estimate.of(values.mean(), values[resampled_rows(len(values))].mean(1))
    numbers = [math.exp(x) if is_log else x for x in (found.mean, found.low, found.high)]
    return dict(zip(names, numbers if len(values) > 1 else (numbers[0], None, None), strict=True))
