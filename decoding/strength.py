"""λ="auto": the strength at which a model's texts come nearest to a style and are still fluent and varied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LogitsProcessor

from decoding.corpora import cache_dir, tokenizer_fingerprint
from decoding.errors import DecodingError
from decoding.metrics import distinct_n, jensen_shannon, token_log_probs
from decoding.models import model_fingerprint
from decoding.ratio import MeanDistribution, frequencies, openings, sample
from ngram.storage import write_atomically

DEFAULT_TOLERANCE = 0.1
CANDIDATES = tuple(i / 10 for i in range(11))
HELD_OUT = 0.1
_TOKENS = 48
_ROWS_AT_A_TIME = 64


class Trial(NamedTuple):
    """What texts at one λ were like."""

    lambda_: float
    perplexity: float  # of the unsteered model
    distinct_2: float  # mean of the texts
    divergence: float  # Jensen-Shannon, in nats, of their token frequencies from the held-out part's


def held_out_part(documents: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The documents without their last tenth of tokens, and that tenth.

    Raises:
        DecodingError: too few tokens to hold some out.
    """
    total = sum(map(len, documents))
    kept, rest = [], int(total * (1 - HELD_OUT))
    if total < 1000:
        raise DecodingError(
            f'λ="auto" holds a tenth of the style\'s text out, and this has {total} tokens: give a number'
        )
    held_out = []
    for ids in documents:
        kept.append(ids[:rest])
        held_out.append(ids[rest:])
        rest = max(rest - len(ids), 0)
    return [ids for ids in kept if len(ids)], [ids for ids in held_out if len(ids)]


def choose_strength(trials: Sequence[Trial], tolerance: float) -> float:
    """The λ whose texts are nearest to the held-out part, among those that keep within the tolerance.

    A trial keeps within it if perplexity is at most 1 + tolerance times the unsteered texts', and distinct-2 at least
    1 − tolerance times theirs. λ = 0 always does.

    Args:
        trials: by ascending λ, the first at 0.
        tolerance: a share.
    """
    unsteered = trials[0]
    within = [
        trial
        for trial in trials
        if trial.perplexity <= unsteered.perplexity * (1 + tolerance)
        and trial.distinct_2 >= unsteered.distinct_2 * (1 - tolerance)
    ]
    return min(within, key=lambda trial: trial.divergence).lambda_


def chosen_strength(
    steered: Callable[[float], LogitsProcessor],
    held_out: Sequence[np.ndarray],
    model: Any,
    tokenizer: Any,
    tolerance: float,
    key: str,
) -> float:
    """Tries λ = 0, 0.1, … 1 on a model and chooses. What was tried is kept in the cache folder.

    Args:
        steered: the processor at a λ, of a prior that was not trained on ``held_out``.
        held_out: documents as int64 token ids.
        model, tokenizer: the generating model's.
        tolerance: as for `choose_strength`.
        key: names the style and how it is added, for the cache.

    Raises:
        DecodingError: a tolerance that is no share.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise DecodingError(f"tolerance must be a share between 0 and 1, not {tolerance!r}")
    parts = (key, model_fingerprint(model), tokenizer_fingerprint(tokenizer)[1])
    path = cache_dir() / "strengths" / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.json"
    if path.is_file():
        trials = [Trial(*numbers) for numbers in json.loads(path.read_bytes())]
    else:
        wanted = frequencies(held_out, len(tokenizer), tokenizer.eos_token_id)
        candidates = track(CANDIDATES, "choosing λ", console=Console(stderr=True), transient=True)
        trials = [_tried(value, steered(value), wanted, model, tokenizer) for value in candidates]
        write_atomically(path, json.dumps(trials).encode())
    return choose_strength(trials, tolerance)


def _tried(lambda_: float, processor: LogitsProcessor, wanted: Tensor, model: Any, tokenizer: Any) -> Trial:
    mean, before = MeanDistribution(), _Before()
    devices = [model.device] if model.device.type == "cuda" else []
    texts = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        for start in range(0, len(openings()), _ROWS_AT_A_TIME):
            prompts = openings()[start : start + _ROWS_AT_A_TIME]
            texts.append(sample(model, tokenizer, prompts, _TOKENS, [before, processor, mean]))
            before.end(texts[-1])
    tokens = torch.cat(texts)
    return Trial(
        lambda_,
        before.perplexity(),
        float(np.mean([distinct_n(ids, 2) for ids in tokens.cpu()])),
        float(jensen_shannon(mean.frequencies(len(tokenizer)).log(), wanted.log())),
    )


class _Before(LogitsProcessor):
    """Leaves scores as they are, and finds the log-probabilities that they give to the tokens chosen after all."""

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._log_probs.append(token_log_probs(self._scores, input_ids[:, -1]))
        self._scores = scores
        return scores

    def end(self, tokens: Tensor) -> None:
        """Takes in the last tokens of a batch, of int64 [B, T]."""
        assert self._scores is not None  # there was a step
        self._log_probs.append(token_log_probs(self._scores, tokens[:, -1]))
        self._scores = None

    def perplexity(self) -> float:
        return float(torch.cat(self._log_probs).mean().neg().exp())
