"""The six abilities of arXiv 2506.07295, and the best temperature of each for a class of model sizes.

The table is made of the paper's published scores (``ability_scores.json``): the mean over the models of a class.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import send
from decoding.errors import DecodingError

ABILITIES = ("CR", "CT", "ICL", "IF", "MT", "SUMM")
NAMES = {
    "CR": "causal reasoning",
    "CT": "creativity",
    "ICL": "in-context learning",
    "IF": "instruction following",
    "MT": "machine translation",
    "SUMM": "summarization",
}
SIZES = ("small", "medium", "large")
# The classes of the table: 1 to 4, 7 to 13, 47 to 70 thousand million parameters. The borders are ours.
_BORDERS = (5e9, 25e9)
DEFAULT_TOLERANCE = 0.01
# How far apart two scores of the table must be to say anything, as shares of the best: for each size the median, over
# abilities and temperatures up to 1, of the standard error of a score's distance from its ability's best, over the 5, 4
# and 3 models whose means the table has. Of four medium models one put 1.3 ahead in causal reasoning, by 1.4 %.
NOISE = {"small": 0.011, "medium": 0.02, "large": 0.011}


@cache
def _published() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("ability_scores.json").read_bytes())


def size_class(parameters: int) -> str:
    """Of a number of parameters: "small", "medium" or "large"."""
    return SIZES[sum(parameters >= border for border in _BORDERS)]


def published_scores(size: str) -> tuple[list[float], np.ndarray]:
    """The paper's temperatures, K of them, and mean scores [6, K], abilities in order.

    Raises:
        DecodingError: no such size.
    """
    if size not in SIZES:
        raise DecodingError(f"unknown model size {size!r}: choose from {', '.join(SIZES)}")
    table = _published()
    return table["temperatures"], np.array([table["sizes"][size]["scores"][ability] for ability in ABILITIES])


def best_temperatures(size: str, tolerance: float | None = None) -> list[float]:
    """The temperature of each ability, and of a prompt of unknown ability in seventh place.

    Args:
        size: of the model.
        tolerance: as for `lowest_within`; by default the selector's, or the table's noise if that is more.

    Raises:
        DecodingError: no such size.
    """
    temperatures, scores = published_scores(size)
    relative = scores / scores.max(1, keepdims=True)
    rows = torch.from_numpy(np.concatenate([scores, relative.mean(0, keepdims=True)]))
    tolerance = max(DEFAULT_TOLERANCE, NOISE[size]) if tolerance is None else tolerance
    return [temperatures[at] for at in lowest_within(rows, tolerance).tolist()]


def expected_scores(shares: Tensor, size: str) -> tuple[Tensor, Tensor]:
    """What prompts are expected to score at each temperature, which are not surely of one ability.

    With p [N, 6] the probabilities and r [6, K] the published scores as shares of each ability's best, it is p r.

    Args:
        shares: probabilities of abilities, float32 [N, 6].
        size: of the model.

    Returns:
        The temperatures, float32 [K], and the scores, float32 [N, K], on the probabilities' device.

    Raises:
        DecodingError: no such size.
    """
    temperatures, scores = published_scores(size)
    relative = torch.from_numpy(scores / scores.max(1, keepdims=True)).to(shares.dtype)
    return send(torch.tensor(temperatures, dtype=torch.float32), shares.device), shares @ send(relative, shares.device)


def expected_temperatures(shares: Tensor, size: str, tolerance: float = DEFAULT_TOLERANCE) -> Tensor:
    """The temperatures of highest `expected_scores`: the lowest that comes within the tolerance, or the table's noise.

    Where all abilities are as likely that is what is best for all of them.

    Args:
        shares: probabilities of abilities, float32 [N, 6].
        size: of the model.
        tolerance: as for `lowest_within`; the size's noise, if that is more.

    Returns:
        float32 [N], on the probabilities' device.

    Raises:
        DecodingError: no such size.
    """
    temperatures, expected = expected_scores(shares, size)
    return temperatures[lowest_within(expected, max(tolerance, NOISE[size]))]


def lowest_within(scores: Tensor, tolerance: float) -> Tensor:
    """The first score within ``tolerance``, a share of the best one, of the best: [..., K] -> int64 [...].

    Scores are noisy and temperatures ascend: where more heat gains next to nothing, the lower one is as good and safer.
    """
    best = scores.amax(-1, keepdim=True)
    return (scores >= best - tolerance * best.abs()).int().argmax(-1)
