"""The path on which a step is steered: PyTorch's operations, or kernels of Triton where these are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.style import steering
from decoding.style.steering import Guards, GuardSettings, Stops, guards_of, stops_of
from ngram import NGramModel
from ngram.kernels import SWITCH, asks_for_triton, uses_triton
from ngram.tables import Tables

_VOCAB = 9000  # more than two tiles
_STOPS = (5, 8000)
_TRIED = (
    GuardSettings(),
    GuardSettings(entropy_gate=9.0),
    GuardSettings(plausibility=0.1),
    GuardSettings(max_js=0.05),
    GuardSettings(plausibility=0.1, max_js=0.05, entropy_gate=9.0),
)
_APART = 2e-2  # a few steps of either search, which stop at 1/4096 of λ


def steer(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None = None,
    guards: Guards | None = None,
    stops: Stops | None = None,
    **options: Any,
) -> Tensor:
    """`decoding.style.steering.steer`, whose arguments and result these are."""
    by: Callable[..., Tensor] = steering.steer
    runs_on = uses_triton if guards is None and stops is None else has_guards_on
    if runs_on(scores.device):
        from decoding.style import kernels

        by = kernels.steer
    return by(tables, scores, history, strength, mixture, guards, stops, **options)


def has_guards_on(device: torch.device) -> bool:
    """Whether guards, and ids that end a text, run as kernels there: tried once, before they take torch's place.

    Raises:
        NGramError: as `ngram.kernels.uses_triton`.
    """
    return uses_triton(device) and (asks_for_triton(device) or _are_right_on(device))


@cache
def _are_right_on(device: torch.device) -> bool:
    try:
        try_on(device)
    except Exception as error:  # whatever a compiler or a card makes of them
        reason = f"Triton's kernels of guards fail on {device} ({error}): PyTorch's operations hold styles back"
        warnings.warn(f"{reason}, more slowly. {SWITCH}=torch does without this message", stacklevel=3)
        return False
    return True


def try_on(device: torch.device) -> None:
    """Holds rows of scores to what PyTorch's operations make of them on the host, with each guard and with all.

    Raises:
        DecodingError: they are not as near as two searches may be.
        Exception: whatever keeps Triton from compiling and launching kernels there.
    """
    from decoding.style import kernels

    draw = torch.Generator().manual_seed(0)
    corpus = (_VOCAB * torch.rand(4 * _VOCAB, generator=draw) ** 4).long()
    tables = NGramModel.train(corpus.numpy(), _VOCAB, order=2).tables
    scores, history = 3 * torch.randn(4, _VOCAB, generator=draw), torch.randint(_VOCAB, (4, 1), generator=draw)
    rows = scores, history, torch.tensor([1.0, 0.3, 1.0, 0.0])
    for settings in _TRIED:
        wanted = _steered(steering.steer, tables, rows, settings)
        found = _steered(kernels.steer, tables.to(device), [each.to(device) for each in rows], settings)
        apart = float((found.cpu() - wanted).abs().max())
        if not apart <= _APART:
            raise DecodingError(f"their scores are {apart:.2g} off")


def _steered(by: Callable[..., Tensor], tables: Tables, rows: Sequence[Tensor], settings: GuardSettings) -> Tensor:
    guards = guards_of([settings], rows[0].device)
    stops = stops_of(_STOPS, _VOCAB, rows[0].device)
    return by(tables, *rows, None, None if guards is None else guards.of(0), stops)
