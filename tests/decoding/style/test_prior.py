import os

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from decoding import DecodingError, NGramModel, StylePrior
from decoding.style.source import Corpus
from decoding.style.training import train_prior
from tests.conftest import TEXT, make_model, make_tokenizer

PAD = 0


@pytest.fixture(scope="module")
def prior(tokenizer):
    return NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=3, pad_vocab=True)


@pytest.fixture
def prompt(tokenizer):
    return tokenizer("the captain said", return_tensors="pt")["input_ids"]


def log_rows(prior, contexts):
    return prior.log_probs(torch.tensor(contexts))


def test_matching_is_the_weighted_sum_over_the_matching_orders(prior, tokenizer):
    ids = tokenizer("captain said that")["input_ids"]
    scores = torch.randn(1, len(tokenizer))
    got = StylePrior(prior, λ=0.4, weights=(0.5, 0.3, 0.2))(torch.tensor([ids]), scores)
    # log p_k with a context cut to k−1 tokens
    rows = [log_rows(prior, [[-1, -1]]), log_rows(prior, [[-1, ids[-1]]]), log_rows(prior, [ids[-2:]])]
    wanted = scores + 0.4 * (0.5 * rows[0] + 0.3 * rows[1] + 0.2 * rows[2])
    torch.testing.assert_close(got, wanted)


def test_orders_whose_context_does_not_match_add_nothing(prior, tokenizer):
    ids = tokenizer("rain storm zzz")["input_ids"]  # the last token is unknown to the corpus
    scores = torch.randn(1, len(tokenizer))
    got = StylePrior(prior, λ=1)(torch.tensor([ids]), scores)
    torch.testing.assert_close(got, scores + log_rows(prior, [[-1, -1]]) / 3)


@pytest.mark.parametrize("orders", [None, (3,), (1, 2), (2, 3)])
def test_interpolated_is_the_highest_order(prior, tokenizer, orders):
    ids = tokenizer("captain said that")["input_ids"]
    scores = torch.randn(1, len(tokenizer))
    got = StylePrior(prior, λ=0.7, combine="interpolated", orders=orders)(torch.tensor([ids]), scores)
    context = ids[-2:] if orders is None or 3 in orders else [-1, ids[-1]]
    torch.testing.assert_close(got, scores + 0.7 * log_rows(prior, [context]))


def test_lambda_0_returns_the_same_scores(prior, prompt):
    scores = torch.randn(1, prior.vocab_size)
    scores[0, 3] = torch.nan
    assert StylePrior(prior, λ=0)(prompt, scores) is scores
    assert StylePrior(λ=0.0)(prompt, scores) is scores


def test_lambda_0_generates_bit_for_bit(prior, model, prompt):
    options = {"max_new_tokens": 20, "do_sample": True, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(1)
    plain = model.generate(prompt, **options)
    torch.manual_seed(1)
    off = model.generate(prompt, logits_processor=[StylePrior(prior, λ=0)], **options)
    assert torch.equal(plain.sequences, off.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, off.scores, strict=True))


def test_masks_are_never_revived_and_the_input_is_left_alone(prior, prompt):
    scores = torch.randn(1, prior.vocab_size)
    scores[0, ::2] = -torch.inf
    before = scores.clone()
    got = StylePrior(prior, λ=1)(prompt, scores)
    assert torch.equal(scores, before)
    assert torch.equal(torch.isneginf(got), torch.isneginf(scores))


def test_nan_is_reported(prior, prompt):
    scores = torch.randn(1, prior.vocab_size)
    scores[0, 5] = torch.nan
    with pytest.raises(DecodingError, match="NaN"):
        StylePrior(prior, λ=0.1)(prompt, scores)


def test_columns_beyond_the_vocabulary_never_gain(prior, prompt):
    scores = torch.randn(1, prior.vocab_size + 9)
    moved = StylePrior(prior, λ=1)(prompt, scores) - scores
    assert (moved[:, prior.vocab_size :] <= moved[:, : prior.vocab_size].min() + 1e-5).all()


def test_scores_narrower_than_the_prior_are_refused(prior, prompt):
    with pytest.raises(DecodingError, match="another model"):
        StylePrior(prior, λ=1)(prompt, torch.randn(1, prior.vocab_size - 1))


def test_pad_tokens_are_no_context(prior, tokenizer):
    processor = StylePrior(prior, λ=0.5, pad_token_id=PAD)
    ids = tokenizer("captain")["input_ids"]
    scores = torch.randn(1, len(tokenizer))
    alone = processor(torch.tensor([ids]), scores)
    for padding in (1, 2, 7):
        assert torch.equal(processor(torch.tensor([[PAD] * padding + ids]), scores), alone)


def test_the_padding_token_inside_a_text_is_a_token_like_any_other(tokenizer):
    ids = tokenizer("captain said that")["input_ids"]
    prior = NGramModel.train([ids[0], PAD, ids[1], PAD, ids[2]] * 9, len(tokenizer), order=3)
    processor = StylePrior(prior, λ=0.5, pad_token_id=PAD, combine="interpolated")
    scores = torch.randn(1, len(tokenizer))
    inside = processor(torch.tensor([[PAD, PAD, ids[0], PAD]]), scores)
    torch.testing.assert_close(inside, scores + 0.5 * log_rows(prior, [[ids[0], PAD]]))


def generate_rows(model, tokenizer, prompts, processor, **options):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, logits_processor=LogitsProcessorList([processor]), pad_token_id=PAD, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def test_left_padded_rows_equal_their_unpadded_runs(prior, model, tokenizer):
    prompts = ["the captain said that his ship had", "night", "the sea was"]
    options = {"max_new_tokens": 16, "do_sample": False}
    processor = StylePrior(prior, λ=1, tokenizer=tokenizer)
    together = generate_rows(model, tokenizer, prompts, processor, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate_rows(model, tokenizer, [prompt], processor, **options)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_beam_search_maximises_the_product_of_model_and_prior(prior, tokenizer):
    """Every continuation of three tokens, by brute force."""
    words = ["the", "captain", "said", "that", "his", "ship"]
    tokenizer = make_tokenizer(words)
    vocab = len(tokenizer)
    model = make_model(vocab)
    model.generation_config.eos_token_id = None
    prior = NGramModel.train(tokenizer(" ".join(words * 3))["input_ids"], vocab, order=3, pad_vocab=True)
    prompt = tokenizer("the captain", return_tensors="pt")["input_ids"]
    beams = vocab**2  # wide enough to be exhaustive
    out = model.generate(
        prompt,
        logits_processor=[StylePrior(prior, λ=0.8, combine="interpolated")],
        num_beams=beams,
        num_return_sequences=5,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
    )
    tails = torch.cartesian_prod(*[torch.arange(vocab)] * 3)
    full = torch.cat((prompt.expand(len(tails), -1), tails), 1)
    with torch.no_grad():
        log_p = model(full).logits.log_softmax(-1)
    total = torch.zeros(len(tails))
    for step in range(3):
        at = prompt.shape[1] + step
        style = prior.log_probs(full[:, at - 2 : at])
        total += (log_p[:, at - 1] + 0.8 * style).gather(1, full[:, at : at + 1])[:, 0]
    best = total.topk(5)
    assert out.sequences.tolist() == full[best.indices].tolist()
    torch.testing.assert_close(out.sequences_scores * 3, best.values, atol=1e-4, rtol=1e-4)


def test_num_return_sequences_and_sampling(prior, model, prompt):
    out = model.generate(
        prompt, logits_processor=[StylePrior(prior, λ=0.5)], do_sample=True, num_return_sequences=4, max_new_tokens=8
    )
    assert out.shape[0] == 4


def test_classifier_free_guidance(prior, model, prompt):
    """The prior is added to the guided scores, once."""
    options = {
        "guidance_scale": 1.5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 1,
    }
    plain = model.generate(prompt, **options).scores[0]
    processor = StylePrior(prior, λ=0.5)
    steered = model.generate(prompt, logits_processor=[processor], **options).scores[0]
    torch.testing.assert_close(steered, processor(prompt, plain))


def test_assisted_generation_gives_the_same_text(prior, model, tokenizer, prompt):
    assistant = make_model(len(tokenizer), attention_bias=True)
    options = {"do_sample": False, "max_new_tokens": 20}
    processor = StylePrior(prior, λ=0.6)
    plain = model.generate(prompt, logits_processor=[processor], **options)
    assisted = model.generate(prompt, logits_processor=[processor], assistant_model=assistant, **options)
    assert plain.tolist() == assisted.tolist()


def test_it_steers_towards_the_corpus(prior, model, prompt):
    torch.manual_seed(0)
    options = {"do_sample": True, "max_new_tokens": 40, "num_return_sequences": 8}
    plain = model.generate(prompt, **options)
    steered = model.generate(prompt, logits_processor=[StylePrior(prior, λ=1, combine="interpolated")], **options)
    assert np.mean([prior.perplexity(row) for row in steered]) < np.mean([prior.perplexity(row) for row in plain]) / 2


def test_an_unbound_prior_shows_the_line_to_write(model, prompt):
    with pytest.raises(DecodingError, match=r"StylePrior\(λ=0.2, style='king-james', tokenizer=tokenizer\)"):
        model.generate(prompt, logits_processor=[StylePrior(λ=0.2)], max_new_tokens=2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"λ": 1.5}, "allow_any_lambda"),
        ({"λ": -0.1}, "allow_any_lambda"),
        ({"λ": float("nan")}, "finite"),
        ({"λ": "0.1"}, "finite"),
        ({"λ": True}, "finite"),
        ({"λ": 0.1, "lambda_": 0.1}, "not both"),
        ({"combine": "geometric"}, "unknown combine"),
        ({"combine": "interpolated", "weights": (1, 1, 1)}, "weights"),
        ({"orders": (1, 4)}, "orders"),
        ({"orders": ()}, "orders"),
        ({"weights": (1, 1)}, "weights"),
        ({"weights": (1, -1, 1)}, "weights"),
        ({"weights": (0, 0, 0)}, "weights"),
    ],
)
def test_unusable_parameters_are_refused(prior, parameters, message):
    with pytest.raises(DecodingError, match=message):
        StylePrior(prior, **parameters)


def test_any_lambda_is_allowed_on_request(prior, prompt):
    scores = torch.randn(1, prior.vocab_size)
    up = StylePrior(prior, lambda_=1.5, allow_any_lambda=True)(prompt, scores) - scores
    down = StylePrior(prior, λ=-1.5, allow_any_lambda=True)(prompt, scores) - scores
    torch.testing.assert_close(up, -down, atol=1e-5, rtol=1e-5)


def test_another_tokenizers_prior_is_refused_with_both_names(tokenizer, tmp_path):
    other = make_tokenizer(["some", "other", "words"])
    tokenizer.name_or_path, other.name_or_path = "models/first", "models/second"
    trained = train_prior(Corpus("storm", (TEXT,)), tokenizer)
    trained.save(tmp_path / "prior.safetensors")
    for style in (trained, tmp_path / "prior.safetensors"):
        StylePrior(style, tokenizer=tokenizer)
        with pytest.raises(DecodingError, match="'first'.*'second'"):
            StylePrior(style, tokenizer=other)


def test_saving_and_opening(prior, tokenizer, prompt, tmp_path):
    processor = StylePrior(prior, λ=0.3, weights=(0.2, 0.3, 0.5))
    processor.save_pretrained(tmp_path / "storm")
    scores = torch.randn(1, len(tokenizer))
    opened = StylePrior.from_pretrained(tmp_path / "storm")
    assert opened.lambda_ == 0.3
    assert torch.equal(opened(prompt, scores), processor(prompt, scores))
    assert StylePrior.from_pretrained(tmp_path / "storm", λ=0.9, tokenizer=tokenizer).lambda_ == 0.9
    (tmp_path / "storm" / "style_prior.json").write_text("{}")
    with pytest.raises(DecodingError, match="damaged"):
        StylePrior.from_pretrained(tmp_path / "storm")
    with pytest.raises(DecodingError, match="no style prior at"):
        StylePrior.from_pretrained("nobody/nothing")


def test_pushing_to_the_hub_uploads_both_files(prior, hub):
    assert StylePrior(prior, λ=0.3).push_to_hub("me/storm") == "https://hub.example/me/storm"
    assert sorted(os.listdir(hub.store / "me/storm")) == ["prior.safetensors", "style_prior.json"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("order", [1, 3, 5])
def test_on_cuda_without_host_syncs_and_in_a_graph(tokenizer, order):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=order, pad_vocab=True)
    processor = StylePrior(prior, λ=0.5, pad_token_id=PAD)
    ids = torch.randint(3, len(tokenizer), (4, 8))
    scores = torch.randn(4, len(tokenizer))
    wanted = processor(ids, scores)
    ids, scores = ids.cuda(), scores.cuda()
    processor(ids, scores)  # moves the tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = processor(ids, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = processor(ids, scores)
    scores.normal_()
    graph.replay()
    torch.testing.assert_close(recorded, processor(ids, scores))
