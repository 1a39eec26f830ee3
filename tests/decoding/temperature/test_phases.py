"""Markers of thinking, and one temperature on each side of them."""

import pickle

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from decoding import AutoTemperature, DecodingError, FixedTemperature, PhaseTemperature, generate
from decoding.temperature.markers import Markers, markers_of
from tests.conftest import WORDS, make_model, make_tokenizer
from tests.decoding.temperature.families import FAMILIES, NAMES, tokenizer_of
from tests.decoding.temperature.test_processors import FixedSelector, rows
from tests.decoding.temperature.thinking import BEGIN, END, SMALL, is_thinking, markers

OPEN, CLOSE = "<think>", "</think>"
HARMONY = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([OPEN, CLOSE, *WORDS])


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def of_bytes(merges, added=(), template=None):
    """A byte-level tokenizer with a few merges."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


def spelled(marker):
    """Merges that make a word of a marker's letters, one after the other."""
    return [(marker[:i], marker[i]) for i in range(1, len(marker))]


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    found, states = markers(), set()
    for _ in range(60):
        ids = torch.tensor(rng.integers(-1, rng.choice([SMALL, 400]), (rng.integers(1, 6), rng.integers(0, 12))))
        before = torch.tensor(rng.random(len(ids)) < 0.5)
        wanted = [is_thinking(row, before=first) for row, first in zip(ids.tolist(), before.tolist(), strict=True)]
        assert found.thinking(ids, before).tolist() == wanted
        assert found.thinking(ids.int()).tolist() == [is_thinking(row) for row in ids.tolist()]
        states |= set(wanted)
    assert states == {True, False}


def test_a_marker_counts_once_it_is_whole():
    found = markers()
    text = [7, 2, 3, 2, 7, 6, 6, 7]
    got = [found.thinking(torch.tensor([text[:stop]], dtype=torch.long)).item() for stop in range(len(text) + 1)]
    assert got == [False, False, False, False, True, True, True, False, False]
    # What both ends and begins thinking ends it.
    assert not found.thinking(torch.tensor([[1, 7, 2, 4, 2]])).item()


def test_markers_that_end_alike_are_told_apart():
    found = Markers([[[1], [2], [3]]], [[[5], [2], [3]], [[9]]])
    assert found.thinking(torch.tensor([[0, 1, 2, 3], [1, 5, 2, 3], [1, 0, 2, 3]])).tolist() == [True, False, False]
    assert found.thinking(torch.tensor([[1, 2, 9], [1, 2, 10**6]]), before=True).tolist() == [False, True]


def test_rows_may_be_padded_reordered_and_of_another_call(tokenizer):
    phases = PhaseTemperature(2.0, 0.5, tokenizer)
    thinking, done, earlier = f"storm {OPEN} wind", f"storm {OPEN} wind {CLOSE} sea", "sea"
    ids = rows(tokenizer, thinking, done, earlier, f"{done} {OPEN}")
    scores = torch.randn(4, len(tokenizer))
    wanted = torch.tensor([2.0, 0.5, 0.5, 2.0])
    assert torch.equal(phases.of(ids, scores), wanted)
    torch.testing.assert_close(phases(ids, scores), scores / wanted[:, None])
    assert torch.equal(phases.of(ids[[3, 1, 1, 0]], scores), wanted[[3, 1, 1, 0]])
    assert torch.equal(phases.of(ids[:, :-1], scores), torch.tensor([2.0, 0.5, 0.5, 0.5]))
    again = pickle.loads(pickle.dumps(phases))  # noqa: S301
    assert torch.equal(again.of(ids, scores), wanted)


class Watched(LogitsProcessor):
    """Makes markers likely, and holds the temperature of every row at every step to a plain loop's."""

    def __init__(self, processor, tokenizer, answers=None):
        self.processor = processor
        self.begin, self.end = tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
        self.answers = answers
        self.seen = set()

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [self.begin, self.end]] += scores.amax(-1, keepdim=True) * 0.6
        got = self.processor(input_ids, scores)
        for row, ids in enumerate(input_ids.tolist()):
            thinks = is_thinking(ids, [[[self.begin]]], [[[self.end]]])
            temperature = 2.0 if thinks else 0.5 if self.answers is None else self.answers[row * 2 // len(input_ids)]
            torch.testing.assert_close(got[row], scores[row] / temperature)
            self.seen.add(temperature)
        return got


@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 3}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
)
def test_generation_with_padding_beams_and_several_answers(model, tokenizer, options):
    phases = Watched(PhaseTemperature(2.0, 0.5, tokenizer), tokenizer)
    inputs = tokenizer([f"storm {OPEN} and sea", "wind"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    for seed in range(3):
        torch.manual_seed(seed)
        model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=10, logits_processor=[phases], **options)
    assert phases.seen == {2.0, 0.5}


def test_assisted_generation_offers_tokens_again(model, tokenizer):
    phases = Watched(PhaseTemperature(2.0, 0.5, tokenizer), tokenizer)
    inputs = tokenizer(f"storm {OPEN} and sea", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 16, "logits_processor": [phases]}
    plain = model.generate(inputs["input_ids"], **options)
    assistant = make_model(len(tokenizer), attention_bias=True)
    assisted = model.generate(inputs["input_ids"], assistant_model=assistant, **options)
    assert plain.tolist() == assisted.tolist()
    assert phases.seen == {2.0, 0.5}


def test_a_text_is_that_of_two_calls_with_one_temperature_each(model, tokenizer):
    begin, end = tokenizer.convert_tokens_to_ids([OPEN, CLOSE])
    never = len(tokenizer)

    def written(ids, temperature, stop):
        options = {"do_sample": True, "top_k": 0, "pad_token_id": never, "max_new_tokens": 80, "eos_token_id": stop}
        return model.generate(ids, logits_processor=[temperature], **options)

    prompt = tokenizer(f"storm {OPEN}", return_tensors="pt")["input_ids"]
    lengths = set()
    for seed in range(4):
        torch.manual_seed(seed)
        thoughts = written(prompt, FixedTemperature(3.0), end)
        wanted = written(thoughts, FixedTemperature(0.4), begin)
        torch.manual_seed(seed)
        got = written(prompt, PhaseTemperature(3.0, 0.4, tokenizer), never)[0].tolist()
        assert got == wanted[0].tolist()[: len(got)] or got[: wanted.shape[1]] == wanted[0].tolist()
        lengths |= {thoughts.shape[1]} if thoughts.shape[1] < len(got) else set()
    assert len(lengths) > 1


def test_generate_binds_it_and_samples(model, tokenizer):
    phases = PhaseTemperature(think=1.5, answer=0.2)
    texts = generate(model, [f"storm {OPEN}", "wind"], tokenizer=tokenizer, logits_processor=[phases], max_new_tokens=5)
    assert len(texts) == 2
    with pytest.raises(DecodingError, match="two processors that set the temperature"):
        generate(model, "storm", tokenizer=tokenizer, logits_processor=[phases, FixedTemperature(1)])
    with pytest.raises(DecodingError, match="leave one out"):
        generate(model, "storm", tokenizer=tokenizer, logits_processor=[phases], temperature=0.5)
    with pytest.raises(DecodingError, match="neither the chat template nor the vocabulary"):
        generate(model, "storm", tokenizer=make_tokenizer(), logits_processor=[phases])


def test_answers_have_the_chosen_temperature(model, tokenizer):
    auto = AutoTemperature(FixedSelector({"storm": 0.5, "wind": 0.8}), tokenizer, think=2.0)
    watched = Watched(auto, tokenizer, answers=[0.5, 0.8])
    inputs = tokenizer([f"storm {OPEN} and sea", "wind"], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    model.generate(inputs["input_ids"], do_sample=True, top_k=0, max_new_tokens=24, logits_processor=[watched])
    assert watched.seen == {2.0, 0.5, 0.8}
    assert auto.chosen.tolist() == pytest.approx([0.5, 0.8])
    with pytest.raises(DecodingError, match="think must be a positive number"):
        AutoTemperature(think=0)
    with pytest.raises(DecodingError, match="markers of thinking that are known"):
        AutoTemperature(FixedSelector({}), make_tokenizer(), think=1.0)


def phases_of(tokenizer, text, **options):
    """Whether each token of a text is written within thinking."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = markers_of(tokenizer, **options)
    return [found.thinking(torch.tensor([ids[: i + 1]])).item() for i in range(len(ids))]


def test_markers_of_the_template_come_first_and_are_looked_for_in_the_vocabulary_else():
    harmony = of_bytes([], ["<|channel|>", "<|message|>", "<think>", "</think>"])
    text = "".join(("<|channel|>analysis<|message|>", "ab", "<|channel|>final<|message|>", "c"))
    assert not any(phases_of(harmony, text))  # tokens that are there, and not in use
    harmony.chat_template = "{{ '<|channel|>analysis<|message|>' + '<|channel|>final<|message|>' }}"
    count = len("analysis")
    assert phases_of(harmony, text) == [False] * (count + 1) + [True] * (1 + 2 + 1 + len("final")) + [False] * 2
    assert phases_of(of_bytes([], ["<|channel|>", "<|message|>"]), text) == phases_of(harmony, text)
    cohere = of_bytes([], ["<|START_THINKING|>", "<|END_THINKING|>"])
    assert phases_of(cohere, "<|START_THINKING|>a<|END_THINKING|>b") == [True, True, False, False]
    plain = of_bytes([], template="{% if '</think>' in content %}{{ content }}{% endif %}")
    assert phases_of(plain, "<think>a</think>b")[-len("a</think>b") - 1 :] == [True] * 9 + [False] * 2


@pytest.mark.parametrize("name", NAMES)
def test_models_templates_tell_their_markers(name):
    tokenizer = tokenizer_of(FAMILIES[name])
    pair = {"gpt-oss": HARMONY} | dict.fromkeys(("deepseek-r1", "qwen-3", "smollm3"), (OPEN, CLOSE))
    if name not in pair:
        with pytest.raises(DecodingError, match="neither the chat template nor the vocabulary"):
            markers_of(tokenizer)
        return
    begin, end = pair[name]
    phases = phases_of(tokenizer, f"a{begin}b{end}c")
    assert phases == phases_of(tokenizer, f"a{begin}b{end}c", begin=begin, end=end)
    assert True in phases and not phases[0] and not phases[-1]


def test_markers_of_plain_text_are_found_however_their_edges_are_split():
    merges = [*spelled("think"), ("<", "/"), (".", "<"), (">", "Ċ"), ("Ġ", "<"), (".<", "/"), (">Ċ", "Ċ")]
    tokenizer = of_bytes(merges)
    found = markers_of(tokenizer, OPEN, CLOSE)
    for before in ("", "a", ".", " ", "\n", "a.", "</"):
        for after in ("", "a", "\n", "\n\n", ".", " "):
            for marker, wanted in ((OPEN, True), (CLOSE, False)):
                ids = tokenizer([before + marker + after], return_tensors="pt")["input_ids"]
                assert found.thinking(ids, before=not wanted).item() == wanted, (before, marker, after)
    for text in ("<thin>", "think>", "<think", "< think>"):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        assert not found.thinking(ids).item()


def test_words_at_the_edges_must_stand_alone():
    tokenizer = make_tokenizer([*WORDS, "this", "onto"])
    text = "this ship his ship onto ship to ship sea"
    got = phases_of(tokenizer, text, begin="his ship", end="to ship")
    assert got == [False] * 3 + [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"begin": OPEN}, "needs two markers"),
        ({"end": CLOSE}, "needs two markers"),
        ({"begin": "", "end": CLOSE}, "needs two markers"),
        ({"begin": 3, "end": 4}, "needs two markers"),
        ({"begin": OPEN, "end": OPEN}, "cannot be a part"),
        ({"begin": OPEN, "end": "think>"}, "cannot be a part"),
        ({"begin": "nowhere", "end": CLOSE}, "cannot spell 'nowhere'"),
        ({"begin": "sea " * 70, "end": CLOSE}, "62 tokens in all"),
    ],
)
def test_markers_that_are_none(tokenizer, options, reason):
    with pytest.raises(DecodingError, match=reason):
        PhaseTemperature(tokenizer=tokenizer, **options)


@pytest.mark.parametrize("options", [{"think": 0}, {"answer": -1}, {"think": True}, {"answer": "auto"}])
def test_temperatures_that_are_none(options):
    with pytest.raises(DecodingError, match="must be a positive number"):
        PhaseTemperature(**options)


def test_without_a_tokenizer_it_says_what_to_write():
    with pytest.raises(DecodingError, match=r"PhaseTemperature\(think, answer, tokenizer\)"):
        PhaseTemperature()(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_without_host_syncs():
    found, ids = markers(), torch.randint(-1, SMALL, (16, 64), device="cuda")
    found.thinking(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = found.thinking(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.tolist() == [is_thinking(row, BEGIN, END) for row in ids.tolist()]
