"""Reports of a sweep, drawn from its finished cells: a table, pictures, and one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import LogFormatter

from decoding.coloured import head_of_page
from decoding.tokens import token_texts
from experiments.lab.pictures import literal, plt, png
from experiments.lab.stats import interval
from experiments.lab.tables import markdown, number
from experiments.style import texts_picture
from ngram.storage import write_atomically

TEMPLATE = Path(__file__).with_name("report.html")
Text = dict[str, Any]
Decode = Callable[[list[int]], str]
Record = dict[str, Any]


class Measure(NamedTuple):
    """One column: where it stands in a text's record, and how it is shown."""

    key: str
    title: str
    short: str
    value: Callable[[Text, str], float | None]
    is_log: bool = False  # averaged as a logarithm, shown as its exponential


MEASURES = (
    Measure(
        "style_ppl",
        "style perplexity (n-gram)",
        "style ppl",
        lambda text, style: text["by_style"][style]["style_nll"],
        True,
    ),
    Measure("base_ppl", "base-model perplexity", "base ppl", lambda text, _: text["base_nll"], True),
    Measure("js", "Jensen–Shannon divergence per step (nats)", "JS", lambda text, _: text["js"]),
    Measure("entropy", "entropy of the sampled distribution (nats)", "entropy", lambda text, _: text["entropy"]),
    Measure(
        "overlap_unsteered",
        "token overlap with the unsteered text",
        "overlap, λ=0",
        lambda text, _: text["overlap_unsteered"],
    ),
    Measure(
        "overlap_corpus",
        "tokens that the corpus has",
        "overlap, corpus",
        lambda text, style: text["by_style"][style]["overlap_corpus"],
    ),
    Measure(
        "copied_run",
        "longest run copied (tokens)",
        "copied run",
        lambda text, style: text["by_style"][style]["copied_run"],
    ),
    Measure("distinct_1", "distinct-1", "distinct-1", lambda text, _: text["distinct_1"]),
    Measure("distinct_2", "distinct-2", "distinct-2", lambda text, _: text["distinct_2"]),
    Measure("distinct_3", "distinct-3", "distinct-3", lambda text, _: text["distinct_3"]),
)
SPEED = ("speed", "tokens per second against λ=0", "speed")


@dataclass(frozen=True)
class Point:
    """What stands at one λ of one line: the records of all its seeds."""

    style: str
    lambda_: float
    kind: str  # "steered" or "entropy-matched"
    temperature: float
    records: Sequence[Record]

    def row(self) -> dict[str, Any]:
        """Means with 95 % bootstrap intervals; a prompt's seeds are averaged first, prompts are resampled."""
        row: dict[str, Any] = {
            "style": self.style,
            "lambda": self.lambda_,
            "kind": self.kind,
            "temperature": self.temperature,
            "seeds": len(self.records),
            "prompts": len(self.records[0]["texts"]),
        }
        for measure in MEASURES:
            values = [[measure.value(text, self.style) for text in record["texts"]] for record in self.records]
            known = None if None in values[0] else np.mean(np.array(values, float), 0)
            row |= interval(measure.key, known, measure.is_log)
        speeds = np.array([record["speed"] for record in self.records]) if self.kind == "steered" else None
        return row | interval(SPEED[0], speeds, False)


def write_report(folder: Path, settings: dict[str, Any], points: Sequence[Point], decode: Decode) -> list[dict]:
    """Writes results.csv, .json and .md, sweep.png, texts.png, plots/*.png and report.html into a run's folder.

    Args:
        folder: where.
        settings: of the run.
        points: every λ of every line.
        decode: a tokenizer's.

    Returns:
        The rows of the table.
    """
    rows = [point.row() for point in points]
    write_atomically(folder / "results.md", markdown(table(rows)).encode())
    seeds = sorted({record["seed"] for point in points for record in point.records})
    content = {"settings": settings, "seeds": seeds, "rows": rows}
    write_atomically(folder / "results.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
    write_atomically(folder / "results.csv", _csv(rows).encode())
    overview = _overview(rows)
    write_atomically(folder / "sweep.png", overview)
    for key, title, _ in _columns(rows):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        _draw(axis, rows, key, title)
        axis.legend(frameon=False, fontsize=8)
        write_atomically(folder / "plots" / f"{key}.png", png(figure))
    data = _viewer_data(settings, points, decode)
    write_atomically(folder / "texts.png", _texts(settings, data, points[0].records[0]["seed"]))
    write_atomically(folder / "report.html", _page(settings, rows, overview, data).encode())
    return rows


def _texts(settings: dict[str, Any], data: dict[str, Any], seed: int) -> bytes:
    """The first prompt's texts, of the first seed."""
    texts = {style: {name: cell[0] for name, cell in cells.items()} for style, cells in data["texts"].items()}
    styles = f"{', '.join(texts)}, " if len(texts) == 1 else ""
    about = (
        f"{styles}{_modes(settings)}; {settings['model']}, temperature 1. "
        f"Prompt 1 of {len(settings['prompts'])}, seed {seed}, the same random numbers for all: not picked."
    )
    return texts_picture.draw(texts, settings["prompts"][0], about)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    return text.getvalue()


def _columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Key, title and short title of the measures that some row has."""
    columns = [(measure.key, measure.title, measure.short) for measure in MEASURES] + [SPEED]
    return [column for column in columns if any(row[column[0]] is not None for row in rows)]


def _overview(rows: Sequence[dict[str, Any]]) -> bytes:
    columns = _columns(rows)
    across = 4
    down = math.ceil(len(columns) / across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3.1 * down), layout="constrained", squeeze=False)
    for axis, (key, title, _) in zip(axes.flat, columns, strict=False):
        _draw(axis, rows, key, title)
    spare = list(axes.flat[len(columns) :])
    for axis in spare:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if spare:
        spare[0].legend(handles, labels, loc="center", frameon=False, fontsize=11)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return png(figure)


def _draw(axis: Any, rows: Sequence[dict[str, Any]], key: str, title: str) -> None:
    styles = list(dict.fromkeys(row["style"] for row in rows))
    for style, kind in dict.fromkeys((row["style"], row["kind"]) for row in rows):
        line = [row for row in rows if (row["style"], row["kind"]) == (style, kind) and row[key] is not None]
        if not line:
            continue
        x = [row["lambda"] for row in line]
        color = f"C{styles.index(style)}"
        label = literal(style if kind == "steered" else f"{style}: unsteered, same entropy")
        axis.plot(x, [row[key] for row in line], "o-" if kind == "steered" else "x:", color=color, label=label, ms=4)
        bounds = [(at, row[f"{key}_low"], row[f"{key}_high"]) for at, row in zip(x, line, strict=True)]
        bounds = [bound for bound in bounds if None not in bound]
        if kind == "steered" and bounds:
            axis.fill_between(*zip(*bounds, strict=True), color=color, alpha=0.15, lw=0)
    if key.endswith("_ppl"):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("λ")
    axis.grid(alpha=0.25)


def table(rows: Sequence[dict[str, Any]], keys: Iterable[str] | None = None, intervals: bool = True) -> list[list[str]]:
    """Headings, then cells as text, with the interval behind every mean if wanted.

    "as 0.1: T=0.96" is the unsteered model at the temperature that gives the entropy of λ = 0.1.
    """
    columns = [(key, short) for key, _, short in _columns(rows) if keys is None or key in keys]
    lines = [["style", "λ", *(short for _, short in columns)]]
    for row in rows:
        how = f"{row['lambda']:g}" if row["kind"] == "steered" else f"as {row['lambda']:g}: T={row['temperature']:.2f}"
        lines.append([row["style"], how, *(_shown(row, key, intervals) for key, _ in columns)])
    return lines


def _shown(row: dict[str, Any], key: str, interval: bool) -> str:
    mean, low, high = row[key], row[f"{key}_low"], row[f"{key}_high"]
    if mean is None:
        return "–"
    if not interval or low is None or low == high:
        return number(mean)
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def _page(settings: dict[str, Any], rows: list[dict], overview: bytes, data: dict[str, Any]) -> str:
    head, *body = table(rows)
    versions = ", ".join(f"{name} {number}" for name, number in settings["environments"][-1]["versions"].items())
    about = (
        f"Model {settings['model']} ({settings['dtype']}), {_modes(settings)}, {len(settings['prompts'])} prompts "
        f"× {settings['max_new_tokens']} tokens × {rows[0]['seeds']} seeds, temperature 1. {versions}."
    )
    templates = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return templates.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about=about,
        coloured=Markup(head_of_page()),
        image=base64.b64encode(overview).decode(),
        head=head,
        body=body,
        data=data,
    )


def _modes(settings: dict[str, Any]) -> str:
    own = {name: about["settings"]["mode"] for name, about in settings["styles"].items() if "settings" in about}
    said = [f"mode {settings['mode']}"] if len(own) < len(settings["styles"]) else []
    return ", ".join(said + [f"{name} as saved: mode {mode}" for name, mode in own.items()])


def _viewer_data(settings: dict[str, Any], points: Sequence[Point], decode: Decode) -> dict[str, Any]:
    """Texts of the first seed: {style: {λ: [[[what a token adds, shift], …] of each prompt]}}."""
    texts: dict[str, dict[str, Any]] = {}
    for point in points:
        if point.kind == "steered":
            held = point.records[0]["texts"]
            cell = [list(zip(token_texts(text["tokens"], decode), text["shift"], strict=True)) for text in held]
            texts.setdefault(point.style, {})[f"{point.lambda_:g}"] = cell
    return {"prompts": settings["prompts"], "texts": texts}
