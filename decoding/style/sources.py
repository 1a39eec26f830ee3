"""Texts of many files, divided among the tasks of a training."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from decoding.errors import DecodingError
from decoding.style.opening import format_of, is_address, is_packed, is_web_address
from decoding.style.readers import check_format, has_fields, is_wanted, of_folder, what_is_wanted
from decoding.style.source import StyleSource

_TIMES = 8  # the memory that a text takes while it is read, in its bytes
_UNPACKED = 4  # bytes of text in a packed one


@dataclass(frozen=True)
class Piece:
    """Texts that are read from one place.

    Attributes:
        source: a registered name, or one file.
        state: what changes when the file does.
        size: of the file, in bytes; 0 if it is not known.
    """

    source: StyleSource
    state: str
    size: int

    @property
    def is_one_text(self) -> bool:
        """Whether the file is one."""
        return self.source.kind == "text" and not has_fields(self.source.where)

    def check_memory(self, memory: int) -> None:
        """Refuses a file that a task could not hold, if it is one that is read whole.

        Raises:
            DecodingError: as said.
        """
        where = self.source.where
        if self.source.kind == "registered" or (has_fields(where) and format_of(where) != ".json"):
            return
        size = self.size * (_UNPACKED if is_packed(where) else 1)
        if size * _TIMES > memory:
            raise DecodingError(
                f"{where} is read whole, and its {self.size / 1e9:.2f} GB would not fit into --memory: give more, "
                "divide the file, or make lines of JSON (.jsonl) of it"
            )


@dataclass(frozen=True)
class Pieces:
    """The places of all texts of a training.

    Attributes:
        pieces: in their order.
        tasks: among which they are divided: by files or, where there are more tasks than these, by their texts.
    """

    pieces: tuple[Piece, ...]
    tasks: int

    @classmethod
    def of(
        cls, specs: Sequence[str | StyleSource], tasks: int, field: str | None = None, *, unwrap: bool | None = None
    ) -> Pieces:
        """Finds the files.

        Args:
            specs: as for `StyleSource.parse`; addresses may be those of folders, and have wildcards.
            tasks: how many.
            field: of texts, in folders and files that have fields.
            unwrap: as `StyleSource` has it.

        Raises:
            DecodingError: what is no text, or nothing there.
        """
        sources = [StyleSource.parse(spec, field, unwrap=unwrap) for spec in specs]
        return cls(tuple(piece for source in sources for piece in _pieces(source)), tasks)

    def texts(self, task: int) -> Iterator[str]:
        """Those of a task."""
        count = len(self.pieces)
        if count >= self.tasks:
            for piece in self.pieces[task :: self.tasks]:
                yield from piece.source.texts()
            return
        piece, place = self.pieces[task % count], task // count
        sharers = len(range(task % count, self.tasks, count))
        if piece.is_one_text and place:
            return
        for number, text in enumerate(piece.source.texts()):
            if number % sharers == place:
                yield text

    @property
    def fingerprint(self) -> str:
        """What tells these texts from others, without reading them."""
        about = [
            [each.source.where, each.source.field, each.source.unwrap, each.state, each.size] for each in self.pieces
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _pieces(source: StyleSource) -> list[Piece]:
    source.require_text()
    if source.kind == "registered":
        return [Piece(source, "", 0)]
    return _at_address(source) if is_address(source.where) else _here(source)


def _here(source: StyleSource) -> list[Piece]:
    path = Path(source.where)
    found = of_folder(path, source.field)[0] if path.is_dir() else [path]
    if not found:
        raise _nothing(source)
    pieces = []
    for each in found:
        check_format(each, source.field)
        about = each.stat()
        pieces.append(Piece(_one_of(source, str(each.absolute())), str(about.st_mtime_ns), about.st_size))
    return pieces


def _at_address(source: StyleSource) -> list[Piece]:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(source.where)
        found = _listed(system, path, source)
        pieces = []
        for each in found:
            where = source.where if each == path else system.unstrip_protocol(each)
            size = int(system.info(each).get("size") or 0)
            check_format(where, source.field)
            pieces.append(Piece(_one_of(source, where), system.ukey(each), size))
    except DecodingError:
        raise
    except Exception as error:  # each file system raises what it likes
        raise DecodingError(f"cannot read {source.where}: {error or type(error).__name__}") from error
    if not pieces:
        raise _nothing(source)
    return pieces


def _listed(system: Any, path: str, source: StyleSource) -> list[str]:
    """The files that an address means."""
    if is_web_address(path):
        return [path]
    if has_magic(path):
        fixed = re.split(r"[*?[]", path)[0]
        return [each for each in sorted(system.glob(path)) if not _is_hidden(each, fixed)]
    if not system.isdir(path):
        return [path]
    files = [each for each in sorted(system.find(path)) if not _is_hidden(each, path)]
    return [each for each in files if is_wanted(each, source.field)]


def _is_hidden(path: str, below: str) -> bool:
    return any(part.startswith(".") for part in path[len(below) :].split("/"))


def _one_of(source: StyleSource, where: str) -> StyleSource:
    return StyleSource(source.name, "text", where, source.field if has_fields(where) else None, source.unwrap)


def _nothing(source: StyleSource) -> DecodingError:
    wanted = what_is_wanted(source.field)
    return DecodingError(f"{source.where} holds no {wanted}: name files, or say with --field which field is the text")
