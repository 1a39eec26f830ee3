"""Packages that carry data, found without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from decoding.errors import DecodingError


def require_package(name: str, install: str) -> Path:
    """The folder of a package that carries data.

    Raises:
        DecodingError: it is not installed; ``install`` says what to do.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DecodingError(f"this needs the package {name}: {install}")
    return Path(spec.origin).parent
