"""Tables and a picture of what methods answered to suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab.cells import Cell
from experiments.lab.pictures import literal, plt, save
from experiments.lab.runs import cpu_hours
from experiments.lab.tables import markdown, plus_minus
from experiments.long_context.asked import AnswerCell, TextCell
from experiments.long_context.baselines import FULL, kept_of, kept_shown, limit_of

Row = Mapping[str, Any]
_FULL = TextCell(FULL, 1.0).name


def rows(cells: Mapping[Cell, Row], compared: Sequence[TextCell]) -> list[dict[str, Any]]:
    """A row for every length, method and task: mean score, and how it differs from full attention's on the prompts.

    The error is the standard error of the mean difference.
    """
    found = []
    for (length, task), records in _by_task(cells).items():
        full = np.array([record["scores"][_FULL] for record in records])
        for each in compared:
            scores = np.array([record["scores"][each.name] for record in records])
            reads = [record["kv_retention"].get(each.name) for record in records]  # of other engines nothing is known
            more = scores - full
            found.append(
                {
                    "task": task,
                    "length": length,
                    "method": each.method,
                    **limit_of(each.kept),
                    "score": float(scores.mean()),
                    "difference": float(more.mean()),
                    "error": float(more.std(ddof=1) / len(more) ** 0.5) if len(more) > 1 else None,
                    "examples": len(more),
                    "tokens": float(np.mean([record["tokens"] for record in records])),
                    "kv_retention": None if None in reads else float(np.mean(reads)),
                }
            )
    return found


def lossless_rows(cells: Mapping[Cell, Row]) -> list[dict[str, Any]]:
    """What share of the lossless mode's drafts was right, by length, task and what they read: the mean of examples."""
    found = []
    for (length, task), records in _by_task(cells).items():
        for kept in records[0]["lossless"]:
            each = [record["lossless"][kept] for record in records]
            shares = [part["acceptance"] for part in each if part["acceptance"] is not None]
            found.append(
                {
                    "task": task,
                    "length": length,
                    **limit_of(float(kept)),
                    "acceptance": float(np.mean(shares)) if shares else None,
                    "same": int(sum(part["same"] for part in each)),
                    "examples": len(each),
                }
            )
    return found


def hours(cells: Mapping[Cell, Row]) -> dict[str, float]:
    """Processor hours that all methods together took, by length."""
    found: dict[str, float] = {}
    for (length, _), records in _by_task(cells).items():
        found[str(length)] = found.get(str(length), 0.0) + cpu_hours(records)
    return found


def _by_task(cells: Mapping[Cell, Row]) -> dict[tuple[int, str], list[Row]]:
    found: dict[tuple[int, str], list[Row]] = {}
    for cell, record in cells.items():
        if isinstance(cell, AnswerCell):
            found.setdefault((cell.length, cell.task), []).append(record)
    return found


def tables(rows: Sequence[Row], lossless: Sequence[Row]) -> Iterator[str]:
    """In Markdown: one for each length, and one for the lossless mode."""
    for length in _different(row["length"] for row in rows):
        of_length = [row for row in rows if row["length"] == length]
        examples = of_length[0]["examples"]
        yield f"### Tasks, {length:,} tokens, {examples} examples each, score × 100\n\n" + markdown(table(of_length))
    if lossless:
        yield "### Lossless: drafted tokens that are right, %\n\n" + markdown(lossless_table(lossless))


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Of one length: a line for every method, with the mean over tasks and the task that lost most."""
    tasks = _different(row["task"] for row in rows)
    lines = [["kept", "method", *tasks, "mean", "against full attention", "worst task"]]
    for (method, kept), line in _by_method(rows).items():
        scores = [f"{100 * line[task]['score']:.0f}" for task in tasks]
        mean = f"{100 * np.mean([row['score'] for row in line.values()]):.1f}"
        lines.append([kept_shown(kept), method, *scores, mean, _against(method, line), _worst(method, line)])
    return lines


def _against(method: str, line: Mapping[str, Row]) -> str:
    """The mean difference; tasks are fixed, so that its error is their errors'."""
    if method == FULL:
        return ""
    errors = [row["error"] for row in line.values()]
    error = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(errors))
    return plus_minus(float(np.mean([row["difference"] for row in line.values()])), error, 1, 100)


def _worst(method: str, line: Mapping[str, Row]) -> str:
    worst = min(line.values(), key=lambda row: row["difference"])
    return "" if method == FULL or worst["difference"] >= 0 else f"{worst['task']} {100 * worst['difference']:.0f}"


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, Row]]:
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["method"], kept_of(row)), {})[row["task"]] = row
    return found


def lossless_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each length and what drafts read."""
    tasks = _different(row["task"] for row in rows)
    lines = [["tokens", "drafts read", *tasks, "same text"]]
    groups: dict[tuple[int, float], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["length"], kept_of(row)), {})[row["task"]] = row
    for (length, kept), line in groups.items():
        shares = [line[task]["acceptance"] for task in tasks]
        same = f"{sum(row['same'] for row in line.values())} of {sum(row['examples'] for row in line.values())}"
        lines.append([f"{length:,}", kept_shown(kept), *("" if x is None else f"{100 * x:.0f}" for x in shares), same])
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """A heat map for each length: methods by tasks."""
    lengths = _different(row["length"] for row in rows)
    tasks = _different(row["task"] for row in rows)
    names = _different((row["method"], kept_of(row)) for row in rows)
    size = (0.55 * len(tasks) * len(lengths) + 4, 0.3 * len(names) + 2)
    figure, axes = plt.subplots(1, len(lengths), figsize=size, layout="constrained", squeeze=False, sharey=True)
    image = None
    for axis, length in zip(axes[0], lengths, strict=True):
        found = {(row["method"], kept_of(row), row["task"]): row["score"] for row in rows if row["length"] == length}
        grid = 100 * np.array([[found[*name, task] for task in tasks] for name in names])
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (y, x), score in np.ndenumerate(grid):
            color = "white" if score < 50 else "black"
            axis.text(x, y, f"{score:.0f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(tasks)), [literal(task) for task in tasks], rotation=90, fontsize=8)
        axis.set_title(f"{length:,} tokens", fontsize=10)
    labels = [literal(method if method == FULL else f"{method}, {kept_shown(kept)}") for method, kept in names]
    axes[0, 0].set_yticks(range(len(names)), labels, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, label="score × 100", shrink=0.7)
    save(figure, path)


def _different(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
