"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def number(x: float) -> str:
    """Three figures or so."""
    places = next((places for places, least in enumerate((100, 10, 1)) if abs(x) >= least), 3)
    return f"{x:.{places}f}"


def plus_minus(value: float, error: float | None, places: int, scale: float = 1.0) -> str:
    """A number and its standard error, if it has one, both times ``scale``."""
    within = "" if error is None else f" ± {scale * error:.{places}f}"
    return f"{scale * value:.{places}f}{within}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first line the headings. A "|" in a cell is escaped."""
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in (cells[0], ["---"] * len(cells[0]), *cells[1:]))
