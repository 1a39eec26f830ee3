"""The committed data, and how tables and numbers are written. Whatever is missing raises an error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.lab.stats import Estimate
from experiments.lab.tables import markdown

DOCS = Path(__file__).parents[1]
Row = Mapping[str, Any]


@cache
def read(name: str) -> Any:
    """A JSON file below docs."""
    return json.loads((DOCS / name).read_text(encoding="utf-8"))


def quoted(key: str) -> Row:
    """What no data here says: the paper's figures, and those of runs that were not kept."""
    return read("quoted.json")[key]


def row(rows: Iterable[Row], **wanted: Any) -> Row:
    """The row with these values.

    Raises:
        LookupError: there is none, or more than one.
    """
    found = [each for each in rows if all(each[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}")
    return found[0]


def figure(file: str, what: str) -> Row:
    """One line of a benchmark."""
    return row(read(file)["figures"], what=what)


def table(lines: Sequence[Sequence[str]]) -> str:
    """In Markdown, with the blank lines around it that Markdown wants beside a comment."""
    return "\n" + markdown(lines)


def bench_table(file: str, labels: Mapping[str, str]) -> list[list[str]]:
    """Lines of a benchmark: label, figure, target; the labels by what the benchmark calls them."""
    return [bench_line(label, figure(file, what)) for what, label in labels.items()]


def bench_line(label: str, found: Row, shown: str | None = None) -> list[str]:
    """One of them, ``shown`` in the place of what the benchmark printed."""
    missed = {True: "", False: ", missed", None: ""}[found["met"]]
    return [label, shown or found["shown"], found["target"] + missed]


def minus(text: str) -> str:
    """With a true minus sign."""
    return text.replace("-", "−")


def points(estimate: Row) -> str:
    """A mean and its interval, in hundredths."""
    return minus(Estimate(**estimate).shown(100))


def change(now: float, before: float) -> str:
    """In per cent, with its sign."""
    return minus(f"{100 * (now / before - 1):+.1f} %")


def span(values: Iterable[float]) -> str:
    """The least and the most."""
    least, *_, most = sorted(values)
    return f"{least:.2f} to {most:.2f}"
