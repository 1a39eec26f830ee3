"""Text files as prose: read as UTF-8, out of Project Gutenberg's frame, with paragraphs on one line each."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from decoding.errors import DecodingError


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8 and not blank.

    Raises:
        DecodingError: otherwise.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DecodingError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in content:
        raise DecodingError(f"{path} is a binary file, not text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodingError(f"{path} is not UTF-8 (byte {error.start}): convert it, for instance with iconv") from error
    if not text.strip():
        raise DecodingError(f"{path} is blank")
    return text


def prose(text: str) -> str:
    """Line ends as \\n, without a Project Gutenberg frame, and with hard-wrapped paragraphs on one line each."""
    text = text.replace("\r\n", "\n")
    frame = re.search(r"\*\*\* ?START OF TH[^\n]*\*\*\*\n(.*?)\n\*\*\* ?END OF TH", text, re.DOTALL)
    text = frame[1] if frame else text
    return unwrap(text) if is_hard_wrapped(text) else text


def is_hard_wrapped(text: str) -> bool:
    """Whether lines are broken by width (as in Project Gutenberg's prose) and not by meaning (as in verse)."""
    widths = [len(line) for line in text.split("\n") if line.strip()]
    return len(widths) > 20 and 55 <= statistics.median(widths) <= 80 and sum(w > 90 for w in widths) < len(widths) / 50


def unwrap(text: str) -> str:
    """Joins the lines of every paragraph; paragraphs stay a blank line apart."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
