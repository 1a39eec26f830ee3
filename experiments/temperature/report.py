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
from experiments.temperature.contest import DEFAULTS
from experiments.temperature.samplers import sampler_name
from ngram.storage import write_atomically

# arXiv 2506.07295: accuracy over SuperGLUE at a default temperature, and with the selector.
PAPER_SUPERGLUE = {
    "Llama-3.2-1B": {0.1: (0.4474, 0.4526), 1.0: (0.4661, 0.4608)},
    "Llama-3-8B": {0.1: (0.6889, 0.6905), 1.0: (0.6831, 0.6941)},
    "Mixtral-8x7B": {0.1: (0.7444, 0.7436), 1.0: (0.7420, 0.7420)},
}


def write(data: Mapping[str, Any], results: Mapping[str, Any], out: Path) -> str:
    """Writes scores.json (what was measured), results.json, results.md and scores.png; the tables as text."""
    text = markdown_of(results)
    for name, content in (("scores.json", data), ("results.json", results)):
        indent = 1 if name == "results.json" else None
        write_atomically(out / name, json.dumps(content, indent=indent, ensure_ascii=False).encode())
    write_atomically(out / "results.md", text.encode())
    if any(model["curves"] for model in results["models"]):
        _draw(results["models"], out / "scores.png")
    return text


def markdown_of(results: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [_classification_table(kind, part) for kind, part in results["classification"].items()]
    if results["together"]:
        parts.append(_contest_table("All models together, prompts held out", results["together"]))
    for model in results["models"]:
        parts += _of_model(model)
    return "\n".join(parts)


_CONTESTS = {
    "held_out": "prompts held out",
    "held_out_without_creativity": "prompts held out, without creativity",
    "kept_out": "data sets kept out of training",
}


def _of_model(model: Mapping[str, Any]) -> list[str]:
    parts = [f"## {model['model']}\n\n{model['dtype']}, top-p {model['top_p']:g}, {model['seeds']} text(s) a prompt.\n"]
    if model["curves"]:
        parts.append(_curve_table(model))
    for key, title in _CONTESTS.items():
        if model[key]:
            prompts = ", ".join(f"{task} {count}" for task, count in model[f"{key}_prompts"].items())
            parts.append(_contest_table(f"{model['model']}, {title} ({prompts})", model[key]))
    if model["translation"]:
        parts.append(_translation_table(model["translation"]))
    if model["superglue"]:
        parts += [_accuracy_table("SuperGLUE, accuracy", model["superglue"]), markdown(superglue_lines([model]))]
    if model["others"]:
        parts.append(_accuracy_table("Tasks without an ability, mean score", model["others"]))
    return parts


def _classification_table(kind: str, part: Mapping[str, Any]) -> str:
    lines = [["prompts", "ability", "number", "told right, %"]]
    lines += [
        [row["task"], row["ability"], str(row["prompts"]), f"{100 * row['accuracy']:.1f}"] for row in part["tasks"]
    ]
    lines += [["**all prompts**", "", "", f"**{100 * part['over_prompts']:.1f}**"]]
    for ability, share in part["by_ability"].items():
        lines.append([f"**{NAMES[ability]}**", ability, "", f"**{100 * share:.1f}**"])
    lines += [["**mean of abilities**", "", "", f"**{100 * part['over_abilities']:.1f}**"]]
    return f"### Abilities told apart: {kind}\n\n" + markdown(lines)


def _curve_table(model: Mapping[str, Any]) -> str:
    lines = [["ability", "data set", "prompts", *map(sampler_name, model["temperatures"]), "breaks between"]]
    for row in model["curves"]:
        points = [Estimate(**point).shown(100) for point in row["scores"]]
        broken = "–" if row["mutation"] is None else "{:g} and {:g}".format(*row["mutation"])
        lines.append([row["ability"], row["task"], str(row["prompts"]), *points, broken])
    return "### Score at each temperature, %\n\n" + markdown(lines)


def _contest_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    abilities = list(rows[0]["by_ability"])
    gains = ["over the best fixed by training", "over the best fixed in hindsight", "worst ability, over the former"]
    lines = [["policy", "share", *gains, *abilities]]
    for row in rows:
        shares = [f"{100 * row['by_ability'][ability]:.1f}" for ability in abilities]
        estimates = [Estimate(**row[key]).shown(100) for key in ("all", "gain", "gain_in_hindsight")]
        worst = f"{100 * row['worst']['gain']:.1f} {row['worst']['ability']}"
        lines.append([", ".join(filter(None, (row["policy"], row["setting"]))), *estimates, worst, *shares])
    return f"### {title}: share of each task's best, %\n\n" + markdown(lines)


def _translation_table(part: Mapping[str, Mapping[str, float]]) -> str:
    lines = [["NTREX, all prompts", *part]]
    for key, title in (("chrf", "chrF"), ("bleu", "BLEU over the model's own pieces")):
        lines.append([title, *(f"{scores[key]:.1f}" for scores in part.values())])
    return "### Translation\n\n" + markdown(lines)


def _accuracy_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0]["accuracy"])
    lines = [["task", "questions", *names]]
    for row in rows:
        shown = [Estimate(**row["accuracy"][name]).shown(100) for name in names]
        lines.append([row["task"], str(row["questions"]), *shown])
    gains = [["gain over all questions, points", *next(iter(rows[-1]["gain"].values()))]]
    for policy, by_fixed in rows[-1]["gain"].items():
        gains.append([policy, *(Estimate(**gain).shown(100) for gain in by_fixed.values())])
    return f"### {title}, %\n\n" + markdown(lines) + "\n" + markdown(gains)


def superglue_lines(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The paper's accuracies over SuperGLUE, then those of models: a line for each selector's policy."""
    lines = [["model", *(f"T={t:g} → selector" for t in DEFAULTS)]]
    for name, by_default in PAPER_SUPERGLUE.items():
        lines.append([f"{name} (paper)", *("{:.4f} → {:.4f}".format(*by_default[t]) for t in DEFAULTS)])
    for model in models:
        total = model["superglue"][-1]
        means = {name: each["mean"] for name, each in total["accuracy"].items()}
        for policy in total["gain"]:
            changes = [f"{means[sampler_name(t)]:.4f} → {means[policy]:.4f}" for t in DEFAULTS]
            lines.append([f"{model['model']} ({policy})", *changes])
    return lines


def _draw(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11, 8), layout="constrained")
    for axis, ability in zip(axes.flat, ABILITIES, strict=True):
        rows = [(model, row) for model in models for row in model["curves"] if row["ability"] == ability]
        for i, (model, row) in enumerate(rows):
            points = [Estimate(**point) for point in row["scores"]]
            at, label = model["temperatures"], literal(f"{row['task']}, {model['model']}")
            axis.plot(at, [100 * p.mean for p in points], "o-", ms=4, color=f"C{i}", label=label)
            bounds = ([100 * p.low for p in points], [100 * p.high for p in points])
            axis.fill_between(at, *bounds, color=f"C{i}", alpha=0.15, lw=0)
            if row["mutation"]:
                axis.axvspan(*row["mutation"], ymin=0.02 * i, ymax=0.02 * i + 0.02, color=f"C{i}", lw=0)
        axis.set_title(f"{ability}: {NAMES[ability]}", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        axis.set_xlabel("temperature")
    for axis in axes[:, 0]:
        axis.set_ylabel("score, %")
    figure.suptitle("Score over temperature, 95 % intervals; bars mark where it breaks", fontsize=11)
    save(figure, path)
