"""How fast chunk selection's adapters are trained: a frozen model reads, adapters learn, on random text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkllm import ChunkAdapters
from chunkllm.training.lessons import Piece, ReadingOptions, load_reading, read_piece, save_reading
from chunkllm.training.loop import TrainingOptions, learn
from experiments.gpu.record import Record
from experiments.lab.device import finish
from experiments.lab.figures import Figure, seconds_of, time_of
from experiments.long_context.bench import BenchOptions, random_model

_CHECK = "losses are finite, and fall on a reading that is learnt from again"
_SENTENCE = 25  # tokens
_PAPERS_TOKENS = 300e6


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: a name of `experiments.long_context.bench.SHAPES`.
        context: tokens of a piece of text.
        readings: pieces that are read; the first is not timed.
        steps: of learning, likewise.
        dtype: of the model.
    """

    shape: str = "llama-3.1-8b"
    context: int = 8000
    readings: int = 4
    steps: int = 6
    dtype: str = "bfloat16"


CARD, TOY = Sizes(), Sizes("toy", 400, 2, 4, "float32")


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds tokens per second, and what they come to."""
    options = ReadingOptions(context=sizes.context)
    model = random_model(BenchOptions(sizes.shape, getattr(torch, sizes.dtype), (sizes.context,)), device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reading.safetensors"
        reading = _timed(lambda i: _read(model, i, options, path), sizes.readings, device)
        adapters = ChunkAdapters.for_model(model)
        losses: list[float] = []
        learning = _timed(_learner(adapters, path, options, losses, device), sizes.steps, device)

    def fall() -> tuple[bool, str]:
        return bool(np.isfinite(losses).all()) and losses[-1] < losses[0], f"{losses[0]:.4g} to {losses[-1]:.4g}"

    record.check(_CHECK, fall)
    where, epochs = f"{sizes.shape}, pieces of {sizes.context:,} tokens", TrainingOptions.epochs
    read, learnt = float(np.median(reading)), float(np.median(learning))
    record.figure(Figure(f"{where}: reading one, with writing what was read", *time_of(reading)), _CHECK)
    record.figure(Figure(f"{where}: learning from one, with opening it", *time_of(learning)), _CHECK)
    for times in (1, epochs):
        speed = sizes.context / (read + times * learnt)
        what = f"{where}: tokens per second, read once and learnt {_times(times)}"
        record.figure(Figure(what, speed, f"{speed:,.0f}"), _CHECK)
        hours = _PAPERS_TOKENS / speed / 3600
        what = f"{where}: hours for {_PAPERS_TOKENS / 1e6:g}M tokens, extrapolated, learnt {_times(times)}"
        record.figure(Figure(what, hours, f"{hours:.1f}"), _CHECK)
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        record.figure(Figure(f"{where}: the most memory that tensors took", most, f"{most / 2**30:.1f} GiB"), _CHECK)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _timed(work: Callable[[int], Any], count: int, device: torch.device) -> np.ndarray:
    """Seconds [count − 1] of a work that is given its number, on host and device; the first is for warming up."""

    def whole(number: int) -> None:
        work(number)
        finish(device)

    seconds: list[float] = [seconds_of(partial(whole, number)) for number in range(count)]
    return np.array(seconds[1:])


def _read(model: Any, number: int, options: ReadingOptions, path: Path) -> None:
    rng = np.random.default_rng(number)
    labels = np.arange(options.context) % _SENTENCE == _SENTENCE - 1
    piece = Piece(rng.integers(model.config.vocab_size, size=options.context), labels)
    save_reading(read_piece(model, piece, options, number), path)


def _learner(
    adapters: ChunkAdapters, path: Path, options: ReadingOptions, losses: list[float], device: torch.device
) -> Callable[[int], None]:
    """A step of learning, which leaves its losses' sum in ``losses``."""
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=TrainingOptions.learning_rate)

    def step(_: int) -> None:
        losses.append(sum(learn(adapters, optimizer, load_reading(path, device), options)))

    return step
