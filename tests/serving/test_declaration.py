"""What engines and servers are started with."""

import json
import os

import pytest

from decoding import DecodingError, Policy, StylePrior
from decoding.vllm import engine_args
from decoding.vllm.declaration import (
    CHUNK_PROCESSOR,
    STYLE_PROCESSOR,
    TEMPERATURE_PROCESSOR,
    DeclaredChunks,
    DeclaredSelector,
    DeclaredStyle,
    checked_chunks,
    declared_chunks,
    declared_phases,
    declared_policy,
    declared_selector,
    declared_styles,
)

STYLES = {"logits_processors": [STYLE_PROCESSOR]}
TEMPERATURE = {"logits_processors": [TEMPERATURE_PROCESSOR]}
BOTH = {"logits_processors": [STYLE_PROCESSOR, TEMPERATURE_PROCESSOR]}


@pytest.fixture(autouse=True)
def nothing_declared(monkeypatch):
    declared = (f"DECODING_{what}" for what in ("STYLES", "TEMPERATURE", "CHUNKS", "POLICY"))
    for variable in (*declared, "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"):
        monkeypatch.setenv(variable, "")  # so that it is put back as it was
        monkeypatch.delenv(variable)


@pytest.fixture
def saved_selector(tmp_path):
    folder = tmp_path / "selector"
    folder.mkdir()
    (folder / "temperature_selector.json").write_text("{}")
    return folder


def test_styles_are_declared_in_the_environment(saved, monkeypatch):
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    assert engine_args(saved) == STYLES
    assert engine_args(saved | {"hub": "me/mine"}) == STYLES
    found = {name: DeclaredStyle(str(path)) for name, path in saved.items()} | {"hub": DeclaredStyle("me/mine")}
    assert declared_styles() == found
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "MINE,DECODING_STYLES"


def test_a_selector_is_declared_in_the_environment(saved_selector, monkeypatch):
    monkeypatch.chdir(saved_selector.parent)
    assert engine_args(temperature="selector") == TEMPERATURE
    assert declared_selector() == DeclaredSelector(str(saved_selector))
    assert engine_args(temperature=True, model_size="large", temperature_policy="curve") == TEMPERATURE
    assert json.loads(os.environ["DECODING_TEMPERATURE"]) == {
        "selector": None,
        "model_size": "large",
        "policy": "curve",
    }
    assert declared_selector() == DeclaredSelector(None, "large", "curve")
    assert engine_args(temperature="me/mine") == TEMPERATURE
    assert declared_selector() == DeclaredSelector("me/mine")
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "DECODING_TEMPERATURE"


def test_phases_are_declared_beside_a_selector_or_without_one(saved_selector):
    assert engine_args(phases=True) == TEMPERATURE
    assert declared_selector() is None
    assert declared_phases() == (None, None)
    assert engine_args(phases=("<a>", "</a>"), temperature=saved_selector, model_size="small") == TEMPERATURE
    assert declared_selector() == DeclaredSelector(str(saved_selector), "small")
    assert declared_phases() == ("<a>", "</a>")
    assert engine_args(temperature=True) == TEMPERATURE
    assert declared_phases() is None
    for phases, reason in ((("a",), "two texts|begin and end"), ("ab", "begin and end"), (("a", "a"), "cannot be a")):
        with pytest.raises(DecodingError, match=reason):
            engine_args(phases=phases)
    assert declared_selector() == DeclaredSelector()


@pytest.mark.parametrize(
    ("phases", "wanted"), [("true", (None, None)), ("{}", (None, None)), ("false", None), ("null", None)]
)
def test_phases_that_vllm_users_can_write(phases, wanted, monkeypatch):
    monkeypatch.setenv("DECODING_TEMPERATURE", f'{{"phases": {phases}}}')
    assert declared_phases() == wanted
    assert declared_selector() == DeclaredSelector()


@pytest.mark.parametrize("phases", ["3", "[]", '{"start": "a"}', '{"begin": "a"}', '{"begin": 1, "end": 2}'])
def test_spoilt_phases_are_refused(phases, monkeypatch):
    monkeypatch.setenv("DECODING_TEMPERATURE", f'{{"phases": {phases}}}')
    with pytest.raises(DecodingError, match="as phases|two markers"):
        declared_phases()


def test_a_declaration_replaces_the_last_one(saved):
    assert engine_args(saved, temperature=True) == BOTH
    assert declared_styles()
    assert declared_selector()
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "DECODING_STYLES,DECODING_TEMPERATURE"
    assert engine_args(temperature=True) == TEMPERATURE
    assert declared_styles() == {}
    assert engine_args({}) == STYLES  # which refuses styles, where vLLM would ignore them
    assert declared_selector() is None
    assert engine_args() == {"logits_processors": []}
    assert engine_args(temperature=False) == {"logits_processors": []}


def test_what_is_not_there_is_refused_and_nothing_declared(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "no.safetensors", "no", tmp_path / "empty"):
        with pytest.raises(DecodingError, match="style 'x': no saved prior"):
            engine_args({"x": source}, temperature=True)
    for source in (tmp_path / "no", "no", tmp_path):
        with pytest.raises(DecodingError, match="no temperature selector at"):
            engine_args(saved, temperature=source)
    for options, reason in (
        ({"temperature": True, "model_size": "tiny"}, "unknown model size 'tiny': choose from small, medium, large"),
        ({"temperature": True, "temperature_policy": "best"}, "unknown temperature policy 'best': choose from ability"),
        ({"model_size": "small"}, "ask for one with temperature"),
        ({"temperature_policy": "curve"}, "ask for one with temperature"),
        ({"policy": "curve"}, "policy='curve' was the temperature selector's: write temperature_policy='curve'"),
        ({"policy": "no"}, "no policy at no"),
        ({"kv_budget": 0}, "kv_budget must be a whole number"),
        ({"full_graphs": True}, "full_graphs is chunk selection's"),
    ):
        with pytest.raises(DecodingError, match=reason):
            engine_args(saved, **options)
    assert declared_styles() == {}
    assert declared_selector() is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": 1}', '{"a": {"style": "x", "max_js": 2}}', '{"a": {"style": "x", "lambda": "auto"}}']
)
def test_a_spoilt_declaration_is_refused(text, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", text)
    monkeypatch.setenv("DECODING_TEMPERATURE", text)
    with pytest.raises(DecodingError, match="DECODING_STYLES"):
        declared_styles()
    with pytest.raises(DecodingError, match="DECODING_TEMPERATURE"):
        declared_selector()


def test_declarations_are_json_that_vllm_users_can_write(saved, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", json.dumps({"mine": str(saved["file"])}))
    assert list(declared_styles()) == ["mine"]
    monkeypatch.setenv("DECODING_TEMPERATURE", '{"model_size": "large"}')
    assert declared_selector() == DeclaredSelector(model_size="large")
    monkeypatch.setenv("DECODING_TEMPERATURE", '{"size": "large"}')
    with pytest.raises(DecodingError, match="can have selector, model_size, policy, not size"):
        declared_selector()


def test_chunk_selection_is_declared_in_the_environment_and_to_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "config.json").write_text("{}")
    for asked, adapters, budget, full_graphs in (
        ({"chunk_adapters": "default"}, "default", 2048, False),
        ({"kv_budget": 512}, None, 512, False),
        ({"chunk_adapters": tmp_path, "kv_budget": 4096}, str(tmp_path), 4096, False),
        ({"chunk_adapters": "me/mine", "full_graphs": True}, "me/mine", 2048, True),
    ):
        chunks = {"adapters": adapters, "kv_budget": budget, "full_graphs": full_graphs}
        assert engine_args(**asked) == {
            "logits_processors": [CHUNK_PROCESSOR],
            "additional_config": {"chunkllm": chunks},
            "block_size": 32,
        }
        assert declared_chunks() == DeclaredChunks(**chunks)
    engine_args({})
    assert declared_chunks() is None


def test_on_a_gpu_chunk_selection_brings_its_backend_and_leaves_the_runner_to_vllm(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert engine_args(kv_budget=512)["attention_backend"] == "CUSTOM"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([], "an object with adapters, kv_budget"),
        ({"budget": 3}, "an object with adapters, kv_budget"),
        ({"adapters": 3}, "adapters must be a folder"),
        ({"kv_budget": "2048"}, "whole number of tokens"),
        ({"kv_budget": True}, "whole number of tokens"),
        ({"full_graphs": 1}, "full_graphs must be true or false"),
    ],
)
def test_settings_of_chunk_selection_are_checked(settings, reason):
    with pytest.raises(DecodingError, match=reason):
        checked_chunks(settings)


def test_adapters_that_are_not_there_are_refused_before_anything_starts(tmp_path):
    with pytest.raises(DecodingError, match="decoding chunk train"):
        engine_args(chunk_adapters=tmp_path / "none")


def test_a_style_cannot_have_the_name_of_none(saved):
    with pytest.raises(DecodingError, match='cannot be called "off"'):
        engine_args({"off": saved["file"]})


ALL_TOKENS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def test_a_policy_is_declared_part_by_part(saved, saved_selector, tmp_path, style_file):
    Policy(style_file, λ=0.3, max_js=0.1, temperature=0.7, think_temperature=1, chunks=512).save_pretrained(
        tmp_path / "mine"
    )
    got = engine_args({"other": saved["file"]}, policy=tmp_path / "mine")
    chunks = {"adapters": None, "kv_budget": 512, "full_graphs": False}
    assert got == {
        "logits_processors": [STYLE_PROCESSOR, TEMPERATURE_PROCESSOR, CHUNK_PROCESSOR],
        "override_generation_config": {"temperature": 1.0, **ALL_TOKENS},
        "additional_config": {"chunkllm": chunks},
        "block_size": 32,
    }
    text = str(tmp_path / "mine" / "style" / style_file.name)
    own = DeclaredStyle(text, (("lambda", 0.3), ("max_js", 0.1)))
    assert declared_styles() == {"other": DeclaredStyle(str(saved["file"])), style_file.stem: own}
    assert declared_phases() == (None, None) and declared_selector() is None
    assert declared_policy() == {
        "style": style_file.stem,
        "temperature": 0.7,
        "think_temperature": 1.0,
        "chunks": 512,
    }
    assert "DECODING_POLICY" in os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"].split(",")
    engine_args()
    assert declared_policy() == {}


def test_a_policys_temperature_is_vllms_own_where_it_is_a_number(monkeypatch):
    got = engine_args(policy=Policy(temperature=0.7))
    assert got == TEMPERATURE | {"override_generation_config": {"temperature": 0.7, **ALL_TOKENS}}
    assert declared_policy() == {} and declared_selector() is None
    got = engine_args(policy=Policy(temperature="auto"), model_size="large", temperature_policy="curve")
    assert got == TEMPERATURE | {"override_generation_config": {"temperature": 1.0, **ALL_TOKENS}}
    assert declared_policy() == {"temperature": "auto"}
    assert declared_selector() == DeclaredSelector(None, "large", "curve")
    assert engine_args(policy=Policy()) == {"logits_processors": []}


@pytest.mark.parametrize(
    ("policy", "options", "reason"),
    [
        ({"style": "king-james"}, {"styles": {"king-james": "king-james"}}, "called 'king-james', as another one is"),
        ({"temperature": "auto"}, {"temperature": True}, "temperature beside a policy that says the same"),
        ({"chunks": 512}, {"kv_budget": 512}, "kv_budget beside a policy"),
        ({"chunks": {"retention": 0.5}}, {}, "has adapters and a budget, not retention"),
        ({"style": "king-james", "mode": "ratio"}, {}, r'mode="ratio" of this policy.* engine_args\(policy=…, model=…'),
        ({"style": "king-james", "λ": "auto"}, {}, 'λ="auto" of this policy'),
    ],
)
def test_policies_that_a_server_cannot_have_are_refused(policy, options, reason):
    with pytest.raises(DecodingError, match=reason):
        engine_args(policy=Policy(**policy), **options)
    assert declared_styles() == {}


def test_a_style_that_wants_the_model_is_measured_with_it(model_folder, style_file, measuring):
    policy = Policy(style_file, λ=0.4, mode="ratio", max_js=0.1)
    folders = set()
    for _ in range(2):
        engine_args(policy=policy, model=str(model_folder))
        ((name, style),) = declared_styles().items()
        assert (name, style.said, style.mode()) == (style_file.stem, (), "ratio")
        prior = StylePrior.from_pretrained(style.style)
        assert (prior.lambda_, prior.mode, prior.guards.max_js) == (0.4, "ratio", 0.1)
        assert prior.log_ratio.std() > 0
        folders.add(style.style)
    assert len(folders) == len(measuring) == 1
