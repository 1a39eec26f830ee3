"""Chunk selection is right, or refused at once, for every causal model type of transformers."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama

from chunkllm import ChunkError, ChunkSelection
from tests.chunkllm.conftest import Stops, cache_name, tiny_model
from tests.chunkllm.every_type import MATRIX, SMALL, outcome, state_of, tiny_model_of, types

WORK = ("cohere2", "gemma3", "gemma4", "granite", "lfm2", "llava", "mllama", "olmo2", "phi3", "qwen2_vl", "qwen3_5")
REFUSED = ("deepseek_v3", "diffllama", "gemma2", "gpt_oss", "jetmoe", "paligemma")
COMMITTED = json.loads(MATRIX.read_text(encoding="utf-8"))


def outcome_of(kind):
    try:
        model = tiny_model_of(kind)
    except Exception as error:
        if kind in COMMITTED["types"] and COMMITTED["transformers"] == transformers.__version__:
            raise
        pytest.skip(f"no small model of this type: {error}")
    return outcome(model)


@pytest.mark.parametrize("kind", WORK)
def test_it_works_with_what_people_use(kind):
    assert outcome_of(kind) is None


@pytest.mark.parametrize("kind", REFUSED)
def test_what_attends_otherwise_is_refused(kind):
    assert outcome_of(kind) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*types()} - {*WORK, *REFUSED}))
def test_every_type_is_right_or_refused(kind):
    found = outcome_of(kind)
    if kind in COMMITTED["types"] and COMMITTED["transformers"] == transformers.__version__:
        assert (found is None) == (COMMITTED["types"][kind] is None), found


# What is compared.


def attach(model):
    return ChunkSelection(**SMALL, budget=16).attach(model)


@pytest.fixture
def llama():
    return tiny_model()


def counting(model):
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_model_is_asked_once_for_each_attention(llama):
    calls = counting(llama)
    for _ in range(2):
        attach(llama).detach()
    assert len(calls) == 4
    llama.set_attn_implementation("eager")
    attach(llama).detach()
    assert len(calls) == 8


def test_weights_that_are_elsewhere_are_not_asked():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    calls = counting(model)
    attach(model).detach()
    assert calls == []


def test_what_a_forward_pass_leaves_is_set_back(llama):
    llama.train()
    llama.model.layers[1].eval()
    decoder = llama.model
    decoder.register_buffer("seen", torch.zeros(1))
    held = decoder.seen

    def mark(*_):
        assert not any(module.training for module in llama.modules())
        decoder.rope_deltas = torch.rand(1)
        decoder.seen = torch.ones(1)

    decoder.register_forward_hook(mark)
    before = state_of(llama)
    attach(llama).detach()
    assert state_of(llama) == before
    assert decoder.seen is held


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_what_sees_attends_as_it_did(kind):
    model = tiny_model_of(kind)
    tower = model.model.visual if kind == "qwen2_vl" else model.model.vision_tower
    tower.set_attn_implementation("eager")
    before = state_of(model)
    with attach(model):
        assert tower.config._attn_implementation == "eager"
        assert model.config._attn_implementation == "sdpa"
    assert state_of(model) == before


def test_chunks_end_at_punctuation_where_the_decoder_is_given_embeddings():
    model = tiny_model_of("qwen2_vl")
    ids = torch.arange(3, 43)[None]
    with ChunkSelection(sinks=0, local=3, max_chunk=30, budget=100).attach(model, Stops(99)) as attached:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
        attached.stats  # noqa: B018  # counts what was read
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        assert attached.stats["boundaries"] >= 2 * 8  # every fifth token ends a sentence


# What is found. Each model is a Llama that does one thing otherwise.


def other_scaling(model, monkeypatch):
    model.model.layers[1].self_attn.scaling = 0.9


def learned_sinks(model, monkeypatch):
    add = lambda module, args, options: (args, options | {"s_aux": torch.zeros(4)})  # noqa: E731
    model.model.layers[1].self_attn.register_forward_pre_hook(add, with_kwargs=True)


def attention_of_its_own(model, monkeypatch):
    own = copy.deepcopy(model.config)
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda module, args: setattr(module, "config", copy.deepcopy(own)))


def louder_attention(model, monkeypatch):
    model.set_attn_implementation("eager")
    plain = modeling_llama.eager_attention_forward

    def louder(module, query, key, value, *rest, **options):
        out, weights = plain(module, query, key, value, *rest, **options)
        return out * 1.01, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", louder)


def another_text(model, monkeypatch):
    model.model.norm.register_forward_hook(lambda module, args, output: output + torch.rand(1))


def a_cache_that_it_knows(model, monkeypatch):
    def check(module, args, options):
        if type(options[cache_name(module)]) is not DynamicCache:
            raise TypeError("my cache\nalone")

    model.model.layers[0].register_forward_pre_hook(check, with_kwargs=True)


def three_streams(model, monkeypatch):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output[None])
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0][0], *args[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_scaling, "it scales the attention logits of layer 1 by 0.9, not by 0.353553"),
        (learned_sinks, "its attention has more than queries, keys and values: s_aux"),
        (attention_of_its_own, r"its layers \[1\] do not attend by transformers' attention interface"),
        (louder_attention, "its attention differs in layer 0"),
        (another_text, "its scores of the next token differ when everything is selected"),
        (a_cache_that_it_knows, "TypeError: my cache alone"),
        (three_streams, "its bottommost layer returns 4 dimensions"),
    ],
)
def test_what_differs_is_said_and_nothing_is_left(llama, monkeypatch, change, message):
    change(llama, monkeypatch)
    before = state_of(llama)
    calls = counting(llama)
    state_with_counter = state_of(llama)
    for _ in range(2):
        with pytest.raises(ChunkError, match=f"^llama: chunk selection does not work with it: {message}"):
            attach(llama)
    assert len(calls) in (2, 3, 4)
    assert state_of(llama) == state_with_counter != before


def test_half_precision_is_exact_enough():
    for kind in ("llama", "gemma3_text"):
        attach(tiny_model(kind).to(torch.bfloat16)).detach()


def test_numbers_that_are_none_are_the_same(llama):
    with torch.no_grad():
        llama.lm_head.weight[3] = torch.nan
        llama.lm_head.weight[4] = torch.inf
    attach(llama).detach()
