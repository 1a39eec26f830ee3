"""Style corpora: texts by name, file or folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from decoding.errors import DecodingError
from decoding.files import exists
from decoding.style.readers import read_documents
from decoding.style.registered import registered_documents, registered_styles
from decoding.tokens import text_fingerprint

_SHOWN = 80  # characters of what is no path


@dataclass(frozen=True)
class Corpus:
    """A body of text in one style.

    Attributes:
        name: how tables and pictures call it.
        documents: its texts, none of them blank.
    """

    name: str
    documents: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the text."""
        return text_fingerprint(self.documents)


def load_corpus(spec: str, field: str | None = None) -> Corpus:
    """Reads a style corpus.

    Args:
        spec: a registered name, a file, or a folder of .txt files. A file is text (UTF-8, or UTF-16 with its mark), or
            by its suffix JSON lines, JSON, CSV, TSV or Parquet; each also as .gz. ``NAME=SPEC`` names it;
            ``FILE.jsonl#FIELD`` gives the field.
        field: the field that holds the text, in a file that has fields.

    Raises:
        DecodingError: nothing there, not text, blank, without the field, or a field of what has none.
    """
    name, source, asked = _parse_spec(spec)
    found = registered_documents(source)
    if found is None:
        found = read_documents(_existing(source), asked or field)
    elif asked is not None:
        raise DecodingError(f"style {source} is a text and has no field {asked!r}")
    documents = [text for text in found if text.strip()]
    if not documents:
        raise DecodingError(f"style corpus {source} holds no text")
    return Corpus(name, tuple(documents))


def split_name(spec: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; without a name, or if a file is called that, "" and the whole."""
    name, equals, source = spec.partition("=")
    return (name, source) if equals and not exists(spec) else ("", spec)


def _parse_spec(spec: str) -> tuple[str, str, str | None]:
    """A style's name, where its text is, and the field that is asked for."""
    name, source = split_name(spec)
    field = None
    if not exists(source) and "#" in source:
        source, _, field = source.rpartition("#")
    return name or Path(source.removesuffix(".gz")).stem, source, field


def _existing(source: str) -> Path:
    if not exists(source):
        shown = source if len(source) <= _SHOWN else f"{source[:_SHOWN]}…"
        raise DecodingError(
            f"no style {shown!r}: give a registered name ({', '.join(registered_styles())}), a text file, a folder of "
            "text files, a file with its field (FILE.jsonl#FIELD), or a saved prior; a text itself goes into a file"
        )
    return Path(source)


def require_distinct(names: Sequence[str]) -> None:
    """Refuses styles of one name.

    Raises:
        DecodingError: as said.
    """
    if len(set(names)) < len(names):
        raise DecodingError(f"two styles have one name ({', '.join(names)}): name them with NAME=SPEC")
