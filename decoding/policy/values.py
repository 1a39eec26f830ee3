"""What each field of a policy can be, checked in one place: of what users write, and of saved files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from typing import Any

from decoding.errors import DecodingError
from decoding.style.settings import Settings
from decoding.style.strength import checked_lambda
from decoding.temperature.processors import checked_temperature

AUTO = "auto"
EMBEDDED = "default"
"""How the adapters and the selector that the packages bring along are called, as in ``decoding serve``."""
GUARDS = ("plausibility", "max_js", "entropy_gate", "steer_stop")
OF_STYLES = ("lambda", "mode", *GUARDS)
# `ChunkSelection`'s keywords: what a value must be. It has one more, ``scorer``, which no file can hold.
_CHUNK_SETTINGS: dict[str, tuple[str, tuple[type, ...]]] = {
    "adapters": (f'a folder, a hub id or "{EMBEDDED}"', (str, PathLike)),
    **dict.fromkeys(("top_k", "budget", "local", "sinks", "max_chunk"), ("a whole number", (int,))),
    "retention": ("a number", (int, float)),
    **dict.fromkeys(("adaptive", "vote", "every_step", "offload", "verify"), ("True or False", (bool,))),
}


def check_field(name: str, value: Any) -> None:
    """Refuses what a field cannot be by itself. None, for what is left out, can be any.

    Args:
        name: as in files, one of `FIELDS`.
        value: what was given.

    Raises:
        DecodingError: says what it must be.
    """
    if value is not None:
        FIELDS[name](value)


def check_together(values: Mapping[str, Any]) -> None:
    """Refuses fields that go with another one that is not there.

    Args:
        values: by their names in files.

    Raises:
        DecodingError: as said.
    """
    given = {name for name, value in values.items() if value is not None}
    if "style" not in given and (alone := [name for name in OF_STYLES if name in given]):
        raise DecodingError(f"{', '.join(alone)} without a style: name one in style")
    if "think_temperature" in given and "temperature" not in given:
        raise DecodingError(f'think_temperature without the answer\'s: write temperature, a number or "{AUTO}"')
    if "selector" in given and values.get("temperature") != AUTO:
        raise DecodingError(f'a selector chooses the temperature: it goes with temperature="{AUTO}"')


def chunk_settings(chunks: Any) -> dict[str, Any]:
    """`ChunkSelection`'s keywords, those given; ``adapters`` as the text that names them.

    Raises:
        DecodingError: something else than True, a budget or a dict, or an unknown or unfit setting.
    """
    if chunks is True:
        return {}
    if type(chunks) is int:
        return {"budget": chunks}
    if not isinstance(chunks, Mapping):
        raise DecodingError(
            f"chunks must be True, a budget in tokens, or a dict of ChunkSelection's settings, not {chunks!r}; "
            "None is without"
        )
    given = {name: value for name, value in chunks.items() if value is not None}
    for name, value in given.items():
        if name not in _CHUNK_SETTINGS:
            raise DecodingError(f"chunks has no setting {name!r}: choose from {', '.join(_CHUNK_SETTINGS)}")
        what, types = _CHUNK_SETTINGS[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise DecodingError(f"{name} of chunks must be {what}, not {value!r}")
    return given | ({"adapters": str(given["adapters"])} if "adapters" in given else {})


def _check_name(field: str, what: str, value: Any) -> None:
    if not isinstance(value, str | PathLike) or not str(value).strip():
        raise DecodingError(f"{field} must be {what}, not {value!r}")


def _check_lambda(value: Any) -> None:
    if not (isinstance(value, str) and value == AUTO):
        checked_lambda(value, hint="")


def _check_temperature(value: Any) -> None:
    if not (isinstance(value, str) and value == AUTO):
        checked_temperature(value, hint=f'; it may also be "{AUTO}"; for greedy search, do_sample=False')


def _check_setting(name: str, value: Any) -> None:
    Settings(**{name: value})


FIELDS: dict[str, Callable[[Any], object]] = {
    "style": partial(_check_name, "style", "a registered name, a text file, a folder, a saved prior or a hub id"),
    "lambda": _check_lambda,
    **{name: partial(_check_setting, name) for name in ("mode", *GUARDS)},
    "temperature": _check_temperature,
    "think_temperature": partial(checked_temperature, name="think_temperature", hint=""),
    "selector": partial(_check_name, "selector", f'a folder, a hub id or "{EMBEDDED}"'),
    "chunks": chunk_settings,
}
"""By their names in files, what refuses unfit values."""
