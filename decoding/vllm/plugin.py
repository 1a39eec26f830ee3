"""What vLLM loads in each of its processes, since the package says so in the entry point group vllm.general_plugins."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from decoding.errors import DecodingError
from decoding.vllm.counts import publish
from decoding.vllm.declaration import CHUNKS_VARIABLE, STYLES_VARIABLE, TEMPERATURE_VARIABLE, asked_for

CPU_BACKEND = "decoding.vllm.cpu_attention.ChunkCPUAttentionBackend"
CUDA_BACKEND = "decoding.vllm.flash_attention.ChunkFlashAttentionBackend"


def register() -> None:
    """Registers the attention backends that select chunks. They do nothing of their own unless an engine asks for it.

    An engine that asks for it, by whatever means, and has another backend does not start.

    Where something is declared, ``/metrics`` shows what is asked for.

    On a CPU, vLLM knows one backend, which ours stands in for. On CUDA, ours is ``CUSTOM``, unless another plugin's is.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    elif not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
    _check_engines()
    if {STYLES_VARIABLE, TEMPERATURE_VARIABLE, CHUNKS_VARIABLE} & set(os.environ):
        publish()


def _check_engines() -> None:
    """Has what an engine is configured with looked at. Without our processor nobody of ours would be asked later."""
    create = EngineArgs.create_engine_config
    if getattr(create, "looks_for_chunks", False):  # vLLM may load plugins again
        return

    @wraps(create)
    def create_engine_config(*args: Any, **options: Any) -> VllmConfig:
        config = create(*args, **options)
        if asked_for(config) is not None:
            refuse_other_backends(config)
        return config

    create_engine_config.looks_for_chunks = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def refuse_other_backends(vllm_config: VllmConfig) -> None:
    """Refuses an engine whose attention is not ours, in which chunks would not be selected.

    Raises:
        DecodingError: says what to ask for instead.
    """
    if current_platform.is_cpu():
        if AttentionBackendEnum.CPU_ATTN.get_path() != CPU_BACKEND:
            raise DecodingError("another plugin has taken the attention backend of CPUs: chunk selection needs that")
        return
    asked = vllm_config.attention_config.backend
    if asked != AttentionBackendEnum.CUSTOM:
        name = "one of vLLM's choice" if asked is None else asked.name
        raise DecodingError(
            f'chunk selection is an attention backend itself: start with attention_backend="CUSTOM", not {name}'
        )
    if not asked.is_overridden() or asked.get_path() != CUDA_BACKEND:
        raise DecodingError("another plugin has taken the attention backend CUSTOM, which chunk selection needs")
