"""The tokenizer of an engine, as this package means it: transformers' own, whichever one vLLM reads prompts with."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.tokenizers import cached_get_tokenizer, cached_tokenizer_from_config


def engine_tokenizer(vllm_config: VllmConfig) -> Any | None:
    """What `decoding.models.load_tokenizer` gives for an engine's tokenizer; None if the engine has none.

    That is vLLM's own, but for Mistral's models, which vLLM may read with mistral_common: where ``tokenizer_mode`` says
    so, or by itself where a repository holds Mistral's files. The tokenizer that it has then lacks much of what
    transformers' have, and spells the same tokens in another way: every prior would seem another tokenizer's.
    """
    config = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(config)
    wrapped = getattr(tokenizer, "transformers_tokenizer", None)  # vLLM's class for mistral_common has one
    if wrapped is None:
        return tokenizer
    own = _of_transformers(config)
    if own is not None:
        return own
    wrapped.name_or_path = wrapped.name_or_path or config.tokenizer  # for messages: Mistral's class does not know it
    return wrapped


def _of_transformers(config: ModelConfig) -> Any | None:
    """The tokenizer that vLLM has in its mode "hf"; None where there are Mistral's files alone."""
    try:
        tokenizer = cached_get_tokenizer(
            config.tokenizer,
            runner_type=config.runner_type,
            tokenizer_mode="hf",
            revision=config.tokenizer_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return None if tokenizer.eos_token is None else tokenizer  # none: a tekken.json by itself, as in `load_tokenizer`
