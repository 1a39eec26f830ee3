"""How sensitive a model is to selection in each of its layers: one layer at a time selects, all others read everything.

Layers differ a thousandfold: those in which few heads look up what stands far back need nearly all of their keys,
others hardly any. `chunkllm.selection.layer_weights` makes shares of a budget of it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkllm.contiguous.attention import intercept
from chunkllm.models import bottom_states, cache_argument, decoder_of, model_shape
from chunkllm.scorers import Scorer, chunk_scores
from chunkllm.selection import Rows, choose_tokens, score_per_token, selectable
from chunkllm.training.distillation import Boundaries
from chunkllm.training.lessons import ReadingOptions, chunk_ends

RETENTION = 0.25
_MOST_TOKENS = 512


@dataclass(frozen=True)
class Choice:
    """What is selected for the last tokens of a text, from the first boundary among them on.

    Attributes:
        scorer: of chunks.
        boundaries: chunks of the text, and those of them after which the selection is refreshed.
        begin: the place of the first of the last tokens.
        options: local window and sinks.
    """

    scorer: Scorer
    boundaries: Boundaries
    begin: int
    options: ReadingOptions

    def mask(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """What each token attends to: bool [n, T], for queries [1, H, n, D] and keys [1, Hkv, T, D] of a layer."""
        ends, chosen = self.boundaries
        at = ends[chosen]
        place = torch.arange(keys.shape[2], device=keys.device)
        asking = place[self.begin :, None]
        kept = torch.cat((torch.ones_like(place)[None].bool(), self._kept(layer, queries, keys)))
        since = torch.cat((at.new_zeros(1), at + 1))
        of = torch.searchsorted(at, place[self.begin :])
        return (kept[of] | (place >= since[of][:, None])) & (place <= asking)

    def _kept(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool [M, T], what stays at each refresh; by the functions that decoding uses."""
        ends, chosen = self.boundaries
        at, length = ends[chosen], keys.shape[2]
        chunk_of = torch.searchsorted(ends, torch.arange(length, device=keys.device))
        features = self.scorer.summarise(layer, keys, chunk_of[None], ends[None]).expand(len(chosen), -1, -1, -1)
        last = at[:, None] - self.begin + torch.arange(1 - self.scorer.queries, 1, device=keys.device)
        chunks, distances = self.boundaries.chunks(), self.boundaries.distances()
        asked = queries[0][:, last].transpose(0, 1)
        scores = chunk_scores(self.scorer, layer, asked, features, chunks.lengths.float(), distances)
        ranks = score_per_token(scores, chunks.lengths) if self.scorer.is_distribution else scores
        rows = Rows(torch.zeros_like(at), at + 1, torch.full_like(at, self.options.local))
        slots = max(round(RETENTION * length), self.options.sinks + self.options.local)
        sinks = self.options.sinks
        tokens, valid = choose_tokens(ranks, selectable(chunks, rows, sinks), rows, sinks, slots)
        kept = torch.zeros(len(at), length + 1, dtype=torch.bool, device=keys.device)
        return kept.scatter_(1, torch.where(valid, tokens, length), True)[:, :length]


def exact(model: Any) -> Any:
    """A copy in float32, with attention that takes masks.

    In half precision rounding alone moves distributions further than most layers do. FlashAttention takes neither
    float32 nor masks.
    """
    made = deepcopy(model).float()
    made.set_attn_implementation("sdpa")
    return made


def last_tokens(length: int) -> int:
    """How many tokens of a text distributions are compared at."""
    return min(_MOST_TOKENS, length // 4)


@torch.inference_mode()
def layer_sensitivity(
    model: Any,
    scorer: Scorer,
    find_boundaries: Callable[[Tensor, Tensor], Tensor],
    ids: np.ndarray,
    last: int,
    options: ReadingOptions,
    on_layer: Callable[[], None] = lambda: None,
) -> list[float]:
    """KL divergence of next-token distributions, with selection in one layer against without: means over tokens.

    A quarter of the tokens stays. The last tokens are read at once, each with what a decode step at its place would
    read.

    Args:
        model: a causal language model of transformers, without anything attached, with sdpa or eager attention.
        scorer: of chunks.
        find_boundaries: of ids [1, T] and the bottommost layer's output [1, T, hidden_size]: bool [1, T].
        ids: int64 [T], a text.
        last: n, tokens of it whose distributions are compared.
        options: longest chunk, local window and sinks.
        on_layer: called when a layer has been measured.

    Returns:
        Nats, for each layer with full attention; 0 if no chunk ends among the last tokens.
    """
    begin = len(ids) - last
    tokens = torch.from_numpy(ids)[None].to(model.device)
    bottom: list[Tensor] = []
    decoder_layer = decoder_of(model).layers[0]
    hook = decoder_layer.register_forward_hook(lambda module, args, output: bottom.append(bottom_states(output)))
    try:
        before: Any = DynamicCache(config=model.config)
        model(input_ids=tokens[:, :begin], logits_to_keep=1, use_cache=True, **{cache_argument(model): before})
        full = _log_probs(model, tokens[:, begin:], before)
    finally:
        hook.remove()
    flags = find_boundaries(tokens, torch.cat(bottom, 1))[0].cpu().numpy()
    choice = Choice(scorer, boundaries_of(flags, begin + scorer.queries - 1, options, model.device), begin, options)
    layers = model_shape(model).full_layers
    if not len(choice.boundaries.chosen):
        return [0.0] * len(layers)
    damage = []
    for layer in layers:
        selecting = _with_selection(model, layer, choice, tokens[:, begin:], before)
        damage.append(max(float(divergence(full, selecting).mean()), 0.0))
        on_layer()
    return damage


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference ‖ other) in nats, of log-probabilities [..., V]."""
    return (reference.exp() * (reference - other)).sum(-1)


def _with_selection(model: Any, layer: int, choice: Choice, tokens: Tensor, before: Any) -> Tensor:
    def attend(attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        if module.layer_idx == layer:
            kept = choice.mask(layer, query, key)[None, None]
            mask = torch.zeros_like(kept, dtype=query.dtype).masked_fill_(~kept, -torch.inf)
        return attention(module, query, key, value, mask, **others)

    undo = intercept(model, attend)
    try:
        return _log_probs(model, tokens, before)
    finally:
        undo()


def _log_probs(model: Any, tokens: Tensor, before: Any) -> Tensor:
    """Float32 [n, V], of the tokens behind what a cache holds, which stays as it is."""
    cache = {cache_argument(model): deepcopy(before)}
    return model(input_ids=tokens, use_cache=True, **cache).logits[0].float().log_softmax(-1)


def boundaries_of(flags: np.ndarray, earliest: int, options: ReadingOptions, device: torch.device) -> Boundaries:
    """Chunks of a text, of which bool [T] tells the boundaries, and those that end from place ``earliest`` on."""
    ends = chunk_ends(flags, options)
    chosen = np.flatnonzero((ends >= earliest) & (ends < len(flags) - 1))
    return Boundaries(torch.from_numpy(ends).to(device), torch.from_numpy(chosen).to(device))
