"""What a model writes by itself: texts sampled from a few openings, and the token frequencies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from decoding.cache import Key, kept
from decoding.models import TRUNCATIONS, input_device, model_fingerprint, undoing
from decoding.tokens import encoding_fingerprint, ends_of_sequence, id_count, pad_id, padded

_TOKENS_PER_OPENING = 128


@lru_cache(maxsize=1)
def openings() -> tuple[str, ...]:
    """Beginnings of many kinds of text, from which a model shows what it writes by itself."""
    return tuple(Path(__file__).with_name("openings.txt").read_text(encoding="utf-8").split("\n")[:-1])


@dataclass(frozen=True)
class _FrequenciesKey(Key):
    folder: ClassVar[str] = "frequencies"
    suffix: ClassVar[str] = ".safetensors"
    model: str
    dtype: str
    tokenizer: str
    openings: tuple[str, ...]
    tokens: int


def model_frequencies(model: Any, tokenizer: Any, at_step: Callable[[float], None] | None = None) -> Tensor:
    """Relative frequencies of token ids in what a model writes by itself, float64 [V]. Kept in the cache folder.

    The mean of its next-token distributions (without the end of sequence) along texts that it samples at temperature 1
    from `openings`, which tells more of rare tokens than counting the sampled ones.

    Args:
        model: to be measured.
        tokenizer: its own.
        at_step: called now and then while it is measured, with the share that is done.
    """

    def measured() -> Tensor:
        with Console(stderr=True).status("measuring which tokens the model writes by itself, once …"):
            return _measured_frequencies(model, tokenizer, at_step)

    key = _FrequenciesKey(
        model_fingerprint(model), str(model.dtype), encoding_fingerprint(tokenizer), openings(), _TOKENS_PER_OPENING
    )
    return kept(key, measured, _loaded, lambda found: save({"frequencies": found}))


def _loaded(content: bytes) -> Tensor:
    return load(content)["frequencies"]


def _measured_frequencies(model: Any, tokenizer: Any, at_step: Callable[[float], None] | None) -> Tensor:
    mean, steps = MeanDistribution(), count(1)

    def watch(scores: Tensor) -> None:
        mean.add(scores)
        if at_step is not None:
            at_step(next(steps) / _TOKENS_PER_OPENING)

    sample_openings(model, tokenizer, _TOKENS_PER_OPENING, [Watcher(watch)])
    return mean.frequencies(id_count(tokenizer))


def sample_openings(model: Any, tokenizer: Any, tokens: int, processors: Sequence[LogitsProcessor]) -> Tensor:
    """`sample` from all `openings`, with the same random numbers every time; the caller's are left alone."""
    device = model.device
    is_forked = device.type not in ("cpu", "mps")  # which have one state, or none that can be put back
    with torch.random.fork_rng([device] if is_forked else [], device_type=device.type if is_forked else "cuda"):
        torch.manual_seed(0)
        return sample(model, tokenizer, openings(), tokens, processors)


_PLAIN = TRUNCATIONS | {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
}


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, processors: Sequence[LogitsProcessor]
) -> Tensor:
    """New tokens, int64 [B, tokens], sampled at temperature 1 from the whole distribution, without ends of sequence."""
    inputs = padded(prompts, tokenizer, input_device(model))
    whole = undoing(model, _PLAIN) | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            **inputs,
            **whole,
            logits_processor=list(processors),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=ends_of_sequence(model, tokenizer),
        )
    finally:
        model.train(was_training)
    return output[:, inputs["input_ids"].shape[1] :]


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
        mass = scores.float().softmax(-1)
        mass = (mass.cpu() if mass.device.type == "mps" else mass).double().sum(0)  # there are no float64 there
        self._sum = mass if self._sum is None else self._sum + mass

    def frequencies(self, vocab_size: int) -> Tensor:
        """The mean of all rows so far, float64 [V]: ids from V on left out, and 0 for ids that have no score."""
        assert self._sum is not None  # there was a step
        kept = self._sum[:vocab_size].cpu()
        return pad(kept / kept.sum(), (0, vocab_size - len(kept)))
