"""The look-up as one kernel of Triton: `ngram.tables.add_log_prior`, whose meaning it has, in a single launch.

A program owns some columns of one row. It walks the trie from the root to the row's contexts, all lengths side by
side, adds the dense part tile by tile, then the continuations within its columns, context by context. No program
writes where another one does: so the result may be the scores themselves, and sums are taken in one order.

What costs on a GPU is bytes, and waiting for them. The scores are read and written once. The first tile is on its way
while the walk waits for the trie, and the first continuations while the dense part is computed.

Importing this module imports Triton, and fails where that is not installed: ask `ngram.kernels.uses_triton` first.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from ngram.errors import NGramError
from ngram.trie_kernel import (
    NEVER,
    add_continuations,
    continuations_of,
    find_contexts,
    places_of,
    rounds_of,
    shares_of,
)

_TILE = 4096
_WARPS = 8
_REGISTERS = 80
_RESIDENT = 3  # so many programs a multiprocessor holds at once, of 256 threads with 80 registers each


class _Tables(Protocol):
    """What is read of `ngram.tables.Tables`."""

    @property
    def unigram(self) -> Tensor: ...
    @property
    def nodes(self) -> Tensor: ...
    @property
    def runs(self) -> Tensor: ...
    @property
    def backoff_book(self) -> Tensor: ...
    @property
    def book_starts(self) -> Tensor: ...
    @property
    def words(self) -> Tensor: ...
    @property
    def deltas(self) -> Tensor: ...
    @property
    def order(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def widest(self) -> tuple[int, ...]: ...


def add_log_prior(
    tables: _Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None = None,
    *,
    prior: int | Tensor = 0,
    shift: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """`ngram.tables.add_log_prior`, whose arguments and result these are.

    Float16 and bfloat16 scores are read as they are. The result is float32, and rounded once, by one more launch.

    Raises:
        NGramError: shapes that do not belong together, or an ``out`` whose columns are not adjacent.
    """
    rows, width = scores.shape
    # A kernel would read what stands behind a tensor that is too short.
    if {rows, len(history), len(strength), len(prior) if isinstance(prior, Tensor) else rows} != {rows}:
        raise NGramError(f"each of {rows} rows of scores needs a history, a strength and a prior of its own")
    if tables.unigram.shape[1] != width:
        raise NGramError(f"scores have {width} columns, tables {tables.unigram.shape[1]}: see Tables.widened")
    narrow = scores.dtype in (torch.float16, torch.bfloat16)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    result = out if out is not None and not narrow else _empty(scores, torch.float32 if narrow else scores.dtype)
    if result.stride(1) != 1:
        raise NGramError(f"out must have its columns side by side, not {result.stride(1)} apart: pass out.contiguous()")
    if not scores.numel():
        return result.to(scores.dtype)
    all_tiles = -(-width // _TILE)
    tiles = -(-all_tiles // max(held_at_once(scores.device) // rows, 1))
    with torch.cuda.device_of(scores) if scores.is_cuda else nullcontext():
        _add[(rows, -(-all_tiles // tiles))](
            scores,
            scores.stride(0),
            result,
            result.stride(0),
            width,
            tiles,
            *arguments_of(tables, history, strength, mixture, prior),
            **constants_of(tables),
            SHIFT=shift,
            IN_PLACE=result is scores,
            TILE=_TILE,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
        )
        return result.to(scores.dtype) if narrow else result


def arguments_of(
    tables: _Tables, history: Tensor, strength: Tensor, mixture: Tensor | None, prior: int | Tensor
) -> tuple[Tensor | int | None, ...]:
    """What a kernel is told of rows and their priors: its arguments from ``history`` to ``joined``."""
    priors = prior if isinstance(prior, Tensor) else None
    return (
        history,
        *history.stride(),
        history.shape[1],
        strength,
        strength.stride(0),
        priors,
        0 if priors is None else priors.stride(0),
        0 if isinstance(prior, Tensor) else prior,
        None if mixture is None else mixture.contiguous(),
        tables.unigram,
        tables.nodes,
        tables.runs,
        tables.words,
        tables.deltas,
        tables.backoff_book,
        tables.book_starts,
        tables.vocab_size,
        len(tables.book_starts),
    )


def constants_of(tables: _Tables) -> dict[str, int]:
    """What a kernel is compiled for, of tables."""
    return {"ORDER": tables.order, "PLACES": places_of(tables.order), "ROUNDS": rounds_of(tables.widest)}


@cache
def held_at_once(device: torch.device) -> int:
    """How many programs a device holds at once: each row is divided so that all of them start together."""
    return _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _empty(scores: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(scores.shape, dtype=dtype, device=scores.device)


@triton.jit
def tile_of(scores, unigram, at, end, TILE: tl.constexpr):
    """Scores (0 where they are None) and unigram row of the columns from ``at`` on, as far as ``end``."""
    column = at + tl.arange(0, TILE)
    some = column < end
    own = tl.zeros([TILE], tl.float32)
    if scores is not None:
        own = tl.load(scores + column, mask=some, other=0.0)
    return own, tl.load(unigram + column, mask=some, other=0.0)


@triton.jit
def add_to_row(
    scores,
    out,
    own,
    base,
    begin,
    end,
    weight,
    history,
    history_step,
    tokens,
    prior,
    mixture,
    unigram,
    nodes,
    runs,
    words,
    deltas,
    book,
    book_starts,
    vocab_size,
    joined,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    ROUNDS: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes scores + weight · log prior to the columns from ``begin`` to ``end`` of ``out``; the weight is not 0.

    Args:
        scores, out, unigram: the row, and the row of its prior; None for scores of 0.
        own, base: `tile_of` its first columns, loaded early.
        weight: λ of the row, float32.
        history, mixture and others: as for `find_contexts` and `shares_of`; ``book`` is the tables' ``backoff_book``.
    """
    keeps = tl.full([1], weight, tl.float32) < 0
    first, added = weight, tl.full([], 0.0, tl.float32)
    if ORDER > 1:
        starts, ends, codes = find_contexts(
            history, history_step, tokens, prior,
            nodes, runs, words, book_starts, vocab_size, joined, ORDER, PLACES, ROUNDS,
        )  # fmt: skip
        first, others = shares_of(starts, ends, weight, mixture, prior, ORDER, PLACES)
        firsts, lasts, ids, amounts, some = continuations_of(
            starts, ends, others, begin, end, words, deltas, ORDER, PLACES, ROUNDS
        )
        if SHIFT:
            added = tl.sum(others * tl.load(book + codes), 0)
    elif mixture is not None:
        first = weight * tl.load(mixture + prior)
    wide = out.dtype.element_ty
    for at in range(begin, end, TILE):
        column = at + tl.arange(0, TILE)
        stays = keeps & (base == NEVER)
        changed = own.to(wide) + first.to(wide) * base.to(wide) + added.to(wide)
        tl.store(out + column, tl.where(stays, own.to(wide), changed), mask=column < end)
        own, base = tile_of(scores, unigram, at + TILE, end, TILE)
    if ORDER > 1:
        add_continuations(out, firsts, lasts, ids, amounts, some, others, words, deltas, unigram, keeps, ORDER, PLACES)


@triton.jit(do_not_specialize=["history_row", "history_step", "tokens", "prior", "vocab_size", "joined", "tiles"])
def _add(
    scores,
    scores_row,
    out,
    out_row,
    width,
    tiles,
    history,
    history_row,
    history_step,
    tokens,
    strength,
    strength_step,
    priors,
    priors_step,
    prior,
    mixture,
    unigram,
    nodes,
    runs,
    words,
    deltas,
    book,
    book_starts,
    vocab_size,
    joined,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    ROUNDS: tl.constexpr,
    SHIFT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: as many ``tiles`` of the row of its first number, from those of its second one on."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * tiles * TILE
    end = tl.minimum(begin + tiles * TILE, width)
    scores += row * scores_row
    out += row * out_row
    weight = tl.load(strength + row * strength_step).to(tl.float32)
    if priors is not None:
        prior = tl.load(priors + row * priors_step)
    unigram += prior.to(tl.int64) * width
    own, base = tile_of(scores, unigram, begin, end, TILE)
    if weight == 0:
        if not IN_PLACE:
            for at in range(begin, end, TILE):
                column = at + tl.arange(0, TILE)
                tl.store(out + column, own.to(out.dtype.element_ty), mask=column < end)
                own, _ = tile_of(scores, unigram, at + TILE, end, TILE)
    else:
        add_to_row(
            scores, out, own, base, begin, end, weight, history + row * history_row, history_step, tokens, prior,
            mixture, unigram, nodes, runs, words, deltas, book, book_starts, vocab_size, joined,
            ORDER, PLACES, ROUNDS, SHIFT, TILE,
        )  # fmt: skip
