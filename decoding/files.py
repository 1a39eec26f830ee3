"""Checks of places to read from and to write to, before anything is computed."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path

from decoding.errors import DecodingError


def exists(path: str | PathLike) -> bool:
    """Whether there is a file or folder. What cannot be a path, such as a text, is none."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def require_writable(path: Path) -> None:
    """Refuses a file or folder that could not be made, by trying its nearest existing parent.

    Raises:
        DecodingError: as said.
    """
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=path if path.is_dir() else existing).close()
    except OSError as error:
        raise DecodingError(f"cannot write to {path} ({error.strerror}): choose another --out") from error
