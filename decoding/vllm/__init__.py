"""The methods in vLLM: per request, served over HTTP."""

from decoding.vllm.engine import engine_args

__all__ = ["engine_args"]
