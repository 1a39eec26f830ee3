import json

import pytest
import torch

from decoding import DecodingError, StylePrior
from decoding.corpora import load_corpus
from decoding.priors import train_prior
from decoding.vllm import style_engine_args
from decoding.vllm.requests import (
    MOST_STYLES_PER_REQUEST,
    PROCESSOR,
    declared_styles,
    layers_of,
    load_styles,
    requested_styles,
)
from tests.conftest import WORDS, make_tokenizer
from tests.serving.conftest import assert_same_distribution

KNOWN = ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (None, []),
        ({}, []),
        ({"other": 1}, []),
        ({"style": "a"}, [("a", None)]),
        ({"style": "a", "lambda": 0.5}, [("a", 0.5)]),
        ({"style": ["a"], "lambda": 1}, [("a", 1.0)]),
        ({"style": ["a", "b"]}, [("a", None), ("b", None)]),
        ({"style": ["a", "b"], "lambda": [0.1, 0]}, [("a", 0.1), ("b", 0.0)]),
        ({"style": []}, []),
    ],
)
def test_what_requests_ask_for(arguments, wanted):
    assert requested_styles(arguments, KNOWN) == wanted


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"style": "c"}, "unknown style 'c'; this server has: a, b"),
        ({"style": 3}, "unknown style 3"),
        ({"style": {"a": 1}}, "unknown style"),
        ({"style": ["a", ["b"]]}, "unknown style"),
        ({"lambda": 0.1}, "without a style"),
        ({"style": "a", "lambda": 1.1}, r"λ must lie in \[0, 1\], not 1.1$"),
        ({"style": "a", "lambda": -0.1}, "λ must lie"),
        ({"style": "a", "lambda": "0.1"}, "finite number"),
        ({"style": "a", "lambda": True}, "finite number"),
        ({"style": "a", "lambda": float("nan")}, "finite number"),
        ({"style": "a", "lambda": [0.1, 0.2]}, "same length: 1 and 2"),
        ({"style": ["a", "b"], "lambda": 0.1}, "same length: 2 and 1"),
        ({"style": ["a"] * (MOST_STYLES_PER_REQUEST + 1)}, "8 styles, not 9"),
    ],
)
def test_what_is_refused(arguments, reason):
    with pytest.raises(DecodingError, match=reason):
        requested_styles(arguments, KNOWN)


def test_without_styles_the_reason_says_how_to_get_some():
    with pytest.raises(DecodingError, match="has: none; start it with --style"):
        requested_styles({"style": "a"}, [])


def test_rows_become_layers():
    first, second = layers_of([[(2, 0.5)], [], [(2, 0.25), (1, 0.125)]], torch.device("cpu"))
    assert first.prior == 2
    assert first.strength.tolist() == [0.5, 0, 0.25]
    assert second.prior == 1
    assert second.strength.tolist() == [0, 0, 0.125]
    (mixed,) = layers_of([[(2, 0.5)], [], [(1, 0.25)]], torch.device("cpu"))
    assert mixed.prior.tolist() == [2, 0, 1]
    assert layers_of([[], []], torch.device("cpu")) == []


@pytest.fixture
def saved(tmp_path, tokenizer, style_file):
    prior = train_prior(load_corpus(str(style_file)), tokenizer)
    prior.save(tmp_path / "file.safetensors")
    StylePrior(prior, λ=0.7, orders=[2], tokenizer=tokenizer).save_pretrained(tmp_path / "folder")
    return {"file": tmp_path / "file.safetensors", "folder": tmp_path / "folder"}


def test_styles_are_declared_in_the_environment(saved, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", "{}")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    assert style_engine_args(saved) == {"logits_processors": [PROCESSOR]}
    assert style_engine_args(saved | {"hub": "me/mine"}) == {"logits_processors": [PROCESSOR]}
    assert declared_styles() == {name: str(path) for name, path in saved.items()} | {"hub": "me/mine"}
    import os

    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "MINE,DECODING_STYLES"


def test_a_style_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", "{}")
    for source in (tmp_path / "no.safetensors", "no", tmp_path):
        with pytest.raises(DecodingError, match="style 'x': no saved prior"):
            style_engine_args({"x": source})
    assert declared_styles() == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_a_spoilt_declaration_is_refused(text, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", text)
    with pytest.raises(DecodingError, match="DECODING_STYLES"):
        declared_styles()


def test_saved_settings_apply_and_a_request_may_leave_lambda_out(saved, tokenizer):
    styles = load_styles({name: str(path) for name, path in saved.items()}, tokenizer, 60, "cpu")
    assert styles.resolve({"style": ["folder", "file"]}) == [(1, 0.7), (0, 0.1)]
    assert styles.resolve({"style": ["folder", "file"], "lambda": [0, 0.5]}) == [(0, 0.5)]
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    wanted = StylePrior.from_pretrained(saved["folder"])(history, scores)
    got = styles.add(scores.clone(), history, layers_of([[(1, 0.7)]] * 2, torch.device("cpu")))
    assert_same_distribution(got, wanted)


def test_priors_that_do_not_fit_the_model_are_refused(saved, tokenizer, tmp_path):
    declared = {"mine": str(saved["file"])}
    with pytest.raises(DecodingError, match="style 'mine'.*another model's"):
        load_styles(declared, None, 10, "cpu")
    with pytest.raises(DecodingError, match="style 'mine': the prior was trained with tokenizer"):
        load_styles(declared, make_tokenizer(WORDS[::-1]), 60, "cpu")
    (tmp_path / "spoilt.safetensors").write_bytes(b"spoilt")
    with pytest.raises(DecodingError, match="style 'x':.*not a whole n-gram model"):
        load_styles({"x": str(tmp_path / "spoilt.safetensors")}, tokenizer, 60, "cpu")


def test_the_declaration_is_json_that_vllm_users_can_write(saved, monkeypatch):
    monkeypatch.setenv("DECODING_STYLES", json.dumps({"mine": str(saved["file"])}))
    assert list(declared_styles()) == ["mine"]
