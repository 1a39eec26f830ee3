"""What the methods say to a model in vLLM, without its weights: run by `decoding.doctor`, in a process of its own.

``python -m decoding.vllm.trial MODEL TEXT OUT`` writes a JSON object to OUT: for each method why it is refused, or
null, and in ``engine`` why vLLM does not run the model at all. TEXT is the text of a style.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from chunkllm.selection import DEFAULT_BUDGET
from decoding.errors import DecodingError
from decoding.vllm.chunks import refuse_what_is_missing
from decoding.vllm.engine import engine_args
from decoding.vllm.processor import StyleLogitsProcessor, TemperatureLogitsProcessor
from decoding.vllm.selecting import refuse_other_layers

_HOST = torch.device("cpu")


def tried(model: str, text: str) -> dict[str, str | None]:
    """What this module writes.

    Args:
        model: a folder, or a hub id.
        text: a file with a style's text.
    """
    refusals: dict[str, str | None] = {"engine": None}
    try:
        config = _configured(model, engine_args({"trial": text}))
    except Exception as error:  # vLLM raises what it likes.
        return {"engine": f"vLLM does not run this model: {_brief(error)}"}
    checks: dict[str, Callable[[], Any]] = {
        "style": lambda: StyleLogitsProcessor(config, _HOST),
        "temperature": lambda: _temperatures(config, temperature=True),
        "phases": lambda: _temperatures(config, phases=True),
        "chunks": lambda: _select(_configured(model, engine_args(kv_budget=DEFAULT_BUDGET))),
    }
    for method, check in checks.items():
        try:
            check()
            refusals[method] = None
        except DecodingError as error:
            refusals[method] = str(error)
        except Exception as error:
            refusals[method] = f"vLLM cannot be tried with this model: {_brief(error)}"
    return refusals


def _configured(model: str, engine: dict[str, Any]) -> VllmConfig:
    return EngineArgs(model, load_format="dummy", enforce_eager=True, **engine).create_engine_config()


def _temperatures(config: VllmConfig, **declared: Any) -> None:
    engine_args(**declared)  # in the environment, where the processor finds it
    TemperatureLogitsProcessor(config, _HOST)


def _select(config: VllmConfig) -> None:
    """Builds the model without weights, and asks its attention.

    Raises:
        DecodingError: chunks cannot be selected in it.
    """
    refuse_what_is_missing(config)
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/init", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            initialize_model(config)
    refuse_other_layers(config)


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(tried(*sys.argv[1:3])), encoding="utf-8")
