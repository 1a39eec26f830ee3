"""`Policy`: each part is what its own class is, and all of them together; what it refuses."""

import copy
import dataclasses
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor

from decoding import (
    ChunkAdapters,
    ChunkError,
    ChunkSelection,
    DecodingError,
    FixedTemperature,
    PhaseTemperature,
    Policy,
    StylePrior,
    TemperatureSelector,
    generate,
)
from decoding.policy.values import _CHUNK_SETTINGS
from tests.conftest import make_model
from tests.decoding.policy.conftest import LONG, PROMPTS, SMALL

NAMES = ["style", "λ", "lambda_", "guards", "temperature", "auto", "phases", "auto phases", "chunks", "budget", "True"]
NAMES += ["adapters", "all"]


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_what_its_class_is(parts, name, write, scored, thinker, thinking):
    assert list(parts) == NAMES
    fields, processors = parts[name]
    policy, bare = Policy(**fields), write()
    assert write(policy) == write(processors=processors) == write(policy)
    assert (write(policy) == bare) == (name in ("True", "budget")), "as much as there is need not be selected from"
    with policy.attach(thinker, thinking) as bound:
        mine = scored(bound)
    singly = [
        each.bound(thinking, thinker) if hasattr(each, "bound") else each
        for each in processors
        if not isinstance(each, ChunkSelection)
    ]
    selections = [each for each in processors if isinstance(each, ChunkSelection)]
    if selections:
        with selections[0].attach(thinker, thinking):
            assert torch.equal(mine, scored(singly))
    else:
        assert torch.equal(mine, scored(singly))
        assert torch.equal(mine, scored(policy.processors(thinking, thinker)))
    assert write() == bare, "the model is as it was"


def test_nothing_is_the_bare_model(write, scored, thinker, thinking):
    policy = Policy()
    assert policy.parts() == policy.processors(thinking, thinker) == [] and policy.top_p is None
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}):
        assert write(policy, **options) == write(**options)
    with policy.attach(thinker, thinking) as processors:
        assert torch.equal(scored(processors), scored([]))


def test_λ_0_is_the_bare_model(write, style_file):
    assert write(Policy(style_file, λ=0), do_sample=True) == write(do_sample=True)


def test_effects_come_in_their_order(style_file, thinker, thinking):
    """The style is added, and only then divided by the temperature."""
    ids = thinking("the captain said", return_tensors="pt")["input_ids"]
    scores = torch.randn(1, len(thinking))
    style, temperature = Policy(style_file, λ=0.7, temperature=0.5).processors(thinking, thinker)
    wanted = StylePrior(style_file, λ=0.7, tokenizer=thinking, model=thinker)(ids, scores) / 0.5
    assert torch.equal(temperature(ids, style(ids, scores)), wanted)


def test_the_selectors_top_p_is_the_last(selector_folder, write):
    policy = Policy(temperature="auto", selector=selector_folder)
    assert policy.top_p == 0.8 and Policy(temperature=0.7).top_p is None
    (found,) = write(policy, prompts=["wind"], return_info=True)
    assert found.top_p == 0.8
    (whole,) = write(policy, prompts=["wind"], return_info=True, top_p=1.0)
    assert whole.top_p == 1.0 and whole.temperature == found.temperature


class Noting(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        return scores


def test_other_processors_come_behind(style_file, write):
    policy, behind, last = Policy(style_file, λ=0.7, temperature=0.5), Noting(), Noting()
    write(policy, [behind])
    write(processors=[StylePrior(style_file, λ=0.7), FixedTemperature(0.5), last])
    assert len(behind.seen) == 24 and all(map(torch.equal, behind.seen, last.seen))


@pytest.mark.parametrize(
    ("fields", "others", "says"),
    [
        ({"style": True}, lambda style: [StylePrior(style)], "^style by the policy and in logits_processor too"),
        ({"temperature": 0.5}, lambda style: [FixedTemperature(0.7)], "^temperature by"),
        ({"chunks": 512}, lambda style: [ChunkSelection()], "^chunks by"),
        (
            {"style": True, "temperature": 1.5, "chunks": True},
            lambda style: [PhaseTemperature(), ChunkSelection(), StylePrior(style)],
            "^style and temperature and chunks by",
        ),
        ({"temperature": 0.5, "style": True}, lambda style: [StylePrior(style)], "^style by"),
    ],
)
def test_what_would_be_done_twice_is_refused(fields, others, says, style_file, write):
    fields = fields | ({"style": style_file} if "style" in fields else {})
    with pytest.raises(DecodingError, match=says):
        write(Policy(**fields), others(style_file))


def test_a_bound_style_is_a_style(style_file, write, thinking):
    with pytest.raises(DecodingError, match="^style by"):
        write(Policy(style_file), [StylePrior(style_file).bind(thinking)])


def test_other_parts_may_stand_beside_a_policy(style_file, write):
    wanted = write(Policy(style_file, temperature=0.5))
    assert write(Policy(style_file), [FixedTemperature(0.5)]) == wanted
    steered = [StylePrior(style_file, λ=1)]
    assert write(Policy(temperature=0.5), steered) == write(processors=[FixedTemperature(0.5), *steered])
    assert write(Policy(temperature=0.5), steered) != write(Policy(temperature=0.5))


def test_generate_refuses_what_is_no_policy_and_a_second_temperature(write):
    with pytest.raises(DecodingError, match=r"policy must be a Policy, not 'my-policy': open a saved one by"):
        write("my-policy")
    with pytest.raises(DecodingError, match=r"temperature=0.7 and a processor that sets the temperature"):
        write(Policy(temperature=0.5), temperature=0.7)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"λ": 0.5}, "^lambda without a style: name one in style"),
        ({"mode": "ratio", "max_js": 0.1, "steer_stop": False}, "^mode, max_js, steer_stop without a style"),
        ({"style": True, "λ": 1.5}, r"λ must lie in \[0, 1\], not 1.5"),
        ({"style": True, "λ": "much"}, "λ must be a finite number"),
        ({"style": True, "λ": True}, "λ must be a finite number"),
        ({"style": True, "λ": 0.1, "lambda_": 0.1}, "give λ or lambda_, not both"),
        ({"style": True, "mode": "papers"}, "unknown mode 'papers': choose from paper, ratio"),
        ({"style": True, "max_js": 2}, "max_js must be a number above 0 and at most"),
        ({"style": True, "steer_stop": 1}, "steer_stop must be True or False"),
        ({"style": "king-jams"}, "no style 'king-jams': give a registered name"),
        ({"style": 3}, "style must be a registered name"),
        ({"style": " "}, "style must be a registered name"),
        ({"temperature": 0}, 'temperature must be a positive number, not 0; it may also be "auto"; for greedy'),
        ({"temperature": "hot"}, "temperature must be a positive number"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"think_temperature": 1.0}, "think_temperature without the answer's: write temperature"),
        ({"temperature": 1.0, "think_temperature": "auto"}, "think_temperature must be a positive number"),
        ({"selector": "me/mine"}, 'it goes with temperature="auto"'),
        ({"selector": 3, "temperature": "auto"}, "selector must be a folder, a hub id"),
        ({"selector": "no folder", "temperature": "auto"}, "no temperature selector at no folder"),
        ({"chunks": False}, "chunks must be True, a budget in tokens, or a dict"),
        ({"chunks": 0.5}, "chunks must be"),
        ({"chunks": [512]}, "chunks must be"),
        ({"chunks": 10}, "chunks: a budget of 10 tokens leaves nothing to choose"),
        ({"chunks": {"budgets": 512}}, "chunks has no setting 'budgets': choose from adapters, top_k, budget"),
        ({"chunks": {"scorer": None}}, None),
        ({"chunks": {"scorer": "mine"}}, "chunks has no setting 'scorer'"),
        ({"chunks": {"budget": "512"}}, "budget of chunks must be a whole number, not '512'"),
        ({"chunks": {"budget": True}}, "budget of chunks must be a whole number, not True"),
        ({"chunks": {"vote": 1}}, "vote of chunks must be True or False"),
        ({"chunks": {"top_k": 3, "budget": 512}}, "chunks: top_k, budget and retention say the same thing"),
        ({"chunks": {"adapters": "no folder"}}, "chunks: no adapters at no folder"),
        ({"chunks": {"adaptive": True}}, "chunks: adaptive needs adapters"),
    ],
)
def test_unfit_fields_are_one_error_each(fields, says, style_file):
    fields = fields | ({"style": style_file} if fields.get("style") is True else {})
    if says is None:
        assert Policy(**fields).parts()
        return
    with pytest.raises(DecodingError, match=says) as caught:
        Policy(**fields)
    assert "\n" not in str(caught.value)


def test_chunks_have_all_settings_of_their_class():
    assert {*_CHUNK_SETTINGS, "scorer"} == set(inspect.signature(ChunkSelection).parameters)


def test_a_policy_does_not_change(style_file, write):
    settings = dict(SMALL)
    policy = Policy(style_file, λ=np.float32(0.5), chunks=settings)
    settings["budget"] = 999
    assert policy.chunks == SMALL and policy.λ == policy.lambda_ == 0.5
    for name in ("λ", "lambda_", "style", "other"):
        with pytest.raises(AttributeError):
            setattr(policy, name, 0.1)
    same = Policy(str(style_file), lambda_=0.5, chunks=SMALL)
    assert policy == same and hash(policy) == hash(same) and policy != Policy(style_file)
    assert dataclasses.replace(policy, lambda_=0.1) == Policy(style_file, λ=0.1, chunks=SMALL)
    assert "'lambda_': 0.5" in str(dataclasses.asdict(policy)) and "lambda_=0.5" in repr(policy)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_policies_are_copied_and_pickled_before_and_after_use(parts, copied, write):
    policy = Policy(**parts["all"][0])
    unused, wanted = copied(policy), write(policy)
    assert write(unused) == write(copied(policy)) == wanted and unused == policy


def test_the_embedded_ones_have_a_name(monkeypatch, adapters_folder, selector):
    asked = []
    adapters = ChunkAdapters.from_pretrained(adapters_folder)
    monkeypatch.setattr(TemperatureSelector, "from_pretrained", lambda name=None: asked.append(name) or selector)
    monkeypatch.setattr(ChunkAdapters, "from_pretrained", lambda name=None, **_: asked.append(name) or adapters)
    assert Policy(temperature="auto").temperature == "auto" and asked == [], "it is opened when it is used"
    Policy(temperature="auto", selector="default", chunks={"adapters": "default"})
    assert asked == [None, None]


def test_threads_share_one_policy(parts, thinking):
    policy = Policy(**parts["all"][0])
    temperatures = [policy.parts()[1] for _ in range(2)]
    assert temperatures[0] is not temperatures[1], "each keeps what it chose"
    models = [make_model(len(thinking)) for _ in range(4)]
    jobs = [(model, [prompt, LONG[0]]) for model in models for prompt in PROMPTS]

    short = {"max_new_tokens": 12, "eos_token_id": None}

    def work(job):  # the likeliest token, for a seed is everybody's
        return generate(job[0], job[1], tokenizer=thinking, policy=policy, top_k=1, return_info=True, **short)

    wanted = [work(job) for job in jobs]
    assert len({each.temperature for rows in wanted for each in rows}) > 1
    by_model = [jobs[at : at + 3] for at in range(0, 12, 3)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = pool.map(lambda some: [work(job) for job in some], by_model)
            assert [each for some in found for each in some] == wanted


def test_a_batch_is_what_its_rows_are_alone(parts, write):
    fields = parts["all"][0]
    policy = Policy(**{name: value for name, value in fields.items() if name != "chunks"})
    together = write(policy, prompts=PROMPTS, top_k=1)
    assert together == [write(policy, prompts=each, top_k=1) for each in PROMPTS]
    assert write(Policy(**fields), prompts=PROMPTS, num_return_sequences=2) == write(
        processors=parts["all"][1], prompts=PROMPTS, num_return_sequences=2
    )


def test_a_block_attaches_and_detaches(thinker, thinking):
    policy = Policy(chunks=SMALL)
    with policy.attach(thinker, thinking) as processors, pytest.raises(ChunkError, match="has a selection attached"):
        assert processors == []
        policy.attach(thinker, thinking).__enter__()
    with pytest.raises(RuntimeError, match="mine"), policy.attach(thinker, thinking):
        raise RuntimeError("mine")
    with policy.attach(thinker, thinking):
        pass


def test_what_no_tokenizer_fits(model, tokenizer):
    with pytest.raises(DecodingError, match="thinking"):
        Policy(temperature=0.4, think_temperature=1.0).processors(tokenizer, model)
