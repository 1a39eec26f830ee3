"""The attention backend on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from chunkllm.paged.selection import Reading
from decoding.vllm.selecting import SelectingBuilder, SelectingImpl, is_selecting


class ChunkCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's, unless the engine asks for chunk selection."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Of attention layers."""
        return _Impl if is_selecting() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Of metadata."""
        return _Builder


class _Impl(SelectingImpl, CPUAttentionBackendImpl): ...


class _Builder(SelectingBuilder, CPUAttentionMetadataBuilder):
    def of_layers(self, metadata: CPUAttentionMetadata, reading: Reading) -> list[Any]:
        self._plans: dict[bytes, Tensor] = {}  # most layers read as much as others
        return super().of_layers(metadata, reading)

    def plan_of(self, metadata: CPUAttentionMetadata) -> Tensor:
        """As vLLM's builder makes it, for other lengths."""
        lengths = metadata.seq_lens.numpy().tobytes()
        if lengths not in self._plans:
            self._plans[lengths] = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(metadata.seq_lens),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                seq_lens=metadata.seq_lens,
                dtype=self.dtype,
                query_start_loc=metadata.query_start_loc,
                causal=metadata.causal,
                sliding_window_size=-1,
                isa=self.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                dynamic_causal=metadata.dynamic_causal,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        return self._plans[lengths]
