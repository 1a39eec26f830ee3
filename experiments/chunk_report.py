"""Tables and pictures of chunk selection, drawn from results alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.report import markdown
from ngram.storage import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_SCORERS = ("adapter", "pooled", "recent", "true attention")
_SHARES = ("0.25", "0.5")


def write_training(results: Mapping[str, Any], out: Path) -> str:
    """Writes a training's training.json and training.png; its table as text."""
    write_atomically(out / "training.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    _draw_training(results, out / "training.png")
    return training_table(results)


def training_table(results: Mapping[str, Any]) -> str:
    """What held-out text says of a training, as Markdown."""
    shares = [f"attention lost with {100 * float(share):g} % of the tokens, %" for share in _SHARES]
    lines = [["chunks ranked by", "KL, nats", *shares]]
    means = results["held_out"]["mean"]
    for name in _SCORERS:
        lost = [f"{100 * means[name][f'missing_at_{share}']:.2f}" for share in _SHARES]
        lines.append([name, f"{means[name]['divergence']:.4f}", *lost])
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
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    loss, boundary, lost, layers = axes.flat
    for axis, key in ((loss, "distillation"), (boundary, "boundary")):
        axis.plot(tokens, [record[key] for record in history], color="C0", alpha=0.4, lw=1, label="learnt from")
    loss.plot(
        tokens[at], [held["mean"]["adapter"]["divergence"] for held in judged], "o-", color="C0", label="held out"
    )
    _level(loss, results["held_out"]["mean"]["pooled"]["divergence"], "C1", "pooled, held out")
    loss.set(title="Chunk attention: KL, mean of layers", ylabel="nats")
    boundary.set(title="Boundaries: cross-entropy, and F1 on held-out text", ylabel="nats")
    f1 = boundary.twinx()
    f1.plot(tokens[at], [100 * held["detector"]["f1"] for held in judged], "o-", color="C2")
    f1.set_ylabel("F1, %", color="C2")
    for share, style in zip(_SHARES, ("-", "--"), strict=True):
        key = f"missing_at_{share}"
        label = f"adapter, {100 * float(share):g} % kept"
        lost.plot(tokens[at], [100 * held["mean"]["adapter"][key] for held in judged], f"o{style}", label=label)
        for i, name in enumerate(_SCORERS[1:], start=1):
            _level(
                lost, 100 * results["held_out"]["mean"][name][key], f"C{i + 1}", name if style == "-" else None, style
            )
    lost.set(title="Held out: full attention that is lost", ylabel="%", ylim=(0, None))
    for i, name in enumerate(_SCORERS):
        values = results["held_out"]["by_layer"][name][f"missing_at_{_SHARES[0]}"]
        layers.plot([100 * value for value in values], "o-", ms=3, color=f"C{i + 1 if i else 0}", label=name)
    layers.set(
        title=f"The same by layer, {100 * float(_SHARES[0]):g} % kept", ylabel="%", xlabel="layer", ylim=(0, None)
    )
    for axis in (loss, boundary, lost):
        axis.set_xlabel("tokens learnt from, millions")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _level(axis: Any, value: float, color: str, label: str | None, style: str = "--") -> None:
    axis.axhline(value, color=color, ls=style, lw=1, label=label)
