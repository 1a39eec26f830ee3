"""Text files: decoded by their mark, out of Project Gutenberg's frame, and with or without hard-wrapped lines."""

from __future__ import annotations

import codecs
import gzip
import re
import statistics
import zlib
from pathlib import Path
from typing import NamedTuple

from decoding.errors import DecodingError

_GZIP = b"\x1f\x8b"
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FRAME = re.compile(r"^\*\*\* ?START OF TH[^*]*\*\*\*[ \t]*\n(.*?)(?:^\*\*\* ?END OF TH|\Z)", re.DOTALL | re.MULTILINE)
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"{\\rtf", b"%pdf-")
_WITHOUT_SPACES = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"


def read_text(path: Path) -> str:
    """A file's text, with \\n alone at the ends of lines.

    It must be UTF-8, or begin with the mark of UTF-16 or UTF-32; gzip is unpacked.

    Raises:
        DecodingError: no such file, a binary one, one with markup, one in another encoding, or a blank one.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DecodingError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:14].lower().startswith(_MARKUP):
        raise DecodingError(f"{path} is HTML, XML, RTF or PDF, not plain text: convert it to text first")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in content:
        raise DecodingError(f"{path} is a binary file, or UTF-16 without its mark: convert it to UTF-8 text")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise DecodingError(
            f"{path} is not {name} (byte {error.start}): convert it, for instance with iconv"
        ) from error
    if not text.strip():
        raise DecodingError(f"{path} is blank")
    return one_line_end(text)


def one_line_end(text: str) -> str:
    """\\n for \\r\\n and for \\r alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Prose(NamedTuple):
    """What `read_prose` makes of a text."""

    text: str
    is_wrapped: bool  # whether its lines were hard-wrapped
    is_joined: bool  # whether they are joined now


def prose(text: str, join_lines: bool | None = None) -> str:
    """The text of `read_prose`."""
    return read_prose(text, join_lines).text


def read_prose(text: str, join_lines: bool | None = None) -> Prose:
    """A text without a Project Gutenberg frame, and with hard-wrapped paragraphs on one line each, if wanted.

    Args:
        text: the text.
        join_lines: whether to, if the text is hard-wrapped. None does where lines are sure to be broken by width,
            whatever that breaks: in a Gutenberg frame, and within words, in scripts without spaces. Elsewhere lines
            may be verse, or source code.
    """
    frame = _FRAME.search(text)
    body = frame[1] if frame else text
    is_wrapped = is_hard_wrapped(body)
    is_sure = is_wrapped and (frame is not None or _breaks_words(body))
    is_joined = is_wrapped and (is_sure if join_lines is None else join_lines)
    return Prose(unwrap(body) if is_joined else body, is_wrapped, is_joined)


def is_hard_wrapped(text: str) -> bool:
    """Whether lines are as long as if they were broken by width (as in Project Gutenberg's prose)."""
    widths = [len(line) for line in text.split("\n") if line.strip()]
    return len(widths) > 20 and 55 <= statistics.median(widths) <= 80 and sum(w > 90 for w in widths) < len(widths) / 50


def _breaks_words(text: str) -> bool:
    return 2 * len(re.findall(rf"{_WITHOUT_SPACES}\n{_WITHOUT_SPACES}", text)) > text.strip().count("\n")


def unwrap(text: str) -> str:
    """Joins the lines of every paragraph, by a space but in scripts that have none. Paragraphs stay a line apart."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(_joined(paragraph) for paragraph in paragraphs if paragraph.strip())


def _joined(paragraph: str) -> str:
    lines = (" ".join(line.split()) for line in paragraph.strip().split("\n"))
    return re.sub(rf"(?<={_WITHOUT_SPACES})\n(?={_WITHOUT_SPACES})", "", "\n".join(lines)).replace("\n", " ")
