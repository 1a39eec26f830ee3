"""vLLM, where it is installed, from the inside."""

from __future__ import annotations

import importlib.util
from typing import Any

from decoding.errors import DecodingError


def require_vllm() -> None:
    """Refuses to go on without vLLM.

    Raises:
        DecodingError: as said.
    """
    if importlib.util.find_spec("vllm") is None:
        raise DecodingError("this needs vLLM, 0.32 or newer: pip install vllm")


def model_runner(llm: Any) -> Any:
    """What computes the steps of a ``vllm.LLM`` in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
