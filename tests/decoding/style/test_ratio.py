import json

import numpy as np
import pytest
import torch

from decoding import DecodingError, NGramModel, StylePrior, generate
from decoding.style import strength
from decoding.style.background import model_frequencies
from decoding.style.ratio import MOST_LOG_RATIO, RARE, frequencies, log_ratio, ratio_to
from decoding.style.strength import Trial, choose_strength, held_out_part
from tests.conftest import TEXT, WORDS


@pytest.fixture(scope="module")
def documents(tokenizer):
    return [np.array(tokenizer(TEXT)["input_ids"])]


@pytest.fixture
def long_style(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(" ".join(WORDS * 40) + "\n", encoding="utf-8")
    return path


def test_the_ratio_is_its_formula():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.25, 0.0, 0.75, 0.0])
    wanted = np.log((p.numpy() + RARE) / (q.numpy() + RARE)).clip(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    torch.testing.assert_close(log_ratio(p, q), torch.from_numpy(wanted), check_dtype=False)
    assert log_ratio(p, q)[3] == 0 and log_ratio(p, q)[1] == MOST_LOG_RATIO


def test_frequencies_leave_the_end_of_sequence_out():
    got = frequencies([np.array([2, 2, 1]), np.array([3, 1])], 5, left_out=1)
    torch.testing.assert_close(got, torch.tensor([0, 0, 2 / 3, 1 / 3, 0], dtype=torch.float64))


def test_what_a_model_writes_is_measured_once(model, tokenizer, short_openings, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = model_frequencies(model, tokenizer)
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers are untouched
    assert first.shape == (len(tokenizer),) and abs(float(first.sum()) - 1) < 1e-9
    assert first[tokenizer.eos_token_id] == 0
    monkeypatch.setattr(model, "generate", None)
    assert torch.equal(model_frequencies(model, tokenizer), first)


def test_backgrounds(documents, model, tokenizer, style_file, short_openings):
    p = frequencies(documents, len(tokenizer), tokenizer.eos_token_id)
    own = ratio_to("model", documents, tokenizer, model)
    torch.testing.assert_close(own, log_ratio(p, model_frequencies(model, tokenizer)))
    assert not ratio_to("corpus", documents, tokenizer).any()
    assert not ratio_to(str(style_file), documents, tokenizer).any()  # the same text
    other = [documents[0][:20]]
    wanted = log_ratio(p, frequencies(other, len(tokenizer), tokenizer.eos_token_id))
    torch.testing.assert_close(ratio_to(other, documents, tokenizer), wanted)
    with pytest.raises(DecodingError, match="needs the model"):
        ratio_to("model", documents, tokenizer)


def test_mode_ratio_adds_the_row(documents, model, tokenizer, style_file, short_openings):
    prior = StylePrior(style_file, λ=0.5, mode="ratio", orders=(1,), steer_stop=True, tokenizer=tokenizer, model=model)
    row = ratio_to("model", documents, tokenizer, model)
    ids, scores = tokenizer("the captain", return_tensors="pt")["input_ids"], torch.randn(1, len(tokenizer))
    torch.testing.assert_close(prior(ids, scores), scores + 0.5 * row)
    wide = torch.randn(1, len(tokenizer) + 7)
    torch.testing.assert_close(prior(ids, wide)[:, : len(tokenizer)], wide[:, : len(tokenizer)] + 0.5 * row)


def test_mode_ratio_with_contexts_divides_every_order(tokenizer):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=3, pad_vocab=True)
    row = torch.randn(len(tokenizer))
    weights = (0.5, 0.3, 0.2)
    settings = {"orders": (1, 2, 3), "weights": weights}
    ids, scores = torch.tensor([tokenizer("captain said")["input_ids"]]), torch.randn(1, len(tokenizer))
    got = StylePrior(prior, λ=0.4, mode="ratio", log_ratio=row, **settings)(ids, scores)
    paper = StylePrior(prior, λ=0.4, **settings)(ids, scores)
    torch.testing.assert_close(
        got, paper + 0.4 * (row - prior.tables.unigram[0])
    )  # all three orders match: weights sum to 1


def test_order_1_weighs_most_in_mode_ratio(tokenizer):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=3, pad_vocab=True)
    row, ids, scores = torch.randn(len(tokenizer)), torch.tensor([[3, 4]]), torch.randn(1, len(tokenizer))
    plain, weighed = (
        StylePrior(prior, λ=1, mode="ratio", log_ratio=row, **weights)(ids, scores)
        for weights in ({}, {"weights": (0.6, 0.2, 0.2)})
    )
    torch.testing.assert_close(plain, weighed)


def test_generate_binds_the_model(model, tokenizer, style_file, short_openings):
    prior = StylePrior(style_file, λ=1, mode="ratio")
    generate(model, "the captain", tokenizer=tokenizer, logits_processor=[prior], max_new_tokens=4)
    assert prior.log_ratio is not None


@pytest.mark.parametrize("contexts", [{}, {"orders": (1,)}, {"orders": (1, 2), "weights": (0.9, 0.1)}])
def test_a_saved_ratio_opens_as_it_was(model, tokenizer, style_file, short_openings, tmp_path, contexts):
    prior = StylePrior(style_file, λ=0.5, mode="ratio", max_js=0.1, tokenizer=tokenizer, model=model, **contexts)
    prior.save_pretrained(tmp_path / "saved")
    opened = StylePrior.from_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    ids, scores = tokenizer("the captain", return_tensors="pt")["input_ids"], torch.randn(1, len(tokenizer))
    assert torch.equal(opened(ids, scores), prior(ids, scores))
    (tmp_path / "saved" / "ratio.safetensors").write_bytes(b"spoilt")
    with pytest.raises(DecodingError, match="damaged"):
        StylePrior.from_pretrained(tmp_path / "saved", tokenizer=tokenizer)


def test_settings_of_earlier_versions_open(tokenizer, style_file, tmp_path):
    StylePrior(style_file, tokenizer=tokenizer).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "style_prior.json").read_text())
    older = {key: config[key] for key in ("lambda", "orders", "weights", "combine")}
    (tmp_path / "style_prior.json").write_text(json.dumps(older))
    assert StylePrior.from_pretrained(tmp_path).mode == "paper"


def test_a_ratio_needs_text_or_its_row(tokenizer, model):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=2)
    with pytest.raises(DecodingError, match="needs the style's text"):
        StylePrior(prior, mode="ratio", tokenizer=tokenizer, model=model)
    with pytest.raises(DecodingError, match="log_ratio"):
        StylePrior(prior, mode="ratio")(torch.tensor([[3]]), torch.randn(1, len(tokenizer)))
    with pytest.raises(DecodingError, match="log_ratio must have"):
        StylePrior(prior, mode="ratio", log_ratio=torch.zeros(3))
    with pytest.raises(DecodingError, match="unknown mode"):
        StylePrior(prior, mode="likelihood")


def trials(perplexities, distincts, divergences):
    return [Trial(i / 10, *numbers) for i, numbers in enumerate(zip(perplexities, distincts, divergences, strict=True))]


def test_the_strength_chosen_is_the_nearest_within_tolerance():
    rising = [30 * 1.05**i for i in range(6)]
    nearer = [0.3 - 0.02 * i for i in range(6)]
    found = trials(rising, [0.95] * 6, nearer)
    assert choose_strength(found, 0.12) == 0.2
    assert choose_strength(found, 0.17) == 0.3
    assert choose_strength(trials([30.0] * 6, [0.95 - 0.04 * i for i in range(6)], nearer), 0.1) == 0.2
    assert choose_strength(trials([30.0] * 6, [0.95] * 6, [0.3, 0.2, 0.1, 0.2, 0.3, 0.4]), 0.1) == 0.2


def test_one_lucky_text_does_not_choose_the_strength():
    nearer = [0.3 - 0.02 * i for i in range(11)]
    assert choose_strength(trials([27.0] + [30.0] * 10, [0.95] * 11, nearer), 0.1) > 0.5


def test_a_tenth_is_held_out():
    documents = [np.arange(600), np.arange(600, 1000)]
    kept, held_out = held_out_part(documents)
    assert np.array_equal(np.concatenate(kept), np.arange(900))
    assert np.array_equal(np.concatenate(held_out), np.arange(900, 1000))
    with pytest.raises(DecodingError, match="tenth"):
        held_out_part([np.arange(100)])


def test_lambda_auto_is_chosen_once_and_saved(model, tokenizer, long_style, short_openings, monkeypatch, tmp_path):
    settings = {"mode": "ratio", "tokenizer": tokenizer, "model": model}
    prior = StylePrior(long_style, λ="auto", tolerance=0.5, **settings)
    assert prior.lambda_ in strength.CANDIDATES and prior.lambda_ > 0
    monkeypatch.setattr(model, "generate", None)
    assert StylePrior(long_style, λ="auto", tolerance=0.5, **settings).lambda_ == prior.lambda_
    StylePrior(long_style, λ="auto", tolerance=0.01, **settings)  # other tolerances ask nothing of the model
    prior.save_pretrained(tmp_path)
    assert StylePrior.from_pretrained(tmp_path, tokenizer=tokenizer).lambda_ == prior.lambda_


def test_lambda_auto_says_what_it_needs(tokenizer, model, style_file, long_style):
    with pytest.raises(DecodingError, match="needs the model"):
        StylePrior(long_style, λ="auto", tokenizer=tokenizer)
    with pytest.raises(DecodingError, match="tolerance"):
        StylePrior(long_style, λ="auto", tokenizer=tokenizer, model=model, tolerance=0)
    with pytest.raises(DecodingError, match="not chosen yet"):
        StylePrior(long_style, λ="auto")(torch.tensor([[3]]), torch.randn(1, len(tokenizer)))
    with pytest.raises(DecodingError, match="finite number"):
        StylePrior(long_style, λ="most")
