"""What a `decoding.Policy` is to a server: a style, a selector, chunks, and what requests have of these."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

from chunkllm.selection import DEFAULT_BUDGET
from decoding.errors import DecodingError
from decoding.policy import Policy
from decoding.policy.values import AUTO, EMBEDDED, OF_STYLES, chunk_settings
from decoding.style.measured import measured_elsewhere
from decoding.style.source import StyleSource
from decoding.temperature.selector import Policy as SelectorPolicy
from decoding.vllm.declaration import DeclaredStyle

_ALL_TOKENS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""A temperature of a policy is for all tokens, whatever the model's generation_config.json says, as in `generate`."""


class ServedPolicy(NamedTuple):
    """A policy, or none, in the words of `decoding.vllm.engine_args` and of requests."""

    style: tuple[str, DeclaredStyle] | None = None  # by name
    selector: bool | str | None = None  # as ``temperature``
    has_phases: bool = False
    adapters: str | None = None
    budget: int | None = None
    sampling: Mapping[str, float] = {}  # vLLM's own parameters, for requests without them
    arguments: Mapping[str, Any] = {}  # of requests that do not have them


def opened_policy(policy: Policy | str | PathLike, model: str | None) -> ServedPolicy:
    """Opens a policy.

    Args:
        policy: one, or the folder or hub id of one.
        model: measures its style, where that has to be.

    Raises:
        DecodingError: none there, a damaged one, or one that vLLM cannot have.
    """
    if not isinstance(policy, Policy):
        if policy in get_args(SelectorPolicy) and not Path(policy).exists():
            raise DecodingError(
                f"policy={policy!r} was the temperature selector's: write temperature_policy={policy!r}"
            )
        policy = Policy.from_pretrained(policy)
    arguments: dict[str, Any] = {}
    style = _style_of(policy, model)
    if style is not None:
        arguments["style"] = style[0]
    selector, think = None, policy.think_temperature
    if policy.temperature == AUTO:
        selector = True if policy.selector in (None, EMBEDDED) else policy.selector
    if policy.temperature == AUTO or think is not None:
        arguments["temperature"] = policy.temperature
    if think is not None:
        arguments["think_temperature"] = think
    adapters, budget = _chunks_of(policy)
    if budget is not None:
        arguments["chunks"] = budget
    return ServedPolicy(style, selector, think is not None, adapters, budget, _sampling_of(policy), arguments)


def _style_of(policy: Policy, model: str | None) -> tuple[str, DeclaredStyle] | None:
    if policy.style is None:
        return None
    source = StyleSource.parse(policy.style)
    values = {"lambda": policy.lambda_, **{name: getattr(policy, name) for name in OF_STYLES[1:]}}
    style = DeclaredStyle(policy.style, tuple((name, value) for name, value in values.items() if value is not None))
    if policy.lambda_ == AUTO or (policy.mode == "ratio" and source.is_text):
        if model is None:
            what = f'λ="{AUTO}"' if policy.lambda_ == AUTO else 'mode="ratio"'
            raise DecodingError(
                f"{what} of this policy's style is measured with the model: name that in engine_args(policy=…, model=…)"
            )
        style = DeclaredStyle(measured_elsewhere(style.style, style.parameters(), model))
    return source.served_name, style


def _chunks_of(policy: Policy) -> tuple[str | None, int | None]:
    """Adapters and budget."""
    if policy.chunks is None:
        return None, None
    settings = chunk_settings(policy.chunks)
    adapters, budget = settings.pop("adapters", None), settings.pop("budget", None)
    if settings:
        raise DecodingError(f"chunk selection in vLLM has adapters and a budget, not {', '.join(settings)}")
    return adapters, DEFAULT_BUDGET if budget is None else budget


def _sampling_of(policy: Policy) -> dict[str, float]:
    if policy.temperature is None:
        return {}
    if policy.temperature == AUTO or policy.think_temperature is not None:
        return {"temperature": 1.0, **_ALL_TOKENS}  # the processor divides
    return {"temperature": float(policy.temperature), **_ALL_TOKENS}
