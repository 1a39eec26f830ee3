"""What a server offers, declared in the environment, which all of its processes share.

vLLM checks requests in the process that receives them and applies them in others, and gives the check no configuration.
So there are four variables in JSON: ``DECODING_STYLES``, an object from names to saved priors, or to objects like
`DeclaredStyle`, ``DECODING_TEMPERATURE``, one like `DeclaredSelector` that may have ``phases``, one like
`DeclaredPhases` (``"selector": false`` does without a selector), ``DECODING_CHUNKS``, one like `DeclaredChunks`, and
``DECODING_POLICY``, the arguments that requests have unless they say otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from chunkllm.paged.tables import local_blocks
from chunkllm.selection import DEFAULT_BUDGET, DEFAULT_LOCAL
from decoding.errors import DecodingError
from decoding.policy.values import AUTO, EMBEDDED, OF_STYLES, check_field
from decoding.style.settings import Mode
from decoding.style.source import StyleSource
from decoding.temperature.markers import checked_markers
from decoding.temperature.selector import Policy

STYLES_VARIABLE = "DECODING_STYLES"
TEMPERATURE_VARIABLE = "DECODING_TEMPERATURE"
CHUNKS_VARIABLE = "DECODING_CHUNKS"
POLICY_VARIABLE = "DECODING_POLICY"
STYLE_PROCESSOR = "decoding.vllm.processor:StyleLogitsProcessor"
TEMPERATURE_PROCESSOR = "decoding.vllm.processor:TemperatureLogitsProcessor"
CHUNK_PROCESSOR = "decoding.vllm.processor:ChunkLogitsProcessor"
CHUNKS_KEY = "chunkllm"  # in an engine's additional_config
BLOCK_SIZE = 32
PHASES = "phases"


class DeclaredStyle(NamedTuple):
    """A style that a server offers, and how it steers where a request does not say."""

    style: str  # as `StyleSource.parse` takes it
    said: tuple[tuple[str, Any], ...] = ()  # of `OF_STYLES`, by name; else it is as it is by itself

    def as_json(self) -> str | dict[str, Any]:
        """What the variable holds."""
        return {"style": self.style, **dict(self.said)} if self.said else self.style

    def parameters(self) -> dict[str, Any]:
        """`StylePrior`'s."""
        return {"lambda_" if name == "lambda" else name: value for name, value in self.said}

    def mode(self) -> Mode:
        """The mode that it has in an engine. Reads what was saved, once.

        Raises:
            DecodingError: nothing there, or damaged.
        """
        return dict(self.said).get("mode") or _saved_mode(self.style)


@lru_cache(maxsize=64)
def _saved_mode(style: str) -> Mode:
    source = StyleSource.parse(style)
    settings = source.saved().settings if source.kind in ("style", "hub") else None
    return "paper" if settings is None else settings.mode


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
    full_graphs: bool = False  # whether CUDA graphs may hold whole steps of single tokens


class Offer(NamedTuple):
    """What a server offers to requests."""

    styles: Mapping[str, DeclaredStyle]
    selector: DeclaredSelector | None
    has_temperatures: bool  # of any kind, beside vLLM's
    has_phases: bool
    has_chunks: bool


def offered() -> Offer:
    """What this process's environment declares.

    Raises:
        DecodingError: as the functions below.
    """
    return Offer(
        declared_styles(),
        declared_selector(),
        TEMPERATURE_VARIABLE in os.environ,
        declared_phases() is not None,
        declared_chunks() is not None,
    )


def declared_policy() -> Mapping[str, Any]:
    """The arguments that this process's environment declares for requests that do not have them.

    Raises:
        DecodingError: the variable is not a JSON object.
    """
    text = os.environ.get(POLICY_VARIABLE)
    return {} if text is None else _parsed(POLICY_VARIABLE, text)


def declared_styles() -> Mapping[str, DeclaredStyle]:
    """The styles that this process's environment declares, by name.

    Raises:
        DecodingError: the variable is not a JSON object of texts, or of objects of `DeclaredStyle`'s fields, or a
            value that a field cannot have.
    """
    return _styles_in(os.environ.get(STYLES_VARIABLE, "{}"))


@lru_cache(maxsize=8)
def _styles_in(text: str) -> Mapping[str, DeclaredStyle]:
    return {name: _style_in(name, value) for name, value in _parsed(STYLES_VARIABLE, text).items()}


def _style_in(name: str, value: Any) -> DeclaredStyle:
    if isinstance(value, str):
        return DeclaredStyle(value)
    known = ("style", *OF_STYLES)
    if not isinstance(value, Mapping) or not set(value) <= set(known) or "style" not in value:
        raise DecodingError(
            f'{STYLES_VARIABLE} must map names to saved priors, like {{"name": "path"}}, or to objects with '
            f"{', '.join(known)}"
        )
    try:
        for field, each in value.items():
            check_field(field, each)
    except DecodingError as error:
        raise DecodingError(f"{STYLES_VARIABLE}: style {name!r}: {error}") from error
    if value.get("lambda") == AUTO:
        raise DecodingError(f'{STYLES_VARIABLE}: style {name!r}: λ must be a number here, not "{AUTO}"')
    return DeclaredStyle(value["style"], tuple((field, each) for field, each in value.items() if field != "style"))


def declared_selector() -> DeclaredSelector | None:
    """The temperature selector that this process's environment declares, if it does.

    Raises:
        DecodingError: the variable is not a JSON object of `DeclaredSelector`'s fields.
    """
    declared = _declared_temperatures()
    if declared is None or declared.get("selector") is False:
        return None
    declared = {name: value for name, value in declared.items() if name != PHASES}
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
    phases = (_declared_temperatures() or {}).get(PHASES)
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


def asked_for(vllm_config: Any | None) -> DeclaredChunks | None:
    """What an engine's ``additional_config={"chunkllm": {…}}`` asks for, if it does.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        DecodingError: as `checked_chunks`.
    """
    additional = None if vllm_config is None else vllm_config.additional_config
    asked = additional.get(CHUNKS_KEY) if isinstance(additional, dict) else None
    return None if asked is None else checked_chunks(asked)


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
    if not isinstance(chunks.full_graphs, bool):
        raise DecodingError(f"full_graphs must be true or false, not {chunks.full_graphs!r}")
    return chunks._replace(kv_budget=checked_budget(chunks.kv_budget))


def checked_budget(value: Any, name: str = "kv_budget") -> int:
    """A budget in tokens.

    Raises:
        DecodingError: no whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DecodingError(f"{name} must be a whole number of tokens above 0, not {value!r}")
    return value


def checked_room(budget: int, block_size: int = BLOCK_SIZE) -> int:
    """A budget that leaves something to choose.

    Args:
        budget: in tokens.
        block_size: of the cache, in tokens. By default what `decoding.vllm.engine_args` sets: a request is checked
            where the engine's is not known.

    Raises:
        DecodingError: it does not, as some blocks are always read.
    """
    always = (local_blocks(DEFAULT_LOCAL, block_size) + 2) * block_size
    if budget < always + block_size:
        raise DecodingError(
            f"a kv_budget of {budget} tokens leaves nothing to choose: the first and the last blocks of {block_size} "
            f"tokens take {always}, so it must be {always + block_size} or more"
        )
    return budget


@lru_cache(maxsize=8)
def _parsed(variable: str, text: str) -> dict[str, Any]:
    try:
        declared = json.loads(text)
    except ValueError as error:
        raise DecodingError(f"{variable} is no JSON: {error}") from error
    if not isinstance(declared, dict):
        raise DecodingError(f"{variable} must be a JSON object, not {text}")
    return declared
