"""Values that are kept on disk, so that they need not be computed, fetched or converted again.

Best effort: what cannot be read is made again, what cannot be written is used all the same. Files appear whole or not
at all, and are as readable for others as the umask says, so several processes and users can share the folder.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, TypeVar

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from ngram import NGramError
from ngram.storage import umask, write_atomically

V = TypeVar("V")
DAMAGED = (ValueError, KeyError, IndexError, TypeError, SafetensorError)
"""What reading a damaged file raises."""


def cache_dir() -> Path:
    """The folder of all caches."""
    return platformdirs.user_cache_path("decoding-middleware")


@dataclass(frozen=True)
class Key:
    """All that a value depends on: the fields of a subclass, values of JSON.

    Attributes:
        folder: of all values of the kind.
        suffix: of their files' names.
    """

    folder: ClassVar[str]
    suffix: ClassVar[str]

    @property
    def path(self) -> Path:
        """The value's file."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_dir() / self.folder / f"{digest[:32]}{self.suffix}"


def kept(key: Key, make: Callable[[], V], load: Callable[[bytes], V], dump: Callable[[V], bytes]) -> V:
    """The value of a key: read, or made and kept.

    Args:
        key: what it depends on.
        make: makes it.
        load: reads a file's content; raises one of `DAMAGED` if that will not do.
        dump: a file's content.
    """
    with suppress(OSError, *DAMAGED):
        return load(key.path.read_bytes())
    value = make()
    try:
        write_atomically(key.path, dump(value))
    except NGramError as error:
        _say_unwritable(str(error))
    return value


def kept_file(path: Path, make: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """A file or folder that others open by its path; in a folder of this process's where the cache cannot be written.

    Args:
        path: where it is kept.
        make: makes it at a path.
        is_whole: whether what is there will do.
    """
    if is_whole(path):
        return path
    try:
        make(path)
    except (OSError, NGramError) as error:
        _say_unwritable(str(error))
        path = _temporary_folder() / path.name
        if not is_whole(path):
            make(path)
    return path


def kept_folder(path: Path, make: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> Path:
    """`kept_file`, of a folder: one process makes it, and others that want it wait.

    Args:
        path: where it is kept.
        make: fills a folder.
        is_whole: whether what is there will do.
    """

    def make_once(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            if not is_whole(path):
                _put_whole(path, make)

    return kept_file(path, make_once, is_whole)


def _put_whole(path: Path, make: Callable[[Path], None]) -> None:
    partial = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        make(Path(partial))
        os.chmod(partial, 0o777 & ~umask())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="decoding-middleware-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _say_unwritable(why: str) -> None:
    """Warns, once for each folder in a process, that nothing can be kept."""
    if (folder := cache_dir()) not in _warned_of:
        _warned_of.add(folder)
        advice = "set XDG_CACHE_HOME to a folder that can be written"
        warnings.warn(f"nothing can be kept in {folder} ({why}): {advice}", stacklevel=3)


_warned_of: set[Path] = set()
