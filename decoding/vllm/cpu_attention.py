"""The attention backend on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

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


class _Impl(SelectingImpl, CPUAttentionBackendImpl):
    _order: Tensor | None = None  # where in a block each number of a head's keys stands

    def can_read_keys(self, attention: Any, block_size: int) -> bool:
        """As they were, unless the cache is quantized. In which order is the processor's affair: some are written."""
        if self.is_fp8_kv_cache:
            return False
        numbers = torch.arange(block_size * self.head_size)
        low, high = (self._written(attention, digits, block_size) for digits in (numbers % 256, numbers // 256))
        self._order = (low + 256 * high).long().argsort()  # bfloat16 has no more than 256 whole numbers in a row
        some = numbers.sin().to(attention.kv_cache_torch_dtype)
        return torch.equal(self._written(attention, some, block_size)[self._order], some.float())

    def _written(self, attention: Any, keys: Tensor, block_size: int) -> Tensor:
        """What a block with these keys of a head, [block size · D], is like in the cache, float32."""
        keys = keys.to(attention.kv_cache_torch_dtype).view(block_size, 1, self.head_size)
        cache = keys.new_zeros(1, 1, block_size, 2 * self.head_size)
        self.do_kv_cache_update(attention, keys, keys, cache, torch.arange(block_size))
        return cache.flatten()[: keys.numel()].float()

    def read_keys(self, attention: Any, blocks: Tensor) -> Tensor:
        """A block holds, for each head, its keys and its values."""
        keys = attention.kv_cache[blocks].flatten(2)[:, :, self._order]
        return keys.unflatten(2, (-1, self.head_size)).transpose(1, 2)


class _Builder(SelectingBuilder, CPUAttentionMetadataBuilder):
    def plans_of(self, metadata: CPUAttentionMetadata, lengths: Tensor) -> list[Tensor]:
        """As vLLM's builder makes them. Most layers read as much as others."""
        keys = [each.tobytes() for each in lengths.numpy()]
        plans = {key: self._plan(metadata, each) for key, each in dict(zip(keys, lengths, strict=True)).items()}
        return [plans[key] for key in keys]

    def _plan(self, metadata: CPUAttentionMetadata, lengths: Tensor) -> Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=metadata.dynamic_causal,
            kv_cache_dtype=self.kv_cache_dtype,
        )
