"""Summaries of chunks beside a paged key-value cache: what a block of the cache holds, as a scorer reads it.

A paged cache is read by whole blocks. So a chunk also ends where its block does: one that crosses an edge is two
*pieces*, each of which lies in one block. Their summaries are kept by block, as keys are: a block that several requests
share has them for all, and one that is written anew gets new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chunkllm.scorers import ChunkStatistics, Scorer, features_of_layers

_TOKENS_PER_PIECE = 16


class Tokens(NamedTuple):
    """The tokens that a step computes, T in all: those of R rows (requests), one row after the other.

    Attributes:
        row: int64 [T].
        position: int64 [T], place in the row's text.
        block: int64 [T], the block that the token is written to.
        is_first: bool [T], whether it is the row's first in this step.
        last: int64 [R], the row's last token in this step.
    """

    row: Tensor
    position: Tensor
    block: Tensor
    is_first: Tensor
    last: Tensor


def tokens_of_step(lengths: Tensor, query_start: Tensor, places: Tensor, block_size: int) -> Tokens:
    """Finds where the tokens of a step belong.

    Args:
        lengths: int [R], tokens of each row, those of this step included.
        query_start: int [R + 1], where each row's tokens begin among those of the step.
        places: int [T], block · block size + place in the block, of each token.
        block_size: tokens of a block.
    """
    count = len(places)
    begin, stop = query_start[:-1].long(), query_start[1:].long()
    rows = torch.arange(len(begin), device=begin.device)
    row = rows.repeat_interleave(stop - begin, output_size=count)
    token = torch.arange(count, device=begin.device)
    position = token - stop[row] + lengths.long()[row]
    return Tokens(row, position, (places // block_size).long(), token == begin[row], stop - 1)


class Pieces(NamedTuple):
    """The pieces of chunks that the tokens of a step belong to, P in all.

    Attributes:
        of_token: int64 [T], the piece that a token belongs to.
        block: int64 [P], of a piece that is whole; else the block that takes what belongs nowhere.
        number: int64 [P], of the piece within its block.
        slot: int64 [P], where the moments are of a piece that goes on from the step before.
        earlier: float32 [P], tokens that it had before this step, of those whose keys were taken in.
        tokens: float32 [P], those and this step's.
        end: int64 [P], its last token in this step.
        is_whole: bool [P], whether that is the last of the piece, too.
        running: int64 [R], the piece of each row's last token.
        row_slot: int64 [R], the row's slot.
    """

    of_token: Tensor
    block: Tensor
    number: Tensor
    slot: Tensor
    earlier: Tensor
    tokens: Tensor
    end: Tensor
    is_whole: Tensor
    running: Tensor
    row_slot: Tensor


class BlockSummaries:
    """Features of the pieces in every block, and the moments of those that have not ended.

    Args:
        scorer: makes features.
        layers: places in the model of the L layers.
        blocks: of the cache.
        block_size: tokens of a block.
        slots: S, rows that can be under way.
        kv_heads: Hkv.
        head_dim: D.
        dtype: of the keys; the features have it too, unless it is float16, whose range is too small for variances.
        device: of everything.
        fixed_shapes: whether shapes must not depend on what tensors hold, so that nothing waits for a device.

    Attributes:
        tokens_per_piece: that a piece has on average, at the least.
        lengths: int64 [blocks + 1, M], tokens of each piece that is whole, 0 where there is none. Pieces of a block
            follow each other from its first token on. The block behind the last takes what belongs nowhere.
        features: [L, Hkv, blocks + 1, M, F].
        nowhere: that last block.
    """

    def __init__(
        self,
        scorer: Scorer,
        layers: Sequence[int],
        *,
        blocks: int,
        block_size: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        fixed_shapes: bool,
    ):
        self._scorer = scorer
        self._layers = layers
        self._fixed_shapes = fixed_shapes
        self._block_size = block_size
        self.nowhere = blocks
        pieces = -(-block_size // _TOKENS_PER_PIECE)
        self.tokens_per_piece = block_size // pieces
        one = torch.zeros(1, kv_heads, 1, head_dim, device=device)
        width = scorer.chunk_features(layers[0], ChunkStatistics(one, one, one)).shape[-1]
        self.lengths = torch.zeros(blocks + 1, pieces, dtype=torch.long, device=device)
        shape = (len(layers), kv_heads, blocks + 1, pieces, width)
        kept = torch.float32 if dtype == torch.float16 else dtype
        self.features = torch.zeros(shape, dtype=kept, device=device)
        # Means, and sums of squares about them.
        self._moments = torch.zeros(len(layers), slots, kv_heads, 2 * head_dim, device=device)
        self._summed = torch.zeros(slots, device=device)  # tokens of each slot's piece that has not ended

    def cut(self, tokens: Tokens, ends: Tensor, row_slot: Tensor, is_new: Tensor) -> Pieces:
        """Cuts the tokens of a step into pieces, and takes in how long those are that end.

        Args:
            tokens: of the step.
            ends: bool [T], whether a chunk ends at the token.
            row_slot: int64 [R], slots of the rows.
            is_new: bool [R], whether the row is new in its slot, and has nothing to go on with. If it begins within a
                block, nobody knows what is said of the beginning: whoever had the block before may have said it.
        """
        offset = tokens.position % self._block_size
        is_fresh = offset == 0
        is_unknown = is_fresh | (tokens.is_first & is_new[tokens.row])
        self.lengths[torch.where(is_unknown, tokens.block, self.nowhere)] = 0
        token = torch.arange(len(offset), device=offset.device)
        begin = torch.where(is_fresh | tokens.is_first, token, 0).cummax(0).values  # of the token's row and block
        before = ends.cumsum(0) - ends.long()
        held = self.lengths[tokens.block[begin]]
        number = (held > 0).sum(1) + before - before[begin]
        most = self.lengths.shape[1] - 1
        is_end = (offset == self._block_size - 1) | (ends & (number < most))
        number = number.clamp(max=most)
        is_begin = is_fresh | tokens.is_first | is_end.roll(1)
        of_token = is_begin.cumsum(0) - 1
        count = self._most_pieces(len(offset), len(row_slot)) if self._fixed_shapes else int(of_token[-1]) + 1
        sizes = torch.zeros(count, device=offset.device).index_add_(0, of_token, torch.ones_like(offset).float())
        end = torch.zeros(count, dtype=torch.long, device=offset.device)
        end.scatter_reduce_(0, of_token, token, "amax")
        first = (end - sizes.long() + 1).clamp(min=0)
        row = tokens.row[first]
        goes_on = tokens.is_first[first] & ~is_fresh[first]
        slot = row_slot[row]
        is_whole = is_end[end] & (sizes > 0)
        earlier = torch.where(goes_on, self._summed[slot], 0)
        running = of_token[tokens.last]
        pieces = Pieces(
            of_token=of_token,
            block=torch.where(is_whole, tokens.block[end], self.nowhere),
            number=number[end],
            slot=slot,
            earlier=earlier,
            tokens=sizes + earlier,
            end=end,
            is_whole=is_whole,
            running=running,
            row_slot=row_slot,
        )
        # Not `tokens`: of a piece whose beginning nobody summed, the length is known all the same.
        started = torch.where(goes_on, self.lengths[pieces.block].sum(1), offset[first])
        self.lengths[pieces.block, pieces.number] = offset[end] + 1 - started
        self.lengths[self.nowhere] = 0
        self._summed[row_slot] = pieces.tokens[running] * ~is_whole[running]
        return pieces

    def _most_pieces(self, tokens: int, rows: int) -> int:
        """That a step can have: a row's first and last block are not whole ones, and each has M pieces at most."""
        return min(tokens, (tokens // self._block_size + 2 * rows) * self.lengths.shape[1])

    def forget(self, row_slot: Tensor, is_new: Tensor) -> None:
        """Empties the slots, int64 [R], of rows that are new there, bool [R]."""
        self._summed[row_slot] = self._summed[row_slot].masked_fill(is_new, 0)

    def discard(self, blocks: Tensor) -> None:
        """Nothing is known of these blocks, int64 [T], until they are written anew."""
        self.lengths[blocks] = 0

    def add(self, pieces: Pieces, keys: Tensor, layers: range) -> None:
        """Takes in the keys of a step.

        Args:
            pieces: what `cut` made of it.
            keys: [n, T, Hkv, D], post-RoPE.
            layers: the n layers that they are of, as numbers in ``features``.
        """
        keys = keys.float()
        kept = self._moments[layers.start : layers.stop]
        mean, squares = _joined(_moments(keys, pieces), kept[:, pieces.slot].chunk(2, -1), pieces)
        kept[:, pieces.row_slot] = torch.cat((mean, squares), -1)[:, pieces.running]
        whole = slice(None) if self._fixed_shapes else pieces.is_whole.nonzero()[:, 0]
        block, number, end = pieces.block[whole], pieces.number[whole], pieces.end[whole]
        if not len(block):
            return
        variance = squares[:, whole] / pieces.tokens[whole].clamp(min=1)[:, None, None]
        parts = (mean[:, whole], variance, keys[:, end])
        statistics = ChunkStatistics(*(part.transpose(1, 2)[:, None] for part in parts))
        features = features_of_layers(self._scorer, self._layers[layers.start : layers.stop], statistics)
        kept_features = self.features[layers.start : layers.stop]
        kept_features[:, :, block, number] = features[:, 0].to(kept_features.dtype)


def _moments(keys: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Means of this step's keys in each piece, and sums of squares about them, each float32 [n, P, Hkv, D]."""
    zeros = keys.new_zeros(len(keys), len(pieces.block), *keys.shape[2:])
    sizes = (pieces.tokens - pieces.earlier).clamp(min=1)[:, None, None]
    mean = zeros.index_add(1, pieces.of_token, keys) / sizes
    return mean, zeros.index_add_(1, pieces.of_token, (keys - mean[:, pieces.of_token]).square_())


def _joined(new: tuple[Tensor, Tensor], kept: Sequence[Tensor], pieces: Pieces) -> tuple[Tensor, Tensor]:
    """The moments of pieces with those of the steps before: pairwise (Chan et al., 1983), so that nothing cancels."""
    (mean, squares), (mean_before, squares_before) = new, kept
    share = (pieces.earlier / pieces.tokens.clamp(min=1))[:, None, None]
    sizes = (pieces.tokens - pieces.earlier)[:, None, None]
    goes_on = (pieces.earlier > 0)[:, None, None]  # else there are another's moments
    shift = torch.where(goes_on, mean_before - mean, 0)
    before = torch.where(goes_on, squares_before, 0)
    return mean + shift * share, squares + before + shift.square() * share * sizes
