"""A `StylePrior` is a recipe; what it is for a tokenizer and a model is bound to them, and nothing else changes."""

import copy
import pickle
import threading

import pytest
import torch

from decoding import DecodingError, NGramModel, StylePrior, generate
from decoding.style.settings import Settings
from tests.conftest import TEXT, WORDS, make_model, make_tokenizer

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def folder(tmp_path, tokenizer, style_file):
    """A saved style whose λ, mode and guards are none of the defaults."""
    row = torch.linspace(-2, 2, len(tokenizer))
    settings = {"mode": "ratio", "orders": [1, 2], "weights": [0.9, 0.1], "max_js": 0.05, "steer_stop": True}
    StylePrior(style_file, λ=0.7, log_ratio=row, tokenizer=tokenizer, **settings).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def scores(tokenizer):
    return 3 * torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))


def test_a_saved_folder_as_a_style_keeps_its_settings(folder, tokenizer, scores):
    opened, given = StylePrior.from_pretrained(folder, tokenizer=tokenizer), StylePrior(folder, tokenizer=tokenizer)
    assert given.lambda_ == 0.7 and given.settings == opened.settings
    assert torch.equal(given(IDS, scores), opened(IDS, scores))
    wanted = Settings(mode="ratio", orders=[1, 2], weights=[0.9, 0.1], max_js=0.05, steer_stop=True)
    assert given.settings == wanted


def test_what_is_given_replaces_what_was_saved(folder, tokenizer):
    given = StylePrior(folder, λ=0.2, max_js=0.1, steer_stop=False, tokenizer=tokenizer)
    assert given.lambda_ == 0.2 and given.settings.max_js == 0.1 and not given.settings.steer_stop
    assert given.mode == "ratio" and given.settings.orders == [1, 2]
    paper = StylePrior(folder, mode="paper", tokenizer=tokenizer)
    assert paper.mode == "paper" and paper.lambda_ == 0.1  # a λ of another mode says nothing
    bare = StylePrior.from_pretrained(folder, tokenizer=tokenizer, max_js=None)
    assert bare.settings.max_js is None and bare.lambda_ == 0.7


def test_the_range_of_a_saved_lambda_is_checked(folder, tokenizer):
    StylePrior(folder, λ=50, allow_any_lambda=True, tokenizer=tokenizer).save_pretrained(folder / "strong")
    for opening in (StylePrior, StylePrior.from_pretrained):
        with pytest.raises(DecodingError, match=r"λ must lie in \[0, 1\], not 50"):
            opening(folder / "strong")
        assert opening(folder / "strong", allow_any_lambda=True).lambda_ == 50


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "loud"), ("orders", [1.5]), ("weights", ["x"]), ("max_js", "0.1"), ("steer_stop", 1), ("combine", 3)],
)
def test_spoilt_settings_of_a_folder_are_one_error(folder, name, value):
    import json

    path = folder / "style_prior.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    for opening in (StylePrior, StylePrior.from_pretrained):
        with pytest.raises(DecodingError, match=rf"style_prior\.json is damaged: .*{name}"):
            opening(folder)


def test_bound_to_another_model_it_has_the_others_ratio(style_file, tokenizer, model, short_openings):
    other = make_model(len(tokenizer), tie_word_embeddings=True)
    prior = StylePrior(style_file, mode="ratio", tokenizer=tokenizer, model=model)
    first = prior.log_ratio
    second = prior.bind(tokenizer, other).log_ratio
    assert not torch.equal(first, second) and torch.equal(prior.log_ratio, second)
    assert torch.equal(second, StylePrior(style_file, mode="ratio", tokenizer=tokenizer, model=other).log_ratio)
    assert torch.equal(prior.bind(tokenizer, model).log_ratio, first)


def test_bound_to_another_tokenizer_it_is_trained_anew(style_file, tokenizer):
    reversed_words = make_tokenizer(WORDS[::-1])
    prior = StylePrior(style_file, tokenizer=tokenizer)
    ours, theirs = prior.model, prior.bind(reversed_words).model
    assert ours.metadata["tokenizer_sha256"] != theirs.metadata["tokenizer_sha256"]
    assert torch.equal(theirs.tables.unigram, StylePrior(style_file, tokenizer=reversed_words).model.tables.unigram)


def test_binding_again_makes_nothing_anew(style_file, tokenizer, model, short_openings, monkeypatch):
    prior = StylePrior(style_file, mode="ratio")
    bound = prior.bind(tokenizer, model)
    monkeypatch.setattr(NGramModel, "load", lambda path: pytest.fail("opened again"))
    assert prior.bind(tokenizer, model) is bound


def test_binding_follows_the_weights_and_the_end_of_sequence(style_file, short_openings):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    prior = StylePrior(style_file, mode="ratio")
    bound = prior.bind(tokenizer, model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    changed = prior.bind(tokenizer, model)
    assert changed is not bound
    tokenizer.eos_token = "night"
    assert prior.bind(tokenizer, model).stop_ids != changed.stop_ids


def test_generate_leaves_what_a_prior_is_bound_to(style_file, tokenizer, model, short_openings):
    prior = StylePrior(style_file, mode="ratio", tokenizer=tokenizer, model=model)
    row, other = prior.log_ratio, make_model(len(tokenizer), tie_word_embeddings=True)
    steered = generate(other, "the captain", tokenizer=tokenizer, logits_processor=[prior], max_new_tokens=4)
    assert torch.equal(prior.log_ratio, row)
    own = StylePrior(style_file, mode="ratio", tokenizer=tokenizer, model=other)
    assert steered == generate(other, "the captain", tokenizer=tokenizer, logits_processor=[own], max_new_tokens=4)


def test_one_prior_in_threads_of_several_models(style_file, tokenizer, short_openings):
    models = [make_model(len(tokenizer), tie_word_embeddings=tied) for tied in (False, True)]
    prior, options = StylePrior(style_file, mode="ratio", λ=1), {"tokenizer": tokenizer, "max_new_tokens": 8}

    def text(model, prior):
        return generate(model, "the captain", logits_processor=[prior], do_sample=False, **options)

    wanted = [text(model, StylePrior(style_file, mode="ratio", λ=1)) for model in models]
    got = [[] for _ in models]

    def work(i):
        got[i] += [text(models[i], prior) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[text] * 4 for text in wanted]


@pytest.mark.parametrize("another", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])  # noqa: S301
def test_copies_before_and_after_use(style_file, tokenizer, scores, another):
    recipe = StylePrior(style_file, λ=0.5, max_js=0.1)
    copied = another(recipe)
    wanted = recipe.bind(tokenizer)(IDS, scores)
    assert torch.equal(copied.bind(tokenizer)(IDS, scores), wanted)
    assert torch.equal(another(recipe)(IDS, scores), wanted)
    assert torch.equal(another(recipe.bind(tokenizer))(IDS, scores), wanted)


def test_one_prior_for_scores_of_several_widths(tokenizer, style_file):
    prior = StylePrior(style_file, λ=0.5, max_js=0.1, tokenizer=tokenizer)
    widths = [len(tokenizer), 64, len(tokenizer), 80]
    alone = [StylePrior(style_file, λ=0.5, max_js=0.1, tokenizer=tokenizer) for _ in widths]
    for width, own in zip(widths, alone, strict=True):
        scores = torch.randn(1, width)
        assert torch.equal(prior(IDS, scores), own(IDS, scores))


def test_lambda_can_be_set_between_steps(tokenizer, style_file, scores):
    prior = StylePrior(style_file, λ=0.5, tokenizer=tokenizer)
    prior.lambda_ = 1
    assert torch.equal(prior(IDS, scores), StylePrior(style_file, λ=1, tokenizer=tokenizer)(IDS, scores))
    assert prior.bind(tokenizer).lambda_ == 1
    with pytest.raises(DecodingError, match="must lie in"):
        prior.lambda_ = 2


def test_an_unknown_style_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(DecodingError, match="no style 'shakespear'"):
        StylePrior("shakespear")
    with pytest.raises(DecodingError, match="no style 'corp/"):
        StylePrior("corp/missing.txt")


def test_a_trained_model_cannot_become_a_ratio(tokenizer, style_file, tmp_path):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=2)
    prior.save(tmp_path / "p.safetensors")
    for style in (prior, tmp_path / "p.safetensors"):
        for asked in ({"mode": "ratio"}, {"λ": "auto"}):
            with pytest.raises(DecodingError, match="needs the style's text"):
                StylePrior(style, **asked)


@pytest.mark.parametrize("orders", [None, [1, 2], [1], [1, 3]])
def test_the_highest_order_whose_context_is_in_the_text(style_file, tokenizer, orders):
    bound = StylePrior(style_file, tokenizer=tokenizer, orders=orders).bind(tokenizer)
    text = tokenizer(TEXT)["input_ids"]
    rows = torch.tensor([text[4:9], [0, 0, 0, *text[8:10]], [0, 0, 0, 0, text[3]], [text[5]] * 5, [0] * 4 + [1]])
    pairs, within = {*zip(text, text[1:], strict=False)}, set(text)
    for row, found in zip(rows.tolist(), bound.matching_orders(rows), strict=True):
        known = [1, *([2] if row[-1] in within else []), *([3] if tuple(row[-2:]) in pairs else [])]
        assert found == max(k for k in known if k in (orders or (1, 2, 3)))
