"""Draws how data flows: ``python -m docs.figures.flows`` writes docs/flows_*.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parents[1]
_LINE, _FILL, _DONE, _TEXT = "#3f51b5", "#e8eaf6", "#fff3e0", "#1a1a2e"
FLOWS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "style": {
        "once for each text": [
            ("a text", ""),
            ("token ids", "tokens"),
            ("counts", "ngram.counts"),
            ("tables", "ngram.tables"),
        ],
        "in each step": [
            ("tokens so far\n+ scores", "the engine"),
            ("look-up", "ngram.tables"),
            ("guards lower λ", "style.steering"),
            ("scores + λ·prior", ""),
        ],
    },
    "temperature": {
        "once for each prompt": [
            ("token ids", "the engine"),
            ("last user turn", "temperature.prompts"),
            ("one vector", "temperature.encoder"),
            ("abilities,\nexpected scores", "temperature.heads"),
        ],
        "then": [
            ("expected scores", ""),
            ("temperature", "temperature.selector"),
            ("scores / T", "temperature.processors"),
            ("top-p", "the engine"),
        ],
    },
    "chunks": {
        "while a chunk is written": [
            ("states of the\nbottom layer", "the engine"),
            ("where chunks end", "boundaries"),
            ("keys of a chunk\n→ features", "scorers"),
            ("last queries\n→ features", "scorers"),
        ],
        "when it ends": [
            ("products\n→ ranks", "scorers"),
            ("divided over layers", "selection"),
            ("tokens or blocks", "selection"),
            ("what attention reads", "contiguous, paged"),
        ],
    },
}


def draw(name: str, rows: dict[str, list[tuple[str, str]]]) -> Path:
    """One flow: each row from left to right, below its caption."""
    figure, axes = plt.subplots(figsize=(9.6, 1.75 * len(rows)))
    axes.set(xlim=(0, 4), ylim=(-len(rows), 0))
    axes.axis("off")
    for y, (caption, row) in enumerate(rows.items()):
        axes.text(0.09, -y - 0.07, caption, fontsize=9, style="italic", color=_LINE)
        for x, (title, room) in enumerate(row):
            is_last = y == len(rows) - 1 and x == len(row) - 1
            _box(axes, x + 0.5, -y - 0.5, title, room, _DONE if is_last else _FILL)
            if x:
                _arrow(axes, (x - 0.075, -y - 0.5), (x + 0.075, -y - 0.5))
    figure.savefig(path := DOCS / f"flow_{name}.svg", facecolor="white", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


def _box(axes: Axes, x: float, y: float, title: str, room: str, fill: str) -> None:
    box = FancyBboxPatch((x - 0.41, y - 0.32), 0.82, 0.64, "round,pad=0.01", fc=fill, ec=_LINE, lw=1.2)
    axes.add_patch(box)
    axes.text(x, y + (0.08 if room else 0), title, ha="center", va="center", fontsize=10, color=_TEXT)
    axes.text(x, y - 0.21, room, ha="center", va="center", fontsize=7.5, color=_LINE, family="monospace")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": _LINE, "lw": 1.4})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "decoding"
    for name, rows in FLOWS.items():
        draw(name, rows)
