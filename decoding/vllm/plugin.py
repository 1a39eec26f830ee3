"""What vLLM loads in each of its processes, since the package says so in the entry point group vllm.general_plugins."""

from __future__ import annotations

import os

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from decoding.vllm.counts import publish
from decoding.vllm.declaration import TEMPERATURE_VARIABLE

CPU_BACKEND = "decoding.vllm.cpu_attention.ChunkCPUAttentionBackend"
CUDA_BACKEND = "decoding.vllm.flash_attention.ChunkFlashAttentionBackend"


def register() -> None:
    """Registers the attention backends that select chunks. They do nothing of their own unless an engine asks for it.

    Where temperatures are declared, ``/metrics`` shows which are chosen.

    On a CPU, vLLM knows one backend, which ours stands in for. On CUDA, ours is ``CUSTOM``, unless another plugin's is.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    elif not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
    if TEMPERATURE_VARIABLE in os.environ:
        publish()
