"""Libraries of extras, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from decoding.errors import DecodingError


def required(module: str, extra: str = "tasks") -> Any:
    """A module that an extra brings.

    Raises:
        DecodingError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DecodingError(f"this needs more packages: pip install decoding-middleware[{extra}] ({error})") from error
