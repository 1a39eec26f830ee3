"""`generate` with what people bring: tokenizers without padding, configurations of their own, other kinds of models."""

import copy
import pickle

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from decoding import (
    AutoTemperature,
    DecodingError,
    EntropyDependentTemperature,
    FixedTemperature,
    Generation,
    NGramModel,
    PhaseTemperature,
    StylePrior,
    TemperatureSelector,
    generate,
)
from decoding.style.steering import mixture_of
from decoding.temperature.encoder import Encoder
from decoding.temperature.heads import AbilityHead
from tests.conftest import TEXT, WORDS, make_model, make_tokenizer
from tests.decoding.temperature.test_processors import FixedSelector
from tests.decoding.test_tokens import byte_level


def without_padding():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


@pytest.fixture
def prior(tokenizer):
    return NGramModel.train(tokenizer(TEXT)["input_ids"], len(tokenizer), pad_vocab=True)


@pytest.mark.parametrize("processors", [[], [FixedTemperature(0.7)]])
def test_a_tokenizer_without_padding_is_left_as_it_is(model, style_file, processors):
    tokenizer = without_padding()
    prompts = ["the captain said that his ship", "rain"]
    torch.manual_seed(0)
    texts = generate(model, prompts, tokenizer=tokenizer, logits_processor=processors, max_new_tokens=5)
    assert tokenizer.pad_token is None and len(texts) == 2


def test_rows_of_a_batch_without_padding_are_each_ones_own(model, style_file):
    tokenizer = without_padding()
    prompts = ["the captain said that his ship had never", "rain", "night came"]
    options = {"tokenizer": tokenizer, "max_new_tokens": 6, "do_sample": False}
    together = generate(model, prompts, logits_processor=[StylePrior(style_file, λ=1)], **options)
    assert together == [
        generate(model, each, logits_processor=[StylePrior(style_file, λ=1)], **options) for each in prompts
    ]


def test_a_mode_that_measures_the_model_needs_no_padding_token(model, style_file, monkeypatch):
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 4)
    tokenizer = without_padding()
    generate(model, "rain", tokenizer=tokenizer, logits_processor=[StylePrior(style_file, mode="ratio")])
    assert tokenizer.pad_token is None


def test_a_continuation_begins_with_its_space(model, tokenizer):
    text = generate(model, "the captain", tokenizer=tokenizer, max_new_tokens=4, do_sample=False)
    output = model.generate(**tokenizer("the captain", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert text.startswith(" ") and "the captain" + text == tokenizer.decode(output[0], skip_special_tokens=True)


def test_strings_that_stop():
    tokenizer = byte_level()
    model = make_model(len(tokenizer))
    options = {"tokenizer": tokenizer, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = generate(model, "the captain", **options)
    stopped = generate(model, "the captain", stop_strings=[whole[3]], **options)
    assert stopped == whole[: whole.index(whole[3]) + 1] != whole


def test_an_encoder_decoder_writes_all_of_its_text(tokenizer, style_file, bart):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    prompts = ["the captain said that", "rain"]
    texts = generate(bart, prompts, tokenizer=tokenizer, **options)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = bart.generate(**tokenizer(prompt, return_tensors="pt"), **options)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True) != ""
    steered = generate(bart, prompts, tokenizer=tokenizer, logits_processor=[StylePrior(style_file, λ=1)], **options)
    assert all(steered)


@pytest.mark.parametrize(
    "held", [{"top_p": 0.01}, {"min_p": 0.99}, {"temperature": 0.01}, {"do_sample": False}, {"top_k": 1}]
)
def test_a_models_own_configuration_does_not_reach_temperatures(tokenizer, held):
    plain, own = (make_model(len(tokenizer)) for _ in range(2))
    own.generation_config.update(**held)
    texts = []
    for model in (plain, own):
        torch.manual_seed(0)
        options = {"tokenizer": tokenizer, "max_new_tokens": 16, "logits_processor": [FixedTemperature(1.5)]}
        texts.append(generate(model, "the captain", **options))
    assert texts[0] == texts[1]
    torch.manual_seed(0)
    assert generate(own, "the captain", top_p=0.01, **options) != texts[0]


def sampled(model, tokenizer, prompt="the captain", **options):
    torch.manual_seed(0)
    return generate(model, prompt, tokenizer=tokenizer, **{"max_new_tokens": 16} | options)


def auto_at(top_p, **by_word):
    selector = FixedSelector(by_word or {"the": 1.5})
    selector.top_p = top_p
    return [AutoTemperature(selector)]


@pytest.mark.parametrize("held", [{}, {"top_p": 0.01}, {"top_k": 1}, {"min_p": 0.99}])
def test_a_chosen_temperature_brings_its_top_p(tokenizer, held):
    plain, own = (make_model(len(tokenizer)) for _ in range(2))
    own.generation_config.update(**held)
    fixed = {"logits_processor": [FixedTemperature(1.5)]}
    cut, whole = sampled(plain, tokenizer, **fixed, top_p=0.3), sampled(plain, tokenizer, **fixed)
    assert cut != whole
    assert sampled(own, tokenizer, logits_processor=auto_at(0.3)) == cut
    assert sampled(own, tokenizer, logits_processor=auto_at(None)) == whole
    assert sampled(own, tokenizer, logits_processor=auto_at(0.3), top_p=1.0) == whole


@pytest.mark.parametrize(
    "own",
    [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}, {"typical_p": 0.5}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.02}],
)
@pytest.mark.parametrize("is_configured", [False, True])
def test_a_truncation_of_the_callers_own_stands_alone(model, tokenizer, own, is_configured):
    given = {"generation_config": GenerationConfig(do_sample=True, **own)} if is_configured else own
    wanted = sampled(model, tokenizer, logits_processor=[FixedTemperature(1.5)], **own)
    assert wanted != sampled(model, tokenizer, logits_processor=[FixedTemperature(1.5)])
    assert sampled(model, tokenizer, logits_processor=auto_at(1e-6), **given) == wanted
    assert sampled(model, tokenizer, logits_processor=[FixedTemperature(1.5)], **given) == wanted


def test_the_answers_chosen_temperature_brings_its_top_p_with_thinking_too(selecting):
    tokenizer = make_tokenizer([*WORDS, "<think>", "</think>"])
    model, prompt = make_model(len(tokenizer)), "storm and sea <think>"
    auto = [AutoTemperature(selecting, think=1.5)]
    found = sampled(model, tokenizer, prompt, logits_processor=auto, return_info=True)
    assert (found.think_temperature, found.top_p, found.ability) == (1.5, 0.8, "CT")
    phases = [PhaseTemperature(1.5, found.temperature)]
    assert found.text == sampled(model, tokenizer, prompt, logits_processor=phases, top_p=0.8)
    told = sampled(model, tokenizer, prompt, logits_processor=phases, return_info=True)
    assert told == Generation(told.text, temperature=found.temperature, think_temperature=1.5)


PROMPTS = ["storm and sea", "wind", "none of them"]


@pytest.fixture
def selecting(encoder):
    return TemperatureSelector(encoder, AbilityHead.fit(encoder(PROMPTS), [1, 2, 4], 6), about={"top_p": 0.8})


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_information_belongs_to_its_text(model, tokenizer, selecting, options):
    plain = sampled(model, tokenizer, PROMPTS, logits_processor=[AutoTemperature(selecting)], **options)
    found = sampled(
        model, tokenizer, PROMPTS, logits_processor=[AutoTemperature(selecting)], return_info=True, **options
    )
    assert [each.text for each in found] == plain
    each_prompt = options.get("num_return_sequences", 1)
    wanted = [row for row in selecting.explain(PROMPTS) for _ in range(each_prompt)]
    for mine, row in zip(found, wanted, strict=True):
        assert (mine.prompt, mine.temperature, mine.ability) == (row.prompt, row.temperature, row.ability)
        assert list(mine.abilities.values()) == pytest.approx(list(row.abilities.values()), abs=1e-5)
        assert (mine.policy, mine.reason, mine.top_p, mine.think_temperature) == ("ability", None, 0.8, None)


def test_one_prompt_has_one_and_what_was_not_read_says_why(model, tokenizer, selecting, monkeypatch):
    reads, encoded = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: reads.append(texts) or encoded(self, texts))
    auto = [AutoTemperature(selecting)]
    one = sampled(model, tokenizer, "storm and sea", logits_processor=auto, return_info=True)
    assert isinstance(one, Generation) and one.ability == "CT" and reads == [["storm and sea"]]
    strange = ["<unk> <unk> <unk>", "storm and sea"]
    found = sampled(model, tokenizer, strange, logits_processor=auto, return_info=True)
    assert [(each.reason, each.ability, each.prompt) for each in found] == [
        ("blank", None, ""),
        (None, "CT", "storm and sea"),
    ]
    many = sampled(model, tokenizer, "wind", logits_processor=auto, num_return_sequences=2, return_info=True)
    assert [each.prompt for each in many] == ["wind", "wind"]
    assert len(reads) == 3


@pytest.mark.parametrize("processors", [[], [FixedTemperature(0.7)], [EntropyDependentTemperature(0.7)]])
def test_information_without_a_selector(model, tokenizer, processors):
    (found,) = sampled(model, tokenizer, ["the captain"], logits_processor=processors, return_info=True)
    temperature = 0.7 if any(isinstance(each, FixedTemperature) for each in processors) else None
    text = sampled(model, tokenizer, logits_processor=processors)
    assert found == Generation(text, temperature=temperature)


def test_a_streamer_gets_the_same_text(model, tokenizer, selecting):
    from transformers import TextStreamer

    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Kept(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"logits_processor": [AutoTemperature(selecting)], "streamer": streamer, "return_info": True}
    found = sampled(model, tokenizer, "storm and sea", **options)
    assert found.text.split() == streamer.text.split() != []


def test_two_temperatures_are_refused(model, tokenizer):
    with pytest.raises(DecodingError, match="two processors that set the temperature"):
        generate(model, "rain", tokenizer=tokenizer, logits_processor=[FixedTemperature(0.7), FixedTemperature(0.6)])


def test_an_offloaded_model(model, tokenizer, style_file):
    accelerate = pytest.importorskip("accelerate")
    options = {"tokenizer": tokenizer, "max_new_tokens": 5, "do_sample": False}
    wanted = generate(model, "the captain", logits_processor=[StylePrior(style_file, λ=1)], **options)
    offloaded = accelerate.cpu_offload(make_model(len(tokenizer)), execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert generate(offloaded, "the captain", logits_processor=[StylePrior(style_file, λ=1)], **options) == wanted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
@pytest.mark.parametrize("kind", ["style", "temperature"])
def test_processors_are_copied_and_pickled_before_and_after_use(model, tokenizer, style_file, copied, kind):
    processor = (
        StylePrior(style_file, λ=0.5, max_js=0.1) if kind == "style" else AutoTemperature(FixedSelector({"the": 0.7}))
    )

    def text(each):
        torch.manual_seed(0)
        return generate(model, "the captain", tokenizer=tokenizer, logits_processor=[each], max_new_tokens=6)

    unused = copied(processor)
    wanted = text(processor)
    assert text(unused) == wanted
    assert text(copied(processor)) == text(copied(unused)) == text(processor) == wanted


def test_parameters_as_other_libraries_have_them(prior, tokenizer, tmp_path):
    plain = StylePrior(prior, λ=0.3, orders=[1, 3], weights=[0.25, 0.75], tokenizer=tokenizer)
    same = StylePrior(
        prior, λ=np.float32(0.3), orders=np.array([1, 3]), weights=np.array([0.25, 0.75]), tokenizer=tokenizer
    )
    same.save_pretrained(tmp_path)
    opened = StylePrior.from_pretrained(tmp_path, tokenizer=tokenizer)
    ids, scores = torch.tensor([[3, 4, 5]]), torch.randn(1, len(tokenizer))
    for each in (same, opened):
        torch.testing.assert_close(each(ids, scores), plain(ids, scores))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, np.float64])
def test_rows_of_any_dtype_are_saved_and_opened(prior, tokenizer, tmp_path, dtype):
    row = torch.linspace(-2, 2, len(tokenizer))
    given = row.numpy().astype(dtype) if dtype is np.float64 else row.to(dtype)
    StylePrior(prior, λ=0.3, mode="ratio", log_ratio=given, tokenizer=tokenizer).save_pretrained(tmp_path)
    opened = StylePrior.from_pretrained(tmp_path, tokenizer=tokenizer)
    torch.testing.assert_close(opened.log_ratio, row, atol=2e-3, rtol=0)


def test_a_background_may_be_a_path(style_file, tokenizer, model, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("rain came as night came on and the sea was black " * 20)
    rows = [
        StylePrior(style_file, mode="ratio", background=each, tokenizer=tokenizer, model=model).log_ratio
        for each in (other, str(other))
    ]
    assert torch.equal(*rows) and rows[0].any()


@pytest.mark.parametrize("orders", [(3, 2, 1), (2, 1, 3), (1, 2, 3)])
def test_shares_go_by_order_and_not_by_place(orders):
    torch.testing.assert_close(mixture_of(3, orders, None, "matching", 0.6), mixture_of(3, None, None, "matching", 0.6))
    assert torch.equal(
        mixture_of(3, orders, [10.0 * k for k in orders], "matching", 0.6),
        mixture_of(3, (1, 2, 3), [10.0, 20.0, 30.0], "matching", 0.6),
    )


def test_a_saved_strength_out_of_range_is_the_callers_to_allow(prior, tokenizer, tmp_path):
    StylePrior(prior, λ=50, allow_any_lambda=True, tokenizer=tokenizer).save_pretrained(tmp_path)
    with pytest.raises(DecodingError, match="allow_any_lambda"):
        StylePrior.from_pretrained(tmp_path)
    assert StylePrior.from_pretrained(tmp_path, allow_any_lambda=True).lambda_ == 50
    assert StylePrior.from_pretrained(tmp_path, λ=0.5).lambda_ == 0.5


@pytest.mark.parametrize(
    "wrong", [{"orders": (1.5,)}, {"orders": "ab"}, {"orders": 2}, {"weights": ["x"] * 3}, {"log_ratio": "x"}]
)
def test_parameters_of_the_wrong_type_are_one_error(prior, wrong):
    with pytest.raises(DecodingError, match=f"{next(iter(wrong))} must hold numbers"):
        StylePrior(prior, **wrong)


def test_a_processor_that_is_no_list_is_one_error(model, tokenizer, style_file):
    with pytest.raises(DecodingError, match=r"must be a list: write \[StylePrior\(…\)\]"):
        generate(model, "x", tokenizer=tokenizer, logits_processor=StylePrior(style_file))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"order": 9}, "order must be a whole number from 1 to 6"),
        ({"order": 2.5}, "order must be"),
        ({"smoothing": "laplace"}, "unknown smoothing 'laplace': choose from kneser-ney"),
        ({"background": "shakespear"}, "no style 'shakespear'"),
        ({"unwrap": "yes"}, "unwrap must be True, False or None"),
        ({"pad_token_id": "x"}, "pad_token_id must hold numbers"),
    ],
)
def test_parameters_are_refused_before_a_text_is_read(style_file, wrong, says):
    with pytest.raises(DecodingError, match=says):
        StylePrior(style_file, mode="ratio", **wrong)
