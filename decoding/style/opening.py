"""Files to read, here or at an address, packed or not: whole, line by line, or as bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from decoding.errors import DecodingError

_HEAD = 1 << 13  # bytes in which a file shows what it is
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PLAIN = "utf-8-sig"
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"{\\rtf", b"%pdf-")
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Endings of packed files. What counts is how a file begins."""


def is_address(where: str | PathLike) -> bool:
    """Whether this is no path, but what fsspec opens, such as ``s3://bucket/file``."""
    return "://" in str(where)


@contextmanager
def opened(where: str | PathLike) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is packed by gzip, bzip2, xz or Zstandard.

    Args:
        where: a path, or an address that fsspec knows.

    Raises:
        DecodingError: it cannot be read, or needs a package that is not installed.
    """
    try:
        with _raw(where) as file:
            yield _unpacked(io.BufferedReader(file, _HEAD), where)
    except (DecodingError, UnicodeDecodeError):
        raise
    except _errors_of(where) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodingError(f"cannot read {where}: {said}") from error


def _errors_of(where: str | PathLike) -> tuple[type[Exception], ...]:
    """What reading may raise: at an address each file system what it likes."""
    return (Exception,) if is_address(where) else (OSError, EOFError, zlib.error, lzma.LZMAError)


def _raw(where: str | PathLike) -> Any:
    if not is_address(where):
        return io.FileIO(where)
    import fsspec

    return fsspec.open(str(where), "rb").open()


def _unpacked(file: io.BufferedReader, where: str | PathLike) -> BinaryIO:
    head = file.peek(_HEAD)
    unpack = next((unpack for sign, unpack in _PACKINGS.items() if head.startswith(sign)), None)
    if unpack is None:
        return file
    try:
        return io.BufferedReader(unpack(file), _HEAD)
    except ImportError as error:
        raise DecodingError(f"{where} is packed by Zstandard: pip install zstandard") from error


class _Zstandard(io.RawIOBase):
    """Unpacks one frame after the other, and notices one that is cut off: the package's own reader does not.

    Args:
        file: to read from.
    """

    def __init__(self, file: BinaryIO):
        import zstandard

        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._packed = self._held = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase` has it."""
        while not self._held:
            packed = self._packed or self._file.read(_HEAD)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._unpack(packed)
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def _unpack(self, packed: bytes) -> None:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._held, self._packed = self._frame.decompress(packed), b""
        except self._zstandard.ZstdError as error:
            raise OSError(str(error)) from error
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None


_PACKINGS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _Zstandard,
}


def read_text(where: str | PathLike) -> str:
    """A file's text, with \\n alone at the ends of lines.

    It must be UTF-8, or begin with the mark of UTF-16 or UTF-32.

    Raises:
        DecodingError: no such file, a binary one, one with markup, one in another encoding, or a blank one.
    """
    with opened(where) as file:
        content = file.read()
    encoding = _encoding(content[:_HEAD], where)
    if encoding == _PLAIN and b"\0" in content:
        raise _binary(where)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _other_encoding(where, encoding, f"byte {error.start}") from error
    if not text.strip():
        raise _blank(where)
    return one_line_end(text)


def read_lines(where: str | PathLike) -> Iterator[str]:
    """The lines of `read_text`, of a file that is not held whole.

    Raises:
        DecodingError: as there, when the reading comes to it.
    """
    number, is_blank = 0, True
    with opened(where) as file:
        encoding = _encoding(file.peek(_HEAD)[:_HEAD], where)  # type: ignore[attr-defined]
        try:
            for line in io.TextIOWrapper(file, encoding):
                number += 1
                if encoding == _PLAIN and "\0" in line:
                    raise _binary(where)
                is_blank = is_blank and not line.strip()
                yield line.removesuffix("\n")
        except UnicodeDecodeError as error:
            raise _other_encoding(where, encoding, f"behind line {number}") from error
    if is_blank:
        raise _blank(where)


def _encoding(head: bytes, where: str | PathLike) -> str:
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:14].lower().startswith(_MARKUP):
        raise DecodingError(f"{where} is HTML, XML, RTF or PDF, not plain text: convert it to text first")
    return next((name for mark, name in _MARKS if head.startswith(mark)), _PLAIN)


def _binary(where: str | PathLike) -> DecodingError:
    return DecodingError(f"{where} is a binary file, or UTF-16 without its mark: convert it to UTF-8 text")


def _other_encoding(where: str | PathLike, encoding: str, place: str) -> DecodingError:
    name = encoding.removesuffix("-sig").upper()
    return DecodingError(f"{where} is not {name} ({place}): convert it, for instance with iconv")


def _blank(where: str | PathLike) -> DecodingError:
    return DecodingError(f"{where} is blank")


def one_line_end(text: str) -> str:
    """\\n for \\r\\n and for \\r alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_web_address(where: str | PathLike) -> bool:
    """Whether this is the address of a page, which has no folders and no wildcards, but may have a query."""
    return str(where).startswith(("http://", "https://"))


def _path_of(where: str | PathLike) -> Path:
    return Path(urlsplit(str(where)).path if is_web_address(where) else str(where))


def format_of(where: str | PathLike) -> str:
    """The ending of a file's name, in lower case, without that of its packing."""
    suffixes = [suffix.lower() for suffix in _path_of(where).suffixes[-2:]]
    if suffixes[-1:] and suffixes[-1] in PACKED:
        return (suffixes[:-1] or [""])[-1]
    return "".join(suffixes[-1:])


def unpacked_name(where: str | PathLike) -> str:
    """A file's name, without the ending of its packing."""
    name = _path_of(where).name
    return name[: -len(Path(name).suffix)] if is_packed(name) else name


def is_packed(where: str | PathLike) -> bool:
    """Whether a file's name says that it is packed."""
    return _path_of(where).suffix.lower() in PACKED
