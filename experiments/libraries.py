"""Libraries of the ``tasks`` extra, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from decoding.errors import DecodingError


def required(module: str) -> Any:
    """A module.

    Raises:
        DecodingError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DecodingError(f"scoring needs more packages: pip install decoding-middleware[tasks] ({error})") from error
