"""Chunk selection: what it keeps (long_context), and how fast it is (bench_long_context.json)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from chunkllm.selection import layer_weights
from experiments.lab.figures import ratio_of
from experiments.lab.tables import plus_minus
from figures.data import Row, bench_line, figure, read, row, table

RESULTS, TRAINING, BENCH = "long_context/results.json", "long_context/training.json", "bench_long_context.json"
CALIBRATED, CALIBRATION = "long_context/calibrated.json", "long_context/calibration.json"
BEST = "adapter, by layer"
_FEW = (BEST, "fixed chunks (FixLLM)", "pages (Quest)", "sinks + recent (StreamingLLM)")
_EVEN = ("adapter", "adapter at every token", "adapter, one vote", "pooled", *_FEW[1:])
_ALL = (BEST, "pooled, by layer", "sinks + recent, by layer", *_EVEN)
SHOWN: Mapping[float, tuple[str, ...]] = {
    1.0: ("full attention",),
    0.75: _FEW,
    0.5: (*_ALL, "kvpress SnapKVPress", "random chunks"),
    0.25: (*_ALL, "random chunks"),
}


def ranked() -> str:
    """How much attention is lost by what chunks are ranked by."""
    data = read(TRAINING)
    means = {name: part["held_out"]["mean"]["adapter"] for name, part in data["widths"].items()}
    mean = data["held_out"]["mean"]
    width = data["options"]["width"]
    rows = {
        "the most recent": mean["recent"],
        "pooled: mean and variance of the keys, no training": mean["pooled"],
        "adapter of width 0: gains alone": means["0"],
        "adapter of width 8": means["8"],
        f"**adapter of width {width}**": mean["adapter"],
        "true attention of the next chunk, in hindsight": mean["true attention"],
    }
    lines = [["chunks ranked by", "lost at 25 % kept, %", "at 50 %, %", "KL, nats"]]
    for label, each in rows.items():
        lost = [f"{100 * each[f'missing_at_{kept}']:.2f}" for kept in (0.25, 0.5)]
        lines.append([label, *lost, f"{each['divergence']:.3f}"])
    return table(lines)


def kept() -> str:
    """Perplexity, divergence, agreement, attention and passkeys of each method at each share kept."""
    heads = ["perplexity, × full attention's", "KL from it, 10⁻³ nats", "same next token, %"]
    lines = [["kept", "method", *heads, "attention held, %", "passkeys found, %"]]
    lines += [_line(kept, method) for kept, methods in SHOWN.items() for method in methods]
    return table(lines)


def calibrated() -> str:
    """Budgets by a calibration against even ones, for a model without adapters."""
    data = read(CALIBRATED)
    heads = ["perplexity, × full attention's", "KL from it, 10⁻³ nats", "same next token, %", "attention held, %"]
    lines = [["kept", "budgets of layers", *heads]]
    for kept in sorted(data["settings"]["retentions"], reverse=True):
        for method, label in (("pooled, by layer", "**by a calibration**"), ("pooled", "even")):
            each = row(data["text"], method=method, retention=kept)
            lines.append([f"{100 * kept:g} %", label, *_figures(each), _held(each)])
    return table(lines)


def moved(method: str, kept: str) -> str:
    """KL from full attention of the model that was calibrated, in 10⁻³ nats."""
    return f"{1e3 * row(read(CALIBRATED)['text'], method=method, retention=float(kept))['divergence']:.0f}"


def most_sensitive() -> str:
    """Layers whose share of a calibrated budget is above twice the average, by name."""
    config = read(CALIBRATION)
    weights = layer_weights(config["sensitivity"])
    shares = zip(config["shape"]["full_layers"], weights / weights.mean(), strict=True)
    layers = [str(layer) for layer, share in shares if share > 2]
    return f"{', '.join(layers[:-1])} and {layers[-1]}"


def text_row(method: str, kept: float | str) -> Row:
    """What one method did to held-out text."""
    rows = [*read(RESULTS)["text"], *read("long_context/kvpress.json")["rows"]]
    return row(rows, method=method, retention=float(kept))


def _line(kept: float, method: str) -> list[str]:
    each = text_row(method, kept)
    judged_elsewhere = method.startswith("kvpress")
    return [
        f"{100 * kept:g} %",
        f"**{method}**" if method == BEST else method,
        *_figures(each),
        "not measured" if judged_elsewhere else _held(each),
        "not measured" if judged_elsewhere else passkeys(method, kept),
    ]


def _figures(each: Row) -> list[str]:
    return [
        plus_minus(each["ratio"], each["ratio_error"], 4),
        plus_minus(each["divergence"], each["divergence_error"], 2, 1e3),
        f"{100 * each['agreement']:.1f}",
    ]


def _held(each: Row) -> str:
    return "100" if each["retention"] == 1 else f"{100 * each['recall']:.1f}"


def passkeys(method: str, kept: float | str) -> str:
    """Found, in per cent."""
    return f"{100 * np.mean(row(read(RESULTS)['passkey'], method=method, retention=float(kept))['found']):.0f}"


def more_perplexity(method: str, kept: float | str) -> str:
    """Than full attention's, in per cent."""
    return f"{100 * (text_row(method, kept)['ratio'] - 1):.1f} %"


def divergence(method: str, kept: str) -> str:
    """From full attention, in 10⁻³ nats."""
    return f"{1e3 * text_row(method, kept)['divergence']:.2f}"


def speed() -> str:
    """Steps per second against both dense ways, from the rounds' seconds."""
    lines = [["tokens in the cache", "against default", "target", "against best dense", "target"]]
    for context in (8192, 32768, 120_000):
        line = [f"{context:,}"]
        for name in ("default", "best dense"):
            found = figure(BENCH, f"{context:,} tokens: steps per second with selection, against {name}")
            line += bench_line("", found, faster(name, context))[1:]
        lines.append(line)
    return table(lines)


def faster(name: str, context: int | str) -> str:
    """Steps per second with selection against one of the dense ways."""
    return ratio_of(_seconds(name, context), _seconds("selected", context))[1]


def _seconds(name: str, context: int | str) -> np.ndarray:
    return np.array(read(BENCH)["seconds_per_step"][f"{name}, batch 1, {context}"])


def costs() -> str:
    """What else was measured of speed and memory."""
    growth = figure(BENCH, "a step with selection at 120,000 tokens, against 8,192")
    reading = "reading a prompt of 4,096 tokens and one step more, attached against not"
    offload = "offload at 120,000 tokens: selected keys and values and chunk features on the device, of all"
    on_device = "offload at 120,000 tokens: on the device, of all keys and values (counted)"
    lines = [
        ["", "measured", "target"],
        bench_line(growth["what"], growth, ratio_of(_seconds("selected", 120_000), _seconds("selected", 8192))[1]),
        bench_line(reading, figure(BENCH, reading)),
        bench_line(on_device, figure(BENCH, offload)),
    ]
    return table(lines)
