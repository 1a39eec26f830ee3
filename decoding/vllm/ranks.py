"""Tensor parallelism: the heads that one of several processes has, and the adapters of these.

vLLM gives each process (rank) as many query heads as any other, in order, and the key-value heads that they read; where
there are fewer of those than processes, neighbours have the same one. Hidden states are whole in every process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm.config import VllmConfig

from chunkllm import ChunkAdapters


class Heads(NamedTuple):
    """How many heads a layer has, and which of them are this process's."""

    total: int
    own: slice


def query_heads(vllm_config: VllmConfig, impl: Any) -> Heads:
    """The query heads of a layer's attention, ``impl`` in vLLM."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return _heads(vllm_config, impl.num_heads * ranks, impl.num_heads)


def kv_heads(vllm_config: VllmConfig, impl: Any) -> Heads:
    """The key-value heads of a layer's attention."""
    ranks, of_model = (
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.model_config.get_total_num_kv_heads(),
    )
    return _heads(vllm_config, min(impl.num_kv_heads * ranks, of_model), impl.num_kv_heads)


def _heads(vllm_config: VllmConfig, total: int, own: int) -> Heads:
    parallel = vllm_config.parallel_config
    rank = parallel.rank % parallel.tensor_parallel_size
    begin = rank * total // parallel.tensor_parallel_size
    return Heads(total, slice(begin, begin + own))


def adapters_of_rank(adapters: ChunkAdapters, vllm_config: VllmConfig, impl: Any) -> ChunkAdapters:
    """The model's adapters, for the heads of this process alone."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return adapters
    return adapters.of_heads(query_heads(vllm_config, impl).own, kv_heads(vllm_config, impl).own)
