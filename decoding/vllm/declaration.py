"""What a server offers, declared in the environment, which all of its processes share.

vLLM checks requests in the process that receives them and applies them in others, and gives the check no configuration.
So there are three variables in JSON: ``DECODING_STYLES``, an object from names to saved priors,
``DECODING_TEMPERATURE``, one like `DeclaredSelector` that may have ``phases``, one like `DeclaredPhases` (and then
``"selector": false`` to do without a selector), and ``DECODING_CHUNKS``, one like `DeclaredChunks`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from chunkllm.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from chunkllm.selection import DEFAULT_BUDGET
from decoding.errors import DecodingError
from decoding.files import exists
from decoding.hub import may_be_hub_id
from decoding.style.source import StyleSource
from decoding.temperature.abilities import SIZES
from decoding.temperature.files import CONFIG_FILE
from decoding.temperature.markers import checked_markers
from decoding.temperature.selector import Policy

STYLES_VARIABLE = "DECODING_STYLES"
TEMPERATURE_VARIABLE = "DECODING_TEMPERATURE"
CHUNKS_VARIABLE = "DECODING_CHUNKS"
STYLE_PROCESSOR = "decoding.vllm.processor:StyleLogitsProcessor"
TEMPERATURE_PROCESSOR = "decoding.vllm.processor:TemperatureLogitsProcessor"
CHUNK_PROCESSOR = "decoding.vllm.processor:ChunkLogitsProcessor"
CHUNKS_KEY = "chunkllm"  # in an engine's additional_config
EMBEDDED = "default"  # the name of what comes with the package
BLOCK_SIZE = 32
_PHASES = "phases"
_COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


class DeclaredSelector(NamedTuple):
    """The temperature selector of a server."""

    selector: str | None = None  # a folder or a hub id, None for the embedded one
    model_size: str | None = None  # None to go by the model's parameters
    policy: Policy | None = None  # None for the selector's own


class DeclaredPhases(NamedTuple):
    """That a server has temperatures of their own for thinking and answering: the texts that begin and end thinking."""

    begin: str | None = None  # None for the model's own, like the other
    end: str | None = None


class DeclaredChunks(NamedTuple):
    """The chunk selection of a server; also what an engine's ``additional_config={"chunkllm": {…}}`` holds."""

    adapters: str | None = None  # a folder or a hub id, "default" for the embedded ones, None to do without
    kv_budget: int = DEFAULT_BUDGET  # tokens that a request reads at most, on average over layers


def engine_args(
    styles: Mapping[str, str | PathLike] | None = None,
    *,
    temperature: bool | str | PathLike | None = None,
    model_size: str | None = None,
    policy: Policy | None = None,
    phases: bool | tuple[str, str] = False,
    chunk_adapters: str | PathLike | None = None,
    kv_budget: int | None = None,
) -> dict[str, Any]:
    """Arguments that give ``vllm.LLM`` or ``AsyncEngineArgs`` style priors, temperatures, chunk selection.

    Declares them in the environment, from which the engine's processes are started, in place of what an earlier call
    declared. For chunk selection, the arguments also set the size of the cache's blocks, and on CUDA the attention
    backend and vLLM's V1 model runner.

    Examples:
        >>> llm = LLM("path-or-hub-id", **engine_args({"king-james": "king-james.safetensors"}, temperature=True))
        >>> llm.generate(prompts, SamplingParams(extra_args={"style": "king-james", "lambda": 0.1}))
        >>> llm.generate(prompts, SamplingParams(temperature=1, extra_args={"temperature": "auto"}))
        >>> llm = LLM("path-or-hub-id", **engine_args(phases=True))
        >>> phases = {"think_temperature": 1.0, "answer_temperature": 0.3}
        >>> llm.generate(prompts, SamplingParams(temperature=1, extra_args=phases))
        >>> llm = LLM("path-or-hub-id", **engine_args(chunk_adapters="my-adapters", kv_budget=2048))
        >>> llm.generate(prompts, SamplingParams(extra_args={"kv_budget": 4096}))  # or "full"

    Args:
        styles: a style for every name, as `StylePrior` takes it: a file of ``decoding style train``, a folder of
            `StylePrior.save_pretrained` (its settings apply, and its λ where a request gives none), a hub id, or a
            text, from which the engine trains a prior once.
        temperature: the selector: True for the embedded one, a folder of `TemperatureSelector.save_pretrained`, or a
            hub id.
        model_size: "small", "medium" or "large", as for `TemperatureSelector.select`; by default by the number of the
            model's parameters.
        policy: "ability" (the default) or "curve".
        phases: requests may have one temperature for thinking and one for answering. True to go by the model's own
            markers of thinking, as `PhaseTemperature` does; else the two texts that begin and end it.
        chunk_adapters: select chunks, with the adapters of a folder or hub id; "default" for the embedded ones.
        kv_budget: select chunks, with or without adapters, where a request has more tokens than these, 2048 by default.

    Raises:
        DecodingError: a name without a style, no selector or adapters there, an unknown size, policy or budget, or
            phases that are no two texts.
    """
    priors = None if styles is None else {name: _style(name, spec) for name, spec in styles.items()}
    selector = _selector(temperature, model_size, policy)
    temperatures = _temperatures(selector, _phases(phases))
    _declare(STYLES_VARIABLE, priors)
    _declare(TEMPERATURE_VARIABLE, temperatures)
    chunks = _chunks(chunk_adapters, kv_budget)
    _declare(CHUNKS_VARIABLE, None if chunks is None else chunks._asdict())
    declared = {STYLE_PROCESSOR: priors, TEMPERATURE_PROCESSOR: temperatures, CHUNK_PROCESSOR: chunks}
    processors = [name for name, value in declared.items() if value is not None]
    return {"logits_processors": processors, **({} if chunks is None else _engine_of(chunks))}


def _engine_of(chunks: DeclaredChunks) -> dict[str, Any]:
    engine = {"additional_config": {CHUNKS_KEY: chunks._asdict()}, "block_size": BLOCK_SIZE}
    if not torch.cuda.is_available():
        return engine
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 does not tell backends which row is whose
    return engine | {"attention_backend": "CUSTOM"}


def _chunks(adapters: str | PathLike | None, budget: int | None) -> DeclaredChunks | None:
    if adapters is None and budget is None:
        return None
    source = None if adapters is None else _saved_adapters(adapters)
    return checked_chunks({"adapters": source, "kv_budget": DEFAULT_BUDGET if budget is None else budget})


def _saved_adapters(source: str | PathLike) -> str:
    if source == EMBEDDED:
        return EMBEDDED
    if (Path(source) / ADAPTER_CONFIG_FILE).is_file():
        return str(Path(source).resolve())
    if not may_be_hub_id(str(source)):
        raise DecodingError(f"no adapters at {source}: make some with `decoding chunk train`")
    return str(source)


def _style(name: str, spec: str | PathLike) -> str:
    try:
        source = StyleSource.parse(spec)
        if source.is_text:
            source.corpus()  # the engine reads it again, but could not tell the caller
    except DecodingError as error:
        raise DecodingError(f"style {name!r}: no saved prior, text or hub id: {error}") from error
    if source.kind == "prior" and not exists(source.where):
        raise DecodingError(f"style {name!r}: no saved prior at {spec}; make one with `decoding style train`")
    where = str(Path(source.where).resolve()) if exists(source.where) else source.where
    return where if source.field is None else f"{where}#{source.field}"


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


def _phases(phases: bool | Sequence[str]) -> DeclaredPhases | None:
    if isinstance(phases, bool):
        return DeclaredPhases() if phases else None
    if isinstance(phases, str) or len(phases) != 2:
        raise DecodingError(f"phases must be True, or the texts that begin and end thinking, not {phases!r}")
    checked_markers(*phases)
    return DeclaredPhases(*phases)


def _temperatures(selector: DeclaredSelector | None, phases: DeclaredPhases | None) -> dict[str, Any] | None:
    """What the variable holds."""
    if phases is None:
        return None if selector is None else selector._asdict()
    return {**({"selector": False} if selector is None else selector._asdict()), _PHASES: phases._asdict()}


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
    declared = _declared_temperatures()
    if declared is None or declared.get("selector") is False:
        return None
    declared = {name: value for name, value in declared.items() if name != _PHASES}
    if not all(value is None or isinstance(value, str) for value in declared.values()):
        raise DecodingError(f"{TEMPERATURE_VARIABLE} must hold texts or null")
    try:
        return DeclaredSelector(**declared)
    except TypeError as error:
        fields = ", ".join(DeclaredSelector._fields)
        raise DecodingError(f"{TEMPERATURE_VARIABLE} can have {fields}, not {', '.join(declared)}") from error


def declared_phases() -> DeclaredPhases | None:
    """The phases that this process's environment declares, if it does.

    Raises:
        DecodingError: the variable is not a JSON object, or its ``phases`` not one of `DeclaredPhases`'s fields.
    """
    phases = (_declared_temperatures() or {}).get(_PHASES)
    if phases is None or isinstance(phases, bool):
        return DeclaredPhases() if phases else None
    if not isinstance(phases, Mapping) or not set(phases) <= set(DeclaredPhases._fields):
        raise DecodingError(f'{TEMPERATURE_VARIABLE} must have {{"begin": …, "end": …}} or true as phases')
    checked_markers(phases.get("begin"), phases.get("end"))
    return DeclaredPhases(**phases)


def _declared_temperatures() -> dict[str, Any] | None:
    text = os.environ.get(TEMPERATURE_VARIABLE)
    return None if text is None else _parsed(TEMPERATURE_VARIABLE, text)


def declared_chunks() -> DeclaredChunks | None:
    """The chunk selection that this process's environment declares, if it does.

    Raises:
        DecodingError: as `checked_chunks`.
    """
    text = os.environ.get(CHUNKS_VARIABLE)
    return None if text is None else checked_chunks(_parsed(CHUNKS_VARIABLE, text))


def checked_chunks(settings: Any) -> DeclaredChunks:
    """Settings of chunk selection, from outside.

    Raises:
        DecodingError: no object of `DeclaredChunks`'s fields, or values that they cannot have.
    """
    fields = ", ".join(DeclaredChunks._fields)
    if not isinstance(settings, Mapping) or not set(settings) <= set(DeclaredChunks._fields):
        raise DecodingError(f"chunk selection is set by an object with {fields}, not {settings!r}")
    chunks = DeclaredChunks(**settings)
    if not isinstance(chunks.adapters, str | None):
        raise DecodingError(f"adapters must be a folder, a hub id, {EMBEDDED!r} or null, not {chunks.adapters!r}")
    return chunks._replace(kv_budget=checked_budget(chunks.kv_budget))


def checked_budget(value: Any) -> int:
    """A budget in tokens.

    Raises:
        DecodingError: no whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DecodingError(f"kv_budget must be a whole number of tokens above 0, not {value!r}")
    return value


@lru_cache(maxsize=8)
def _parsed(variable: str, text: str) -> dict[str, Any]:
    try:
        declared = json.loads(text)
    except ValueError as error:
        raise DecodingError(f"{variable} is no JSON: {error}") from error
    if not isinstance(declared, dict):
        raise DecodingError(f"{variable} must be a JSON object, not {text}")
    return declared
