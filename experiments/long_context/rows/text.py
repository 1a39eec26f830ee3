"""Figures of a method that ``decoding chunk eval`` cannot run itself, on its texts and for its table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def figures(full: Tensor, pressed: Tensor, targets: Tensor) -> dict[str, float]:
    """Of one text: how much more a token costs, KL from full attention in nats, and how often the best is the same."""
    losses = [-log_probs.gather(-1, targets[:, None]).mean() for log_probs in (full, pressed)]
    return {
        "more": float(losses[1] - losses[0]),
        "divergence": float((full.exp() * (full - pressed)).sum(-1).mean()),
        "agreement": float((full.argmax(-1) == pressed.argmax(-1)).float().mean()),
    }


def row(name: str, kept: float, by_text: list[dict[str, float]]) -> dict[str, Any]:
    """Means over texts, with standard errors; of a method that keeps a share, up to 1, or so many tokens."""
    columns = {key: torch.tensor([text[key] for text in by_text], dtype=torch.float64) for key in by_text[0]}
    errors = {key: float(values.std() / len(values) ** 0.5) for key, values in columns.items()}
    return {
        "method": name,
        **({"retention": kept} if kept <= 1 else {"budget": int(kept)}),
        "ratio": float(columns["more"].mean().exp()),
        "ratio_error": errors["more"],
        "divergence": float(columns["divergence"].mean()),
        "divergence_error": errors["divergence"],
        "agreement": float(columns["agreement"].mean()),
    }
