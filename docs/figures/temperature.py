"""Temperature selection: policies against each other, and abilities told apart."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.temperature.report import superglue_lines
from figures.data import Row, minus, points, read, row, table

RESULTS = "temperature/results.json"
LABELS: Mapping[str, str] = {
    "selector, ability (small)": "**selector, ability** (the paper's table)",
    "selector, curve": "**selector, curve** (the model's own scores)",
    "selector, through generate": "the same through `generate`, texts of their own",
}
PROMPTS: Mapping[str, str] = {
    "requests written apart": "requests written apart, by somebody who had not read ours",
    "requests written apart, below a system prompt in plain text": "the same below a system prompt in plain text",
    "wordings kept out": "wordings kept out, by the author of those learnt from",
    "prompts held out": "held out, of the data sets learnt from",
    "data sets kept out": "data sets kept out",
}


def gains() -> str:
    """Every policy's share of the best, and its gains over the best fixed temperatures."""
    gains = ["over the best fixed by training", "over the best fixed in hindsight"]
    lines = [["policy", "share, %", *gains, "worst ability"]]
    for each in read(RESULTS)["together"]:
        label = ", ".join(filter(None, (LABELS.get(each["policy"], each["policy"]), each["setting"])))
        shares = [share(each["policy"]), points(each["gain"]), points(each["gain_in_hindsight"])]
        lines.append([label, *shares, minus(f"{100 * each['worst']['gain']:.1f} {each['worst']['ability']}")])
    return table(lines)


def superglue() -> str:
    """Accuracy at default temperatures and with the selector, in the paper and here."""
    return table(superglue_lines(read(RESULTS)["models"]))


def abilities() -> str:
    """How well abilities are told apart, by where the prompts come from."""
    lines = [["prompts", "number", "mean of abilities, %", "worst ability, %", "worst wording or data set, %"]]
    for kind, label in PROMPTS.items():
        part = _told(kind)
        lowest = min(part["by_ability"], key=part["by_ability"].get)
        worst = f"{100 * part['worst_ability']:.1f} {lowest}"
        lines.append([label, prompts_told(kind), told(kind), worst, f"{100 * part['worst_task']:.0f}"])
    return table(lines)


def _told(kind: str) -> Row:
    return read(RESULTS)["classification"][kind]


def told(kind: str) -> str:
    """The mean of abilities, in per cent."""
    return f"{100 * _told(kind)['over_abilities']:.1f}"


def prompts_told(kind: str) -> str:
    """How many there are."""
    return f"{sum(each['prompts'] for each in _told(kind)['tasks']):,}"


def plain_text_costs() -> str:
    """How much a system prompt in plain text takes, in points."""
    apart, below = (f"requests written apart{end}" for end in ("", ", below a system prompt in plain text"))
    return f"{100 * (_told(apart)['over_abilities'] - _told(below)['over_abilities']):.1f}"


def share(policy: str) -> str:
    """Of the best, in per cent, over all models."""
    return f"{100 * row(read(RESULTS)['together'], policy=policy)['all']['mean']:.1f}"


def gain(policy: str) -> str:
    """Over the best fixed temperature that training names, in points, over all models."""
    return points(row(read(RESULTS)["together"], policy=policy)["gain"])


def gain_of(model: str, policy: str, prompts: str = "held_out") -> str:
    """The same for one model; ``prompts`` are held_out, held_out_without_creativity or kept_out."""
    return points(row(_model(model)[prompts], policy=policy)["gain"])


def most_lost(policy: str) -> str:
    """On the worst ability, in points."""
    return f"{-100 * row(read(RESULTS)['together'], policy=policy)['worst']['gain']:.1f}"


def over_default(model: str, policy: str, default: str) -> str:
    """The gain in accuracy over SuperGLUE against a default temperature, in points."""
    return points(_model(model)["superglue"][-1]["gain"][policy][default])


def _model(name: str) -> Row:
    return row(read(RESULTS)["models"], model=name)
