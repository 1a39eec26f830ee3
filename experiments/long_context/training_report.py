"""Tables and pictures of chunk selection, drawn from results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkllm.selection import divide, layer_weights
from experiments.lab.pictures import plt, save
from experiments.lab.tables import markdown
from ngram.storage import write_atomically

_SCORERS = ("adapter", "pooled", "recent", "true attention")
_COLORS = dict(zip(_SCORERS, ("C0", "C1", "C3", "C2"), strict=True))
_SHARES = ("0.25", "0.5")


def write_training(results: Mapping[str, Any], out: Path) -> str:
    """Writes a training's training.json, results.md and training.png; its table as text."""
    text = training_table(results)
    write_atomically(out / "training.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    _draw_training(results, out / "training.png")
    write_atomically(out / "results.md", text.encode())
    return text


def training_table(results: Mapping[str, Any]) -> str:
    """What held-out text says of a training, as Markdown."""
    shares = [f"attention lost with {100 * float(share):g} % of the tokens, %" for share in _SHARES]
    lines = [["chunks ranked by", "KL, nats", *shares]]
    rows = {name: results["held_out"]["mean"][name] for name in _SCORERS}
    for width, other in results["widths"].items():
        rows[f"adapter of width {width}"] = other["held_out"]["mean"]["adapter"]
    for name, means in rows.items():
        lost = [f"{100 * means[f'missing_at_{share}']:.2f}" for share in _SHARES]
        lines.append([name, f"{means['divergence']:.4f}", *lost])
    detector = [f"{key} {100 * value:.1f} %" for key, value in results["held_out"]["detector"].items()]
    return markdown(lines) + f"\nBoundaries, at probability {results['threshold']:g}: {', '.join(detector)}\n"


def rounded(figures: Any, digits: int = 4) -> Any:
    """Numbers in nested dictionaries, rounded."""
    if isinstance(figures, Mapping):
        return {key: rounded(value, digits) for key, value in figures.items()}
    return round(figures, digits)


def _draw_training(results: Mapping[str, Any], path: Path) -> None:
    history = results["history"]
    tokens = np.arange(1, len(history) + 1) * results["options"]["reading"]["context"] / 1e6
    at = [i for i, record in enumerate(history) if "held_out" in record]
    judged = [history[i]["held_out"] for i in at]
    figure, axes = plt.subplots(2, 3, figsize=(16, 7), layout="constrained")
    loss, boundary, damage, lost, layers, budgets = axes.flat
    for axis, key in ((loss, "distillation"), (boundary, "boundary")):
        values = np.array([record[key] for record in history])
        axis.plot(tokens, values, color=_COLORS["adapter"], alpha=0.25, lw=1)
        axis.plot(tokens, _smoothed(values), color=_COLORS["adapter"], lw=1.5, label="learnt from, smoothed")
    divergences = [held["mean"]["adapter"]["divergence"] for held in judged]
    loss.plot(tokens[at], divergences, "o--", color=_COLORS["adapter"], label="held out")
    _level(loss, results["held_out"]["mean"]["pooled"]["divergence"], _COLORS["pooled"], "pooled, held out")
    loss.set(title="Chunk attention: KL, mean of layers", ylabel="nats", ylim=(0, None))
    boundary.set(title="Boundaries: cross-entropy, and F1 on held-out text", ylabel="nats", ylim=(0, None))
    f1 = boundary.twinx()
    f1.plot(tokens[at], [100 * held["detector"]["f1"] for held in judged], "o--", color="C4")
    f1.set_ylabel("F1, %", color="C4")
    f1.set_ylim(0, 100)
    for share, style in zip(_SHARES, ("-", "--"), strict=True):
        key, label = f"missing_at_{share}", f"{100 * float(share):g} % kept"
        by_epoch = [100 * held["mean"]["adapter"][key] for held in judged]
        lost.plot(tokens[at], by_epoch, f"o{style}", color=_COLORS["adapter"], label=f"adapter, {label}")
        for name in _SCORERS[1:]:
            value = 100 * results["held_out"]["mean"][name][key]
            _level(lost, value, _COLORS[name], f"{name}, {label}", style)
    lost.set(title="Held out: full attention that is lost", ylabel="%", ylim=(0, None))
    for name in _SCORERS:
        by_layer = results["held_out"]["by_layer"][name][f"missing_at_{_SHARES[0]}"]
        layers.plot([100 * value for value in by_layer], "o-", ms=3, color=_COLORS[name], label=name)
    layers.set(
        title=f"The same by layer, {100 * float(_SHARES[0]):g} % kept", ylabel="%", xlabel="layer", ylim=(0, None)
    )
    sensitivity = results["sensitivity"]
    damage.semilogy(np.maximum(sensitivity, 1e-7), "o-", ms=3, color="C5")
    damage.set(title="Next tokens' KL when a layer alone selects, 25 % kept", ylabel="nats", xlabel="layer")
    context = results["options"]["reading"]["context"]
    for share in _SHARES:
        on_average, most = torch.tensor([round(float(share) * context)]), torch.tensor([context])
        tokens_of = divide(on_average, layer_weights(sensitivity), most)[0].numpy()
        label = f"{100 * float(share):g} % kept"
        budgets.plot(100 * tokens_of / context, "o-", ms=3, label=label)
    budgets.set(title="So a budget is divided by layer", ylabel="tokens kept, %", xlabel="layer", ylim=(0, 105))
    for axis in (loss, boundary, lost):
        axis.set_xlabel("tokens learnt from, millions")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in (loss, layers, budgets):
        axis.legend(fontsize=8, frameon=False)
    boundary.legend(fontsize=8, frameon=False, loc="center right")
    lost.set_ylim(0, 1.45 * lost.get_ylim()[1])  # lines cross the whole width: room for the legend above them
    lost.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    save(figure, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, about a fortieth of all to either side, fewer at the ends."""
    reach = len(values) // 40
    sums = np.concatenate(([0.0], values.cumsum()))
    place = np.arange(len(values))
    first, stop = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return (sums[stop] - sums[first]) / (stop - first)


def _level(axis: Any, value: float, color: str, label: str | None, style: str = "--") -> None:
    axis.axhline(value, color=color, ls=style, lw=1, label=label)
