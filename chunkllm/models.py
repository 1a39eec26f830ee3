"""What chunk selection needs to know of a model, read from its configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chunkllm.errors import ChunkError

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def cache_argument(model: Any) -> str:
    """What a model or decoder calls the cache in its forward pass."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


@dataclass(frozen=True)
class ModelShape:
    """Shapes of a model's attention.

    Attributes:
        model_type: of its configuration ("llama", "qwen3", …).
        hidden_size: of its layers' outputs.
        heads: H, query heads.
        kv_heads: Hkv, key-value heads.
        head_dim: D.
        scaling: of attention logits.
        full_layers: places of the layers with full attention, in which chunks are selected; others are left alone.
    """

    model_type: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    full_layers: tuple[int, ...]


def model_shape(model: Any) -> ModelShape:
    """Reads a model's configuration.

    Args:
        model: a causal language model of transformers.

    Raises:
        ChunkError: chunks cannot be selected in it; the message names what is missing.
    """
    try:
        return _read_shape(model)
    except (AttributeError, RuntimeError) as error:  # the latter is what transformers raises for what differs by layer
        reason = str(error).partition("\n")[0]
        raise ChunkError(
            f"{model.config.model_type} has no one value for all layers of what chunk selection needs: {reason}"
        ) from error


def _read_shape(model: Any) -> ModelShape:
    config = model.config.get_text_config(decoder=True)
    kind = config.model_type
    if model.config.is_encoder_decoder:
        raise ChunkError(f"{kind} is an encoder-decoder model: chunk selection is for decoders alone")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ChunkError(f"{kind} has latent attention (kv_lora_rank): chunk selection needs plain keys and values")
    if getattr(config, "rope_parameters", None) is None and getattr(config, "rope_theta", None) is None:
        raise ChunkError(f"{kind} has no rotary position embeddings (rope_parameters): chunk selection needs them")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ChunkError(f"{kind} caps its attention logits (attn_logit_softcapping), which chunk selection does not")
    if not getattr(model, "_supports_attention_backend", False):
        raise ChunkError(f"{kind} does not use transformers' attention interface (_supports_attention_backend)")
    layers = layer_kinds(config)
    if layers.others or not layers.full:
        found = ", ".join(sorted(set(layers.others))) or "sliding windows alone"
        raise ChunkError(f"{kind} has no layers with full attention, or others that keep no keys and values: {found}")
    attention = attention_modules(model)[layers.full[0]]
    if hasattr(attention, "sinks"):
        raise ChunkError(f"{kind} has learned attention sinks (sinks), which chunk selection does not know")
    heads = config.num_attention_heads
    return ModelShape(
        model_type=kind,
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        scaling=float(attention.scaling),
        full_layers=layers.full,
    )


class LayerKinds(NamedTuple):
    """A model's layers by what they keep."""

    full: tuple[int, ...]  # places of those with full attention
    sliding: tuple[int, ...]  # and of those with windows
    others: tuple[str, ...]  # names of transformers' classes for what each other layer keeps


def layer_kinds(config: Any) -> LayerKinds:
    """The layers of a text model's configuration, as transformers caches them."""
    layers: list[Any] = DynamicCache(config=config).layers
    full = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
    sliding = tuple(i for i, layer in enumerate(layers) if i not in full and getattr(layer, "is_sliding", False))
    others = tuple(type(layer).__name__ for i, layer in enumerate(layers) if i not in (*full, *sliding))
    return LayerKinds(full, sliding, others)


def attention_modules(model: Any) -> dict[int, Any]:
    """The attention of every layer, by its place.

    Raises:
        ChunkError: the model's layers are not where models of transformers have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    modules = {} if layers is None else {i: getattr(layer, "self_attn", None) for i, layer in enumerate(layers)}
    if not modules or not all(hasattr(module, "scaling") for module in modules.values()):
        raise ChunkError(f"{model.config.model_type} has no decoder layers with self_attn: chunk selection needs them")
    return modules
