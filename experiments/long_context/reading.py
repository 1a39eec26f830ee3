"""Prompts that are read once, and what is written or scored behind them under a selection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkllm.contiguous.attach import Attachment
from chunkllm.models import bottom_states, cache_argument, decoder_of
from chunkllm.training.calibration import divergence
from decoding.metrics import token_log_probs
from decoding.tokens import continuations

LAST = 8  # Tokens of a prompt that the selection's own model pass reads, for their queries.
_RECALL_EVERY = 64


@dataclass(frozen=True)
class Read:
    """Prompts that have been read with full attention.

    Attributes:
        ids: int64 [B, T].
        states: keys and values of every layer but for the last tokens, each [B, Hkv, T − last, D].
        bottom: [B, T − last, hidden_size], the bottommost layer's output.
    """

    ids: Tensor
    states: list[tuple[Tensor, Tensor]]
    bottom: Tensor


def read(model: Any, ids: Tensor, following: Tensor | None = None) -> tuple[Read, Tensor | None]:
    """Reads prompts of one length row by row, with full attention.

    Args:
        model: without anything attached.
        ids: int64 [B, T], the prompts.
        following: int64 [B, n], tokens behind them.

    Returns:
        The prompts, and float32 [B, n, V], log-probabilities of what follows, if that is given.
    """
    rows, bottoms, predicted = [], [], []
    name = cache_argument(model)
    decoder_layer = decoder_of(model).layers[0]
    for i, row in enumerate(ids.split(1)):
        cache: Any = DynamicCache(config=model.config)
        hook = decoder_layer.register_forward_hook(lambda module, args, output: bottoms.append(bottom_states(output)))
        try:
            model(input_ids=row[:, :-LAST], logits_to_keep=1, use_cache=True, **{name: cache})
        finally:
            hook.remove()
        rows.append([(layer.keys, layer.values) for layer in cache.layers])
        if following is not None:
            rest = torch.cat((row[:, -LAST:], following[i : i + 1, :-1]), 1)
            output = model(input_ids=rest, logits_to_keep=following.shape[1], use_cache=True, **{name: cache})
            predicted.append(output.logits.float().log_softmax(-1))
    layers = zip(*rows, strict=True)
    states = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]
    return Read(ids, states, torch.cat(bottoms)), torch.cat(predicted) if predicted else None


class Continuation:
    """Writes or scores tokens behind prompts that were read, under a selection that is attached."""

    def __init__(self, model: Any, chunks: Attachment, prompts: Read):
        self.model = model
        self.cache = chunks.new_cache()
        self.cache.load(prompts.states, chunks.boundaries(prompts.ids[:, : prompts.bottom.shape[1]], prompts.bottom))
        self.logits = self.step(prompts.ids[:, -LAST:])

    def step(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> logits after the last, [B, V]."""
        output = self.model(input_ids=ids, logits_to_keep=1, use_cache=True, **{cache_argument(self.model): self.cache})
        return output.logits[:, -1]


def score_texts(model: Any, chunks: Attachment, prompts: Read, targets: Tensor, full: Tensor) -> dict[str, Any]:
    """Predicts the tokens that follow prompts, given those before.

    Args:
        model: with the selection attached.
        chunks: the selection.
        prompts: B of them.
        targets: int64 [B, n], what follows.
        full: float32 [B, n, V], log-probabilities under full attention.

    Returns:
        Negative log-likelihoods, divergences from full attention and whether the most probable token is the same, B
        lists of n each; recall per layer; the retention.
    """
    writing = Continuation(model, chunks, prompts)
    losses, divergences, agree, recalls = [], [], [], []
    for i in range(targets.shape[1]):
        losses.append(-token_log_probs(writing.logits, targets[:, i]))
        divergences.append(divergence(full[:, i], writing.logits.float().log_softmax(-1)))
        agree.append(writing.logits.argmax(-1) == full[:, i].argmax(-1))
        if i and i % _RECALL_EVERY == 0 and writing.cache.full_layers[0].selected:
            scaling = chunks.plan.shape.scaling
            recalls.append([float(layer.recall(scaling).mean()) for layer in writing.cache.full_layers])
        if i + 1 < targets.shape[1]:
            writing.logits = writing.step(targets[:, i : i + 1])
    return {
        "nll": torch.stack(losses, 1).tolist(),
        "divergence": torch.stack(divergences, 1).tolist(),
        "agree": torch.stack(agree, 1).tolist(),
        "recall": np.mean(recalls, 0).tolist() if recalls else None,
        "kv_retention": chunks.stats["kv_retention"],
        "stats": chunks.stats,
    }


def write(
    model: Any,
    chunks: Attachment,
    prompts: Read,
    tokenizer: Any,
    new_tokens: int,
    ends: Collection[int] = (),
    ends_line: bool = False,
) -> list[str]:
    """What a model writes greedily behind prompts.

    Args:
        model: with the selection attached.
        chunks: the selection.
        prompts: B of them.
        tokenizer: the model's.
        new_tokens: the most to write.
        ends: ids that end a text, of a single prompt.
        ends_line: whether a line that is not empty does, too.
    """
    writing = Continuation(model, chunks, prompts)
    written = [writing.logits.argmax(-1)]
    while len(written) < new_tokens and not _has_ended(written, tokenizer, ends, ends_line):
        written.append(writing.step(written[-1][:, None]).argmax(-1))
    sequences = torch.cat((prompts.ids, torch.stack(written, 1)), 1)
    return continuations(sequences, prompts.ids.shape[1], tokenizer)


def _has_ended(written: list[Tensor], tokenizer: Any, ends: Collection[int], ends_line: bool) -> bool:
    if ends and int(written[-1][0]) in ends:
        return True
    return ends_line and "\n" in tokenizer.decode(torch.cat(written)).lstrip()
