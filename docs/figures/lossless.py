"""The lossless mode: how fast it writes, what was accepted, and whether texts are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.lab.figures import ratio_of
from figures import long_context
from figures.data import Row, figure, read, row, table

TEXTS = ("long_context/lossless.json", "long_context/lossless_qwen.json")
RANDOM = "long_context/lossless_random.json"
_CONTEXTS = (8192, 32768, 120_000)
_WAYS = ("lossless", "selected", "prompt lookup", "best dense")


def two_ways() -> str:
    """What one gets with and without ``verify``, first of all."""
    half = long_context.more_perplexity(long_context.BEST, 0.5)
    lossless = [_random_speed(context) for context in _CONTEXTS]
    near = [long_context.faster("best dense", context).split()[0] for context in _CONTEXTS]
    heads = ["", "the text", *(f"behind {context:,} tokens" for context in _CONTEXTS)]
    lines = [
        heads,
        ["**lossless**: `ChunkSelection(verify=True)`", "the model's own, token for token", *lossless],
        ["**nearly lossless**: `ChunkSelection()`", f"perplexity {half} higher with half of the cache read", *near],
    ]
    return table(lines)


def _random_speed(context: int) -> str:
    return _speed(read(RANDOM), "random, batch 1", context, "lossless", "best dense").split()[0]


def on_texts() -> str:
    """Each text behind which a model wrote: speeds against both dense ways, acceptance, equality."""
    heads = ["model, text, tokens", "way", "against default", "against best dense", "drafted tokens right", "same text"]
    lines = [heads]
    for file in TEXTS:
        data = read(file)
        for text, context in _groups(data):
            label = f"{data['model']}, {text}, {context:,}"
            lines += [[label, way, *_line(data, text, context, way)] for way in _WAYS]
    return table(lines)


def on_random() -> str:
    """Random weights, and an acceptance that was set."""
    data = read(RANDOM)
    lines = [["tokens in the cache", "way", "against default", "target", "against best dense", "target"]]
    for text, context in _groups(data):
        for way in _WAYS:
            if way == "prompt lookup":
                continue
            cells = [_speed(data, text, context, way, against) for against in ("default", "best dense")]
            goals = (
                ["", ""] if way != "lossless" else [_goal(text, context, each) for each in ("default", "best dense")]
            )
            lines.append([f"{context:,}", way, cells[0], goals[0], cells[1], goals[1]])
    return table(lines)


def against(where: str, text: str, context: str, base: str) -> str:
    """The lossless mode's speed against another way's, with its quartiles."""
    return _speed(read(f"long_context/{where}.json"), text, int(context), "lossless", base)


def acceptance(where: str, text: str, context: str, way: str = "lossless") -> str:
    """Of drafted tokens the right ones, in per cent."""
    return f"{100 * _record(read(f'long_context/{where}.json'), text, int(context), way)['acceptance']:.1f} %"


def _groups(data: Any) -> Sequence[tuple[str, int]]:
    return list(dict.fromkeys((each["text"], each["context"]) for each in data["records"]))


def _record(data: Any, text: str, context: int, way: str) -> Row:
    return row(data["records"], text=text, context=context, way=way)


def _line(data: Any, text: str, context: int, way: str) -> list[str]:
    found = _record(data, text, context, way)
    right = "" if found["acceptance"] is None else f"{100 * found['acceptance']:.1f} %"
    same = f"{found['same']} of {found['tokens']}" if found["same"] < found["tokens"] else "yes"
    speeds = [_speed(data, text, context, way, base) for base in ("default", "best dense")]
    return [*speeds, right, same]


def _speed(data: Any, text: str, context: int, way: str, base: str) -> str:
    if way == base:
        return ""
    times, others = (np.array(_record(data, text, context, each)["seconds"]) for each in (way, base))
    return ratio_of(others, times)[1]


def _goal(text: str, context: int, base: str) -> str:
    found = figure(RANDOM, f"{text}, {context:,} tokens: lossless, against {base}")
    missed = {True: "", False: ", missed", None: ""}[found["met"]]
    return found["target"] + missed
