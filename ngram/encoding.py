"""How numbers are kept in `ngram.tables.Tables`, for those who write and read them."""

from __future__ import annotations

NEVER = -1e30
"""Log-probability of what cannot occur. Finite, so that a weight of 0 leaves scores as they are (0 · −inf is NaN)."""
SMALL_VOCAB = 1 << 16
SMALL_BIAS = 1 << 15
"""Small integers are kept as int16, less this."""
RUN_BITS = 4
"""Nodes stand in runs of 2^4; a node's first continuation is kept as its distance from the run's first one."""
