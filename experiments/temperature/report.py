"""Tables and the picture of a temperature selector's evaluation, drawn from its results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoding.temperature.abilities import ABILITIES, NAMES
from experiments.lab.pictures import literal, plt, save
from experiments.lab.stats import Estimate
from experiments.lab.tables import markdown
from experiments.temperature.collect import sampler_name
from experiments.temperature.evaluate import DEFAULTS
from ngram.storage import write_atomically

# arXiv 2506.07295: accuracy over SuperGLUE at a default temperature, and with the selector.
PAPER_SUPERGLUE = {
    "Llama-3.2-1B": {0.1: (0.4474, 0.4526), 1.0: (0.4661, 0.4608)},
    "Llama-3-8B": {0.1: (0.6889, 0.6905), 1.0: (0.6831, 0.6941)},
    "Mixtral-8x7B": {0.1: (0.7444, 0.7436), 1.0: (0.7420, 0.7420)},
}


def write(results: Mapping[str, Any], out: Path) -> str:
    """Writes results.json, results.md and scores.png; the tables as text."""
    text = _tables(results)
    write_atomically(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    write_atomically(out / "results.md", text.encode())
    _draw(results, out / "scores.png")
    return text


def _tables(results: Mapping[str, Any]) -> str:
    parts = [_classification_table(results["classification"])]
    if "abilities" in results:
        parts += [
            _curve_table(results["abilities"]),
            _contest_table("Held-out prompts of the data sets trained on", results["abilities"]["held_out"]),
        ]
        if results["abilities"]["kept_out"]:
            parts.append(_contest_table("Data sets kept out of training", results["abilities"]["kept_out"]))
        if results["abilities"]["translation"]:
            parts.append(_translation_table(results["abilities"]["translation"]))
    if "superglue" in results:
        parts.append(_superglue_table(results["superglue"]))
    return "\n".join(parts)


def _classification_table(parts: Mapping[str, Any]) -> str:
    lines = [["prompts", "data set or wording", "ability", "number", "classified right, %"]]
    named = (("held out", "held_out"), ("data set kept out", "kept_out"), ("wording kept out", "wordings"))
    for name, part in ((name, parts[key]) for name, key in named if key in parts):
        for row in part["tasks"]:
            lines.append([name, row["task"], row["ability"], str(row["prompts"]), f"{100 * row['accuracy']:.1f}"])
        lines.append([f"**{name}**", "all prompts", "", "", f"**{100 * part['over_prompts']:.1f}**"])
        lines.append([f"**{name}**", "mean of abilities", "", "", f"**{100 * part['over_abilities']:.1f}**"])
        if "worst_task" in part:
            lines.append([f"**{name}**", "worst ability", "", "", f"**{100 * part['worst_ability']:.1f}**"])
            lines.append([f"**{name}**", "worst data set or wording", "", "", f"**{100 * part['worst_task']:.1f}**"])
    return "### Abilities told apart\n\n" + markdown(lines)


def _curve_table(part: Mapping[str, Any]) -> str:
    lines = [["ability", "data set", "prompts", *map(sampler_name, part["temperatures"]), "breaks between"]]
    for row in part["curves"]:
        points = [Estimate(**point).shown(100) for point in row["scores"]]
        broken = "–" if row["mutation"] is None else "{:g} and {:g}".format(*row["mutation"])
        lines.append([row["ability"], row["task"], str(row["prompts"]), *points, broken])
    return "### Score at each temperature, %\n\n" + markdown(lines)


def _contest_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    tasks = list(rows[0]["by_task"])
    lines = [["policy", "all", "gain over the best fixed", *tasks]]
    for row in rows:
        shares = [f"{100 * row['by_task'][task]:.1f}" for task in tasks]
        lines.append([row["policy"], Estimate(**row["all"]).shown(100), Estimate(**row["gain"]).shown(100), *shares])
    return f"### {title}: share of each ability's best, %\n\n" + markdown(lines)


def _translation_table(part: Mapping[str, Mapping[str, float]]) -> str:
    lines = [["NTREX, all prompts", *part]]
    for key, title in (("chrf", "chrF"), ("bleu", "BLEU over the model's own pieces")):
        lines.append([title, *(f"{scores[key]:.1f}" for scores in part.values())])
    return "### Translation\n\n" + markdown(lines)


def _superglue_table(part: Mapping[str, Any]) -> str:
    names = list(part["rows"][0]["accuracy"])
    lines = [["task", "questions", *names]]
    for row in part["rows"]:
        shown = [Estimate(**row["accuracy"][name]).shown(1, 3) for name in names]
        lines.append([row["task"], str(row["questions"]), *shown])
    default = [["model", *(f"T={t:g} → selector" for t in DEFAULTS)]]
    for model, by_default in PAPER_SUPERGLUE.items():
        default.append([f"{model} (paper)", *("{:.4f} → {:.4f}".format(*by_default[t]) for t in DEFAULTS)])
    means = {name: part["rows"][-1]["accuracy"][name]["mean"] for name in names}
    for policy in names[len(DEFAULTS) :]:
        changes = [f"{means[sampler_name(t)]:.4f} → {means[policy]:.4f}" for t in DEFAULTS]
        default.append([f"{part['model']} (ours, {policy})", *changes])
    return "### SuperGLUE, accuracy\n\n" + markdown(lines) + "\n" + markdown(default)


def _draw(results: Mapping[str, Any], path: Path) -> None:
    if "abilities" not in results:
        return
    part = results["abilities"]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
    for axis, ability in zip(axes.flat, ABILITIES, strict=True):
        for i, row in enumerate(row for row in part["curves"] if row["ability"] == ability):
            points = [Estimate(**point) for point in row["scores"]]
            at = part["temperatures"]
            axis.plot(at, [100 * p.mean for p in points], "o-", ms=4, color=f"C{i}", label=literal(row["task"]))
            bounds = ([100 * p.low for p in points], [100 * p.high for p in points])
            axis.fill_between(at, *bounds, color=f"C{i}", alpha=0.15, lw=0)
            if row["mutation"]:
                axis.axvspan(*row["mutation"], ymin=0.02 * i, ymax=0.02 * i + 0.02, color=f"C{i}", lw=0)
        axis.set_title(f"{ability}: {NAMES[ability]}", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("temperature")
    for axis in axes[:, 0]:
        axis.set_ylabel("score, %")
    title = f"{part['model']}: score over temperature, 95 % intervals; bars mark where it breaks"
    figure.suptitle(literal(title), fontsize=11)
    save(figure, path)
