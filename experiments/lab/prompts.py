"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from decoding.errors import DecodingError
from decoding.style.opening import read_text

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line.

    Raises:
        DecodingError: not a text file, or one with an empty line.
    """
    lines = read_text(path).rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise DecodingError(f"{path}, line {number} is empty: a prompts file has one prompt a line")
    return tuple(line.strip() for line in lines)
