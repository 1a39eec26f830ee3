"""``decoding bench long-context``: how fast tokens are written behind long contexts, with selection and without.

Weights and contexts are random: speed does not depend on them. The context's keys and values are put in the cache
directly, so that no prompt need be read. Three paths write the same number of tokens behind it:

- *default*: what users have, `DynamicCache` and the model's own attention;
- *best dense*: a cache that grows in place, and attention that reads each key once for all query heads of its group;
- *selected*: `ChunkSelection` with adapters (untrained ones cost as much): boundary detection at every token, selection
  at every 20th.

``decoding bench gpu`` measures GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache

from chunkllm import ChunkAdapters, ChunkSelection
from chunkllm.models import cache_argument
from decoding.environment import environment
from experiments.lab.device import free
from experiments.lab.figures import Figure, interleaved, ratio_of, report
from experiments.lab.pictures import plt, save
from experiments.long_context.paths import DEFAULT, DENSE, SELECTED, filled

BUDGET = 2048
CHUNK = 20
PATHS = (DEFAULT, DENSE, SELECTED)
_CONTEXT_TARGETS = {8192: (1.5, 1.2), 32768: (4.0, 2.0), 120_000: (25.0, 5.0)}

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}
"""Of configurations; Llama's where no type is named."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        shape: a name of `SHAPES`.
        dtype: of weights and cache.
        contexts: tokens in the cache.
        batches: rows.
        rounds: blocks of steps; times are medians over blocks.
        block: steps of a block, a multiple of the chunks' 20.
    """

    shape: str
    dtype: torch.dtype
    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    rounds: int = 5
    block: int = CHUNK


def random_model(options: BenchOptions, device: torch.device) -> Any:
    """A model of that shape with random weights, whose positions reach beyond the contexts.

    Its scores are made by its embeddings: so all of its parameters are read in a step, and none is kept besides.
    """
    shape = {"model_type": "llama"} | SHAPES[options.shape]
    positions = 2 * max(options.contexts)
    config = AutoConfig.for_model(**shape, max_position_embeddings=positions, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()


def contents(model: Any, batch: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values of every layer, one at a time."""
    config = model.config
    shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for _ in range(config.num_hidden_layers):
        yield tuple(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv")  # type: ignore[misc]


def selection(model: Any, **options: Any) -> ChunkSelection:
    """The selection that is measured: its detector runs and never fires, and a chunk ends after 20 tokens.

    The budget is divided among layers as the embedded adapters tell, if the model has as many layers as theirs.
    """
    adapters = ChunkAdapters.for_model(model)
    known = ChunkAdapters.from_pretrained().config.sensitivity
    fits = known is not None and len(known) == len(adapters.config.shape.full_layers)
    adapters.config = replace(adapters.config, threshold=2.0, sensitivity=known if fits else None)
    return ChunkSelection(adapters, max_chunk=CHUNK, **{"budget": BUDGET} | options)


class Writer:
    """Writes tokens greedily."""

    def __init__(self, model: Any, cache: Cache, batch: int):
        self._model = model
        self._options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
        self._next = torch.full((batch, 4), 7, device=model.device)
        self.steps(1)  # reads four tokens with full attention, as the end of a prompt
        self.steps(CHUNK)

    def steps(self, count: int) -> None:
        """So many forward passes."""
        for _ in range(count):
            self._next = self._model(input_ids=self._next, **self._options).logits[:, -1:].argmax(-1)
        if self._next.is_cuda:
            torch.cuda.synchronize()


def step_seconds(model: Any, options: BenchOptions, name: str, batch: int, length: int) -> np.ndarray:
    """Seconds per step, one figure for each block: a block has as many boundaries as tokens / 20."""
    chunks = selection(model)
    ended = torch.zeros(batch, length, dtype=torch.bool)
    with filled(name, model, contents(model, batch, length), chunks, lambda _: ended) as (cache, _):
        writer = Writer(model, cache, batch)
        seconds = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            writer.steps(options.block)
            seconds.append((time.perf_counter() - began) / options.block)
    free()
    return np.array(seconds)


Times = dict[tuple[str, int, int], np.ndarray]


def measure(options: BenchOptions, device: torch.device, show: Callable[[str], None]) -> Times:
    """Seconds per step by path, batch and context. What does not fit into memory is left out."""
    model = random_model(options, device)
    times: Times = {}
    with torch.inference_mode():
        for batch in options.batches:
            for length in options.contexts:
                for name in PATHS:
                    show(f"{options.shape}, {length:,} tokens × {batch}, {name}")
                    try:
                        times[name, batch, length] = step_seconds(model, options, name, batch, length)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
    return times


def main(contexts: tuple[int, ...], dtype: str, rounds: int, out: Path | None, picture: Path | None) -> None:
    """Measures, prints the table, and writes it as JSON and as a picture if asked."""
    from rich.console import Console

    host = BenchOptions("smollm2-135m", getattr(torch, dtype), contexts, rounds=rounds)
    console = Console(stderr=True)
    with console.status("measuring") as status:
        times = measure(host, torch.device("cpu"), status.update)
        figures = [
            *_speed_figures(host, times),
            *_growth_figure(host, times),
            _prefill_figure(host, status.update),
            _offload_figure(host, max(contexts), status.update),
        ]
    speeds = {f"{name}, batch {batch}, {length}": seconds.tolist() for (name, batch, length), seconds in times.items()}
    about = {"shape": host.shape, "dtype": dtype, "budget": BUDGET, "chunk": CHUNK, "seconds_per_step": speeds}
    report(figures, f"long contexts, {host.shape} in {dtype}, {BUDGET} tokens kept", about, out)
    if picture is not None:
        here = environment()
        draw(host, times, f"{here['cpu']}, {here['threads']} threads", picture)


def _speed_figures(options: BenchOptions, times: Times) -> Iterator[Figure]:
    for length in options.contexts:
        selected = times["selected", 1, length]
        for name, target in zip(PATHS, _CONTEXT_TARGETS.get(length, (None, None)), strict=False):
            ratio, shown = ratio_of(times[name, 1, length], selected)
            met = None if target is None else ratio >= target
            yield Figure(
                f"{length:,} tokens: steps per second with selection, against {name}",
                ratio,
                shown,
                "" if target is None else f"≥ {target:g}×",
                met,
            )


def _growth_figure(options: BenchOptions, times: Times) -> Iterator[Figure]:
    shortest, longest = min(options.contexts), max(options.contexts)
    if shortest == longest:
        return
    ratio, shown = ratio_of(times["selected", 1, longest], times["selected", 1, shortest])
    what = f"a step with selection at {longest:,} tokens, against {shortest:,}"
    yield Figure(what, ratio, shown, "≤ 1.15×", ratio <= 1.15)


def _prefill_figure(options: BenchOptions, show: Callable[[str], None], length: int = 4096) -> Figure:
    """One more step belongs to it: that is when the prompt's chunks are summarised and first chosen from."""
    show("reading prompts")
    model = random_model(options, torch.device("cpu"))
    ids = torch.randint(0, model.config.vocab_size, (1, length))

    def read(_: int) -> Any:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        name = cache_argument(model)
        return model(input_ids=ids[:, :1], use_cache=True, **{name: output[name]})

    def read_selecting(i: int) -> Any:
        with selection(model).attach(model):
            return read(i)

    with torch.inference_mode():
        read(0)
        plain, selecting = interleaved([read, read_selecting], options.rounds)
    ratio, shown = ratio_of(selecting, plain)
    what = f"reading a prompt of {length:,} tokens and one step more, attached against not"
    return Figure(what, ratio, shown, "≤ 1.03×", ratio <= 1.03)


def _offload_figure(options: BenchOptions, length: int, show: Callable[[str], None]) -> Figure:
    """Counted from the tensors: on a CPU, device and host are the same memory."""
    show("offloading")
    model = random_model(options, torch.device("cpu"))
    with torch.inference_mode(), selection(model, offload=True).attach(model) as chunks:
        cache = chunks.new_cache()
        cache.load(contents(model, 1, length), torch.zeros(1, length, dtype=torch.bool))
        Writer(model, cache, 1)
        parts = [layer.memory for layer in cache.full_layers]
    on_device = sum(part["selected"] + part["features"] for part in parts)
    shape = model.config
    width = 2 * shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads  # of a key and a value
    full = length * width * shape.num_hidden_layers * model.dtype.itemsize
    share = 100 * on_device / full
    what = f"offload at {length:,} tokens: selected keys and values and chunk features on the device, of all"
    return Figure(what, share, f"{share:.1f} %", "≤ 30 %", share <= 30)


_LINES = {  # that differ in lightness too, for eyes and printers without colours
    "default": ("s--", "#7a7a7a", "full attention, as by default"),
    "best dense": ("o--", "#b36b00", "full attention, best dense cache"),
    "selected": ("D-", "#0072b2", "chunk selection"),
}


def draw(options: BenchOptions, times: Times, machine: str, picture: Path) -> None:
    """Tokens per second over the context, relative to the default at the shortest: absolute ones are the machine's."""
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    speeds = {key: 1 / float(np.median(seconds)) for key, seconds in times.items()}
    unit = speeds["default", 1, min(options.contexts)]
    for name in PATHS:
        line = [(length, speeds[name, 1, length] / unit) for length in options.contexts if (name, 1, length) in speeds]
        style, color, said = _LINES[name]
        axis.plot(*zip(*line, strict=True), style, color=color, lw=2, ms=7)
        axis.annotate(
            said, line[-1], (10, 0), textcoords="offset points", color=color, va="center", annotation_clip=False
        )
    for length in options.contexts:
        if ("default", 1, length) in speeds:
            ratios = np.divide(times["default", 1, length], times["selected", 1, length])  # of the rounds
            at = (length, speeds["selected", 1, length] / unit)
            axis.annotate(f"{np.median(ratios):.1f}×", at, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(options.contexts, [f"{length:,}" for length in options.contexts])
    axis.yaxis.set_major_formatter("{x:g}×")
    axis.minorticks_off()
    axis.margins(y=0.12)
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel(f"tokens per second\n(1× is the default at {min(options.contexts):,})")
    dtype = str(options.dtype).removeprefix("torch.")
    title = (
        f"{options.shape}, {dtype}, batch 1, {BUDGET:,} tokens read; {machine}\nAbove: chunk selection against default"
    )
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    save(figure, picture)
