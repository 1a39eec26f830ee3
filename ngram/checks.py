"""What a model may be asked for: one clear error each, before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ngram.errors import NGramError
from ngram.tables import MAX_ORDER


def check_whole(**numbers: Any) -> None:
    """Refuses what is no whole number."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise NGramError(f"{name} must be a whole number, not {value!r}")


def check_size(vocab_size: int, order: int = 1) -> None:
    """Refuses an order beyond `MAX_ORDER`, and a vocabulary without ids."""
    check_whole(order=order, vocab_size=vocab_size)
    if not 1 <= order <= MAX_ORDER:
        raise NGramError(f"order must be 1 to {MAX_ORDER}, not {order}")
    if vocab_size < 1:
        raise NGramError(f"vocab_size must be at least 1, not {vocab_size}")


def check_markers(vocab_size: int, bos_id: int | None, eos_id: int | None) -> None:
    """Refuses markers that are no ids, or one."""
    for name, marker in (("bos_id", bos_id), ("eos_id", eos_id)):
        if marker is None:
            continue
        check_whole(**{name: marker})
        if not 0 <= marker < vocab_size:
            raise NGramError(f"{name} {marker} must lie in [0, {vocab_size})")
    if bos_id is not None and bos_id == eos_id:
        raise NGramError(f"bos_id and eos_id are both {bos_id}: what begins a text cannot end it; leave bos_id out")
