"""What a comparison of ways to a style found: a table, verdicts, samples, and the Pareto picture.

*Style* is the judge's probability. *Fluency* is base perplexity, and is compared at equal diversity: as a multiple of
the unsteered model's at the temperature where its texts have the same mean entropy (between measured temperatures,
log perplexity is interpolated over entropy). 1 is as fluent as the plain model is at that diversity. All methods have
the same prompts: these are resampled for all at once, so that an interval holds the baseline's error, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.lab.pictures import literal, plt, png
from experiments.lab.runs import cpu_hours
from experiments.lab.stats import Estimate, interval, resampled_rows
from experiments.lab.tables import markdown, number
from experiments.style.compare import RECOMMENDED, UNSTEERED, CompareCell, Comparison
from experiments.style.judge import StyleJudge, train_judges
from experiments.style.likeness import CHARACTERS, Embed
from ngram.storage import write_atomically

LONGEST_RUN = 12
"""Tokens in a row that a text may have from the corpus before it counts as copied."""
MEASURES: Mapping[str, tuple[Callable[[dict[str, Any]], float], bool]] = {
    "base_ppl": (lambda text: text["base_nll"], True),
    "entropy": (lambda text: text["entropy"], False),
    "js": (lambda text: text["js"], False),
    "distinct_1": (lambda text: text["distinct_1"], False),
    "distinct_2": (lambda text: text["distinct_2"], False),
    "distinct_3": (lambda text: text["distinct_3"], False),
}
COLUMNS = {
    "judge": "style (judge)",
    "fluency": "ppl, equal diversity",
    "gain": "style − ratio's, equal ppl",
    "likeness": "likeness",
    "base_ppl": "base ppl",
    "ppl_ratio": "base ppl × unsteered",
    "entropy": "entropy",
    "js": "JS",
    "distinct_2": "distinct-2",
    "distinct_ratio": "distinct-2 × unsteered",
    "copied": f"copied > {LONGEST_RUN}",
    "longest_run": "longest run",
    "delta": "Delta",
    "sentence_words": "words a sentence",
}
CLASSES = {
    "paper": "C3",
    RECOMMENDED: "C0",
    "three passages": "C2",
    "zero-shot prompt": "C1",
    "LoRA": "C4",
    "half LoRA": "C5",
}
ON_TOP = {"three passages + ratio": "C2", "LoRA + ratio": "C4", "half LoRA + ratio": "C5"}


class Verdict(NamedTuple):
    """Whether a line of points dominates another: for each of its points has one with more style, as fluent or more."""

    style: str
    better: str
    worse: str
    dominates: bool
    but_for: tuple[float, ...]  # λ of the points that are not dominated


class Values(NamedTuple):
    """Of a cell, float64 [P] each: means over a prompt's texts."""

    judge: np.ndarray
    base_nll: np.ndarray
    entropy: np.ndarray


def judged(comparison: Comparison, embed: Embed | None = None) -> tuple[list[dict[str, Any]], dict[str, StyleJudge]]:
    """Every cell as a row, for each style, and the judges."""
    corpora = {**comparison.styles, **comparison.others}
    judges = train_judges({name: style.split for name, style in corpora.items()}, list(comparison.styles), embed)
    rows = []
    for style, judge in judges.items():
        mine = [
            row_of(cell, record, style, judge)
            for cell, record in comparison.records.items()
            if cell.style in (None, style)
        ]
        set_side_by_side([row for row, _ in mine], [values for _, values in mine])
        rows += [row for row, _ in mine]
    return rows, judges


def row_of(cell: CompareCell, record: dict[str, Any], style: str, judge: StyleJudge) -> tuple[dict[str, Any], Values]:
    """Means of a cell with 95 % bootstrap intervals; a prompt's samples are averaged first, prompts are resampled."""
    texts = record["texts"]
    row: dict[str, Any] = {
        "style": style,
        "method": cell.method,
        "lambda": cell.lambda_,
        "temperature": cell.temperature,
    }
    written = [text["text"] for text in texts]
    prompts = np.array([text["prompt"] for text in texts])

    def by_prompt(values: Sequence[float]) -> np.ndarray:
        return np.bincount(prompts, np.asarray(values, float)) / np.bincount(prompts)

    probabilities = by_prompt(judge.probability(written).tolist())
    row |= interval("judge", probabilities, False)
    row |= interval("likeness", by_prompt(judge.likeness(written).tolist()), False)
    for name, (value, is_log) in MEASURES.items():
        row |= interval(name, by_prompt([value(text) for text in texts]), is_log)
    row |= interval("copied", by_prompt([text["copied_run"][style] > LONGEST_RUN for text in texts]), False)
    row["longest_run"] = max(text["copied_run"][style] for text in texts)
    row |= {"delta": judge.delta(written), "sentence_words": judge.sentence_words(written)}
    return row, Values(probabilities, *(by_prompt([text[name] for text in texts]) for name in ("base_nll", "entropy")))


def set_side_by_side(rows: Sequence[dict[str, Any]], values: Sequence[Values]) -> None:
    """Adds what rows of one style are against the unsteered model, and against `RECOMMENDED` at equal fluency."""
    drawn = _drawn(len(values[0].judge))
    judge, nll, entropy = (np.stack(each)[:, drawn].mean(-1) for each in zip(*values, strict=True))
    plain = [i for i, row in enumerate(rows) if row["method"] == UNSTEERED]
    fluency = nll - _interpolated(entropy, entropy[plain], nll[plain])
    itself = next(i for i in plain if rows[i]["temperature"] == 1)
    line = [itself, *(i for i, row in enumerate(rows) if row["method"] == RECOMMENDED)]
    gain = judge - _interpolated(fluency, fluency[line], judge[line])
    for i, row in enumerate(rows):
        row |= _estimate("fluency", np.exp(fluency[i]))
        is_between = fluency[line, 0].min() <= fluency[i, 0] <= fluency[line, 0].max() and row["method"] != UNSTEERED
        row |= _estimate("gain", gain[i] if is_between and i not in line else None)
        row["ppl_ratio"] = row["base_ppl"] / rows[itself]["base_ppl"]
        row["distinct_ratio"] = row["distinct_2"] / rows[itself]["distinct_2"]
        row["copied_more"] = row["copied"] > rows[itself]["copied"]


def _drawn(prompts: int) -> np.ndarray:
    """Which prompts each resample holds, int64 [1 + RESAMPLES, P]: the first holds them as they are."""
    return np.vstack((np.arange(prompts), resampled_rows(prompts)))


def _interpolated(at: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y over x, float64 [K, R], at float64 [N, R]; at the ends of the line beyond it."""
    order = np.argsort(x, 0)
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    return np.stack([np.interp(*each) for each in zip(at.T, x.T, y.T, strict=True)], 1)


def _estimate(key: str, resampled: np.ndarray | None) -> dict[str, float | None]:
    """A number and its interval, as `interval` names them, of what was measured and its resamples."""
    names = (key, f"{key}_low", f"{key}_high")
    if resampled is None:
        return dict.fromkeys(names)
    found = Estimate.of(resampled[0], resampled[1:])
    return dict(zip(names, (found.mean, found.low, found.high), strict=True))


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Who dominates whom on each style's Pareto picture."""
    pairs = [
        (RECOMMENDED, "paper"),
        (RECOMMENDED, "zero-shot prompt"),
        (RECOMMENDED, "three passages"),
        (RECOMMENDED, "LoRA"),
        ("three passages + ratio", "three passages"),
        ("three passages + ratio", "LoRA"),
        ("LoRA + ratio", "LoRA"),
        ("half LoRA + ratio", "half LoRA"),
        ("half LoRA + ratio", "LoRA"),
    ]
    styles = dict.fromkeys(row["style"] for row in rows)
    tried = {row["method"] for row in rows}
    return [
        _verdict([row for row in rows if row["style"] == style], *pair)
        for style in styles
        for pair in pairs
        if tried.issuperset(pair)
    ]


def _verdict(rows: Sequence[dict[str, Any]], better: str, worse: str) -> Verdict:
    line = [row for row in rows if row["method"] == better]
    left = [
        row["lambda"]
        for row in rows
        if row["method"] == worse
        and not any(mine["judge"] > row["judge"] and mine["fluency"] <= row["fluency"] for mine in line)
    ]
    return Verdict(rows[0]["style"], better, worse, not left, tuple(left))


def limits(rows: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The worst that a method does to each style at any λ, against the unsteered model."""
    found = []
    for style in dict.fromkeys(row["style"] for row in rows):
        mine = [row for row in rows if (row["style"], row["method"]) == (style, method)]
        found.append(
            {
                "style": style,
                "ppl_ratio": max(row["ppl_ratio"] for row in mine),
                "distinct_ratio": min(row["distinct_ratio"] for row in mine),
                "copies_more": any(row["copied_more"] for row in mine),
            }
        )
    return found


def write(comparison: Comparison, encoder: str | None = None, embed: Embed | None = None) -> list[dict[str, Any]]:
    """Writes results.json, results.md, samples.md and pareto.png into the run's folder; the rows of the table.

    Args:
        comparison: a finished one.
        encoder: name of what verifies authors, and ``embed``, the same itself; by default character n-grams.
        embed: see there.
    """
    rows, judges = judged(comparison, embed)
    folder, settings = comparison.folder.path, comparison.folder.settings
    texts = len(comparison.options.prompts) * comparison.options.samples
    about = {
        style: {
            "accuracy": judge.accuracy,
            "function_word_accuracy": judge.function_word_accuracy,
            "sentence_words": judge.target_sentence_words,
            "ceiling": judge.ceiling(texts),
            "floor": judge.floor(texts),
        }
        for style, judge in judges.items()
    }
    tried = {row["method"] for row in rows}
    found = {
        "settings": settings | {"encoder": encoder or CHARACTERS},
        "cpu_hours": cpu_hours(comparison.records.values()),
        "judges": about,
        "limits": {method: limits(rows, method) for method in ("paper", RECOMMENDED) if method in tried},
        "verdicts": [verdict._asdict() for verdict in verdicts(rows)],
        "rows": rows,
    }
    write_atomically(folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
    write_atomically(folder / "results.md", markdown(table(rows, about)).encode())
    write_atomically(folder / "samples.md", samples(comparison).encode())
    write_atomically(folder / "pareto.png", pareto(rows, about))
    return rows


def table(rows: Sequence[dict[str, Any]], judges: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Headings, then cells as text, with the interval behind every mean that has one; each style's ceiling and floor
    come first.
    """
    lines = [["style", "method", *COLUMNS.values()]]
    for style, judge in judges.items():
        for end, name in (("ceiling", "the style's own held-out text"), ("floor", "other authors' held-out text")):
            lines.append([style, name, *(number(judge[end][key]) if key in judge[end] else "" for key in COLUMNS)])
        lines += [[style, label(row), *(_shown(row, key) for key in COLUMNS)] for row in rows if row["style"] == style]
    return lines


def label(row: Mapping[str, Any]) -> str:
    """A method with its strength, or the unsteered model with its temperature."""
    if row["method"] == UNSTEERED:
        return f"{UNSTEERED}, T={row['temperature']:g}"
    return f"{row['method']}, λ={row['lambda']:g}" if row["lambda"] else row["method"]


def _shown(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None:
        return ""
    low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
    within = "" if low is None or high is None or low == high else f" [{number(low)}, {number(high)}]"
    return number(row[key]) + within


def samples(comparison: Comparison) -> str:
    """The first text of every style and method at its highest λ, in Markdown."""
    prompt = comparison.options.prompts[0]
    parts = [f"# What each method makes of “{prompt}”\n\nThe first text at the highest λ, as it came.\n"]
    for style in comparison.styles:
        parts.append(f"\n## {style}\n")
        last = {
            cell.method: cell for cell in comparison.records if cell.style in (None, style) and cell.temperature == 1
        }
        for method, cell in last.items():
            text = comparison.records[cell]["texts"][0]["text"]
            strength = f" (λ={cell.lambda_:g})" if cell.lambda_ else ""
            parts.append(f"\n**{method}{strength}**: {prompt}{' / '.join(text.split(chr(10)))}\n")
    return "".join(parts)


def pareto(rows: Sequence[dict[str, Any]], judges: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Style against fluency at equal diversity, a panel for each style. Up and left is better.

    Lines show what the judge says of held-out text, the style's own and others'.
    """
    styles = list(dict.fromkeys(row["style"] for row in rows))
    across = min(3, len(styles) + 1)
    down = math.ceil((len(styles) + 1) / across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.8 * down), layout="constrained", squeeze=False)
    for axis, style in zip(axes.flat, styles, strict=False):
        _panel(axis, [row for row in rows if row["style"] == style])
        for end, name, dash in (("ceiling", "its own held-out text", "--"), ("floor", "others' held-out text", ":")):
            axis.axhline(judges[style][end]["judge"], color="k", lw=0.8, ls=dash, label=name)
        axis.set_title(literal(style))
    for axis in axes.flat[len(styles) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[len(styles)].legend(handles, labels, loc="center", frameon=False)
    return png(figure)


def _reach(row: Mapping[str, Any], key: str, end: str) -> float:
    bound = row[f"{key}_{end}"]
    return 0.0 if bound is None else abs(bound - row[key])


def _panel(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for methods, marker in ((CLASSES, "o"), (ON_TOP, "^")):
        for method, color in methods.items():
            line = [row for row in rows if row["method"] == method]
            if not line:
                continue
            x, y = [row["fluency"] for row in line], [row["judge"] for row in line]
            errors = {
                name: [[_reach(row, key, end) for row in line] for end in ("low", "high")]
                for name, key in (("xerr", "fluency"), ("yerr", "judge"))
            }
            shape = "-" if len(line) > 1 else ""
            axis.errorbar(
                x, y, **errors, fmt=f"{marker}{shape}", color=color, label=method, ms=5, lw=1.2, elinewidth=0.5
            )
            for row in line:
                if row["lambda"]:
                    at = (row["fluency"], row["judge"])
                    where = {"xytext": (-4, 3), "ha": "right"} if method == RECOMMENDED else {"xytext": (4, -9)}
                    axis.annotate(
                        f"{row['lambda']:g}", at, **where, textcoords="offset points", fontsize=6, color=color
                    )
    plain = [row for row in rows if row["method"] == UNSTEERED]
    axis.plot([row["fluency"] for row in plain], [row["judge"] for row in plain], "k.", label="unsteered, T 0.3 to 1.3")
    axis.set_xscale("log")
    axis.set_xticks([0.7, 1, 1.5, 2, 3, 5])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.axvline(1, color="k", lw=0.5, ls=":")
    axis.set_ylim(0, 1)
    axis.set_xlabel("base perplexity × unsteered at equal entropy")
    axis.set_ylabel("style: the judge's probability")
    axis.grid(alpha=0.25)
