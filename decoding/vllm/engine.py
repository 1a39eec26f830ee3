"""What an engine is started with: its arguments, and what is declared in the environment of its processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from chunkllm.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from chunkllm.selection import DEFAULT_BUDGET
from decoding.errors import DecodingError
from decoding.files import exists
from decoding.hub import may_be_hub_id
from decoding.policy import Policy
from decoding.policy.values import EMBEDDED
from decoding.style.source import StyleSource
from decoding.temperature.abilities import SIZES
from decoding.temperature.files import CONFIG_FILE
from decoding.temperature.markers import checked_markers
from decoding.temperature.selector import Policy as SelectorPolicy
from decoding.vllm.declaration import (
    BLOCK_SIZE,
    CHUNK_PROCESSOR,
    CHUNKS_KEY,
    CHUNKS_VARIABLE,
    PHASES,
    POLICY_VARIABLE,
    STYLE_PROCESSOR,
    STYLES_VARIABLE,
    TEMPERATURE_PROCESSOR,
    TEMPERATURE_VARIABLE,
    DeclaredChunks,
    DeclaredPhases,
    DeclaredSelector,
    DeclaredStyle,
    checked_chunks,
)
from decoding.vllm.metrics import NONE
from decoding.vllm.policies import ServedPolicy, opened_policy
from decoding.vllm.requests import OFF

_COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def engine_args(
    styles: Mapping[str, str | PathLike] | None = None,
    *,
    policy: Policy | str | PathLike | None = None,
    model: str | None = None,
    temperature: bool | str | PathLike | None = None,
    model_size: str | None = None,
    temperature_policy: SelectorPolicy | None = None,
    phases: bool | tuple[str, str] = False,
    chunk_adapters: str | PathLike | None = None,
    kv_budget: int | None = None,
    full_graphs: bool = False,
) -> dict[str, Any]:
    """Arguments that give ``vllm.LLM`` or ``AsyncEngineArgs`` style priors, temperatures, chunk selection.

    Declares them in the environment, from which the engine's processes are started, in place of what an earlier call
    declared. For chunk selection, the arguments also set the size of the cache's blocks, and on CUDA the attention
    backend. A policy's temperature also sets vLLM's ``override_generation_config``.

    Examples:
        >>> llm = LLM("path-or-hub-id", **engine_args({"king-james": "king-james.safetensors"}, temperature=True))
        >>> llm.generate(prompts, SamplingParams(extra_args={"style": "king-james", "lambda": 0.1}))
        >>> llm.generate(prompts, SamplingParams(temperature=1, extra_args={"temperature": "auto"}))
        >>> llm = LLM("path-or-hub-id", **engine_args(policy="my-policy"))
        >>> llm.generate(prompts)  # as the policy says
        >>> llm.generate(prompts, SamplingParams(extra_args={"lambda": 0.1, "max_js": "off"}))  # the rest as it says
        >>> llm = LLM("path-or-hub-id", **engine_args(phases=True))
        >>> phases = {"think_temperature": 1.0, "answer_temperature": 0.3}
        >>> llm.generate(prompts, SamplingParams(temperature=1, extra_args=phases))
        >>> llm = LLM("path-or-hub-id", **engine_args(chunk_adapters="my-adapters", kv_budget=2048))
        >>> llm.generate(prompts, SamplingParams(extra_args={"kv_budget": 4096}))  # or "full"

    Args:
        styles: a style for every name, as `StylePrior` takes it: a file of ``decoding style train``, a folder of
            `StylePrior.save_pretrained` (its settings apply, and its λ where a request gives none), a hub id, or a
            text, from which the engine trains a prior once.
        policy: what every request has unless it says otherwise: a `Policy`, a folder of `Policy.save_pretrained`, or a
            hub id. Its style is served besides ``styles``, by its own name.
        model: the engine's, a folder or a hub id, for a policy whose style is measured with it: mode "ratio" of a text,
            or λ="auto". Loaded by transformers for that, in a process that ends then.
        temperature: the selector: True for the embedded one, a folder of `TemperatureSelector.save_pretrained`, or a
            hub id.
        model_size: "small", "medium" or "large", as for `TemperatureSelector.select`; by default by the number of the
            model's parameters.
        temperature_policy: the selector's: "ability" (the default) or "curve".
        phases: requests may have one temperature for thinking and one for answering. True to go by the model's own
            markers of thinking, as `PhaseTemperature` does; else the two texts that begin and end it.
        chunk_adapters: select chunks, with the adapters or calibration of a folder or hub id; "default" for embedded
            adapters.
        kv_budget: select chunks, with or without adapters, where a request has more tokens than these, 2048 by default.
        full_graphs: of chunk selection, have CUDA graphs hold whole steps of single tokens, and not only what lies
            between attentions. Not tried on a GPU yet.

    Raises:
        DecodingError: a name without a style, no policy, selector or adapters there, an unknown size, policy or budget,
            phases that are no two texts, full graphs without chunk selection, or what the policy and another argument
            both say.
    """
    served = ServedPolicy() if policy is None else opened_policy(policy, model)
    priors = _styles(styles, served)
    selector = _selector(_one_of("temperature", temperature or None, served.selector), model_size, temperature_policy)
    temperatures = _temperatures(selector, _phases(phases or served.has_phases), served)
    adapters = _one_of("chunk_adapters", chunk_adapters, served.adapters)
    chunks = _chunks(adapters, _one_of("kv_budget", kv_budget, served.budget), full_graphs)
    _declare(STYLES_VARIABLE, None if priors is None else {name: each.as_json() for name, each in priors.items()})
    _declare(TEMPERATURE_VARIABLE, temperatures)
    _declare(CHUNKS_VARIABLE, None if chunks is None else chunks._asdict())
    _declare(POLICY_VARIABLE, served.arguments or None)
    declared: dict[str, Any] = {STYLE_PROCESSOR: priors, TEMPERATURE_PROCESSOR: temperatures, CHUNK_PROCESSOR: chunks}
    engine: dict[str, Any] = {"logits_processors": [name for name, value in declared.items() if value is not None]}
    if served.sampling:
        engine["override_generation_config"] = served.sampling
    return engine if chunks is None else engine | _engine_of(chunks)


def _one_of(name: str, given: Any, of_policy: Any) -> Any:
    """What an argument or the policy says.

    Raises:
        DecodingError: both do.
    """
    if given is not None and of_policy is not None:
        raise DecodingError(f"{name} beside a policy that says the same thing: leave one of them out")
    return of_policy if given is None else given


def _styles(styles: Mapping[str, str | PathLike] | None, served: ServedPolicy) -> dict[str, DeclaredStyle] | None:
    named: dict[str, DeclaredStyle] = {name: DeclaredStyle(str(spec)) for name, spec in (styles or {}).items()}
    if served.style is not None:
        name, style = served.style
        if name in named:
            raise DecodingError(f"the policy's style is called {name!r}, as another one is: give that another name")
        named[name] = style
    if styles is None and not named:
        return None
    return {name: each._replace(style=_style(name, each.style)) for name, each in named.items()}


def _engine_of(chunks: DeclaredChunks) -> dict[str, Any]:
    engine = {"additional_config": {CHUNKS_KEY: chunks._asdict()}, "block_size": BLOCK_SIZE}
    return engine | {"attention_backend": "CUSTOM"} if torch.cuda.is_available() else engine


def _chunks(adapters: str | PathLike | None, budget: int | None, full_graphs: bool) -> DeclaredChunks | None:
    if adapters is None and budget is None:
        if full_graphs:
            raise DecodingError("full_graphs is chunk selection's: ask for that with kv_budget or chunk_adapters")
        return None
    source = None if adapters is None else _saved_adapters(adapters)
    budget = DEFAULT_BUDGET if budget is None else budget
    return checked_chunks({"adapters": source, "kv_budget": budget, "full_graphs": full_graphs})


def _saved_adapters(source: str | PathLike) -> str:
    if source == EMBEDDED:
        return EMBEDDED
    if (Path(source) / ADAPTER_CONFIG_FILE).is_file():
        return str(Path(source).resolve())
    if not may_be_hub_id(str(source)):
        raise DecodingError(f"no adapters at {source}: make some with `decoding chunk train`")
    return str(source)


def _style(name: str, spec: str) -> str:
    if name in (OFF, NONE):
        raise DecodingError(f'a style cannot be called "{name}", which says that a request has none')
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
    temperature: Literal[True] | str | PathLike | None, model_size: str | None, policy: SelectorPolicy | None
) -> DeclaredSelector | None:
    if temperature is None:
        if model_size is not None or policy is not None:
            raise DecodingError(
                "model_size and temperature_policy are the temperature selector's: ask for one with temperature"
            )
        return None
    for what, value, known in (
        ("model size", model_size, SIZES),
        ("temperature policy", policy, get_args(SelectorPolicy)),
    ):
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


def _temperatures(
    selector: DeclaredSelector | None, phases: DeclaredPhases | None, served: ServedPolicy
) -> dict[str, Any] | None:
    """What the variable holds."""
    if selector is None and phases is None and not served.sampling:
        return None
    chosen = {"selector": False} if selector is None else selector._asdict()
    return chosen if phases is None else {**chosen, PHASES: phases._asdict()}


def _declare(variable: str, value: Mapping[str, Any] | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
        return
    os.environ[variable] = json.dumps(value, ensure_ascii=False)
    copied = os.environ.get(_COPIED_BY_RAY, "")
    if variable not in copied.split(","):  # Ray's workers on other machines get only what is listed
        os.environ[_COPIED_BY_RAY] = ",".join(filter(None, (copied, variable)))
