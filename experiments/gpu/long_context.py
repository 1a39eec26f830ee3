"""Tokens behind long contexts: by default, by the best dense attention, and with chunk selection.

A step of the best dense attention and one with selection are CUDA graphs over the same keys and values, and are
replayed in turns. With a selection, a step's share of choosing chunks is added: that is called, not replayed, and waits
for the host. By default there are no graphs, since the cache grows by copies: its steps are called, and beside them
those with selection, as ``generate`` calls them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, DynamicCache

from chunkllm import Attachment
from chunkllm.contiguous.cache import ChunkCache
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.models import cache_argument
from experiments.gpu.record import Record, said
from experiments.lab.device import bandwidth, device_seconds, finish, free, replayed
from experiments.lab.figures import Figure, ratio_of, time_of
from experiments.long_context.bench import CHUNK, BenchOptions, Writer, contents, random_model, selection
from experiments.long_context.paths import DEFAULT, DENSE, SELECTED, filled

PAPERS, _PAPERS_CONTEXT = 4.48, 120_000  # times the default's speed, arXiv 2510.02361
_MOST_OF_BOUND = 1.3
_TOKEN = 7


@dataclass(frozen=True)
class Cell:
    """One context.

    Attributes:
        shape: a name of `experiments.long_context.bench.SHAPES`.
        context: tokens in the cache.
        batch: rows.
        least: the goal against the best dense attention, with the smaller selection.
    """

    shape: str
    context: int
    batch: int
    least: float | None = None


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        cells: in order of worth; those of one shape together.
        budget: tokens that are kept; beside it half of all.
        rounds: of replays.
        blocks: of called steps, in each of which all rows choose once.
        dtype: of weights and keys.
        copied: bytes, for the bandwidth.
        checked: tokens of the context that ways are compared behind.
    """

    cells: tuple[Cell, ...]
    budget: int = 2048
    rounds: int = 20
    blocks: int = 2
    dtype: str = "bfloat16"
    copied: int = 1 << 30
    checked: int = 4096


_LLAMA, _QWEN = "llama-3.1-8b", "qwen3-8b"
CARD = Sizes(
    cells=(
        Cell(_LLAMA, 120_000, 1, 1.6),
        Cell(_LLAMA, 120_000, 6, 4.0),
        Cell(_LLAMA, 32_768, 1),
        Cell(_LLAMA, 8192, 1),
        Cell(_LLAMA, 120_000, 4),
        Cell(_LLAMA, 32_768, 6),
        Cell(_LLAMA, 8192, 6),
        Cell(_LLAMA, 32_768, 4),
        Cell(_LLAMA, 8192, 4),
        Cell(_QWEN, 120_000, 1),
        Cell(_QWEN, 120_000, 4),
        Cell(_QWEN, 32_768, 1),
        Cell(_QWEN, 8192, 1),
        Cell(_QWEN, 32_768, 6),
        Cell(_QWEN, 8192, 6),
        Cell(_QWEN, 120_000, 6),
        Cell(_QWEN, 32_768, 4),
        Cell(_QWEN, 8192, 4),
    )
)
TOY = Sizes(
    cells=(Cell("toy", 400, 1, 1.0), Cell("toy", 400, 2)),
    budget=128,
    rounds=2,
    blocks=1,
    dtype="float32",
    copied=1 << 12,
    checked=200,
)


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds what a step takes, cell by cell."""
    speed = bandwidth(device, sizes.copied)
    record.note(bytes_per_second=speed, chunk=CHUNK)
    model, shape = None, None
    with torch.inference_mode():
        for cell in sizes.cells:
            if cell.shape != shape:
                model, shape = None, cell.shape
                free()
                longest = max(each.context for each in sizes.cells)
                model = random_model(BenchOptions(shape, getattr(torch, sizes.dtype), (longest,)), device)
                record.note(**{f"FlashAttention takes keys of {shape}": _takes_flash_attention(model)})
                _check(model, shape, sizes, device, record)
            _Measured(cell, model, sizes, device, record, speed).all()


class _Measured:
    """The ways behind one context."""

    def __init__(
        self, cell: Cell, model: Any, sizes: Sizes, device: torch.device, record: Record, bytes_per_second: float
    ):
        self._cell, self._model, self._sizes, self._device, self._record = cell, model, sizes, device, record
        self._bandwidth = bytes_per_second
        self._where = f"{cell.shape}, {cell.context:,} tokens, batch {cell.batch}"
        self._called: dict[str, np.ndarray] = {}  # seconds of a step, by budget

    def all(self) -> None:
        """Adds all figures of the cell; what does not fit into memory is said not to."""
        self._tried("with selection", self._selecting)
        self._tried("by default", self._by_default)

    def _tried(self, what: str, work: Callable[[], None]) -> None:
        line = f"{self._where}: {what}"
        try:
            work()
        except torch.OutOfMemoryError:
            self._record.absent(line, "does not fit into memory")
        except RuntimeError as error:  # of the device: as of a graph that cannot be captured
            self._record.absent(line, said(error))
            self._record.check(line, partial(_failed, said(error)))
        free()

    def _figure(
        self, what: str, found: tuple[float, str], least: float | None = None, most: float | None = None
    ) -> None:
        value, shown = found
        target, met = "", None
        if least is not None:
            target, met = f"≥ {least:g}×", value >= least
        elif most is not None:
            target, met = f"≤ {most:g}×", value <= most
        figure = Figure(f"{self._where}: {what}", value, shown, target, met)
        self._record.figure(figure, *_checks(self._cell.shape))

    def _selecting(self) -> None:
        """Best dense, and selections beside it."""
        cell, budget = self._cell, self._sizes.budget
        chosen, never = selection(self._model, budget=budget), partial(_never, cell.batch, cell.context)
        states = contents(self._model, cell.batch, cell.context)
        with filled(DENSE, self._model, states, chosen, never) as (held, _):
            dense = replayed(_StandingStep(self._model, held, cell.batch), self._device)
            dense_seconds = device_seconds([dense], self._sizes.rounds, self._device)[0]
        self._figure(f"a step, {DENSE}, replayed", time_of(dense_seconds))
        for name, kept in (("budget", {"budget": budget}), ("half", {"budget": None, "retention": 0.5})):
            tokens = budget if name == "budget" else cell.context // 2
            self._tried(f"{tokens:,} tokens kept", partial(self._kept, name, tokens, kept, held, dense))

    def _kept(self, name: str, tokens: int, kept: dict[str, Any], held: Cache, dense: Callable[[], Any]) -> None:
        """One selection beside the best dense attention."""
        cell, blocks = self._cell, self._sizes.blocks
        with selection(self._model, **kept).attach(self._model) as chunks:
            cache = _sharing(chunks, held, cell.batch, cell.context)
            writer = Writer(self._model, cache, cell.batch)
            self._called[name] = _block_seconds(writer, blocks, self._device)
            choosing = _choosing_seconds(writer, cache, blocks, self._device)
            with _standing(cache):
                ours = replayed(_StandingStep(self._model, cache, cell.batch), self._device)
                # Called, and not replayed, the dense step would ask for a selection: on a CPU it is not repeated.
                works = [dense, ours] if self._device.type == "cuda" else [ours, ours]
                times = device_seconds(works, self._sizes.rounds, self._device)
        share = np.resize(choosing, self._sizes.rounds) / CHUNK
        step, what = times[1] + share, f"{tokens:,} tokens kept"
        self._figure(f"a step, {what}, replayed, with its share of choosing", time_of(step))
        self._figure(f"a step, {what}, called", time_of(self._called[name]))
        self._figure(f"choosing once, {what}", time_of(choosing))
        least = cell.least if name == "budget" else None
        self._figure(f"{what}, against {DENSE}, both replayed", ratio_of(times[0], step), least=least)
        bound = (_bytes_of(self._model) + cell.batch * tokens * _bytes_per_token(self._model)) / self._bandwidth
        of_bound = ratio_of(step, np.full_like(step, bound))
        what = f"a step, {what}, against (weights + selected bytes) / bandwidth"
        self._figure(what, of_bound, most=_MOST_OF_BOUND)

    def _by_default(self) -> None:
        """What users have without us, called."""
        cell = self._cell
        never = partial(_never, cell.batch, cell.context)
        states = contents(self._model, cell.batch, cell.context)
        with filled(DEFAULT, self._model, states, selection(self._model), never) as (cache, _):
            seconds = _block_seconds(Writer(self._model, cache, cell.batch), self._sizes.blocks, self._device)
        self._figure(f"a step, {DEFAULT}, called", time_of(seconds))
        if (ours := self._called.get("budget")) is not None:
            what = f"{self._sizes.budget:,} tokens kept, against {DEFAULT}, both called"
            papers = f" (the paper: {PAPERS}×)" if cell.context == _PAPERS_CONTEXT else ""
            self._figure(what + papers, ratio_of(seconds, ours))


def _failed(why: str) -> tuple[bool, str]:
    return False, why


def _never(batch: int, length: int, _: Attachment) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.bool)


class _StandingStep:
    """A step that reads and writes the same places each time: what it writes to a cache of `ChunkLayer` is taken back.

    Attributes:
        token: int64 [B, 1], what is read. A step leaves the one that it has written there.
    """

    def __init__(self, model: Any, cache: Cache, batch: int):
        self.token = torch.full((batch, 1), _TOKEN, device=model.device)
        self._model, self._layers = model, cache.layers
        self._options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}

    def __call__(self) -> Tensor:
        """Scores, [B, 1, V]."""
        scores: Tensor = self._model(input_ids=self.token, **self._options).logits
        self.token.copy_(scores.argmax(-1))
        for layer in self._layers:
            assert isinstance(layer, ChunkLayer)
            layer.step_back()
        return scores

    def scores(self, run: Callable[[], Tensor]) -> Tensor:
        """What a run of it, called or replayed, gives for the first token."""
        self.token.fill_(_TOKEN)
        return run().clone()


def _sharing(chunks: Attachment, held: Cache, batch: int, length: int) -> ChunkCache:
    """A cache for a selection over keys and values that another one holds: there is no room for them twice."""
    cache = chunks.new_cache()
    layers: list[Any] = held.layers
    states = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in layers]
    cache.load(states, torch.zeros(batch, length, dtype=torch.bool))
    for own, other in zip(cache.full_layers, layers, strict=True):
        own.keys, own.values, own.stored = other.keys, other.values, length
    return cache


@contextmanager
def _standing(cache: ChunkCache) -> Iterator[None]:
    """A cache that chooses nothing before a step, which can then be captured. Boundaries are found, and go nowhere."""
    for name in ("begin", "observe"):
        setattr(cache, name, lambda *_: None)
    try:
        yield
    finally:
        for name in ("begin", "observe"):
            delattr(cache, name)


def _block_seconds(writer: Writer, blocks: int, device: torch.device) -> np.ndarray:
    """Seconds of a called step [blocks], means of blocks with one choice each."""
    seconds = []
    for _ in range(blocks):
        finish(device)
        began = time.perf_counter()
        writer.steps(CHUNK)
        seconds.append((time.perf_counter() - began) / CHUNK)
    return np.array(seconds)


def _choosing_seconds(writer: Writer, cache: ChunkCache, blocks: int, device: torch.device) -> np.ndarray:
    """Seconds of choosing chunks [blocks], with the host's part: what a step does that chooses, before it computes."""
    own = cache.begin
    found: list[list[float]] = []

    def timed(*args: Any) -> None:
        finish(device)
        began = time.perf_counter()
        own(*args)
        finish(device)
        found[-1].append(time.perf_counter() - began)

    setattr(cache, "begin", timed)  # noqa: B010  # mypy knows no other way
    try:
        for _ in range(blocks):
            found.append([])
            writer.steps(CHUNK)
    finally:
        delattr(cache, "begin")
    return np.array([max(block) for block in found])  # one of a block's steps chooses, and takes longest


def _bytes_of(model: Any) -> int:
    """Of all weights, each of which a step reads once: scores are made by the embeddings."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _bytes_per_token(model: Any) -> int:
    """Of its keys and values, in all layers."""
    keys, values = next(contents(model, 1, 1))
    return (keys.nbytes + values.nbytes) * model.config.num_hidden_layers


def _takes_flash_attention(model: Any) -> bool:
    """Whether torch's FlashAttention computes a step of the best dense attention: then torch prefers it."""
    keys, values = next(contents(model, 1, 256))
    queries = keys[:, :, : model.config.num_attention_heads // model.config.num_key_value_heads]
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            scaled_dot_product_attention(queries, keys, values)
    except RuntimeError:
        return False
    return True


def _checks(shape: str) -> tuple[str, str]:
    return (
        f"{shape}: {DENSE}, replayed, computes what {DEFAULT} computes",
        f"{shape}: with selection, a replayed step computes what a called one does",
    )


def _check(model: Any, shape: str, sizes: Sizes, device: torch.device, record: Record) -> None:
    """Dense ways compute the same behind a text that was read, and a replayed step what a called one does."""
    bound, batch = 1e-3 if sizes.dtype == "float32" else 5e-2, 1
    never = partial(_never, batch, sizes.checked)
    chosen = selection(model, budget=sizes.budget)

    def dense() -> tuple[bool, str]:
        states, wanted = _read_by_default(model, sizes.checked)
        with filled(DENSE, model, states, chosen, never) as (cache, _):
            step = _StandingStep(model, cache, batch)
            return _are_near(step.scores(replayed(step, device)), wanted, bound)

    def selected() -> tuple[bool, str]:
        states, _ = _read_by_default(model, sizes.checked)
        with filled(SELECTED, model, states, chosen, never) as (cache, _):
            assert isinstance(cache, ChunkCache)
            Writer(model, cache, batch)
            with _standing(cache):
                step = _StandingStep(model, cache, batch)
                wanted = step.scores(step)
                return _are_near(step.scores(replayed(step, device)), wanted, bound)

    for name, work in zip(_checks(shape), (dense, selected), strict=True):
        record.check(name, work)


def _read_by_default(model: Any, length: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of a random text, and the scores [1, 1, V] of `_TOKEN` behind it."""
    cache = DynamicCache(config=model.config)
    options = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    model(input_ids=torch.randint(model.config.vocab_size, (1, length), device=model.device), **options)
    layers: list[Any] = cache.layers
    states = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    return states, model(input_ids=torch.full((1, 1), _TOKEN, device=model.device), **options).logits


def _are_near(found: Tensor, wanted: Tensor, bound: float) -> tuple[bool, str]:
    """Whether the difference is small beside what it differs from, and how small."""
    apart = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return apart <= bound, f"difference {apart:.2g} of the scores, allowed {bound:g}"
