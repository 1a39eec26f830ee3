"""The budgets that requests ask for on the V2 model runner, where each request has a place in a table."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from decoding.vllm.requests import UNLIMITED, read_admitted


class BudgetSlots:
    """What a processor hears of requests, for an attention backend, which asks by their places.

    Args:
        count: places of the runner's table.

    Attributes:
        longest: tokens that a request can have: nobody's budget is more.
    """

    def __init__(self, count: int):
        self._budgets = np.full(count, -1, np.int64)  # the server's
        self.longest = UNLIMITED

    def add(self, slot: int, params: Any) -> bool:
        """Puts a request into a slot. Whether its logits change: no."""
        budget = read_admitted(params, "chunk selection").budget
        self._budgets[slot] = -1 if budget is None else min(budget, self.longest)
        return False

    def flush(self) -> None:
        """Nothing."""

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Nothing."""
        return logits

    def of(self, places: np.ndarray, default: int) -> np.ndarray:
        """Tokens, int64 like the places; ``default`` where a request asks for nothing."""
        budgets = self._budgets[places]
        return np.where(budgets < 0, default, budgets)


@lru_cache(maxsize=16)
def budget_slots(engine: str, count: int) -> BudgetSlots:
    """Those of an engine, by its ``instance_id``: one for its processor and its attention backend."""
    return BudgetSlots(count)
