import pytest
import torch
from transformers import TopPLogitsWarper

from decoding.temperature.nucleus import cut_to_nucleus


def by_hand(row, top_p):
    """The likeliest tokens, until they have the share together."""
    probabilities, kept, share = row.double().softmax(-1).tolist(), set(), 0.0
    for token in sorted(range(len(row)), key=lambda i: -probabilities[i]):
        if share >= top_p:
            break
        kept.add(token)
        share += probabilities[token]
    return torch.tensor([value if i in kept else -torch.inf for i, value in enumerate(row.tolist())])


@pytest.mark.parametrize("seed", range(5))
def test_every_row_keeps_its_own_nucleus(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(6, 50, generator=generator)
    scores[:, ::7] = -torch.inf
    top_p = torch.tensor([0.9, 1.0, 0.5, 1e-6, 0.99, 1.0])
    got = cut_to_nucleus(scores.clone(), top_p)
    for row, p in enumerate(top_p.tolist()):
        assert torch.equal(got[row], scores[row] if p == 1 else by_hand(scores[row], p))
    assert torch.equal(got[2:3], TopPLogitsWarper(0.5)(None, scores[2:3]))
    assert torch.isfinite(got[3]).sum() == 1


def test_it_works_in_place_and_leaves_tokens_without_probability_alone_at_1():
    scores = torch.tensor([[0.0, -1e4, 1.0], [0.0, -1e4, 1.0]])
    got = cut_to_nucleus(scores, torch.tensor([1.0, 0.999]))
    assert got is scores
    assert got.tolist() == [[0.0, -1e4, 1.0], [0.0, -torch.inf, 1.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_without_host_syncs():
    scores, top_p = torch.randn(4, 1000), torch.tensor([0.9, 1.0, 0.5, 0.2])
    device = scores.cuda(), top_p.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = cut_to_nucleus(*device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), cut_to_nucleus(scores, top_p))
