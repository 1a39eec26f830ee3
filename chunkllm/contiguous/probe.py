"""Does chunk selection compute what a model computes? Found out with a few tokens, before a selection is attached.

A configuration does not tell all that a model does with its keys. So two short texts, one of them padded, are read and
continued by one token, without a selection and with one that selects everything. Every layer's attention over what was
gathered must then be the model's own over all keys, and the scores of the next token must be the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from chunkllm.contiguous.attention import Handler, watch
from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.errors import ChunkError
from chunkllm.models import CACHE_NAMES, attention_implementation, bottom_states, cache_argument, decoder_of
from chunkllm.scorers import PooledScorer

_TOKENS, _PADDING = 13, 4
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # what attention functions of transformers add to the logits, if given
Attach = Callable[[Plan, Callable[[Plan, Counters], ChunkCache]], AbstractContextManager]
_found: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


class GatheringCache(ChunkCache):
    """Selects everything, at every step."""

    def _slots(self, held: np.ndarray) -> np.ndarray:
        return held

    def _due(self, length: int) -> np.ndarray | None:
        assert self.table is not None
        if self._front.has_queries:
            _require_interface(layer.place for layer in self.full_layers if not layer.has_queries)
            return np.ones(len(self.table.first), bool)
        return None


def _require_interface(missed: Iterable[int]) -> None:
    if places := sorted(missed):
        raise ChunkError(f"its layers {places} do not attend by transformers' attention interface")


def require_exact(model: Any, plan: Plan, attach: Attach) -> None:
    """Refuses a model whose attention is not computed right, and leaves it as it is.

    A model is asked once for each of its attention implementations. On the meta device, where there are no numbers to
    compare, none is.

    Args:
        model: a causal language model of transformers.
        plan: what is to be attached; of it the model's shape matters, not what is selected.
        attach: attaches a plan, with the caches that a function makes, for the time of a ``with`` block.

    Raises:
        ChunkError: what is computed differs, or nothing is computed at all.
    """
    if model.device.type == "meta":
        return
    known, implementation = _found.setdefault(model, {}), attention_implementation(model)
    if implementation not in known:
        with _as_it_was(model):
            known[implementation] = _difference(model, plan, attach)
    if (reason := known[implementation]) is not None:
        raise ChunkError(f"{plan.shape.model_type}: chunk selection does not work with it: {reason}")


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Neither dropout nor random numbers, and whatever a forward pass sets on a module is set back."""
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for module, _, _ in held:
                module.training = False
            yield
    finally:
        for module, attributes, buffers in held:
            _set_back(vars(module), attributes)
            _set_back(module._buffers, buffers)


def _set_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if now.get(name, now) is not value:
            now[name] = value


def _difference(model: Any, plan: Plan, attach: Attach) -> str | None:
    """What differs, or None."""
    try:
        plain, _ = _scores(model, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Models of others raise what they like.
        return f"without a selection it cannot read a few tokens: {_said(error)}"
    shape = plan.shape
    scorer = PooledScorer(shape.head_dim, scaling=shape.scaling)
    gathering = replace(
        plan, owner=object(), scorer=scorer, top_k=None, budget=None, retention=1.0, local=2, sinks=1, max_chunk=3,
        weights=torch.ones(len(shape.full_layers), dtype=torch.float64), vote=False, every_step=True, offload=False,
        verify=False,
    )  # fmt: skip
    seen = _Comparison(shape.scaling)
    hook = decoder_of(model).layers[0].register_forward_hook(seen.look_at_bottom)
    try:
        with attach(gathering, seen.new_cache), watch(model, seen.comparing):
            # A cache as `generate` makes it.
            gathered, cache = _scores(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
        if not isinstance(cache, GatheringCache):
            return f"it returns a {type(cache).__name__} of its own"
        _require_interface(set(shape.full_layers) - seen.layers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _said(error)
    finally:
        hook.remove()
    if seen.reason is not None:
        return seen.reason
    return None if _are_close(gathered, plain) else "its scores of the next token differ when everything is selected"


def _said(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, ChunkError) else f"{type(error).__name__}: {said}"


def _scores(model: Any, cache: Any) -> tuple[Tensor, Any]:
    """Scores [2, V] of the token after a step, and the cache."""
    ids = _ids(model)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache_name = cache_argument(model)
    for part in (slice(_TOKENS - 1), slice(_TOKENS - 1, None)):
        given: dict[str, Any] = {"position_ids": positions[:, part]} if takes_positions else {}
        given |= {cache_name: cache, "attention_mask": mask[:, : part.stop], "use_cache": True}
        output = model(input_ids=ids[:, part], **given)
        cache = next((output[name] for name in CACHE_NAMES if name in output), None)
        if cache is None:
            raise ChunkError("it returns no key-value cache")
    return output.logits[:, -1], cache


def _ids(model: Any) -> Tensor:
    """int64 [2, T], different tokens, of those that stand for nothing else."""
    config, count = model.config, model.get_input_embeddings().num_embeddings
    configs = (config, config.get_text_config(decoder=True))
    special = {value for each in configs for name, value in vars(each).items() if "token" in name and _is_id(value)}
    plain = [i for i in range(min(count, 4 * _TOKENS + len(special))) if i not in special]
    places = [i * (len(plain) - 1) // (2 * _TOKENS) for i in range(2 * _TOKENS)]
    return torch.tensor([plain[i] for i in places], device=model.device).view(2, _TOKENS)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_close(got: Tensor, wanted: Tensor) -> bool:
    """Up to what rounding does: half of a dtype's digits, of a vector's largest value."""
    bound = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
    is_same = (got == wanted) | (got.isnan() & wanted.isnan())
    return got.shape == wanted.shape and bool((is_same | ((got - wanted).abs() <= bound)).all())


@dataclass
class _Comparison:
    """Holds the attention of layers over what was gathered to the model's own over all keys, which goes on."""

    scaling: float
    cache: GatheringCache | None = None
    layers: set[int] = field(default_factory=set)
    reason: str | None = None

    def new_cache(self, plan: Plan, counters: Counters) -> GatheringCache:
        """The one whose layers are looked at."""
        self.cache = GatheringCache(plan, counters)
        return self.cache

    def look_at_bottom(self, layer: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        """Boundaries are detected from what the bottommost layer returns."""
        dimensions = bottom_states(output).dim()
        if dimensions != 3:
            self.reason = f"its bottommost layer returns {dimensions} dimensions, not [batch, tokens, hidden_size]"

    def comparing(self, handler: Handler) -> Handler:
        """A handler that compares what another returns."""

        def both(
            attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> Any:
            ours = handler(attention, module, query, key, value, mask, **options)
            layer = None if self.cache is None else self.cache.layers[module.layer_idx]
            if not isinstance(layer, ChunkLayer) or not layer.selected:
                return ours
            theirs = attention(module, query, *layer.everything(), mask, **options)
            self.layers.add(module.layer_idx)
            self.reason = self.reason or self._judge(module.layer_idx, ours[0], theirs[0], options)
            return theirs

        return both

    def _judge(self, place: int, ours: Tensor, theirs: Tensor, options: dict[str, Any]) -> str | None:
        if added := [name for name in _UNKNOWN if options.get(name) is not None]:
            return f"its attention has more than queries, keys and values: {', '.join(added)}"
        scaling = options.get("scaling")
        if scaling is not None and abs(scaling - self.scaling) > 1e-5 * self.scaling:
            return f"it scales the attention logits of layer {place} by {scaling:.6g}, not by {self.scaling:.6g}"
        return None if _are_close(ours, theirs) else f"its attention differs in layer {place}"
