"""Files of documents by format: text, JSON lines, JSON, CSV, TSV and Parquet, packed or not, here or elsewhere."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from decoding.errors import DecodingError
from decoding.style.opening import PACKED, format_of, is_address, one_line_end, opened, read_lines, read_text
from decoding.style.text import prose, read_prose
from decoding.tokens import require_text

_NAMED = 3  # of the files left out of a folder


def read_documents(where: str | PathLike, field: str | None, join_lines: bool | None = None) -> Iterator[str]:
    """The texts of a file, or of a folder: of its .txt files or, with a field, of its files that have fields.

    Args:
        where: a path, or the address of a file, as fsspec knows them.
        field: the field that holds the text, in formats that have fields.
        join_lines: whether to join hard-wrapped lines; None as for `prose`, in files of text alone. What is not as one
            would expect is reported.

    Raises:
        DecodingError: nothing that can be read, an unknown format, or no such field.
    """
    if not is_address(where) and Path(where).is_dir():
        return _read_folder(Path(where), field, join_lines)
    check_format(where, field)
    if not has_fields(where):
        return iter([_read_prose(where, join_lines)])
    texts = _texts(where, str(field), _WITH_FIELDS[format_of(where)](where))
    return (prose(text, True) if join_lines else text for text in texts)


def has_fields(where: str | PathLike) -> bool:
    """Whether a file's texts stand in a field; otherwise the file is one text."""
    return format_of(where) in _WITH_FIELDS


def check_format(where: str | PathLike, field: str | None) -> None:
    """Refuses a file of an unknown format, and one whose field is not known.

    Raises:
        DecodingError: as said.
    """
    suffix, known = format_of(where), ", ".join(sorted(_WITH_FIELDS))
    if suffix in _WITH_FIELDS:
        if field is None:
            raise DecodingError(f"{where} has fields: say with --field (or {where}#FIELD) which of them is the text")
    elif field is not None:
        raise DecodingError(
            f"{where} is read as plain text and has no field {field!r}: known formats with fields are {known}, "
            f"and {', '.join(PACKED)} of these"
        )
    elif suffix in _OTHER_FORMATS:
        raise DecodingError(f"{where} is no plain text ({suffix}): convert it to .txt, or to {known}")


def has_known_suffix(where: str) -> bool:
    """Whether a name is that of a file with text, or of one that should be."""
    return format_of(where) in {".txt", *_WITH_FIELDS, *_OTHER_FORMATS}


_OTHER_FORMATS = frozenset(
    [".html", ".htm", ".xhtml", ".xml", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".epub", ".mobi", ".ipynb", ".xlsx"]
    + [".arrow", ".feather", ".pkl", ".pt", ".bin", ".npy", ".npz", ".gguf"]
    + [".zip", ".7z", ".tar", ".tgz"]
)


def _read_prose(where: str | PathLike, join_lines: bool | None) -> str:
    found = read_prose(read_text(where), join_lines)
    if join_lines is None and found.is_joined:
        _report(f"joined the hard-wrapped lines of {where}: unwrap=False (--no-unwrap) keeps them")
    elif join_lines is None and found.is_wrapped:
        _report(f"{where} may have hard-wrapped lines, which were kept: unwrap=True (--unwrap) joins them")
    elif join_lines and not found.is_joined:
        _report(f"{where} has no hard-wrapped lines: it was left as it is")
    return found.text


def _report(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _read_folder(folder: Path, field: str | None, join_lines: bool | None) -> Iterator[str]:
    found, left_out = of_folder(folder, field)
    read = 0
    for path in found:
        try:
            for text in read_documents(path, field, join_lines):
                yield text
                read += 1
        except DecodingError as error:
            if field is not None:
                raise
            left_out.append(f"{path.name} ({str(error).removeprefix(f'{path} ')})")
    if not read:
        raise DecodingError(f"folder {folder} holds no {what_is_wanted(field)} that can be read{_named(left_out)}")
    if left_out:
        _report(f"of folder {folder}, {len(left_out)} files were left out{_named(left_out)}")


def of_folder(folder: Path, field: str | None) -> tuple[list[Path], list[str]]:
    """The files of a folder whose texts are wanted, and what is left out and why."""
    all_ = files_of(folder)
    left_out = [f"{path.name} (no {what_is_wanted(field)})" for path in all_ if not is_wanted(path, field)]
    return [path for path in all_ if is_wanted(path, field)], left_out


def is_wanted(where: str | PathLike, field: str | None) -> bool:
    """Whether a file of a folder has texts: in this field, or as one of its .txt files."""
    return has_fields(where) if field is not None else is_text_file(where)


def what_is_wanted(field: str | None) -> str:
    """Such files, in words."""
    return ".txt file" if field is None else "file with fields"


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, in their order, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def is_text_file(path: str | PathLike) -> bool:
    """Whether a file of a folder is read as one of its texts."""
    return format_of(path) == ".txt"


def _named(names: list[str]) -> str:
    more = [] if len(names) <= _NAMED else [f"and {len(names) - _NAMED} more"]
    return ": " + ", ".join(names[:_NAMED] + more) if names else ""


Record = tuple[str, Any]  # where it stands, and what it is


def _texts(where: str | PathLike, field: str, records: Iterator[Record]) -> Iterator[str]:
    for place, record in records:
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none: it is no object"
            raise DecodingError(f"{where}, {place}: no text field {field!r} (fields: {fields})")
        require_text(record[field], f"{where}, {place}: field {field!r}")
        yield one_line_end(record[field])


def _json_lines(where: str | PathLike) -> Iterator[Record]:
    for number, line in enumerate(read_lines(where), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DecodingError(f"{where}, line {number}: not JSON ({error})") from error


def _json(where: str | PathLike) -> Iterator[Record]:
    text = read_text(where)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodingError(f"{where} is not JSON ({error}); lines of JSON have the suffix .jsonl") from error
    if not isinstance(held, list):
        raise DecodingError(f"{where} must hold a list of objects, not one {type(held).__name__}")
    yield from ((f"item {number}", item) for number, item in enumerate(held, start=1))


def _separated(by: str) -> Callable[[str | PathLike], Iterator[Record]]:
    def records(where: str | PathLike) -> Iterator[Record]:
        lines = (f"{line}\n" for line in read_lines(where))
        reader = csv.DictReader(lines, delimiter=by, strict=True)
        try:
            for number, record in enumerate(reader, start=1):
                yield f"row {number}", {key: value for key, value in record.items() if key is not None}
        except csv.Error as error:
            raise DecodingError(f"{where}, line {reader.line_num}: {error}") from error

    return records


def _parquet(where: str | PathLike) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DecodingError(f"{where} is a Parquet file: pip install pyarrow") from error
    number = 0
    with opened(where) as file:
        try:
            whole = file if file.seekable() else io.BytesIO(file.read())
            for batch in ParquetFile(whole).iter_batches(batch_size=_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
        except (OSError, ArrowException) as error:
            raise DecodingError(f"{where} is no whole Parquet file: {error}") from error


_ROWS = 1 << 10  # of a Parquet file that are held
_WITH_FIELDS: dict[str, Callable[[str | PathLike], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
