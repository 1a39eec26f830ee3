"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def number(x: float) -> str:
    """Three figures or so."""
    places = next((places for places, least in enumerate((100, 10, 1)) if abs(x) >= least), 3)
    return f"{x:.{places}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first line the headings."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))
