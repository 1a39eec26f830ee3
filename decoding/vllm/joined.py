"""Large priors of an engine, joined once into a file, so that all processes of a machine read the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from decoding.cache import Key, kept_folder
from decoding.style import files
from decoding.vllm.declaration import DeclaredStyle
from ngram import NGramError
from ngram.layout import join
from ngram.storage import map_tables, save_tables
from ngram.tables import Shape, Tables

_FILE = "tables.safetensors"


@dataclass(frozen=True)
class Joined(Key):
    """What is joined: how styles are declared, the files that they are read from, and for how many columns."""

    folder: ClassVar[str] = "joined"
    suffix: ClassVar[str] = ""

    styles: list[list[Any]]
    width: int

    @classmethod
    def of(cls, declared: Mapping[str, DeclaredStyle], sources: Sequence[str], width: int) -> Joined | None:
        """None where they are as well joined in memory: one alone, small ones, and those that are not files here."""
        paths = list(map(Path, sources))
        if len(paths) < 2 or not all(path.exists() for path in paths):
            return None
        held = [sorted(each for each in (path, *path.rglob("*")) if each.is_file()) for path in paths]
        if sum(each.stat().st_size for each in sum(held, [])) < files.MAPPED:
            return None
        states = [[[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in some] for some in held]
        return cls([[each._asdict(), state] for each, state in zip(declared.values(), states, strict=True)], width)

    def tables(self, shapes: Sequence[Shape], priors: Iterable[Tables], width: int) -> Tables:
        """As `ngram.layout.join`, from the file; made first, if it is not there."""

        def make(folder: Path) -> None:
            save_tables(folder / _FILE, join(shapes, priors, width))

        return map_tables(kept_folder(self.path, make, _opens) / _FILE)


def _opens(folder: Path) -> bool:
    try:
        map_tables(folder / _FILE)
    except NGramError:
        return False
    return True
