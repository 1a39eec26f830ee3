"""What a server offers, declared in the environment, which all of its processes share.

vLLM checks requests in the process that receives them and applies them in others, and gives the check no configuration.
So there are two variables in JSON: ``DECODING_STYLES``, an object from names to saved priors, and
``DECODING_TEMPERATURE``, an object like `DeclaredSelector`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

from decoding.abilities import SIZES
from decoding.errors import DecodingError
from decoding.priors import is_saved_prior, may_be_hub_id
from decoding.selector import CONFIG_FILE, Policy

STYLES_VARIABLE = "DECODING_STYLES"
TEMPERATURE_VARIABLE = "DECODING_TEMPERATURE"
STYLE_PROCESSOR = "decoding.vllm.processor:StyleLogitsProcessor"
TEMPERATURE_PROCESSOR = "decoding.vllm.processor:TemperatureLogitsProcessor"
_COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


class DeclaredSelector(NamedTuple):
    """The temperature selector of a server."""

    selector: str | None = None  # a folder or a hub id, None for the embedded one
    model_size: str | None = None  # None to go by the model's parameters
    policy: Policy | None = None  # None for the selector's own


def engine_args(
    styles: Mapping[str, str | PathLike] | None = None,
    *,
    temperature: bool | str | PathLike | None = None,
    model_size: str | None = None,
    policy: Policy | None = None,
) -> dict[str, Any]:
    """Arguments that give ``vllm.LLM`` or ``AsyncEngineArgs`` style priors, a temperature selector, or both.

    Declares them in the environment, from which the engine's processes are started, in place of what an earlier call
    declared.

    Examples:
        >>> llm = LLM("path-or-hub-id", **engine_args({"king-james": "king-james.safetensors"}, temperature=True))
        >>> llm.generate(prompts, SamplingParams(extra_args={"style": "king-james", "lambda": 0.1}))
        >>> llm.generate(prompts, SamplingParams(temperature=1, extra_args={"temperature": "auto"}))

    Args:
        styles: a saved prior for every name: a file of ``decoding style train``, a folder of
            `StylePrior.save_pretrained` (its settings apply, and its λ where a request gives none), or a hub id.
        temperature: the selector: True for the embedded one, a folder of `TemperatureSelector.save_pretrained`, or a
            hub id.
        model_size: "small", "medium" or "large", as for `TemperatureSelector.select`; by default by the number of the
            model's parameters.
        policy: "ability" (the default) or "curve".

    Raises:
        DecodingError: a name without a saved prior, no selector there, or an unknown size or policy.
    """
    priors = None if styles is None else {name: _saved_prior(name, source) for name, source in styles.items()}
    selector = _selector(temperature, model_size, policy)
    _declare(STYLES_VARIABLE, priors)
    _declare(TEMPERATURE_VARIABLE, None if selector is None else selector._asdict())
    processors = [STYLE_PROCESSOR] * (priors is not None) + [TEMPERATURE_PROCESSOR] * (selector is not None)
    return {"logits_processors": processors}


def _saved_prior(name: str, source: str | PathLike) -> str:
    if is_saved_prior(source) and Path(source).exists():
        return str(Path(source).resolve())
    if not may_be_hub_id(str(source)):
        raise DecodingError(f"style {name!r}: no saved prior at {source}; make one with `decoding style train`")
    return str(source)


def _selector(
    temperature: bool | str | PathLike | None, model_size: str | None, policy: Policy | None
) -> DeclaredSelector | None:
    if temperature is None or temperature is False:
        if model_size is not None or policy is not None:
            raise DecodingError("model_size and policy are the temperature selector's: ask for one with temperature")
        return None
    for what, value, known in (("model size", model_size, SIZES), ("policy", policy, get_args(Policy))):
        if value not in (None, *known):
            raise DecodingError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
    return DeclaredSelector(None if temperature is True else _saved_selector(temperature), model_size, policy)


def _saved_selector(source: str | PathLike) -> str:
    if (Path(source) / CONFIG_FILE).is_file():
        return str(Path(source).resolve())
    if not may_be_hub_id(str(source)):
        raise DecodingError(f"no temperature selector at {source}: there is no {CONFIG_FILE}")
    return str(source)


def _declare(variable: str, value: dict[str, Any] | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
        return
    os.environ[variable] = json.dumps(value, ensure_ascii=False)
    copied = os.environ.get(_COPIED_BY_RAY, "")
    if variable not in copied.split(","):  # Ray's workers on other machines get only what is listed
        os.environ[_COPIED_BY_RAY] = ",".join(filter(None, (copied, variable)))


def declared_styles() -> dict[str, str]:
    """What this process's environment declares: a saved prior for every name.

    Raises:
        DecodingError: the variable is not a JSON object of strings.
    """
    declared = _parsed(STYLES_VARIABLE, os.environ.get(STYLES_VARIABLE, "{}"))
    if not all(isinstance(source, str) for source in declared.values()):
        raise DecodingError(f'{STYLES_VARIABLE} must map names to saved priors, like {{"name": "path"}}')
    return dict(declared)


def declared_selector() -> DeclaredSelector | None:
    """The temperature selector that this process's environment declares, if it does.

    Raises:
        DecodingError: the variable is not a JSON object of `DeclaredSelector`'s fields.
    """
    text = os.environ.get(TEMPERATURE_VARIABLE)
    if text is None:
        return None
    declared = _parsed(TEMPERATURE_VARIABLE, text)
    if not all(value is None or isinstance(value, str) for value in declared.values()):
        raise DecodingError(f"{TEMPERATURE_VARIABLE} must hold texts or null")
    try:
        return DeclaredSelector(**declared)
    except TypeError as error:
        fields = ", ".join(DeclaredSelector._fields)
        raise DecodingError(f"{TEMPERATURE_VARIABLE} can have {fields}, not {', '.join(declared)}") from error


@lru_cache(maxsize=8)
def _parsed(variable: str, text: str) -> dict[str, Any]:
    try:
        declared = json.loads(text)
    except ValueError as error:
        raise DecodingError(f"{variable} is no JSON: {error}") from error
    if not isinstance(declared, dict):
        raise DecodingError(f"{variable} must be a JSON object, not {text}")
    return declared
