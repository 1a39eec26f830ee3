"""Features of the chunks of a prompt or of a step, made where its keys are: many at once, or as a CPU's cache holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.late import send
from chunkllm.scorers import Scorer

_IN_CACHE = 16384  # tokens, of a layer's keys


def summarise(
    layers: Sequence[ChunkLayer],
    scorer: Scorer,
    at: np.ndarray,
    spans: tuple[np.ndarray, np.ndarray],
    device: torch.device,
) -> None:
    """Adds features of new chunks to layers.

    Args:
        layers: all keys of these chunks must be in their storage.
        scorer: whose features they are.
        at: int64 [B], the number of each row's first new chunk.
        spans: starts and lengths of the new chunks, int64 [B, C]; rows with fewer are filled up with length 0.
        device: of the features.
    """
    starts, lengths = spans
    is_new = lengths > 0
    room = int((at + is_new.sum(1)).max())
    pieces = []
    for rows, columns in _pieces(starts, lengths, device):
        places = _places(starts[rows, columns], lengths[rows, columns], device)
        pieces.append((rows, at[rows] + columns.start, is_new[rows, columns].sum(1), *places))
    for layer in layers:
        assert layer.keys is not None
        for rows, first, counts, tokens, chunk_of, ends in pieces:
            features = scorer.summarise(layer.place, layer.keys[rows, :, tokens].to(device), chunk_of, ends)
            layer.add_features(features, rows, first, counts, room)


def _pieces(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of chunks summarised at once: on a GPU all, on a CPU as many of a row as its cache holds.

    Larger tensors, made on the way, would cost it several times what they are made for.
    """
    rows, columns = starts.shape
    if device.type != "cpu" or int(lengths.sum(1).max()) <= _IN_CACHE:
        yield slice(0, rows), slice(0, columns)
        return
    for row in np.flatnonzero(lengths[:, 0]):
        cuts = np.searchsorted(lengths[row].cumsum(), np.arange(0, lengths[row].sum(), _IN_CACHE))
        for first, last in zip(cuts, (*cuts[1:], columns), strict=True):
            if first < last:
                yield slice(int(row), int(row) + 1), slice(int(first), int(last))


def _places(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[slice, Tensor, Tensor]:
    """The tokens among which chunks stand, and for each of them its chunk [b, T], and the chunks' ends [b, C]."""
    has_any = lengths[:, 0] > 0
    begin = int(starts[has_any, 0].min())
    stop = int((starts + lengths).max())
    chunk_of = np.full((len(starts), stop - begin), starts.shape[1], np.int64)
    for row in np.flatnonzero(has_any):
        number = np.repeat(np.arange(starts.shape[1]), lengths[row])
        first = starts[row, 0] - begin
        chunk_of[row, first : first + len(number)] = number
    ends = np.maximum(starts + lengths - 1 - begin, 0)
    return slice(begin, stop), send(chunk_of, device), send(ends, device)
