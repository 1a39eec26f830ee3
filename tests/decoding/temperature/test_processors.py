import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from transformers import LogitsProcessorList

from decoding import (
    AutoTemperature,
    DecodingError,
    DynamicTemperature,
    EntropyDependentTemperature,
    FixedTemperature,
    NGramModel,
    StylePrior,
    generate,
)
from decoding.late import LateAnswer
from tests.conftest import TEXT

NONE = torch.zeros(1, 1, dtype=torch.long)


class FixedSelector:
    """Chooses by the prompt's first word, and counts. What it reads of a prompt is the temperature."""

    top_p = None

    def __init__(self, by_word, unknown=1.25):
        self.by_word, self.unknown = by_word, unknown
        self.asked = []
        self.encoder = FakeEncoder(self)

    def temperatures_of(self, vectors, model_size, policy):
        if vectors.any():
            self.asked.append((self.encoder.read, model_size, policy))
        return vectors[:, 0].where(vectors[:, 1] > 0, self.unknown)

    def is_for(self, model):
        return False


class FakeEncoder:
    width, model = 2, SimpleNamespace(device="cpu")

    def __init__(self, selector):
        self.selector = selector

    def __call__(self, prompts):
        self.read = tuple(prompts)
        return torch.tensor([[self.selector.by_word[prompt.split()[0]], 1.0] for prompt in prompts])


def scores_with_entropy(entropy, size):
    def of(top):
        rest = 1 - top
        return -(top * math.log(top) + rest * math.log(rest / (size - 1)))

    top = brentq(lambda p: of(p) - entropy, 0.5, 1 - 1e-12)
    probabilities = torch.full((1, size), (1 - top) / (size - 1), dtype=torch.float64)
    probabilities[0, 0] = top
    return probabilities.log().float()


def test_a_fixed_temperature_divides():
    scores = torch.randn(3, 7)
    torch.testing.assert_close(FixedTemperature(0.4)(NONE, scores), scores / 0.4)
    assert torch.equal(FixedTemperature(1)(NONE, scores), scores)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "hot", True])
def test_temperatures_that_are_none(value):
    with pytest.raises(DecodingError, match="positive number"):
        FixedTemperature(value)


def test_dynamic_temperature_of_llama_cpp():
    # T = 1, range 0.2, entropy 0.0753 of at most 10.3735 nats, in half precision: 0.8027.
    scores = scores_with_entropy(0.0753, round(math.exp(10.3735)))
    found = DynamicTemperature(1.0, range=0.2).of(NONE, scores)
    assert found.item() == pytest.approx(0.8027, abs=3e-4)
    assert found.item() == pytest.approx(0.8 + 0.4 * 0.0753 / 10.3735, abs=1e-5)


def test_dynamic_temperature_counts_the_allowed_tokens_and_stays_positive():
    scores = torch.zeros(1, 8)
    scores[:, 4:] = -torch.inf
    assert DynamicTemperature(1.0, range=0.5).of(NONE, scores).item() == pytest.approx(1.5)
    sure = torch.full((1, 8), -torch.inf)
    sure[0, 2] = 3.0
    assert DynamicTemperature(0.3, range=0.5).of(NONE, sure).item() == pytest.approx(0.01)


def test_entropy_dependent_temperature():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    p = scores.double().softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    wanted = 0.7 * 0.8 ** (0.5 / entropy)
    torch.testing.assert_close(EntropyDependentTemperature(0.7, theta=0.5).of(NONE, scores), wanted.float())
    assert EntropyDependentTemperature(0.7, theta=0).of(NONE, scores).tolist() == pytest.approx([0.7] * 4)
    sure = torch.zeros(1, 5).index_fill(1, torch.tensor([1]), 1e4)
    assert torch.isfinite(EntropyDependentTemperature()(NONE, sure)).all()


@pytest.mark.parametrize("make", [lambda: EntropyDependentTemperature(theta=-1), lambda: DynamicTemperature(range=-1)])
def test_entropy_based_settings_are_checked(make):
    with pytest.raises(DecodingError, match="at least 0"):
        make()


def rows(tokenizer, *texts):
    return tokenizer(list(texts), return_tensors="pt", padding=True)["input_ids"]


def test_blank_rows_get_the_temperature_for_any_prompt(model, tokenizer):
    selector = FixedSelector({"storm": 0.5, "wind": 2.0})
    auto = AutoTemperature(selector, tokenizer, model=model)
    scores = torch.ones(3, len(tokenizer))
    ids = torch.cat((rows(tokenizer, "storm and sea", "wind"), torch.zeros(1, 3, dtype=torch.long)))
    auto(ids, scores)
    assert auto.chosen.tolist() == [0.5, 2.0, 1.25]
    auto(ids[2:], scores[2:])
    assert auto.chosen.tolist() == [1.25]
    auto(ids[:, :0], scores)
    assert auto.chosen.tolist() == [1.25] * 3
    assert [asked[0] for asked in selector.asked] == [("storm and sea", "wind")]


def test_every_call_chooses_anew(model, tokenizer):
    selector = FixedSelector(dict.fromkeys(("storm", "the"), 0.5))
    auto = AutoTemperature(selector, tokenizer, model=model)
    options = {"do_sample": True, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    prompts = ["storm", "storm and", "storm and sea", "storm", "storm", "the sea and the ship had such a wind"]
    for prompt in prompts:  # the second, a call's first step, is as long as a step of the first
        model.generate(**tokenizer(prompt, return_tensors="pt"), logits_processor=[auto], **options)
    assert [asked[0] for asked in selector.asked] == [(prompt,) for prompt in prompts]
    written = model.generate(**tokenizer(prompts[-1], return_tensors="pt"), logits_processor=[auto], **options)
    model.generate(written, logits_processor=[auto], **options)  # goes on writing
    assert len(selector.asked) == len(prompts) + 1
    turn = torch.cat((written, tokenizer("and night", return_tensors="pt")["input_ids"]), 1)
    model.generate(turn, logits_processor=[auto], **options)
    assert len(selector.asked) == len(prompts) + 2


def test_what_is_bound_for_a_call_keeps_its_temperatures(model, tokenizer):
    selector = FixedSelector({"storm": 0.5, "wind": 2.0})
    auto = AutoTemperature(selector, tokenizer, model=model)
    scores = torch.ones(1, len(tokenizer))
    bound = auto.bound(tokenizer, model)
    first = rows(tokenizer, "storm and sea")
    bound(first, scores)
    longer = torch.cat((first, first, first), 1)
    for length in (4, 6, 5, 8):  # as in assisted generation
        assert bound(longer[:, :length], scores)[0, 0] == 2
    auto(rows(tokenizer, "wind"), scores)  # another call, meanwhile
    assert bound.chosen.tolist() == [0.5] and auto.chosen.tolist() == [2.0]
    assert len(selector.asked) == 2


def test_assisted_generation(model, tokenizer):
    selector = FixedSelector({"storm": 0.5})
    options = {"tokenizer": tokenizer, "max_new_tokens": 8, "prompt_lookup_num_tokens": 3}
    generate(model, "storm and sea and storm and", logits_processor=[AutoTemperature(selector)], **options)
    assert [asked[0] for asked in selector.asked] == [("storm and sea and storm and",)]


def test_generate_chooses_anew_and_leaves_what_is_bound(model, tokenizer):
    selector = FixedSelector({"storm": 0.5})
    auto = AutoTemperature(selector, tokenizer, model_size="large")
    bound = auto._bound
    for prompt in ("storm", "storm and", "storm and sea"):
        generate(model, prompt, tokenizer=tokenizer, logits_processor=[auto], max_new_tokens=4)
    assert [asked[:2] for asked in selector.asked] == [((p,), "large") for p in ("storm", "storm and", "storm and sea")]
    assert auto._bound is bound and auto.chosen.tolist() == [0.5]


def test_an_unknown_size_is_warned_of_once(model, tokenizer):
    scores = torch.ones(1, len(tokenizer))
    selector = FixedSelector({"storm": 0.5})
    auto = AutoTemperature(selector, tokenizer)
    with pytest.warns(UserWarning, match="model=model"):
        auto(rows(tokenizer, "storm"), scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto(rows(tokenizer, "storm and sea"), scores)
        for known in ({"model": model}, {"model_size": "large"}, {"policy": "curve"}):
            AutoTemperature(selector, tokenizer, **known)(rows(tokenizer, "storm"), scores)
    assert [asked[1] for asked in selector.asked] == ["small", "small", "small", "large", "small"]


def test_the_size_is_that_of_the_model_that_is_given(tokenizer):
    large = SimpleNamespace(num_parameters=lambda: 8e9)
    selector = FixedSelector({"storm": 0.5})
    AutoTemperature(selector, tokenizer, model=large)(rows(tokenizer, "storm"), torch.ones(1, len(tokenizer)))
    assert selector.asked[0][1] == "medium"


def test_every_row_gets_its_prompts_temperature_once(tokenizer):
    selector = FixedSelector({"storm": 0.5, "wind": 2.0})
    auto = AutoTemperature(selector, tokenizer)
    ids = rows(tokenizer, "storm and sea", "wind", "storm and sea")
    scores = torch.randn(3, len(tokenizer))
    wanted = scores / torch.tensor([[0.5], [2.0], [0.5]])
    for _ in range(4):
        torch.testing.assert_close(auto(ids, scores), wanted)
        ids = torch.cat((ids, torch.full((3, 1), 5)), 1)
    assert selector.asked == [(("storm and sea", "wind"), "small", None)]  # without padding, each once


def test_another_prompt_is_noticed(tokenizer):
    selector = FixedSelector({"storm": 0.5, "wind": 2.0, "sea": 0.1})
    auto = AutoTemperature(selector, tokenizer, model_size="large", policy="ability")
    scores = torch.ones(1, len(tokenizer))
    auto(rows(tokenizer, "storm and sea"), scores)
    assert auto(rows(tokenizer, "wind and sea"), scores)[0, 0] == 0.5  # as long as the last one
    assert auto(rows(tokenizer, "sea and sea black"), scores)[0, 0] == 10  # as long as its next step
    auto(rows(tokenizer, "wind"), scores)
    auto(rows(tokenizer, "wind", "sea"), torch.ones(2, len(tokenizer)))
    assert [len(asked[0]) for asked in selector.asked] == [1, 1, 1, 1, 2]
    assert selector.asked[0][1:] == ("large", "ability")


def test_without_a_tokenizer_it_says_what_to_write():
    with pytest.raises(DecodingError, match=r"AutoTemperature\(selector, tokenizer, model=model\)"):
        AutoTemperature(FixedSelector({}))(NONE, torch.zeros(1, 5))


def test_texts_are_those_of_the_same_fixed_temperature(model, tokenizer):
    prompts = ["storm and sea", "wind"]
    auto = AutoTemperature(FixedSelector({"storm": 0.5, "wind": 2.0}))
    options = {"tokenizer": tokenizer, "max_new_tokens": 12}
    for prompt, temperature in zip(prompts, (0.5, 2.0), strict=True):
        torch.manual_seed(3)
        chosen = generate(model, prompt, logits_processor=[auto], **options)
        torch.manual_seed(3)
        inputs = tokenizer(prompt, return_tensors="pt")
        plain = model.generate(
            inputs["input_ids"], do_sample=True, temperature=temperature, top_k=0, max_new_tokens=12, pad_token_id=0
        )
        assert prompt + chosen == tokenizer.decode(plain[0], skip_special_tokens=True)


def test_beams_and_several_answers_share_their_prompts_temperature(model, tokenizer):
    selector = FixedSelector({"storm": 0.5, "wind": 2.0})
    auto = AutoTemperature(selector)
    options = {"tokenizer": tokenizer, "max_new_tokens": 6, "logits_processor": [auto]}
    assert len(generate(model, ["storm and sea", "wind"], num_return_sequences=2, **options)) == 4
    assert auto.chosen.tolist() == [0.5, 0.5, 2.0, 2.0]
    generate(model, ["storm and sea", "wind"], num_beams=3, **options)
    assert auto.chosen.tolist() == [0.5] * 3 + [2.0] * 3
    assert all(prompts == ("storm and sea", "wind") for prompts, *_ in selector.asked)


def test_the_size_is_the_bound_models(model, tokenizer):
    selector = FixedSelector({"storm": 1.0})
    generate(model, "storm", tokenizer=tokenizer, logits_processor=[AutoTemperature(selector)], max_new_tokens=2)
    assert selector.asked[0][1:] == ("small", "ability")


def test_style_and_temperature_in_one_list(model, tokenizer):
    prior = NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), order=2, pad_vocab=True)
    style, auto = StylePrior(prior, λ=0.5), AutoTemperature(FixedSelector({"storm": 0.5}), tokenizer)
    ids, scores = rows(tokenizer, "storm and sea"), torch.randn(1, len(tokenizer))
    both = LogitsProcessorList([style, auto])(ids, scores)
    torch.testing.assert_close(both, style(ids, scores) / 0.5)
    text = generate(model, "storm and sea", tokenizer=tokenizer, logits_processor=[style, auto], max_new_tokens=4)
    assert isinstance(text, str)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"do_sample": False}])
def test_two_temperatures_are_one_too_many(model, tokenizer, options):
    with pytest.raises(DecodingError, match="leave one out"):
        generate(model, "storm", tokenizer=tokenizer, logits_processor=[FixedTemperature(0.5)], **options)


def test_late_answers_are_immediate_on_a_host():
    late = LateAnswer()
    assert not late(torch.device("cpu"), lambda: torch.tensor(False))
    assert late(torch.device("cpu"), lambda: torch.tensor(True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_without_host_syncs(tokenizer):
    auto = AutoTemperature(FixedSelector({"storm": 0.5, "wind": 2.0}), tokenizer)
    ids = rows(tokenizer, "storm and sea", "wind").cuda()
    scores = torch.randn(2, len(tokenizer), device="cuda")
    auto(ids, scores)
    ids = torch.cat((ids, torch.full((2, 1), 5, device="cuda")), 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = auto(ids, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_allclose(got.cpu(), scores.cpu() / torch.tensor([[0.5], [2.0]]), rtol=1e-6)
