"""Long contexts in vLLM: what reading blocks costs (long_context/vllm.json), and how fast it is."""

from __future__ import annotations

import numpy as np

from experiments.lab.figures import ratio_of
from experiments.lab.tables import plus_minus
from figures.data import Row, figure, read, row, table
from figures.long_context import BEST, text_row

BENCH = "bench_vllm_long_context.json"
BLOCKS = "adapter, by layer, in vLLM, blocks of 32"


def kept() -> str:
    """Chunks in transformers against blocks in vLLM."""
    heads = ["chunks, in transformers: perplexity", "KL", "blocks of 32, in vLLM: perplexity", "KL"]
    lines = [["tokens read", *heads]]
    for share in (0.75, 0.5, 0.25):
        blocks = row(read("long_context/vllm.json")["rows"], method=BLOCKS, retention=share)
        lines.append([f"{100 * share:g} %", *_pair(text_row(BEST, share)), *_pair(blocks)])
    return table(lines)


def _pair(each: Row) -> list[str]:
    moved = plus_minus(each["divergence"], each["divergence_error"], 2, 1e3)
    return [plus_minus(each["ratio"], each["ratio_error"], 4), moved]


def speed() -> str:
    """Tokens per second against vLLM without, by context and batch."""
    heads = ["batch 4: tokens per second, against vLLM without", "target", "a lone request", "target"]
    lines = [["tokens in the cache", *heads]]
    for context in (4096, 8192, 32_768):
        cells = [cell for batch in (4, 1) for cell in (_cell(batch, context), _found(batch, context)["target"])]
        lines.append([f"{context:,}", *cells])
    return table(lines)


def faster(batch: int | str, context: int | str) -> str:
    """The median of the turns' ratios with its quartiles."""
    return _ratio(batch, context, "selected")


def at_most(batch: int | str, context: int | str) -> str:
    """What attention for nothing would give."""
    return _ratio(batch, context, "short").split()[0]


def _cell(batch: int, context: int) -> str:
    missed = ": missed" if _found(batch, context)["met"] is False else ""
    return f"{faster(batch, context)}, at most {at_most(batch, context)}{missed}"


def _found(batch: int, context: int) -> Row:
    what = f"{context:,} tokens, batch {batch}: tokens per second with selection, against vLLM without"
    return figure(BENCH, what)


def _ratio(batch: int | str, context: int | str, kind: str) -> str:
    seconds = read(BENCH)["seconds_of_steps"][f"batch {batch}, {context}"]
    return ratio_of(np.array(seconds["stock"]), np.array(seconds[kind]))[1]
