import math

import pytest
import torch

from decoding import DecodingError, NGramModel, StylePrior
from decoding.metrics import entropy, jensen_shannon
from decoding.style import steering
from decoding.style.steering import GuardSettings, guards_of, steer
from ngram.layout import join
from tests.conftest import TEXT


@pytest.fixture(scope="module")
def prior(tokenizer):
    return NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=3, pad_vocab=True)


@pytest.fixture
def history(tokenizer):
    return torch.tensor([tokenizer("captain said")["input_ids"], tokenizer("rain as")["input_ids"]] * 4)


@pytest.fixture
def scores(tokenizer):
    return 3 * torch.randn(8, len(tokenizer), generator=torch.Generator().manual_seed(0))


def steered(prior, history, scores, λ=1.0, **guards):
    return StylePrior(prior, λ=λ, allow_any_lambda=True, **guards)(history, scores)


@pytest.mark.parametrize("budget", [1e-4, 0.01, 0.05, 0.2])
def test_the_budget_is_kept_and_used(prior, history, scores, budget):
    strong = 4.0
    got = steered(prior, history, scores, strong, max_js=budget)
    spent = jensen_shannon(scores, got)
    assert (spent <= budget * 1.0001).all()
    plain = steered(prior, history, scores, strong)
    free = jensen_shannon(scores, plain) <= budget
    torch.testing.assert_close(got[free], plain[free])
    share = (got - scores).norm(dim=1) / (plain - scores).norm(dim=1)
    over = jensen_shannon(scores, scores + (share + 2 / 2**steering.HALVINGS)[:, None] * (plain - scores))
    assert (over[~free] > budget).all() and (~free).any()


@pytest.mark.parametrize("budget", [1e-5, 1e-3, 0.05, 0.3, 0.6])
def test_the_search_finds_the_largest_share_whatever_the_change(budget):
    generator = torch.Generator().manual_seed(1)
    log_p = (torch.randn(200, 1000, generator=generator) * torch.rand(200, 1, generator=generator) * 8).log_softmax(-1)
    change = torch.randn(200, 1000, generator=generator) * 10 ** (3 * torch.rand(200, 1, generator=generator) - 1)
    share = steering._share_within(log_p.exp(), change, torch.full((1, 1), budget))
    spent = jensen_shannon(log_p.double(), log_p.double() + share.double() * change.double())
    more = jensen_shannon(
        log_p.double(), log_p.double() + (share + 2 / 2**steering.HALVINGS).double() * change.double()
    )
    assert (spent <= budget * 1.01 + 1e-6).all()
    assert (more > budget)[share[:, 0] < 1].all()


def test_the_divergence_is_that_of_the_metrics(prior, history, scores):
    change = steered(prior, history, scores) - scores
    got = steering._divergence(scores.softmax(-1), change)[:, 0]
    torch.testing.assert_close(got, jensen_shannon(scores, scores + change), atol=1e-6, rtol=1e-4)


def test_the_plausible_share_their_probability_and_others_keep_theirs(prior, history, scores):
    alpha = 0.2
    p, q = scores.softmax(-1), steered(prior, history, scores, plausibility=alpha).softmax(-1)
    plausible = p >= alpha * p.amax(-1, keepdim=True)
    assert 1 < plausible.sum(1).float().mean() < p.shape[1] - 1
    torch.testing.assert_close(q[~plausible], p[~plausible])
    plain = steered(prior, history, scores).softmax(-1)
    for row in range(len(p)):
        among = plausible[row]
        wanted = plain[row, among] / plain[row, among].sum() * p[row, among].sum()
        torch.testing.assert_close(q[row, among], wanted)


def test_all_are_plausible_at_a_tiny_share(prior, history, scores):
    got = steered(prior, history, scores, plausibility=1e-30)
    torch.testing.assert_close(got.softmax(-1), steered(prior, history, scores).softmax(-1))


def test_the_gate_follows_entropy(prior, history, scores):
    gate = float(entropy(scores).median())
    got = steered(prior, history, scores, entropy_gate=gate)
    share = (entropy(scores) / gate).clamp(max=1)[:, None]
    torch.testing.assert_close(got, scores + share * (steered(prior, history, scores) - scores))


def test_guards_together_keep_masks_and_the_input(prior, history, scores):
    scores[:, ::3] = -torch.inf
    before = scores.clone()
    got = steered(prior, history, scores, plausibility=0.1, max_js=0.02, entropy_gate=1.0)
    assert torch.equal(scores, before)
    assert torch.equal(torch.isneginf(got), torch.isneginf(scores)) and not got.isnan().any()
    assert (jensen_shannon(scores, got) <= 0.02 * 1.0001).all()


def test_half_precision_keeps_its_dtype(prior, history, scores):
    assert steered(prior, history, scores.bfloat16(), max_js=0.02).dtype == torch.bfloat16


def test_rows_have_the_guards_of_their_own_prior(prior, history, scores):
    settings = [GuardSettings(max_js=0.01), GuardSettings(), GuardSettings(plausibility=0.3, entropy_gate=2.0)]
    tables = join([prior.tables.shape] * 3, [prior.tables] * 3)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    strength = torch.full((8,), 0.8)
    strength[3] = 0
    got = steer(tables, scores, history, strength, guards=guards_of(settings, "cpu").of(rows), prior=rows)
    assert torch.equal(got[3], scores[3])
    for row, which in enumerate(rows.tolist()):
        if row != 3:
            alone = steered(prior, history[row : row + 1], scores[row : row + 1], 0.8, combine="interpolated",
                            **settings[which]._asdict())  # fmt: skip
            torch.testing.assert_close(got[row : row + 1].softmax(-1), alone.softmax(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("plausibility", 0), ("plausibility", 1.1), ("max_js", 0.7), ("max_js", True), ("entropy_gate", math.nan),
     ("entropy_gate", -1), ("max_js", "0.1")],
)  # fmt: skip
def test_guards_outside_their_range_are_refused(prior, name, value):
    with pytest.raises(DecodingError, match=f"{name} must be a number above 0"):
        StylePrior(prior, **{name: value})


def test_no_guards_are_none():
    assert guards_of([GuardSettings(), GuardSettings()], "cpu") is None


def test_the_plausible_are_moved_alike_on_devices(prior, history, scores, monkeypatch):
    scores[:, ::3] = -torch.inf
    tables = join([prior.tables.shape] * 2, [prior.tables] * 2)
    rows, strength = torch.tensor([0, 1] * 4), torch.tensor([0.8] * 7 + [0.0])
    guards = guards_of([GuardSettings(plausibility=0.1), GuardSettings()], "cpu").of(rows)
    on_host = steer(tables, scores, history, strength, guards=guards, prior=rows)
    monkeypatch.setattr(steering, "counts_on_host", lambda device: False)
    elsewhere = steer(tables, scores, history, strength, guards=guards, prior=rows)
    torch.testing.assert_close(elsewhere, on_host)
    assert torch.equal(elsewhere[-1], scores[-1])
