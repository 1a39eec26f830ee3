"""Summaries that are made some chunks at a time are those that are made all at once."""

import numpy as np
import pytest
import torch

from chunkllm.contiguous import summaries
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.contiguous.table import ChunkTable
from chunkllm.scorers import PooledScorer, chunk_statistics

B, GROUPS, T, D = 3, 2, 200, 8


def random_table():
    """Rows with padding of their own, ends at places of their own, and a last chunk that has not ended."""
    random = np.random.default_rng(0)
    table = ChunkTable(np.array([0, 7, 33]), max_chunk=16, sinks=4)
    table.extend(random.random((B, T)) < 0.1)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_cache", [1, 10, 64, 10_000])
@pytest.mark.parametrize("before", [0, 3])  # chunks that have features already
def test_pieces_make_no_difference(monkeypatch, dtype, in_cache, before):
    monkeypatch.setattr(summaries, "_IN_CACHE", in_cache)
    torch.manual_seed(0)
    table, layer, scorer = random_table(), ChunkLayer(0, offload=False), PooledScorer(D)
    keys = torch.randn(B, GROUPS, T, D).to(dtype) + 5
    layer.update(keys, keys)
    some = np.where(np.arange(B) == 1, table.counts, before)  # of one row nothing is left
    for at, upto in ((np.zeros(B, np.int64), before), (np.zeros(B, np.int64), None), (some, None)):
        starts, lengths = table.spans(at)
        spans = starts[:, :upto], lengths[:, :upto]
        if spans[0].shape[1]:
            summaries.summarise([layer], scorer, at, spans, keys.device)
    for row, count in enumerate(table.counts):
        starts, lengths = (torch.from_numpy(span[row, :count]) for span in table.spans())
        chunk_of = torch.full((1, T), int(count))
        for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            chunk_of[0, start : start + length] = number
        whole = chunk_statistics(keys[row : row + 1], chunk_of, (starts + lengths - 1)[None])
        wanted = torch.cat((whole.mean, whole.variance), -1)[0]
        torch.testing.assert_close(layer.features[row, :, :count], wanted, rtol=1e-4, atol=1e-5)
        assert not layer.features[row, :, count:].any()
