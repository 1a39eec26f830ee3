"""What ``decoding bench gpu`` found on a card (docs/gpu), or that nothing was measured yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.gpu import summary
from experiments.gpu.pieces import PIECES
from experiments.gpu.ways import WAYS
from figures.data import DOCS, Row, bench_line, table

FOLDER = DOCS / "gpu"
NOTHING = "not measured"
_NAMED = ("kernels", "torch")  # what computes a style, the quicker first


def _record(piece: str) -> dict[str, Any] | None:
    return next((each for each in summary.records(FOLDER) if each["piece"] == piece and each["figures"]), None)


def _of(piece: str, lines: Callable[[dict[str, Any]], Sequence[Sequence[str]]]) -> str:
    """A table of a piece, if it has any figures."""
    record = _record(piece)
    return f"\n{NOTHING.capitalize()} yet.\n" if record is None else table(lines(record))


def place() -> str:
    """The card, and the versions."""
    found = [each for each in summary.records(FOLDER) if "card" in each]
    return f"\n{summary.place(found[0]) if found else 'No card has run it yet.'}\n"


def pieces() -> str:
    """What there is to measure, and how it ended."""
    found = {each["piece"]: summary.verdict(each) for each in summary.records(FOLDER)}
    lines = [["`--only`", "what is measured", "seconds", "result"]]
    return table(
        [
            *lines,
            *([f"`{each.name}`", each.title, f"{each.seconds:g}", found.get(each.name, NOTHING)] for each in PIECES),
        ]
    )


def goals() -> str:
    """All figures that had a goal."""
    found = [each for record in summary.records(FOLDER) for each in record["figures"] if each["target"]]
    if not found:
        return f"\n{NOTHING.capitalize()} yet.\n"
    return table([["", "measured", "goal"], *(bench_line(each["what"], each) for each in found)])


def front() -> list[str]:
    """A line for the first pages: how many goals were met, and on which card."""
    records = [each for each in summary.records(FOLDER) if "card" in each]
    met = [each["met"] for record in records for each in record["figures"] if each["met"] is not None]
    if not met:
        return [f"{NOTHING}: `decoding bench gpu` does, in eight minutes", "", "", ""]
    return [
        f"{sum(met)} of {len(met)} goals for speed met",
        records[0]["card"]["name"] or "a CPU, at toy sizes",
        "",
        "",
    ]


def style() -> str:
    """A step in every way over batches, at the first vocabulary."""
    return _of("style", _style)


def _style(record: dict[str, Any]) -> list[list[str]]:
    (vocabulary, *_), batches = (record["settings"][name] for name in ("vocabularies", "batches"))
    shown = _shown(record)
    named = next(name for name in _NAMED if any(f": {name}, replayed" in what for what in shown))
    lines = [[f"V={vocabulary:,}, {named}", *(f"batch {batch}" for batch in sorted(batches))]]
    for way in WAYS:
        whats = (f"{way.name}, batch {batch}, V={vocabulary:,}: {named}, replayed" for batch in sorted(batches))
        lines.append([way.name, *(shown.get(what, NOTHING) for what in whats)])
    return lines


def long_context() -> str:
    """A step behind each context."""
    return _of("long-context", _long_context)


def _long_context(record: dict[str, Any]) -> list[list[str]]:
    budget, shown = record["settings"]["budget"], _shown(record)
    heads = (
        "a step, best dense, replayed",
        f"a step, {budget:,} tokens kept, replayed, with its share of choosing",
        f"{budget:,} tokens kept, against best dense, both replayed",
        "half kept, against best dense, both replayed",
        f"a step, {budget:,} tokens kept, against (weights + selected bytes) / bandwidth",
        f"{budget:,} tokens kept, against default, both called",
    )
    lines = [["", *heads]]
    for cell in record["settings"]["cells"]:
        where = f"{cell['shape']}, {cell['context']:,} tokens, batch {cell['batch']}"
        half = f"{cell['context'] // 2:,} tokens kept, against"
        whats = (f"{where}: {head.replace('half kept, against', half)}" for head in heads)
        lines.append([where, *(_beginning_with(what, shown) for what in whats)])
    return lines


def _shown(record: dict[str, Any]) -> dict[str, str]:
    return {each["what"]: each["shown"] for each in record["figures"]}


def _beginning_with(what: str, shown: dict[str, str]) -> str:
    """What was measured of something, whatever its line adds."""
    found = next((text for name, text in shown.items() if name.startswith(what)), None)
    return found or NOTHING


def figures(piece: str) -> str:
    """All of a piece."""
    return _of(piece, lambda record: [["", "measured", "goal"], *map(_line, record["figures"])])


def _line(each: Row) -> list[str]:
    return bench_line(each["what"], each)
