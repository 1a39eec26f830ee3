"""Where results are kept that need not be computed, fetched or converted again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The folder of all caches."""
    return platformdirs.user_cache_path("decoding-middleware")


def cache_file(folder: str, key: str, suffix: str) -> Path:
    """The file of one result.

    Args:
        folder: of all results of the kind.
        key: everything that the result depends on.
        suffix: of the file's name.
    """
    return cache_dir() / folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}"
