"""Style corpora: text by name, file, folder or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from decoding.errors import DecodingError
from decoding.style.registered import registered_documents, registered_styles
from decoding.style.text import prose, read_text
from decoding.tokens import text_fingerprint


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
        spec: a registered name, a UTF-8 text file, a folder of .txt files, or a .jsonl file with one object a line.
            ``NAME=SPEC`` names it; ``FILE.jsonl#FIELD`` gives the field.
        field: the field that holds the text in a .jsonl file.

    Raises:
        DecodingError: nothing there, not text, blank, or without the field.
    """
    name, source, field = _parse_spec(spec, field)
    found = registered_documents(source)
    documents = [text for text in (_read_path(Path(source), field) if found is None else found) if text.strip()]
    if not documents:
        raise DecodingError(f"style corpus {source} holds no text")
    return Corpus(name, tuple(documents))


def split_name(spec: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; without a name, or if a file is called that, "" and the whole."""
    name, equals, source = spec.partition("=")
    return (name, source) if equals and not Path(spec).exists() else ("", spec)


def _parse_spec(spec: str, field: str | None) -> tuple[str, str, str | None]:
    name, source = split_name(spec)
    if not Path(source).exists() and "#" in source:
        source, _, field = source.rpartition("#")
    return name or Path(source).stem, source, field


def _read_path(path: Path, field: str | None) -> list[str]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DecodingError(f"folder {path} holds no .txt file")
        return [prose(read_text(file)) for file in files]
    if not path.is_file():
        raise DecodingError(
            f"no style {str(path)!r}: give a registered name ({', '.join(registered_styles())}), a text file, "
            "a folder of .txt files, a .jsonl file with its field, or a saved prior"
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(path, field)
    return [prose(read_text(path))]


def _read_json_lines(path: Path, field: str | None) -> list[str]:
    if field is None:
        raise DecodingError(f"{path} is a JSON-lines file: say with --field (or {path}#FIELD) which field is the text")
    documents = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DecodingError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(item, dict) or not isinstance(item.get(field), str):
            fields = ", ".join(item) if isinstance(item, dict) else "none: it is no object"
            raise DecodingError(f"{path}, line {number}: no text field {field!r} (fields: {fields})")
        documents.append(item[field])
    return documents


def require_distinct(names: Sequence[str]) -> None:
    """Refuses styles of one name.

    Raises:
        DecodingError: as said.
    """
    if len(set(names)) < len(names):
        raise DecodingError(f"two styles have one name ({', '.join(names)}): name them with NAME=SPEC")
