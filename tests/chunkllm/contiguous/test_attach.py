import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MiniMaxConfig,
    MistralConfig,
    RecurrentGemmaConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from chunkllm import AdapterConfig, ChunkAdapters, ChunkError, ChunkSelection, PooledScorer
from chunkllm.models import model_shape
from tests.chunkllm.conftest import VOCAB, Stops, cache_name, cache_of, prompts, tiny_model

SMALL = {"sinks": 2, "local": 6, "max_chunk": 8}


@pytest.fixture
def model():
    return tiny_model()


@torch.no_grad()
def logits(model):
    ids, mask = prompts((50, 20))
    torch.manual_seed(0)
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=True, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(got.logits)


def hooks(model):
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_always_called",
            "_forward_hooks_with_kwargs",
        )
        if getattr(module, kind)
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_detached_model_is_what_it_was(kind, trained, implementation):
    model = tiny_model(kind, implementation=implementation)
    before, names = logits(model), set(vars(model))
    chooser = ChunkSelection(ChunkAdapters.for_model(model) if trained else None, **SMALL, budget=16)
    for leave in ("with", "detach", "exception"):
        if leave == "with":
            with chooser.attach(model, Stops()) as attached:
                during = logits(model)
                assert hooks(model)
        elif leave == "detach":
            attached = chooser.attach(model)
            logits(model)
            attached.detach()
            attached.detach()  # again, which does nothing
        else:
            with pytest.raises(KeyError), chooser.attach(model):
                logits(model)
                raise KeyError
        assert not hooks(model)
        assert model.config._attn_implementation == implementation
        assert model.get_decoder().config._attn_implementation == implementation
        assert set(vars(model)) == names
        assert torch.equal(logits(model), before)
    assert not torch.equal(during, before)


def test_an_exception_in_a_forward_pass_leaves_nothing(model):
    before = logits(model)
    last = model.get_decoder().layers[-1].mlp
    with ChunkSelection(**SMALL, budget=16).attach(model):
        handle = last.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        after = logits(model)
    assert torch.equal(logits(model), before)
    with ChunkSelection(**SMALL, budget=16).attach(model):
        assert torch.equal(logits(model), after)


def test_an_exception_while_selecting_leaves_nothing(model, monkeypatch):
    before = logits(model)
    ChunkSelection().attach(model).detach()  # what it compares first, it compares once
    monkeypatch.setattr(PooledScorer, "query_features", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), ChunkSelection(**SMALL, budget=16).attach(model):
        logits(model)
    assert not hooks(model)
    assert torch.equal(logits(model), before)


def test_a_selection_is_attached_once(model):
    with ChunkSelection().attach(model):
        with pytest.raises(ChunkError, match="detach it first"):
            ChunkSelection().attach(model)
        logits(model)
    with ChunkSelection().attach(model):
        pass


def test_another_model_is_untouched(model):
    other = tiny_model(seed=1)
    before = logits(other)
    with ChunkSelection(**SMALL, budget=16).attach(model) as attached:
        assert torch.equal(logits(other), before)
        assert attached.stats["steps"] == 0
        assert not hooks(other)
        selected = logits(model)
        third = tiny_model()  # made meanwhile
        assert torch.equal(logits(model), selected)
    assert not torch.equal(logits(third), selected)
    assert torch.equal(logits(model), logits(third))


def test_one_selection_on_two_models(model):
    chooser, other = ChunkSelection(**SMALL, budget=16), tiny_model(seed=1)
    with chooser.attach(model):
        alone = logits(model)
    with chooser.attach(other):
        other_alone = logits(other)
        with chooser.attach(model):
            assert torch.equal(logits(model), alone)
            assert torch.equal(logits(other), other_alone)


# What is refused.


def of(config, **changes):
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(config(**shape | changes))


GEMMA_3N = {
    "head_dim": 8,
    "layer_types": ["full_attention"] * 3,
    "activation_sparsity_pattern": [0.0] * 3,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(GPT2Config), "gpt2 .*rotary position embeddings"),
        (lambda: of(MiniMaxConfig, head_dim=8, num_local_experts=2), "minimax has a cache of its own"),
        (lambda: of(RecurrentGemmaConfig, attention_window_size=8), "recurrent_gemma .*full attention.*: LinearAttent"),
        (lambda: of(GptOssConfig, head_dim=8, num_local_experts=2), "gpt_oss .*attention sinks"),
        (
            lambda: of(Gemma3nTextConfig, num_hidden_layers=3, num_kv_shared_layers=1, **GEMMA_3N),
            "gemma3n_text .*another's keys and values .num_kv_shared_layers",
        ),
        (lambda: of(MistralConfig, sliding_window=8), "mistral .*sliding windows alone"),
        (lambda: of(Gemma2Config, head_dim=8, attn_logit_softcapping=50.0), "gemma2 .*attn_logit_softcapping"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1)),
            "t5 is an encoder-decoder model",
        ),
    ],
)
def test_models_without_what_is_needed_are_refused(make, message):
    model = make()
    own = model.config._attn_implementation
    for use in (ChunkSelection().attach, ChunkAdapters.for_model):
        with pytest.raises(ChunkError, match=message):
            use(model)
    assert not hooks(model)
    assert model.config._attn_implementation == own


def test_a_model_whose_layers_have_different_heads_is_refused(monkeypatch):
    def differs(config):
        raise RuntimeError("'head_dim' is a per-layer attribute\nand more")  # as transformers has it for Gemma 4

    model = tiny_model()
    monkeypatch.setattr(LlamaConfig, "head_dim", property(differs))
    with pytest.raises(
        ChunkError, match="llama has no one value for all layers .*: 'head_dim' is a per-layer attribute$"
    ):
        model_shape(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "a"}, "budget must be a whole number, not 'a'"),
        ({"budget": 2048.0}, "budget must be a whole number, not 2048.0"),
        ({"top_k": True}, "top_k must be a whole number, not True"),
        ({"sinks": "4"}, "sinks must be a whole number"),
        ({"retention": "0.5"}, "retention must be a number, not '0.5'"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"retention": 2.0}, r"retention must lie in \(0, 1\], not 2.0"),
        ({"retention": 0.0}, "retention must lie in"),
        ({"retention": float("nan")}, "retention must lie in"),
        ({"top_k": 3, "budget": 512}, "give one"),
        ({"top_k": 3, "retention": 0.5}, "give one"),
        ({"budget": 512, "retention": 0.5}, "give one"),
        ({"budget": 68}, r"a budget of 68 tokens leaves nothing to choose: sinks \(4\).*\(64\) take 68"),
        ({"budget": 40, "local": 8, "max_chunk": 36}, "leaves nothing to choose"),
        ({"top_k": 3, "adaptive": True}, "adaptive"),
        ({"vote": True, "adaptive": True}, "adaptive"),
        ({"adaptive": True}, "decoding chunk calibrate"),
        ({"local": 0}, "local and max_chunk must be at least 1"),
        ({"max_chunk": 0}, "local and max_chunk must be at least 1"),
        ({"sinks": -1}, "sinks at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ChunkError, match=message):
        ChunkSelection(**options)


def test_a_budget_that_a_running_chunk_may_fill_is_refused(model):
    chooser = ChunkSelection(budget=30, local=8)
    with pytest.raises(ChunkError, match=r"running chunk \(32\)"):
        chooser.attach(model, Stops())
    assert not hooks(model)
    with chooser.attach(model):  # then chunks are of 20 tokens
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "its hidden_size is 32, theirs 48"),
        ({"num_hidden_layers": 4}, "full_layers"),
        ({"num_key_value_heads": 4}, "its kv_heads is 2, theirs 4"),
    ],
)
def test_adapters_of_another_model_are_refused(model, changes, message):
    adapters = ChunkAdapters.for_model(tiny_model(**changes))
    with pytest.raises(ChunkError, match=f"another model.*{message}"):
        ChunkSelection(adapters).attach(model)
    assert not hooks(model)


def read(model, ids, mask=None, cache=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=True, **{cache_name(model): cache})


def test_caches_that_are_not_its_own_are_refused(model):
    ids, mask = prompts((20,))
    filled = cache_of(read(model, ids))
    chooser = ChunkSelection(**SMALL, budget=16)
    with chooser.attach(model):
        with pytest.raises(ChunkError, match="DynamicCache that was built without selection"):
            read(model, ids[:, :1], cache=filled)
        with pytest.raises(ChunkError, match="StaticCache"):
            read(model, ids, cache=StaticCache(config=model.config, max_cache_len=64))
        own = cache_of(read(model, ids, cache=DynamicCache(config=model.config)))
        empty = cache_of(read(model, ids, cache=DynamicCache()))
        assert type(own) is type(empty)
        with pytest.raises(ChunkError, match="the cache holds 1 rows, not 2"):
            read(model, ids[:, :1].repeat(2, 1), cache=own)
    with ChunkSelection(**SMALL, budget=16).attach(model):
        with pytest.raises(ChunkError, match="built with another selection"):
            read(model, ids[:, :1], cache=own)
        read(model, ids)
    with chooser.attach(model):
        read(model, ids[:, :1], cache=own)


def test_masks_that_it_cannot_take_are_refused(model):
    ids, mask = prompts((20, 9))
    with ChunkSelection(**SMALL, budget=16).attach(model):
        for wrong in (mask.flip(1), torch.tensor([[1] * 20, [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5])):
            with pytest.raises(ChunkError, match="padding on the left only: set tokenizer.padding_side"):
                read(model, ids, wrong)
        with pytest.raises(ChunkError, match="masks of two dimensions"):
            read(model, ids, torch.ones(2, 1, 20, 20, dtype=torch.bool).tril())
        cache = cache_of(read(model, ids, mask))
        with pytest.raises(ChunkError, match="another padding"):
            read(model, ids[:, :5], torch.ones(2, 25, dtype=torch.long), cache)
        logits(model)


# Files.


@pytest.fixture
def adapters(model):
    torch.manual_seed(3)
    sensitivity = (0.25, 0.0, 1.5e-4)
    made = ChunkAdapters.for_model(model, width=4, detector_width=8, queries=2, threshold=0.4, sensitivity=sensitivity)
    made.key.data.normal_()
    return made


@pytest.fixture
def folder(adapters, tmp_path):
    adapters.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def test_opening_adapters_leaves_the_seed_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ChunkAdapters.from_pretrained(folder)
    assert torch.equal(torch.rand(2), expected)


def test_adapters_come_back_as_they_were_saved(model, adapters, folder):
    assert {path.name for path in folder.iterdir()} - {"README.md"} == {"config.json", "model.safetensors"}
    back = ChunkAdapters.from_pretrained(folder)
    assert back.config == adapters.config
    assert back.config.shape == model_shape(model)
    assert back.state_dict().keys() == adapters.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in adapters.state_dict().items())
    got = []
    for each in (adapters, back):
        with ChunkSelection(each, **SMALL, budget=16).attach(model):
            got.append(logits(model))
    assert torch.equal(*got)


def test_adapters_that_know_the_layers_divide_the_budget(model, adapters):
    kept = {}
    for name, options in {"told": {}, "even": {"adaptive": False}, "vote": {"vote": True}}.items():
        with ChunkSelection(adapters, **SMALL, budget=24, **options).attach(model) as chunks:
            model.generate(prompts((80,))[0], max_new_tokens=12, do_sample=False)
            kept[name] = chunks.stats["layers"]
    assert kept["told"][0] > kept["told"][2] + 0.05 and kept["told"][1] == pytest.approx(kept["told"][2], abs=0.02)
    for name in ("even", "vote"):
        assert len(set(kept[name].values())) == 1
    assert sum(kept["told"].values()) == pytest.approx(sum(kept["even"].values()), abs=0.03)


def test_what_they_were_trained_on_is_kept(adapters, tmp_path):
    config = AdapterConfig(adapters.config.shape, width=2, about={"command": "decoding chunk train", "recall": [0.9]})
    ChunkAdapters(config).save_pretrained(tmp_path)
    ChunkAdapters(config).save_pretrained(str(tmp_path))  # over it
    assert ChunkAdapters.from_pretrained(str(tmp_path)).config == config


def change(folder, **fields):
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | fields))


DAMAGES = {
    "too few layers": lambda f: change(f, sensitivity=[0.1, 0.2]),
    "no numbers": lambda f: change(f, sensitivity=["a", "b", "c"]),
    "less than nothing": lambda f: change(f, sensitivity=[0.1, -0.2, 0.1]),
    "cut weights": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "no config": lambda f: (f / "config.json").unlink(),
    "cut config": lambda f: (f / "config.json").write_text('{"format": '),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "a string": lambda f: (f / "config.json").write_text('"chunkllm"'),
    "nothing": lambda f: (f / "config.json").write_text("null"),
    "no text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xfd"),
    "another format": lambda f: change(f, format="chunkllm-adapters/2"),
    "another width": lambda f: change(f, width=5),
    "a word as width": lambda f: change(f, width="wide"),
    "no width": lambda f: change(f, width=-1),
    "a field too many": lambda f: change(f, wide=1),
    "no shape": lambda f: change(f, shape=None),
    "half a shape": lambda f: change(f, shape={"full_layers": [0, 1, 2]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(folder, damage):
    DAMAGES[damage](folder)
    with pytest.raises(ChunkError, match="adapters at .* are damaged"):
        ChunkAdapters.from_pretrained(folder)


def test_weights_that_are_no_numbers_are_refused(adapters, tmp_path):
    adapters.gains.data[0, 0, 0] = torch.nan
    adapters.save_pretrained(tmp_path)
    with pytest.raises(ChunkError, match="not finite"):
        ChunkAdapters.from_pretrained(tmp_path)


def test_no_adapters_there(tmp_path):
    for where in (tmp_path / "nowhere", "someone/none-of-these", "no good name!"):
        with pytest.raises(ChunkError, match="no adapters at"):
            ChunkAdapters.from_pretrained(where)


def test_a_model_on_several_devices_is_refused(models):
    model = copy.deepcopy(models("llama"))
    model.model.layers[-1].to("meta")
    with pytest.raises(ChunkError, match="lies on several devices"):
        ChunkSelection(budget=100).attach(model)
