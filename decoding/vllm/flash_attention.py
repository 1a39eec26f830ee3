"""The attention backend on CUDA: FlashAttention's, under the name that vLLM has for others' backends."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from decoding.vllm.declaration import asked_for
from decoding.vllm.selecting import SelectingBuilder, SelectingImpl, is_selecting


class ChunkFlashAttentionBackend(FlashAttentionBackend):
    """FlashAttention, with chunk selection if the engine asks for it."""

    supports_kv_cache_update_bypass = False  # since vLLM 0.33 a model may leave keys out, which the selection reads

    @staticmethod
    def get_name() -> str:
        """The one name that vLLM knows for backends of others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Of attention layers."""
        return _Impl if is_selecting() else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Of metadata."""
        return _Builder


class _Impl(SelectingImpl, FlashAttentionImpl):
    def can_read_keys(self, attention: Any, block_size: int) -> bool:
        """As they were, unless the cache is quantized."""
        return not is_quantized_kv_cache(self.kv_cache_dtype)

    def read_keys(self, attention: Any, blocks: Tensor) -> Tensor:
        """A block holds [Hkv, block size, keys and values]."""
        return attention.kv_cache[blocks][..., : self.head_size].transpose(1, 2)


class _Builder(SelectingBuilder, FlashAttentionMetadataBuilder):
    supports_update_block_table = False  # a selection is one block table's

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs of what lies between attentions: a layer's selection is computed anew in each step.

        If the engine asks for them, also of whole steps with single tokens.
        """
        declared = asked_for(vllm_config)
        if declared is not None:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if declared.full_graphs else AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)

    def plans_of(self, metadata: FlashAttentionMetadata, lengths: Tensor) -> list[None]:
        """None: the kernel makes its own."""
        return [None] * len(lengths)
