"""The lossless mode: how fast it writes, what was accepted, and whether texts are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.lab.figures import ratio_of
from figures import long_context
from figures.data import Row, figure, read, row, table

TEXTS = "long_context/lossless.json"
LONGER = ("long_context/lossless_qwen.json", "long_context/lossless_qwen_32k.json")
RANDOM = ("long_context/lossless_random.json", "long_context/lossless_random_120k.json")
_CONTEXTS = (8192, 32768, 120_000)
_ALWAYS = {"always drafting": "greedily", "always drafting, sampled": "sampled"}
_ATTENDED = ", by true attention"
_WAYS = ("lossless", "selected", "best dense")
_ON_TEXTS = ("lossless", "selected", "prompt lookup", "best dense")


def two_ways() -> str:
    """What one gets with and without ``verify``, first of all."""
    half = long_context.more_perplexity(long_context.BEST, 0.5)
    lossless = [faster(context) for context in _CONTEXTS]
    near = [long_context.faster("best dense", context).split()[0] for context in _CONTEXTS]
    heads = ["", "the text", *(f"behind {context:,} tokens" for context in _CONTEXTS)]
    lines = [
        heads,
        ["**lossless**: `ChunkSelection(verify=True)`", "the model's own, token for token", *lossless],
        ["**nearly lossless**: `ChunkSelection()`", f"perplexity {half} higher with half of the cache read", *near],
    ]
    return table(lines)


def faster(context: int | str) -> str:
    """The lossless mode's speed against the best dense attention, behind a random context."""
    context = int(context)
    file = next(file for file in RANDOM if context in {behind for _, behind in _groups(read(file))})
    return _speed(read(file), "random, batch 1", context, "lossless", "best dense").split()[0]


def on_texts(*files: str) -> str:
    """Behind each text: speeds against both dense ways, and whether what is written is full attention's."""
    lines = [["text", "way", "against default", "against best dense", "same text"]]
    for data in map(read, files or [TEXTS]):
        for text, context in _groups(data):
            lines += [[f"{text}, {context:,} tokens", way, *_line(data, text, context, way)] for way in _ON_TEXTS]
    return table(lines)


def accepted(*files: str) -> str:
    """Of seven drafted tokens at a time, how many were right."""
    shown = ["drafted tokens right", "tokens a pass"]
    lines = [["text", "written", *shown, *(f"{each}{_ATTENDED}" for each in shown)]]
    for data in map(read, files or [TEXTS]):
        for text, context in _groups(data):
            for way, label in _ALWAYS.items():
                found = [_record(data, text, context, each) for each in (way, way + _ATTENDED)]
                cells = [cell for each in found for cell in _accepted(each)]
                lines.append([f"{text}, {context:,} tokens", label, *cells])
    return table(lines)


def _accepted(found: Row) -> list[str]:
    return [f"{100 * found['acceptance']:.1f} %", f"{found['tokens'] / found['passes']:.1f}"]


def on_random() -> str:
    """Random weights, and an acceptance that was set."""
    lines = [["tokens in the cache", "way", "against default", "target", "against best dense", "target"]]
    for file in RANDOM:
        for text, context in _groups(read(file)):
            for way in _WAYS:
                cells = []
                for against in ("default", "best dense"):
                    speed = _speed(read(file), text, context, way, against)
                    cells += [speed, _goal(file, text, context, against) if way == "lossless" else ""]
                lines.append([f"{context:,}", way, *cells])
    return table(lines)


def _groups(data: Any) -> Sequence[tuple[str, int]]:
    return list(dict.fromkeys((each["text"], each["context"]) for each in data["records"]))


def _record(data: Any, text: str, context: int, way: str) -> Row:
    return row(data["records"], text=text, context=context, way=way)


def _line(data: Any, text: str, context: int, way: str) -> list[str]:
    found = _record(data, text, context, way)
    same = f"{found['same']} of {found['tokens']}" if found["same"] < found["tokens"] else "yes"
    return [*(_speed(data, text, context, way, base) for base in ("default", "best dense")), same]


def _speed(data: Any, text: str, context: int, way: str, base: str) -> str:
    if way == base:
        return ""
    times, others = (np.array(_record(data, text, context, each)["seconds"]) for each in (way, base))
    return ratio_of(others, times)[1]


def _goal(file: str, text: str, context: int, base: str) -> str:
    found = figure(file, f"{text}, {context:,} tokens: lossless, against {base}")
    missed = {True: "", False: ", missed", None: ""}[found["met"]]
    return found["target"] + missed
