"""A place in a model's attention: between the key-value cache and the attention function that the model uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from chunkllm.models import INTERFACE, attention_modules, decoder_of

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
    modules = list(attention_modules(model).values())
    # Those that the decoder and its attention read, and no other part's: a vision tower attends as it did.
    configs = {id(part.config): part.config for part in (decoder_of(model), *modules)}.values()
    held = [(config, config._attn_implementation) for config in configs]
    _handlers.update(dict.fromkeys(modules, handler))
    for config, own in held:
        config._attn_implementation_internal = _registered(own)  # the property's setter sets those of parts, too

    def undo() -> None:
        for config, own in held:
            config._attn_implementation_internal = own
        for module in modules:
            _handlers.pop(module, None)

    return undo


@contextmanager
def watch(model: Any, wrap: Callable[[Handler], Handler]) -> Iterator[None]:
    """Puts another handler around that of `intercept`, for the time of a ``with`` block."""
    held = {module: _handlers[module] for module in attention_modules(model).values()}
    _handlers.update({module: wrap(handler) for module, handler in held.items()})
    try:
        yield
    finally:
        _handlers.update(held)


def _registered(own: str) -> str:
    name = _PREFIX + own
    if name not in AttentionInterface():
        AttentionInterface.register(name, _calling(own))
        masks = AttentionMaskInterface()
        if own in masks:
            AttentionMaskInterface.register(name, masks[own])
    return name


def _calling(own: str) -> Attention:
    # Models give the first four by place, and some the mask by name.
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        # "eager" is no registered function, but one of the model's own file, which may have others of its own, too.
        functions = sys.modules[type(module).__module__]
        eager: Any = getattr(functions, "eager_attention_forward", None)
        interface = getattr(functions, INTERFACE, None) or AttentionInterface()
        function = interface.get_interface(own, eager)
        handler = _handlers.get(module)
        if handler is None:
            return function(module, query, key, value, attention_mask, **options)
        return handler(function, module, query, key, value, attention_mask, **options)

    return attention
