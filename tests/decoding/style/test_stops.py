"""The ids that end a text keep their odds against the likeliest other one, in every mode, unless asked otherwise."""

import pytest
import torch

from decoding import NGramModel, StylePrior, generate
from decoding.style.steering import GuardSettings, guards_of, steer, stops_of
from ngram.layout import join
from tests.conftest import TEXT

EOS = 1
HISTORY = torch.tensor([[3, 4], [5, 6], [7, 8], [3, 9]])
MODES = {
    "paper": {},
    "ratio": {"mode": "ratio"},
    "interpolated": {"combine": "interpolated"},
    "order 1": {"orders": (1,)},
    "guarded": {"plausibility": 0.05, "entropy_gate": 1.0},
    "budget": {"max_js": 0.5},
}


@pytest.fixture(scope="module")
def prior(tokenizer):
    return NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=3, eos_id=EOS, pad_vocab=True)


@pytest.fixture(params=[0, 1, 2])
def scores(tokenizer, request):
    return 3 * torch.randn(4, len(tokenizer), generator=torch.Generator().manual_seed(request.param))


def settings(mode, tokenizer):
    row = {"log_ratio": torch.linspace(2, -2, len(tokenizer))} if mode == "ratio" else {}
    return MODES[mode] | row


def odds(scores, stops):
    others = scores.clone()
    others[:, stops] = -torch.inf
    return scores[:, stops] - others.amax(-1, keepdim=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("λ", [0.3, 1.0])
def test_odds_and_others_in_every_mode(prior, scores, tokenizer, mode, λ):
    chosen = settings(mode, tokenizer)
    got = StylePrior(prior, λ=λ, **chosen)(HISTORY, scores)
    torch.testing.assert_close(odds(got, [EOS]), odds(scores, [EOS]), atol=1e-4, rtol=1e-4)
    assert not torch.equal(got, scores)
    if mode != "budget":  # which is spent with the end of text as it is
        steered = StylePrior(prior, λ=λ, steer_stop=True, **chosen)(HISTORY, scores)
        differ = (got.log_softmax(-1) - steered.log_softmax(-1)).diff(dim=1).abs() > 1e-4
        assert not differ[:, 2:].any()  # all others move as they would


@pytest.mark.parametrize("mode", MODES)
def test_greedy_texts_end_where_they_would(prior, tokenizer, mode):
    scores = 3 * torch.randn(400, len(tokenizer), generator=torch.Generator().manual_seed(5))
    scores[:, EOS] += 4
    history = torch.randint(3, len(tokenizer), (400, 2), generator=torch.Generator().manual_seed(6))
    ends = scores.argmax(-1) == EOS
    assert 0.1 < ends.float().mean() < 0.9
    got = StylePrior(prior, λ=1, **settings(mode, tokenizer))(history, scores)
    assert torch.equal(got.argmax(-1) == EOS, ends)


def test_the_budget_holds_with_ends_left_alone(prior, scores):
    from decoding.metrics import jensen_shannon

    scores[:, EOS] += 5
    got = StylePrior(prior, λ=1, max_js=0.02)(HISTORY, scores)
    assert (jensen_shannon(scores, got) <= 0.02 * 1.0001).all()


def test_masked_ends_stay_masked_and_forced_ones_forced(prior, scores):
    masked, forced = scores.clone(), torch.full_like(scores, -torch.inf)
    masked[:, EOS], forced[:, EOS] = -torch.inf, 0
    for chosen in MODES.values():
        if chosen.get("mode") == "ratio":
            continue
        style = StylePrior(prior, λ=0.8, **chosen)
        got = style(HISTORY, masked)
        assert torch.isneginf(got[:, EOS]).all() and torch.isfinite(got[:, 2:]).all()
        got = style(HISTORY, forced)
        assert (got.softmax(-1)[:, EOS] == 1).all()


def test_half_precision(prior, scores):
    got = StylePrior(prior, λ=0.5)(HISTORY, scores.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(odds(got.float(), [EOS]), odds(scores, [EOS]), atol=0.2, rtol=0.1)


def test_the_ids_are_those_at_which_the_model_stops(style_file, tokenizer, model):
    assert StylePrior(style_file, tokenizer=tokenizer).stop_ids == (EOS,)
    model.generation_config.eos_token_id = [EOS, 7]
    try:
        assert StylePrior(style_file, tokenizer=tokenizer, model=model).stop_ids == (EOS, 7)
    finally:
        model.generation_config.eos_token_id = EOS


def test_generate_leaves_the_ends_alone_that_it_is_given(style_file, tokenizer, model):
    prior = StylePrior(style_file, λ=1)
    seen = []

    class Spy(type(prior.bind(tokenizer))):
        def __call__(self, input_ids, scores):
            result = super().__call__(input_ids, scores)
            seen.append((odds(scores, [7, 9]), odds(result, [7, 9])))
            return result

    bound = prior.bound(tokenizer, model, [7, 9])
    assert bound.stop_ids == (EOS, 7, 9)
    bound.__class__ = Spy
    generate(model, "the captain", tokenizer=tokenizer, logits_processor=[prior], eos_token_id=[7, 9], max_new_tokens=5)
    assert seen
    for before, after in seen:
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_rows_of_priors_that_do_and_do_not(prior, tokenizer):
    scores = 3 * torch.randn(4, len(tokenizer), generator=torch.Generator().manual_seed(0))
    tables = join([prior.tables.shape] * 2, [prior.tables] * 2)
    rows, strength = torch.tensor([0, 1, 0, 1]), torch.tensor([0.5, 0.5, 0, 0])
    stops = stops_of([EOS], len(tokenizer), "cpu").left_by([False, True]).of(rows)
    for guards in (None, guards_of([GuardSettings(plausibility=0.2), GuardSettings(max_js=0.3)], "cpu").of(rows)):
        got = steer(tables, scores, HISTORY, strength, guards=guards, stops=stops, prior=rows)
        assert torch.equal(got[2:], scores[2:])
        torch.testing.assert_close(odds(got[:1], [EOS]), odds(scores[:1], [EOS]), atol=1e-4, rtol=1e-4)
        plain = steer(tables, scores, HISTORY, strength, guards=guards, prior=rows)
        torch.testing.assert_close(got[1], plain[1])


def test_nothing_is_left_alone_where_nothing_ends_a_text():
    assert stops_of([], 9, "cpu") is None
    assert stops_of([12, -1], 9, "cpu") is None
    assert stops_of([3], 9, "cpu").left_by([True, True]) is None
    assert stops_of([0, 1], 2, "cpu") is None  # nothing else could be said
    assert stops_of([0, 3, 8], 9, "cpu").between == ((1, 3), (4, 8))
