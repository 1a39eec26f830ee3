"""Files of documents by format: text, JSON lines, JSON, CSV, TSV and Parquet, and gzip of these."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from decoding.errors import DecodingError
from decoding.style.text import one_line_end, prose, read_prose, read_text
from decoding.tokens import require_text

_NAMED = 3  # of the files left out of a folder


def read_documents(path: Path, field: str | None, join_lines: bool | None = None) -> list[str]:
    """The texts of a file, or of the .txt files of a folder.

    Args:
        path: which.
        field: the field that holds the text, in formats that have fields.
        join_lines: whether to join hard-wrapped lines; None as for `prose`, in files of text alone. What is not as one
            would expect is reported.

    Raises:
        DecodingError: nothing that can be read, an unknown format, or no such field.
    """
    if path.is_dir():
        if field is not None:
            raise DecodingError(f"{path} is a folder of texts: its files have no field {field!r}")
        return _read_folder(path, join_lines)
    suffix = _suffix(path)
    if suffix in _WITH_FIELDS:
        if field is None:
            raise DecodingError(f"{path} has fields: say with --field (or {path}#FIELD) which of them is the text")
        texts = _texts(path, field, _WITH_FIELDS[suffix](path))
        return [prose(text, True) if join_lines else text for text in texts]
    if field is not None:
        raise DecodingError(
            f"{path} is read as plain text and has no field {field!r}: known formats with fields are "
            f"{', '.join(sorted(_WITH_FIELDS))}, and .gz of these"
        )
    if suffix in _OTHER_FORMATS:
        raise DecodingError(
            f"{path} is no plain text ({suffix}): convert it to .txt, or to {', '.join(sorted(_WITH_FIELDS))}"
        )
    return [_read_prose(path, join_lines)]


def has_known_suffix(where: str) -> bool:
    """Whether a name is that of a file with text, or of one that should be."""
    return _suffix(Path(where)) in {".txt", *_WITH_FIELDS, *_OTHER_FORMATS}


_OTHER_FORMATS = frozenset(
    [".html", ".htm", ".xhtml", ".xml", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".ipynb", ".xlsx"]
    + [".arrow", ".feather", ".pkl", ".pt", ".bin", ".npy", ".npz", ".gguf"]
    + [".zip", ".7z", ".tar", ".bz2", ".xz", ".zst"]
)


def _read_prose(path: Path, join_lines: bool | None) -> str:
    found = read_prose(read_text(path), join_lines)
    if join_lines is None and found.is_joined:
        _report(f"joined the hard-wrapped lines of {path}: unwrap=False (--no-unwrap) keeps them")
    elif join_lines is None and found.is_wrapped:
        _report(f"{path} may have hard-wrapped lines, which were kept: unwrap=True (--unwrap) joins them")
    elif join_lines and not found.is_joined:
        _report(f"{path} has no hard-wrapped lines: it was left as it is")
    return found.text


def _report(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return (suffixes[:-1] or [""])[-1] if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _read_folder(folder: Path, join_lines: bool | None) -> list[str]:
    found, left_out = [], []
    for path in files_of(folder):
        if not is_text_file(path):
            left_out.append(f"{path.name} (no .txt file)")
            continue
        try:
            found.append(_read_prose(path, join_lines))
        except DecodingError as error:
            left_out.append(f"{path.name} ({str(error).removeprefix(f'{path} ')})")
    if not found:
        raise DecodingError(f"folder {folder} holds no .txt file that can be read{_named(left_out)}")
    if left_out:
        _report(f"of folder {folder}, {len(left_out)} files were left out{_named(left_out)}")
    return found


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, in their order, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def is_text_file(path: Path) -> bool:
    """Whether a file of a folder is read as one of its texts."""
    return _suffix(path) == ".txt"


def _named(names: list[str]) -> str:
    more = [] if len(names) <= _NAMED else [f"and {len(names) - _NAMED} more"]
    return ": " + ", ".join(names[:_NAMED] + more) if names else ""


Record = tuple[str, Any]  # where it stands, and what it is


def _texts(path: Path, field: str, records: Iterator[Record]) -> Iterator[str]:
    for where, record in records:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none: it is no object"
            raise DecodingError(f"{path}, {where}: no text field {field!r} (fields: {fields})")
        require_text(record[field], f"{path}, {where}: field {field!r}")
        yield one_line_end(record[field])


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DecodingError(f"{path}, line {number}: not JSON ({error})") from error


def _json(path: Path) -> Iterator[Record]:
    try:
        held = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DecodingError(f"{path} is not JSON ({error}); lines of JSON have the suffix .jsonl") from error
    if not isinstance(held, list):
        raise DecodingError(f"{path} must hold a list of objects, not one {type(held).__name__}")
    yield from ((f"item {number}", item) for number, item in enumerate(held, start=1))


def _separated(by: str) -> Callable[[Path], Iterator[Record]]:
    def records(path: Path) -> Iterator[Record]:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=by, strict=True)
        try:
            for number, record in enumerate(reader, start=1):
                yield f"row {number}", {key: value for key, value in record.items() if key is not None}
        except csv.Error as error:
            raise DecodingError(f"{path}, line {reader.line_num}: {error}") from error

    return records


def _parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DecodingError(f"{path} is a Parquet file: pip install pyarrow") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except (OSError, ArrowException) as error:
        raise DecodingError(f"{path} is no whole Parquet file: {error}") from error


_WITH_FIELDS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
