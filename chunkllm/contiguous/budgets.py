"""How many tokens a row keeps: pure functions of what the row itself holds, whatever stands beside it in the batch."""

from __future__ import annotations

import numpy as np
import torch

from chunkllm.contiguous.plan import Plan
from chunkllm.contiguous.table import ChunkTable
from chunkllm.selection import divide


def tokens_kept(plan: Plan, table: ChunkTable, held: np.ndarray) -> np.ndarray:
    """int64 [B], tokens that rows keep on average over layers, of the ``held`` [B] that they have."""
    least = plan.sinks + max(plan.local, plan.max_chunk)
    if plan.top_k is not None:
        return np.minimum(least + table.longest(plan.top_k), held)
    if plan.budget is not None:
        return np.full_like(held, max(plan.budget, least))
    return np.maximum(np.rint(plan.retention * held).astype(np.int64), least)


def layer_limits(plan: Plan, slots: np.ndarray, recent: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Divides what rows keep among layers, in proportion to the plan's weights.

    Args:
        plan: whose weights they are.
        slots: int64 [B], tokens that a row keeps on average, as `tokens_kept` gives them.
        recent: int64 [B], last tokens that always stay, in every layer.
        held: int64 [B], tokens that the row has: all that a layer can use.

    Returns:
        int64 [B, L]. A row that has no more than ``slots`` keeps all in every layer.
    """
    always = plan.sinks + recent
    to_choose, most = (torch.from_numpy(np.maximum(x - always, 0)) for x in (slots, held))
    limits = always[:, None] + divide(to_choose, plan.weights, most).numpy()
    return np.where((held <= slots)[:, None], held[:, None], limits)
