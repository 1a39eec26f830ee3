"""Long contexts in vLLM: what reading blocks costs (long_context/vllm.json), and how fast it is."""

from __future__ import annotations

import numpy as np

from experiments.lab.figures import ratio_of
from experiments.lab.tables import plus_minus
from figures.data import Row, figure, read, row, table
from figures.long_context import BEST, text_row

BENCH, AGAIN = "bench_vllm_long_context.json", "bench_vllm_8k.json"
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
    lines = [["tokens in the cache", "batch 4: tokens per second, against vLLM without", "batch 1", "target"]]
    for context in (4096, 8192, 16_384, 32_768):
        found = [_found(BENCH, batch, context) for batch in (4, 1)]
        cells = [_cell(BENCH, batch, context) for batch in (4, 1)]
        lines.append([f"{context:,}", *cells, found[0]["target"]])
    return table(lines)


def again() -> str:
    """8,192 tokens, measured again in more and shorter turns."""
    lines = [["tokens in the cache", "batch 4: tokens per second, against vLLM without", "batch 1", "target"]]
    cells = [_cell(AGAIN, batch, 8192) for batch in (4, 1)]
    return table([*lines, ["8,192", *cells, _found(AGAIN, 4, 8192)["target"]]])


def faster(batch: int | str, context: int | str, file: str = BENCH) -> str:
    """The median of the turns' ratios with its quartiles."""
    return _ratio(file, batch, context, "selected")


def at_most(batch: int | str, context: int | str, file: str = BENCH) -> str:
    """What attention for nothing would give."""
    return _ratio(file, batch, context, "short").split()[0]


def _cell(file: str, batch: int, context: int) -> str:
    missed = ": missed" if _found(file, batch, context)["met"] is False else ""
    return f"{faster(batch, context, file)}, at most {at_most(batch, context, file)}{missed}"


def _found(file: str, batch: int, context: int) -> Row:
    what = f"{context:,} tokens, batch {batch}: tokens per second with selection, against vLLM without"
    return figure(file, what)


def _ratio(file: str, batch: int | str, context: int | str, kind: str) -> str:
    seconds = read(file)["seconds_of_steps"][f"batch {batch}, {context}"]
    return ratio_of(np.array(seconds["stock"]), np.array(seconds[kind]))[1]
