"""vLLM, where it is installed, from the inside."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


STYLES, TEMPERATURES, CHUNKS = "styles", "temperatures", "chunk selection"
_PROCESSORS = {
    "StyleLogitsProcessor": STYLES,
    "TemperatureLogitsProcessor": TEMPERATURES,
    "ChunkLogitsProcessor": CHUNKS,
}


@contextmanager
def without(llm: Any, parts: Sequence[str]) -> Iterator[None]:
    """The engine as if parts that it has had not been declared. V1's runner: all that declaring changes in a step.

    Args:
        llm: a ``vllm.LLM`` in this process.
        parts: of `STYLES`, `TEMPERATURES` and `CHUNKS`.
    """
    if not parts:
        yield
        return
    runner = model_runner(llm)
    batch = runner.input_batch
    kinds = batch.logitsprocs.argmax_invariant, batch.logitsprocs.non_argmax_invariant
    held = [list(processors) for processors in kinds]
    for processors in kinds:
        processors[:] = [each for each in processors if _PROCESSORS.get(type(each).__name__) not in parts]
    assert sum(map(len, held)) - sum(map(len, kinds)) == len(parts)
    needs_output = batch.logitsprocs_need_output_token_ids
    batch.logitsprocs_need_output_token_ids = any(type(each).__name__ in _PROCESSORS for kind in kinds for each in kind)
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    groups = [getattr(builder, "group", None) for builder in builders]
    if CHUNKS in parts:
        for builder in builders:
            builder.group = None
    try:
        yield
    finally:
        batch.logitsprocs_need_output_token_ids = needs_output
        for processors, own in zip(kinds, held, strict=True):
            processors[:] = own
        for builder, group in zip(builders, groups, strict=True):
            builder.group = group
