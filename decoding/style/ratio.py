"""Log-likelihood ratios of tokens: how much likelier a style's text has a token than a background has.

The background that steers best is what the model itself writes: a prior that is high for frequent words sharpens, a
ratio to the model's own frequencies moves it where the style differs from it, and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LogitsProcessor

from decoding.errors import DecodingError
from decoding.models import model_fingerprint
from decoding.style.source import cache_dir, load_corpus, tokenize, tokenizer_fingerprint
from ngram.storage import write_atomically

RARE = 5e-5
"""ε: tokens much rarer than this on both sides are left alone. One in 20,000."""
MOST_LOG_RATIO = 2.0
"""c: no token's odds change by more than a factor of e^(2λ). Unbounded, a few words of the style get into loops."""
MODEL, CORPUS = "model", "corpus"
_TOKENS_PER_OPENING = 128


def log_ratio(style: Tensor, background: Tensor, most: float = MOST_LOG_RATIO) -> Tensor:
    """r(w) = log((p(w) + ε) / (q(w) + ε)), cut off at ±c.

    Args:
        style: p, relative frequencies of all token ids in the style, float [V].
        background: q, likewise.
        most: c.

    Returns:
        float32 [V].
    """
    ratio = ((style.double() + RARE) / (background.double() + RARE)).log()
    return ratio.clamp_(-most, most).float()


def frequencies(documents: Sequence[np.ndarray], vocab_size: int, left_out: int | None = None) -> Tensor:
    """Relative frequencies of token ids, float64 [V], those of ``left_out`` (the end of sequence) not counted."""
    counts = np.bincount(np.concatenate(documents), minlength=vocab_size).astype(np.float64)
    if left_out is not None:
        counts[left_out] = 0
    return torch.from_numpy(counts / max(counts.sum(), 1))


def ratio_to(
    background: str | Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    tokenizer: Any,
    model: Any | None = None,
    most: float = MOST_LOG_RATIO,
) -> Tensor:
    """The log-ratio row of a style's documents to a background, float32 [V].

    Args:
        background: "model", what the model writes by itself; "corpus", the documents' own frequencies, whose ratio is
            0 everywhere, so that contexts alone steer; else a corpus, as in `load_corpus` or as token ids.
        documents: int64 token ids.
        tokenizer: the model's.
        model: needed for "model".
        most: as for `log_ratio`.

    Raises:
        DecodingError: "model" without a model, or no such corpus.
    """
    size, eos = len(tokenizer), tokenizer.eos_token_id
    if isinstance(background, str) and background == CORPUS:
        return torch.zeros(size)
    if isinstance(background, str) and background == MODEL:
        if model is None:
            raise DecodingError(
                'the ratio to what the model writes needs the model: StylePrior(…, mode="ratio", tokenizer=tokenizer, '
                'model=model), or decoding.generate, which binds it; or choose background="corpus", or a corpus'
            )
        other = model_frequencies(model, tokenizer)
    else:
        texts = tokenize(load_corpus(background), tokenizer) if isinstance(background, str) else background
        other = frequencies(texts, size, eos)
    return log_ratio(frequencies(documents, size, eos), other, most)


@lru_cache(maxsize=1)
def openings() -> tuple[str, ...]:
    """Beginnings of many kinds of text, from which a model shows what it writes by itself."""
    return tuple(Path(__file__).with_name("openings.txt").read_text(encoding="utf-8").split("\n")[:-1])


def model_frequencies(model: Any, tokenizer: Any) -> Tensor:
    """Relative frequencies of token ids in what a model writes by itself, float64 [V]. Kept in the cache folder.

    The mean of its next-token distributions (without the end of sequence) along texts that it samples at temperature 1
    from `openings`, which tells more of rare tokens than counting the sampled ones.
    """
    key = "\0".join((model_fingerprint(model), tokenizer_fingerprint(tokenizer)[1], *openings()))
    path = cache_dir() / "frequencies" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["frequencies"]
        except (SafetensorError, KeyError):
            path.unlink()
    with Console(stderr=True).status("measuring which tokens the model writes by itself, once …"):
        found = _measured_frequencies(model, tokenizer)
    write_atomically(path, save({"frequencies": found}))
    return found


def _measured_frequencies(model: Any, tokenizer: Any) -> Tensor:
    mean = MeanDistribution()
    sample_openings(model, tokenizer, _TOKENS_PER_OPENING, [Watcher(mean.add)])
    return mean.frequencies(len(tokenizer))


def sample_openings(model: Any, tokenizer: Any, tokens: int, processors: Sequence[LogitsProcessor]) -> Tensor:
    """`sample` from all `openings`, with the same random numbers every time; the caller's are left alone."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        return sample(model, tokenizer, openings(), tokens, processors)


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, processors: Sequence[LogitsProcessor]
) -> Tensor:
    """New tokens, int64 [B, tokens], sampled at temperature 1 from the whole distribution, without ends of sequence."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    inputs.pop("token_type_ids", None)
    output = model.generate(
        **inputs,
        logits_processor=list(processors),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends_of_sequence(model, tokenizer),
    )
    return output[:, inputs["input_ids"].shape[1] :]


def ends_of_sequence(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the tokenizer's, and those at which ``model.generate`` stops."""
    held = model.generation_config.eos_token_id
    stops = held if isinstance(held, list) else [] if held is None else [held]
    return sorted({tokenizer.eos_token_id, *stops})


class Watcher(LogitsProcessor):
    """Leaves scores as they are, and shows them, float [B, V], to somebody."""

    def __init__(self, show: Callable[[Tensor], None]):
        self._show = show

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Shows a step."""
        self._show(scores)
        return scores


class MeanDistribution:
    """Adds up next-token distributions."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Takes in a step: scores float [B, V]."""
        mass = scores.float().softmax(-1).double().sum(0)
        self._sum = mass if self._sum is None else self._sum + mass

    def frequencies(self, vocab_size: int) -> Tensor:
        """The mean of all rows so far, float64 [V], ids from ``vocab_size`` on left out."""
        assert self._sum is not None  # there was a step
        kept = self._sum[:vocab_size].cpu()
        return kept / kept.sum()
