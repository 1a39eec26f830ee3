"""What was found on a card, as tables in Markdown: of a folder of records, and for the docs' pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.gpu.pieces import PIECES
from experiments.gpu.record import CARD, DONE, FAILED, INTERRUPTED, TIMED_OUT, read
from experiments.lab.runs import CELLS
from experiments.lab.tables import markdown
from ngram.storage import write_atomically

SUMMARY = "summary.md"


def records(folder: Path) -> list[dict[str, Any]]:
    """Those of a run's folder, the worthiest first."""
    found = (read(folder / CELLS / f"{piece.name}.json") for piece in PIECES)
    return [record for record in found if record is not None]


def is_bad(record: dict[str, Any]) -> bool:
    """Whether something is wrong with it: not that something was not here, or did not fit into the time."""
    return record["status"] in (FAILED, TIMED_OUT, INTERRUPTED) or not all(each["passed"] for each in record["checks"])


def verdict(record: dict[str, Any]) -> str:
    """How a piece ended, in words."""
    passed = sum(each["passed"] for each in record["checks"])
    why = f" ({record['why']})" if record["why"] else ""
    ended = f"{record['status']}{why}"
    if not record["checks"]:
        return ended
    return f"{ended}; {passed} of {len(record['checks'])} checks passed"


def status_table(found: list[dict[str, Any]]) -> str:
    """A line for each piece."""
    lines = [["piece", "", "checks passed", "figures", "seconds"]]
    for record in found:
        passed = sum(each["passed"] for each in record["checks"])
        figures = sum(each["value"] is not None for each in record["figures"])
        ended = record["status"] + (f": {record['why']}" if record["why"] else "")
        checks = f"{passed} of {len(record['checks'])}" if record["checks"] else ""
        lines.append([record["piece"], ended, checks, str(figures), f"{record['seconds']:.0f}"])
    return markdown(lines)


def failures_table(found: list[dict[str, Any]]) -> str:
    """The checks that did not pass; nothing where all did."""
    failed = [
        [record["piece"], each["name"], each["seen"]]
        for record in found
        for each in record["checks"]
        if not each["passed"]
    ]
    return markdown([["piece", "not passed", "what was seen"], *failed]) if failed else ""


def figures_table(record: dict[str, Any]) -> str:
    """All figures of a piece."""
    lines = [["", "measured", "target"]]
    for each in record["figures"]:
        missed = ", missed" if each["met"] is False else ""
        lines.append([each["what"], each["shown"], each["target"] + missed])
    return markdown(lines)


def place(record: dict[str, Any]) -> str:
    """On what it was measured."""
    card, versions = record["card"], record["versions"]
    if record["sizes"] != CARD:
        return f"{record['sizes']}."
    known = versions | {"CUDA": card["cuda"], "driver": card["driver"], "Triton": card["triton"]}
    names = ("driver", "CUDA", "torch", "Triton", "transformers", "vllm")
    said = ", ".join(f"{name} {known[name]}" for name in names if known.get(name) is not None)
    return f"{card['name']}, {card['memory'] / 2**30:.0f} GiB; {said}."


def text(found: list[dict[str, Any]]) -> str:
    """The whole page."""
    parts = ["# What was measured\n"]
    whole = [record for record in found if "card" in record]
    if whole:
        parts.append(place(whole[0]) + "\n")
    parts += [status_table(found), failures_table(found)]
    for record in found:
        if record["figures"]:
            unfinished = "" if record["status"] == DONE else f" ({record['status']})"
            parts += [f"## {record['piece']}{unfinished}\n", figures_table(record)]
    return "\n".join(part for part in parts if part)


def write(folder: Path) -> Path:
    """Writes the page of a folder's records; returns where."""
    path = folder / SUMMARY
    write_atomically(path, text(records(folder)).encode())
    return path
