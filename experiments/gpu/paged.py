"""Chunk selection over a paged cache: whether steps that are replayed from a CUDA graph read what called ones read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from chunkllm import PooledScorer
from chunkllm.paged.replayed import ReplayedSelection
from chunkllm.paged.selection import PagedSelection, Step
from experiments.lab.device import no_waiting, replayed

T = TypeVar("T")
_BLOCK, _HEAD, _ENDS = 16, 64, 12  # tokens of a block, numbers of a key, and tokens of which one ends a chunk


@dataclass(frozen=True)
class Sizes:
    """What is compared.

    Attributes:
        layers: L.
        rows: R.
        prompt: tokens of each row.
        budget: tokens that each reads.
        steps: of single tokens.
    """

    layers: int = 8
    rows: int = 16
    prompt: int = 2000
    budget: int = 512
    steps: int = 100

    @property
    def row_blocks(self) -> int:
        """Blocks of each row, in the end."""
        return -(-(self.prompt + self.steps) // _BLOCK)


class _Tokens:
    """Keys, queries and ends of chunks of the tokens of a step, in the same tensors for each step of single tokens."""

    def __init__(self, sizes: Sizes, device: torch.device):
        self._draw = torch.Generator(device).manual_seed(0)
        self._layers, self._device = sizes.layers, device
        self.single = self.made(sizes.rows)

    def made(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [L, T, 2, D], queries [L, T, 4, D], ends bool [T]."""
        keys, queries = (
            torch.randn(self._layers, count, heads, _HEAD, generator=self._draw, device=self._device)
            for heads in (2, 4)
        )
        return keys, queries, torch.rand(count, generator=self._draw, device=self._device) < 1 / _ENDS

    def renew(self) -> None:
        """Other tokens."""
        for held, new in zip(self.single, self.made(len(self.single[2])), strict=True):
            held.copy_(new)


def as_called(sizes: Sizes, device: torch.device) -> tuple[bool, str]:
    """Blocks and tokens that rows read, step by step. No step waits."""
    called = _selection(partial(PagedSelection, fixed_shapes=True), sizes, device)
    again = _selection(ReplayedSelection, sizes, device)
    tokens = _Tokens(sizes, device)
    again.capture(sizes.rows)
    replay = replayed(lambda: _tell(again, *tokens.single), device)
    prompt = tokens.made(sizes.rows * sizes.prompt)
    for selection in (called, again):
        selection.begin(_step(sizes, 0, sizes.prompt, device))
        _tell(selection, *prompt)
    wrong = selected = 0
    for held in range(sizes.prompt, sizes.prompt + sizes.steps):
        tokens.renew()
        step = _step(sizes, held, 1, device)
        with no_waiting(device):
            wanted, found = called.begin(step), again.begin(step)
            _tell(called, *tokens.single)
            replay()
        assert wanted is not None and found is not None
        width = wanted.block_table.shape[2]
        is_read = torch.arange(width, device=device) < -(-wanted.lengths // _BLOCK)[..., None]
        wrong += int(((wanted.block_table != found.block_table[..., :width]) & is_read).sum())
        wrong += int((wanted.lengths != found.lengths).sum())
        selected += int((found.lengths <= held).sum())
    of_all = sizes.steps * sizes.rows * sizes.layers
    return wrong == 0 and selected > 0, f"{wrong} blocks or lengths differ, {selected:,} of {of_all:,} tables are short"


def _selection(made: Callable[..., T], sizes: Sizes, device: torch.device) -> T:
    return made(
        PooledScorer(_HEAD),
        range(sizes.layers),
        torch.ones(sizes.layers),
        heads=4,
        kv_heads=2,
        head_dim=_HEAD,
        blocks=sizes.rows * sizes.row_blocks,
        block_size=_BLOCK,
        rows=sizes.rows,
        row_blocks=sizes.row_blocks,
        slots=sizes.rows,
        sinks=4,
        local=64,
        dtype=torch.float32,
        device=device,
    )


def _step(sizes: Sizes, held: int, count: int, device: torch.device) -> Step:
    """All rows compute so many tokens behind those that they hold."""
    rows = sizes.rows
    table = torch.arange(rows * sizes.row_blocks, device=device).view(rows, -1)
    at = torch.arange(held, held + count, device=device)
    of_rows = np.full(rows, 1)
    return Step(
        table.int(),
        torch.full((rows,), held + count, dtype=torch.int32, device=device),
        (torch.arange(rows + 1, device=device) * count).int(),
        (table[:, at // _BLOCK] * _BLOCK + at % _BLOCK).flatten(),
        of_rows * count,
        np.full(rows, held == 0),
        of_rows * sizes.budget,
        of_rows * (held + count),
        slots=np.arange(rows),
    )


def _tell(selection: PagedSelection, keys: Tensor, queries: Tensor, ends: Tensor) -> None:
    """The calls of a step."""
    for layer in range(len(keys)):
        selection.add(layer, keys[layer], queries[layer])
        if layer == 0:
            selection.note_ends(ends)
