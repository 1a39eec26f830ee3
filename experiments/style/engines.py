"""What generates a cell's texts: transformers here, vLLM in `experiments.style.vllm_engine`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from decoding.models import input_device
from decoding.style.prior import StylePrior
from decoding.tokens import pad_id, padded
from experiments.lab.timing import TimedProcessor
from experiments.style.cells import Style, SweepCell, SweepOptions


class Batch(NamedTuple):
    """Texts of equal length, and the distributions that they were drawn from."""

    prompt_ids: Sequence[Tensor]  # of each row, int64, without padding
    tokens: Tensor  # int64 [B, T], new ones only
    steps: Iterable[tuple[Tensor, Tensor]]  # of each new token, the raw and the processed scores, float [B, V]
    seconds: float
    prior_seconds: float  # of those, in the prior


class Engine(Protocol):
    """Generates texts."""

    def generate(self, cell: SweepCell, start: int, prompts: list[str]) -> Batch:
        """Samples a text for each prompt; ``start`` is the number of the first one among all of the sweep's."""
        ...


def prior_of(style: Style, options: SweepOptions, **more: Any) -> StylePrior:
    """The processor of a style, as it was saved, or as a sweep's options have it."""
    own = {"mode": options.mode, "combine": options.combine} if style.settings is None else style.settings.as_dict()
    parameters = {"log_ratio": style.log_ratio, "allow_any_lambda": options.allow_any_lambda, **own, **more}
    return StylePrior(style.prior, **parameters)


class TransformersEngine:
    """``model.generate``, in padded batches."""

    def __init__(self, model: Any, tokenizer: Any, styles: Mapping[str, Style], options: SweepOptions):
        self.model = model
        self.tokenizer = tokenizer
        self.styles = styles
        self.options = options

    def generate(self, cell: SweepCell, start: int, prompts: list[str]) -> Batch:
        """See `Engine`."""
        inputs = padded(prompts, self.tokenizer, input_device(self.model))
        processors = []
        if cell.style is not None:
            bound = {"λ": cell.lambda_, "pad_token_id": pad_id(self.tokenizer)}
            processors.append(TimedProcessor(prior_of(self.styles[cell.style], self.options, **bound)))
        torch.manual_seed(seed_of(cell, start))
        began = time.perf_counter()
        output = self.model.generate(
            **inputs,
            logits_processor=processors,
            do_sample=True,
            temperature=cell.temperature,
            top_k=0,
            top_p=1.0,
            min_new_tokens=self.options.max_new_tokens,
            max_new_tokens=self.options.max_new_tokens,
            pad_token_id=pad_id(self.tokenizer),
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        prior_seconds = sum(processor.seconds for processor in processors)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        width = inputs["input_ids"].shape[1]
        mask = inputs["attention_mask"].bool()
        prompt_ids = [ids[keep].cpu() for ids, keep in zip(inputs["input_ids"], mask, strict=True)]
        steps = zip(output.logits, output.scores, strict=True)
        return Batch(prompt_ids, output.sequences[:, width:], steps, seconds, prior_seconds)


def seed_of(cell: SweepCell, number: int) -> int:
    """One seed for each seed of the user's and each prompt, or first prompt of a batch."""
    return cell.seed * 1_000_003 + number
