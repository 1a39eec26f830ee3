"""What chunk selection needs to know of a model, read from its configuration."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chunkllm.errors import ChunkError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what files of models call transformers' attention interface
_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "mixer")  # what models call it in a layer
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def cache_argument(model: Any) -> str:
    """What a model or decoder calls the cache in its forward pass.

    Raises:
        ChunkError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    found = next((name for name in CACHE_NAMES if name in parameters), None)
    if found is None:
        raise ChunkError(f"{type(model).__name__} takes no key-value cache: chunk selection needs one")
    return found


def decoder_of(model: Any) -> Any:
    """The module that holds a model's decoder layers; for some models `get_decoder` gives one around or beside it.

    Raises:
        ChunkError: there is none.
    """
    decoder = model.get_decoder()
    for found in (decoder, getattr(decoder, "model", None), getattr(model, "model", None)):
        if hasattr(found, "layers"):
            return found
    raise ChunkError(f"{model.config.model_type} has no decoder with layers: chunk selection needs them")


def bottom_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """[B, T, hidden_size], of what a decoder layer returned; some return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def attention_implementation(model: Any) -> str:
    """The name of the attention function of a model's decoder ("sdpa", "eager", …)."""
    return decoder_of(model).config._attn_implementation


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
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise ChunkError(f"{kind} has a cache of its own: chunk selection needs transformers' (DynamicCache)")
    if getattr(config, "num_kv_shared_layers", None):
        raise ChunkError(f"{kind} has layers that read another's keys and values (num_kv_shared_layers)")
    layers = layer_kinds(config)
    if not layers.full:
        found = ", ".join(sorted(set(layers.others))) or "sliding windows alone"
        raise ChunkError(f"{kind} has no layers with full attention alone, in which to select: {found}")
    modules = attention_modules(model)
    full = tuple(i for i in layers.full if i in modules)  # others attend to images, as in Mllama
    if not full:
        raise ChunkError(f"{kind} has no attention (self_attn) in its decoder's layers")
    attention = modules[full[0]]
    if not hasattr(sys.modules[type(attention).__module__], INTERFACE):
        raise ChunkError(f"{kind} does not use transformers' attention interface ({INTERFACE})")
    if hasattr(attention, "sinks"):
        raise ChunkError(f"{kind} has learned attention sinks (sinks), which chunk selection does not know")
    heads, kv_heads, head_dim = _of_attention(config, full)
    return ModelShape(
        model_type=kind,
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=float(getattr(attention, "scaling", head_dim**-0.5)),
        full_layers=full,
    )


def _of_attention(config: Any, layers: tuple[int, ...]) -> tuple[int, int, int]:
    """H, Hkv and D, which those layers must have in common; others may have theirs."""
    by_layer = getattr(config, "per_layer_config", None)
    found = {_heads(each) for each in ([config] if by_layer is None else [by_layer[i] for i in layers])}
    if len(found) > 1:
        raise AttributeError(f"query heads, key-value heads and their width are {sorted(found)}")
    return found.pop()


def _heads(config: Any) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


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
    """The attention of the decoder's layers that have one, by its place.

    Raises:
        ChunkError: the model's layers are not where models of transformers have them.
    """
    found = {}
    for i, layer in enumerate(decoder_of(model).layers):
        module = next((getattr(layer, name) for name in _ATTENTION if hasattr(layer, name)), None)
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            found[i] = module
    return found
