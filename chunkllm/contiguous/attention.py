"""A place in a model's attention: between the key-value cache and the attention function that the model uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from chunkllm.models import attention_modules

Attention = Callable[..., tuple[Tensor, Tensor | None]]
Handler = Callable[..., tuple[Tensor, Tensor | None]]

_PREFIX = "chunkllm_"
_handlers: WeakKeyDictionary[nn.Module, Handler] = WeakKeyDictionary()


def intercept(model: Any, handler: Handler) -> Callable[[], None]:
    """Lets ``handler`` compute the attention of a model, with the model's own attention function at hand.

    transformers finds attention functions by name. One is registered that calls the handler of the module that asks,
    and the model's own function where there is none, so that other models never notice.

    Args:
        model: a causal language model of transformers.
        handler: called as ``handler(attention, module, query, key, value, attention_mask, **options)``, where
            ``attention`` is the model's own function and takes what follows. Queries [B, H, T, D] and keys are
            post-RoPE; keys and values [B, Hkv, S, D] are what the cache returned.

    Returns:
        What undoes it.
    """
    own = model.get_decoder().config._attn_implementation
    modules = attention_modules(model).values()
    name = _registered(own)
    _handlers.update(dict.fromkeys(modules, handler))
    model.set_attn_implementation(name)

    def undo() -> None:
        model.set_attn_implementation(own)
        for module in modules:
            _handlers.pop(module, None)

    return undo


def _registered(own: str) -> str:
    name = _PREFIX + own
    if name not in AttentionInterface():
        AttentionInterface.register(name, _calling(own))
        masks = AttentionMaskInterface()
        if own in masks:
            AttentionMaskInterface.register(name, masks[own])
    return name


def _calling(own: str) -> Attention:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        # "eager" is no registered function, but one of the model's own file.
        functions = sys.modules[type(module).__module__]
        eager: Any = getattr(functions, "eager_attention_forward", None)
        function = AttentionInterface().get_interface(own, eager)
        handler = _handlers.get(module)
        if handler is None:
            return function(module, query, key, value, mask, **options)
        return handler(function, module, query, key, value, mask, **options)

    return attention
