"""The methods in vLLM: per request, served over HTTP."""

from decoding.vllm.requests import style_engine_args

__all__ = ["style_engine_args"]
