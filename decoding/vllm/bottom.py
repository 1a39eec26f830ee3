"""The output of a model's bottom layer, in which adapters look for ends of chunks: how an engine hands it over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context, is_forward_context_available

from decoding.errors import DecodingError

OPERATOR = "decoding::note_bottom_states"

ARCHITECTURES = frozenset(
    {
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    }
)
"""vLLM's classes whose bottom layer gives its output, or that and a residual to be added. A test holds each of them to
transformers. Others can differ: Cohere's gives a residual that is in the output already."""


class _Watch:
    """Waits for the list of layers that a model's first attention belongs to.

    Attention is made before the list that holds its layer becomes the model's, and PyTorch tells of that.
    """

    def __init__(self, config: VllmConfig, impl: Any):
        self._impl = impl
        self._context = config.compilation_config.static_forward_context
        self._splitting = config.compilation_config.splitting_ops
        self._handle = register_module_module_registration_hook(self._registered)

    def stop(self) -> None:
        """No module is looked at any more."""
        self._handle.remove()
        _watching.clear()

    def _registered(self, module: nn.Module, name: str, submodule: Any) -> None:
        config = get_current_vllm_config_or_none()
        if config is None or config.compilation_config.static_forward_context is not self._context:
            self.stop()  # another model's: the list of this one never came
        elif name == "layers" and isinstance(submodule, nn.ModuleList) and self._is_within(submodule[0]):
            submodule[0].register_buffer("chunk_anchor", torch.zeros(1), persistent=False)
            submodule[0].register_forward_hook(_detect)
            self._impl.is_bottom = True
            if self._splitting and OPERATOR not in self._splitting:
                # Else a CUDA graph would hold what the operator did when it was captured. vLLM's own models add theirs
                # here too: the list is read when the model is compiled, in its first pass.
                self._splitting.append(OPERATOR)
            self.stop()

    def _is_within(self, layer: nn.Module) -> bool:
        return any(getattr(module, "impl", None) is self._impl for module in layer.modules())


_watching: list[_Watch] = []


def watch_bottom_layer(config: VllmConfig, impl: Any) -> None:
    """Sees to it that ends of chunks are looked for in the bottom layer's output of the model that is being built.

    Args:
        config: the engine's.
        impl: of an attention layer that is being made. The first one's layer is the bottom.
    """
    if not _watching and not _is_watched(config):
        _watching.append(_Watch(config, impl))


def stop_watching() -> None:
    """The model is built: whatever has not been found is not there."""
    for watch in list(_watching):
        watch.stop()


def _is_watched(config: VllmConfig) -> bool:
    layers = config.compilation_config.static_forward_context.values()
    return any(getattr(getattr(layer, "impl", None), "is_bottom", False) for layer in layers)


def refuse_unseen_ends(config: VllmConfig) -> None:
    """Refuses a model or an engine in which adapters would not be told of the bottom layer's output, or wrongly.

    Raises:
        DecodingError: says what stands in the way.
    """
    architecture, compilation = config.model_config.architecture, config.compilation_config
    without = "leave the adapters out, and chunks end with the cache's blocks"
    if config.model_config.using_transformers_backend():
        raise DecodingError(
            f"of transformers' own model classes (model_impl) adapters do not see the bottom layer's output: {without}"
        )
    if architecture not in ARCHITECTURES:
        raise DecodingError(f"adapters for {architecture} have not been tried in vLLM: {without}")
    if not _is_watched(config):
        raise DecodingError(f"no list of layers was found in {architecture}, whose first one adapters read: {without}")
    if not compilation.cudagraph_mode:
        return
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        raise DecodingError("adapters are not called in breakable CUDA graphs: set VLLM_USE_BREAKABLE_CUDAGRAPH=0")
    if OPERATOR not in (compilation.splitting_ops or ()):
        raise DecodingError(
            f"adapters are called where CUDA graphs are split: splitting_ops of the compilation config lacks {OPERATOR}"
        )


def _detect(layer: nn.Module, args: Any, output: Tensor | tuple[Tensor, Tensor]) -> None:
    hidden_states, residual = output if isinstance(output, tuple) else (output, None)
    torch.ops.decoding.note_bottom_states(hidden_states, residual, layer.chunk_anchor)


@torch.library.custom_op(OPERATOR, mutates_args=("anchor",))
def note_bottom_states(hidden_states: Tensor, residual: Tensor | None, anchor: Tensor) -> None:
    """Hands the bottom layer's output to the selection. An operator of its own, since compiled models call it too.

    Args:
        hidden_states: [T, hidden_size].
        residual: what is to be added to it, if the model has not yet.
        anchor: nothing; said to be written to, lest the call be taken for one without effect.
    """
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    if not isinstance(metadata, dict):
        return
    steps = {id(step): step for each in metadata.values() if (step := getattr(each, "chunks", None)) is not None}
    for step in steps.values():
        step.note_bottom_states(hidden_states, residual)


@note_bottom_states.register_fake
def _(hidden_states: Tensor, residual: Tensor | None, anchor: Tensor) -> None: ...
