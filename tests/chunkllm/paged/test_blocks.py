"""Summaries of blocks: the same however a text is cut into steps, and those of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm.paged.blocks import BlockSummaries, tokens_of_step
from chunkllm.scorers import PooledScorer
from tests.chunkllm.paged.engine import BLOCK, HKV, D, L


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 1000))
def test_features_do_not_depend_on_how_a_text_is_cut_into_steps(first, second, seed):
    draw = torch.Generator().manual_seed(seed)
    total = first + second + 1
    keys, ends = torch.randn(L, total, HKV, D, generator=draw), torch.rand(total, generator=draw) < 0.2

    def summarised(sizes):
        summaries = BlockSummaries(
            PooledScorer(D), range(L), blocks=10, block_size=BLOCK, slots=2, kv_heads=HKV, head_dim=D,
            dtype=torch.float32, device=torch.device("cpu"), fixed_shapes=seed % 2 == 0,
        )  # fmt: skip
        at = 0
        for size in sizes:
            start = torch.tensor([0, size])
            tokens = tokens_of_step(torch.tensor([at + size]), start, torch.arange(at, at + size), BLOCK)
            pieces = summaries.cut(tokens, ends[at : at + size], torch.tensor([0]), torch.tensor([at == 0]))
            summaries.add(pieces, keys[:, at : at + size], range(L))
            at += size
        return summaries

    whole, parts = summarised([total]), summarised([size for size in (first, second, 1) if size])
    assert torch.equal(whole.lengths, parts.lengths)
    for a, b in zip(whole.features, parts.features, strict=True):
        torch.testing.assert_close(a[:, :10], b[:, :10], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summaries_of_keys_with_a_large_bias_are_those_of_float64(dtype, fixed_shapes):
    """Read in steps of several sizes, so that pieces go on; one dimension turns by more than float16 has squares of."""
    torch.manual_seed(0)
    count, sizes = 6 * BLOCK, [5, 1, 1, 9, 1, 1, 1, 12, 17]
    turned = 300.0 * torch.arange(count).mul(2.5).cos()[:, None, None] * (torch.arange(D) == 0)
    keys = (torch.randn(count, HKV, D) + 300.0 * (torch.arange(D) > 3) + turned).to(dtype)
    made = BlockSummaries(
        PooledScorer(D),
        [0],
        blocks=8,
        block_size=BLOCK,
        slots=2,
        kv_heads=HKV,
        head_dim=D,
        dtype=dtype,
        device=torch.device("cpu"),
        fixed_shapes=fixed_shapes,
    )
    at = 0
    for size in sizes:
        places = BLOCK + torch.arange(at, at + size)
        tokens = tokens_of_step(torch.tensor([at + size]), torch.tensor([0, size]), places, BLOCK)
        pieces = made.cut(tokens, torch.zeros(size, dtype=torch.bool), torch.tensor([0]), torch.tensor([at == 0]))
        made.add(pieces, keys[None, at : at + size], range(1))
        at += size
    assert at == count
    of_blocks = keys.double().unflatten(0, (-1, BLOCK)).permute(2, 0, 1, 3)  # [Hkv, blocks, tokens, D]
    wanted = torch.cat((of_blocks.mean(2), of_blocks.var(2, unbiased=False)), -1)
    got = made.features[0][:, 1:7, 0]
    assert (wanted > 4e4).any() and got.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
