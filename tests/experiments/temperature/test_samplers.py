import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from experiments.temperature.samplers import FAMILIES, Draw, Nucleus, TopNSigma, samplers


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
def test_the_nucleus_is_that_of_transformers(spread, top_p):
    scores = spread * torch.randn(12, 3000, generator=torch.Generator().manual_seed(0))
    scores[3, 5:] = -torch.inf
    expected = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    assert torch.equal(Nucleus(top_p, among=16)(None, scores), expected)


def test_top_n_sigma_keeps_what_is_near_the_top_at_any_temperature():
    scores = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0, -torch.inf]])
    sigma = scores[0, :5].std(correction=0)
    expected = scores.masked_fill(scores < 4.0 - sigma, -torch.inf)
    for temperature in (0.5, 1.0, 7.0):
        assert torch.equal(TopNSigma(1.0)(None, scores / temperature) * temperature, expected)
    assert expected.isfinite().sum() == 2


def test_families_have_settings_to_choose_from():
    found = samplers((0.1, 1.0), 0.9, baselines=True)
    assert list(found)[:2] == ["T=0.1", "T=1"] == list(samplers((0.1, 1.0), 0.9, baselines=False))
    counts = [sum(name.startswith(beginning) for name in found) for beginning in FAMILIES.values()]
    assert counts == [2] * len(FAMILIES) and sum(counts) + 2 == len(found)


@pytest.mark.parametrize("among", [4, 16])
def test_tokens_are_drawn_as_sampling_draws_them(among):
    torch.manual_seed(0)
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf])
    drawn = Draw(among)(None, scores.expand(20_000, -1))
    assert torch.equal(drawn.isfinite().sum(-1), torch.ones(20_000, dtype=torch.long))
    torch.testing.assert_close((drawn == 0).float().mean(0), scores.softmax(-1), atol=0.012, rtol=0)
