"""What the block tables of a step take in vLLM: by torch's operations, and by Triton's kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from chunkllm.paged.tables import Choices, Reading, read_tables
from experiments.gpu.record import Record
from experiments.gpu.ways import TORCH, TRITON, paths
from experiments.lab.device import device_seconds, no_waiting, replayed
from experiments.lab.figures import Figure, ratio_of, time_of

_CHECK = "the kernel's tables are torch's, as far as rows read"
_LOCAL = 4


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        layers: L.
        batches: rows, every second of which selects.
        blocks: that a row holds.
        kept: blocks that are chosen.
        block_size: tokens of a block.
        rounds: in which ways of computing take turns.
    """

    layers: int = 32
    batches: tuple[int, ...] = (1, 64)
    blocks: int = 7500
    kept: int = 124
    block_size: int = 16
    rounds: int = 30


CARD, TOY = Sizes(), Sizes(layers=2, batches=(1, 3), blocks=20, kept=5, rounds=2)


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds microseconds of both, replayed."""
    found, why_not = paths(device)
    record.note(paths=list(found), without_kernels=why_not)
    ways: dict[str, Callable[[Choices], Reading]] = {TORCH: read_tables}
    if TRITON in found:
        from chunkllm.paged import table_kernel  # which imports Triton

        ways[TRITON] = table_kernel.read_tables
    for batch in sizes.batches:
        step = _step(sizes, batch, device)
        where = f"{batch} rows, {sizes.layers} layers, {sizes.blocks:,} blocks a row"
        check = f"{_CHECK}: {where}"
        record.check(check, partial(_same, ways, step, sizes, device))
        if not record.passed(check):
            continue
        times = device_seconds([replayed(partial(way, step), device) for way in ways.values()], sizes.rounds, device)
        for name, seconds in zip(ways, times, strict=True):
            record.figure(Figure(f"{where}: {name}, replayed", *time_of(seconds, "µs")), check)
        if len(times) > 1:
            record.figure(Figure(f"{where}: kernel against torch", *ratio_of(times[0], times[1])), check)


def _step(sizes: Sizes, batch: int, device: torch.device) -> Choices:
    """Random blocks of rows that are nearly as long as their tables."""
    draw = torch.Generator().manual_seed(0)
    lengths = sizes.blocks * sizes.block_size - torch.randint(sizes.block_size, (batch,), generator=draw)
    table = torch.randperm(batch * sizes.blocks, generator=draw).int().view(batch, -1)
    middle = 1 + torch.rand(sizes.layers, batch, sizes.blocks - _LOCAL - 2, generator=draw).argsort(-1)
    chosen = torch.nn.functional.pad(middle[:, :, : sizes.kept], (1, sizes.blocks - sizes.kept)).to(torch.int16)
    counts = torch.full((sizes.layers, batch), sizes.kept, dtype=torch.int32)
    selects = torch.arange(batch) % 2 == 0
    table, selects, lengths, chosen, counts = (each.to(device) for each in (table, selects, lengths, chosen, counts))
    slot = torch.arange(batch, device=device)
    return Choices(table, slot, selects, lengths, chosen, counts, sizes.block_size, _LOCAL)


def _same(
    ways: dict[str, Callable[[Choices], Reading]], step: Choices, sizes: Sizes, device: torch.device
) -> tuple[bool, str]:
    """On the device, against torch's on the host. None waits."""
    wanted = read_tables(_step(sizes, len(step.lengths), torch.device("cpu")))
    is_read = torch.arange(sizes.blocks) < -(-wanted.lengths // sizes.block_size)[..., None]
    wrong = 0
    for way in ways.values():
        way(step)  # the first call may compile
        with no_waiting(device):
            found = way(step)
        table, lengths = found.block_table.cpu(), found.lengths.cpu()
        wrong += int(((table != wanted.block_table) & is_read).sum() + (lengths != wanted.lengths).sum())
    return wrong == 0, f"{wrong} of {len(ways) * int(is_read.sum()):,} blocks differ"
