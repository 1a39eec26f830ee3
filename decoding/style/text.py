"""Texts out of Project Gutenberg's frame, and with or without hard-wrapped lines."""

from __future__ import annotations

import re
import statistics
from typing import NamedTuple

_FRAME = re.compile(r"^\*\*\* ?START OF TH[^*]*\*\*\*[ \t]*\n(.*?)(?:^\*\*\* ?END OF TH|\Z)", re.DOTALL | re.MULTILINE)
_WITHOUT_SPACES = r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"


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
