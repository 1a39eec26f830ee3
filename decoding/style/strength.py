"""λ: which values it may have, and λ="auto".

"auto" is the strength at which a model's texts come nearest to a style and are still fluent and varied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LogitsProcessor

from decoding.cache import Key, kept
from decoding.errors import DecodingError
from decoding.metrics import distinct_n, jensen_shannon
from decoding.models import model_fingerprint
from decoding.style.background import MeanDistribution, Watcher, openings, sample_openings
from decoding.style.ratio import frequencies
from decoding.tokens import control_ids, encoding_fingerprint, id_count

ANY_LAMBDA_HINT = "; allow_any_lambda=True (--allow-any-lambda) lifts that"
DEFAULT_TOLERANCE = 0.25
LEAST_DISTINCT = 0.9
CANDIDATES = tuple(i / 10 for i in range(11))
HELD_OUT = 0.1
_TOKENS = 48


class Trial(NamedTuple):
    """What texts at one λ were like."""

    lambda_: float
    perplexity: float  # of the unsteered model
    distinct_2: float  # mean of the texts
    divergence: float  # Jensen-Shannon, in nats, of their token frequencies from the held-out part's


def checked_lambda(value: float, allow_any: bool = False, *, hint: str = ANY_LAMBDA_HINT) -> float:
    """λ as a float. ``hint`` says what to do about a value outside [0, 1].

    Raises:
        DecodingError: not a finite number, or outside [0, 1] and not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DecodingError(f"λ must be a finite number, not {value!r}")
    if not (allow_any or 0 <= value <= 1):
        raise DecodingError(f"λ must lie in [0, 1], not {value:g}{hint}")
    return float(value)


def checked_tolerance(value: float) -> float:
    """A tolerance of `choose_strength`.

    Raises:
        DecodingError: no finite number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DecodingError(f"tolerance must be a number above 0, such as 0.25, not {value!r}")
    return value


def held_out_part(documents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The documents without their last tenth of tokens, and that tenth.

    Raises:
        DecodingError: too few tokens to hold some out.
    """
    total = sum(map(len, documents))
    left, rest = [], int(total * (1 - HELD_OUT))
    if total < 1000:
        raise DecodingError(
            f'λ="auto" holds a tenth of the style\'s text out, and this has {total} tokens: give a number'
        )
    held_out = []
    for ids in documents:
        left.append(ids[:rest])
        held_out.append(ids[rest:])
        rest = max(rest - len(ids), 0)
    return [ids for ids in left if len(ids)], [ids for ids in held_out if len(ids)]


def choose_strength(trials: Sequence[Trial], tolerance: float) -> float:
    """The λ whose texts are nearest to the held-out part, among those that keep within the tolerance.

    A λ keeps within it if perplexity is at most 1 + tolerance times the unsteered texts', and distinct-2 at least 0.9
    times theirs. λ = 0 always does. Both are read off parabolas through all trials: texts differ more by chance than by
    one step of λ.

    Args:
        trials: by ascending λ, the first at 0; three or more.
        tolerance: the share by which perplexity may rise.
    """
    lambdas = [trial.lambda_ for trial in trials]
    perplexity = np.exp(_smoothed(lambdas, [np.log(trial.perplexity) for trial in trials]))
    distinct = _smoothed(lambdas, [trial.distinct_2 for trial in trials])
    within = (perplexity <= perplexity[0] * (1 + tolerance)) & (distinct >= distinct[0] * LEAST_DISTINCT)
    return min(compress(trials, within), key=lambda trial: trial.divergence).lambda_


def _smoothed(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    return np.polyval(np.polyfit(x, y, 2), x)


def chosen_strength(
    steered: Callable[[float], LogitsProcessor],
    held_out: Sequence[np.ndarray],
    model: Any,
    tokenizer: Any,
    tolerance: float,
    about: dict[str, Any],
) -> float:
    """Tries λ = 0, 0.1, … 1 on a model and chooses. What was tried is kept in the cache folder.

    Args:
        steered: the processor at a λ, of a prior that was not trained on ``held_out``.
        held_out: documents as int64 token ids.
        model, tokenizer: the generating model's.
        tolerance: as for `choose_strength`.
        about: the style, and all that decides how it is added, as JSON.
    """

    def tried() -> list[Trial]:
        wanted = frequencies(held_out, id_count(tokenizer), control_ids(tokenizer))
        candidates = track(CANDIDATES, "choosing λ", console=Console(stderr=True), transient=True)
        return [_tried(value, steered(value), wanted, model, tokenizer) for value in candidates]

    key = _TrialsKey(
        about, model_fingerprint(model), str(model.dtype), encoding_fingerprint(tokenizer), openings(), _TOKENS
    )
    return choose_strength(kept(key, tried, _loaded, lambda trials: json.dumps(trials).encode()), tolerance)


@dataclass(frozen=True)
class _TrialsKey(Key):
    folder: ClassVar[str] = "strengths"
    suffix: ClassVar[str] = ".json"
    style: dict[str, Any]
    model: str
    dtype: str
    tokenizer: str
    openings: tuple[str, ...]
    tokens: int


def _loaded(content: bytes) -> list[Trial]:
    trials = [Trial(*map(float, numbers)) for numbers in json.loads(content)]
    if [trial.lambda_ for trial in trials] != list(CANDIDATES):
        raise ValueError("trials of other strengths")
    return trials


def _tried(lambda_: float, processor: LogitsProcessor, wanted: Tensor, model: Any, tokenizer: Any) -> Trial:
    mean, cost = MeanDistribution(), _Cost()
    processors = [Watcher(cost.before), processor, Watcher(cost.after), Watcher(mean.add)]
    texts = sample_openings(model, tokenizer, _TOKENS, processors).cpu()
    return Trial(
        lambda_,
        cost.perplexity(),
        float(np.mean([distinct_n(ids, 2) for ids in texts])),
        float(jensen_shannon(mean.frequencies(id_count(tokenizer)).log(), wanted.log())),
    )


class _Cost:
    """What steered texts cost under the scores before the prior: Σ_w q(w) · −log p(w) of each step, p before, q after.

    That is what the sampled tokens cost in the mean, with less noise.
    """

    def __init__(self) -> None:
        self._log_p: Tensor | None = None
        self._costs: list[Tensor] = []

    def before(self, scores: Tensor) -> None:
        self._log_p = scores.float().log_softmax(-1)

    def after(self, scores: Tensor) -> None:
        assert self._log_p is not None  # ``before`` comes before
        q = scores.float().softmax(-1)
        self._costs.append(-torch.where(q > 0, q * self._log_p, 0).sum(-1))

    def perplexity(self) -> float:
        return float(torch.cat(self._costs).mean().exp())
