"""Tables and pictures of ``decoding chunk eval``, drawn from its finished cells alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab.cells import Cell
from experiments.lab.pictures import literal, plt, save
from experiments.lab.tables import markdown, plus_minus
from experiments.long_context.asked import EvalOptions, PasskeyCell, ShortCell, TextCell
from experiments.long_context.baselines import FULL, kept_of, kept_shown, limit_of
from experiments.long_context.suites import report as suites
from ngram.storage import write_atomically

_COLORS = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
Cells = Mapping[Cell, Mapping[str, Any]]


def write(
    cells: Cells, options: EvalOptions, settings: Mapping[str, Any], out: Path, others: Sequence[TextCell] = ()
) -> str:
    """Writes results.json, results.md and the pictures of what was measured; returns the tables as text.

    Args:
        cells: records.
        options: what was asked for.
        settings: of the run.
        out: its folder.
        others: methods that ran elsewhere.
    """
    content: dict[str, Any] = {"settings": settings}
    parts = []
    if ShortCell() in cells:
        content |= {"text": text_rows(cells, options), "short": cells[ShortCell()]}
        parts.append("### Held-out text\n\n" + markdown(_text_table(content["text"])))
        _draw_quality(content["text"], options, out / "quality.png")
        _draw_recall(content["text"], options, out / "recall.png")
    if options.passkeys:
        content["passkey"] = passkey_rows(cells, options)
        parts.append("### Passkeys found, %\n\n" + markdown(_passkey_table(content["passkey"], options)))
        _draw_passkeys(content["passkey"], options, out / "passkey.png")
    if rows := suites.rows(cells, [*options.compared, *others]):
        content |= {"tasks": rows, "lossless": suites.lossless_rows(cells), "cpu_hours": suites.hours(cells)}
        parts += suites.tables(rows, content["lossless"])
        suites.draw(rows, out / "tasks.png")
    if ShortCell() in cells:
        parts.append(_short_line(cells[ShortCell()]))
    text = "\n".join(parts)
    write_atomically(out / "results.json", json.dumps(content, indent=1, ensure_ascii=False).encode())
    write_atomically(out / "results.md", text.encode())
    return text


def _short_line(cell: Mapping[str, Any]) -> str:
    same = "the same bits" if cell["identical"] else "not the same bits"
    return (
        f"Texts of {cell['tokens']} tokens, within the default budget: perplexity {cell['perplexity']:.3f} without "
        f"selection, {cell['with_selection']:.3f} with ({same}).\n"
    )


def text_rows(cells: Cells, options: EvalOptions) -> list[dict[str, Any]]:
    """A row for every method and what it keeps: perplexity, its ratio to full attention's, agreement, recall."""
    base = np.array(cells[TextCell(FULL, 1.0)]["nll"])
    rows = []
    for compared in options.compared:
        method, cell = compared.method, cells[compared]
        losses = np.array(cell["nll"])
        more = (losses - base).mean(1)  # by text
        rows.append(
            {
                "method": method,
                **limit_of(compared.kept),
                "kv_retention": cell["kv_retention"],
                "perplexity": float(np.exp(losses.mean())),
                "ratio": float(np.exp(more.mean())),
                "ratio_error": None if method == FULL else _error(more),
                "divergence": 0.0 if method == FULL else float(np.mean(cell["divergence"])),
                "divergence_error": None if method == FULL else _error(np.mean(cell["divergence"], 1)),
                "agreement": 1.0 if method == FULL else float(np.mean(cell["agree"])),
                "recall": None if cell["recall"] is None else float(np.mean(cell["recall"])),
                "recall_by_layer": cell["recall"],
            }
        )
    return rows


def _error(values: np.ndarray) -> float | None:
    """Standard error of a mean over texts."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def passkey_rows(cells: Cells, options: EvalOptions) -> list[dict[str, Any]]:
    """Shares of keys found, a matrix of lengths by depths for every method and what it keeps."""
    rows = []
    for compared in options.compared:
        shares = [
            [
                float(np.mean(cells[PasskeyCell(length, i)]["hits"][compared.name]))
                for i in range(options.passkey_depths)
            ]
            for length in options.passkey_lengths
        ]
        rows.append({"method": compared.method, **limit_of(compared.kept), "found": shares})
    return rows


def _text_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = ["perplexity", "against full attention", "KL, 10⁻³ nats", "same next token, %", "attention held, %"]
    lines = [["kept", "method", *columns]]
    for row in rows:
        ratio = plus_minus(row["ratio"], row["ratio_error"], 4)
        moved = plus_minus(row["divergence"], row["divergence_error"], 2, 1e3)
        lines.append(
            [
                kept_shown(kept_of(row)),
                row["method"],
                f"{row['perplexity']:.3f}",
                ratio,
                moved,
                f"{100 * row['agreement']:.1f}",
                "100" if row["recall"] is None else f"{100 * row['recall']:.1f}",
            ]
        )
    return lines


def _passkey_table(rows: Sequence[Mapping[str, Any]], options: EvalOptions) -> list[list[str]]:
    lines = [["kept", "method", *(f"{length:,} tokens" for length in options.passkey_lengths), "all"]]
    for row in rows:
        by_length = [float(np.mean(shares)) for shares in row["found"]]
        figures = [f"{100 * share:.0f}" for share in (*by_length, float(np.mean(by_length)))]
        lines.append([kept_shown(kept_of(row)), row["method"], *figures])
    return lines


def _draw_quality(rows: Sequence[Mapping[str, Any]], options: EvalOptions, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.6), layout="constrained")
    measures = (
        ("perplexity above full attention, %", lambda row: 100 * (row["ratio"] - 1)),
        ("divergence from full attention (KL), nats", lambda row: row["divergence"]),
        ("same next token as full attention, %", lambda row: 100 * row["agreement"]),
        ("attention held by what is kept, %", lambda row: 100 * (1 if row["recall"] is None else row["recall"])),
    )
    full = next(row for row in rows if row["method"] == FULL)
    for axis, (title, value) in zip(axes.flat, measures, strict=True):
        is_logarithmic = title.startswith("divergence")
        ends = [] if is_logarithmic else [full]
        for i, method in enumerate(options.methods):
            line = sorted([row for row in rows if row["method"] == method] + ends, key=lambda row: row["kv_retention"])
            style = "-" if method.startswith("adapter") else "--" if method.startswith("pooled") else ":"
            x = [100 * row["kv_retention"] for row in line]
            axis.plot(x, [value(row) for row in line], f"o{style}", **_look(i, method), ms=4)
        if is_logarithmic:
            axis.set_yscale("log")
        else:
            shown = [value(row) for row in rows if not row["method"].startswith("random")]  # it would hide the others
            margin = 0.05 * (max(shown) - min(shown)) or 1.0
            axis.set_ylim(min(shown) - margin, max(shown) + margin)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("keys and values kept, %")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def _look(number: int, method: str) -> dict[str, Any]:
    return {"color": _COLORS[number % len(_COLORS)], "label": literal(method)}


def _draw_recall(rows: Sequence[Mapping[str, Any]], options: EvalOptions, path: Path) -> None:
    amounts = sorted({kept_of(row) for row in rows if row["recall_by_layer"]})
    size = (5 * len(amounts) + 1, 4)
    figure, axes = plt.subplots(1, max(len(amounts), 1), figsize=size, layout="constrained", squeeze=False)
    for axis, kept in zip(axes[0], amounts, strict=False):
        for i, method in enumerate(options.methods):
            row = next(row for row in rows if (row["method"], kept_of(row)) == (method, kept))
            axis.plot([100 * held for held in row["recall_by_layer"]], **_look(i, method), lw=1.2)
        axis.set_title(f"attention held, %, {kept_shown(kept)} kept", fontsize=10)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    if amounts:
        axes[0, 0].legend(fontsize=7)
    save(figure, path)


def _draw_passkeys(rows: Sequence[Mapping[str, Any]], options: EvalOptions, path: Path) -> None:
    amounts = sorted({kept_of(row) for row in rows if row["method"] != FULL})
    names = [FULL, *options.methods]
    grid: dict[str, Any] = {
        "figsize": (2.1 * len(names), 2 * len(amounts) + 0.6),
        "layout": "constrained",
        "squeeze": False,
    }
    figure, axes = plt.subplots(len(amounts), len(names), sharex=True, sharey=True, **grid)
    image = None
    for line, kept in zip(axes, amounts, strict=True):
        for axis, name in zip(line, names, strict=True):
            wanted = (name, 1.0 if name == FULL else kept)
            found = next(row["found"] for row in rows if (row["method"], kept_of(row)) == wanted)
            image = axis.imshow(np.array(found), vmin=0, vmax=1, cmap="cividis", aspect="auto")
            axis.set_yticks(
                range(len(options.passkey_lengths)), [f"{n:,}" for n in options.passkey_lengths], fontsize=8
            )
            last = options.passkey_depths - 1
            axis.set_xticks((0, last), ("first", "last"), fontsize=8)
        line[0].set_ylabel(f"{kept_shown(kept)} kept", fontsize=9)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(literal(name).replace(" (", "\n("), fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=axes, label="keys found", shrink=0.7)
    figure.supxlabel("place of the key", fontsize=9)
    figure.supylabel("tokens of the prompt", fontsize=9)
    save(figure, path)
