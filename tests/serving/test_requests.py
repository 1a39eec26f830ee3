import math
from types import SimpleNamespace

import pytest
import torch

from decoding import DecodingError, StylePrior
from decoding.vllm.requests import (
    MOST_STYLES_PER_REQUEST,
    UNLIMITED,
    check_request,
    check_temperature,
    chosen_top_p,
    layers_of,
    load_styles,
    requested_budget,
    requested_styles,
    stops_table,
    wanted_temperatures,
)
from tests.conftest import WORDS, make_tokenizer
from tests.serving.conftest import CUT, TOP_P, assert_same_distribution, sampling

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


@pytest.mark.parametrize("arguments", [None, {}, {"style": "a"}, {"temperature": None}])
@pytest.mark.parametrize("is_served", [True, False])
def test_requests_may_leave_the_selector_alone(arguments, is_served):
    check_temperature(arguments, 0.3, is_served, is_served)
    assert wanted_temperatures(arguments) is None


def test_requests_may_leave_their_temperature_to_the_selector():
    arguments = {"style": "a", "temperature": "auto"}
    check_temperature(arguments, 1.0, has_selector=True)
    assert wanted_temperatures(arguments) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"think_temperature": 1.5, "answer_temperature": 0.3, "style": "a"}, (0.3, 1.5)),
        ({"think_temperature": 1.5}, (1.0, 1.5)),
        ({"answer_temperature": 2, "think_temperature": None}, (2.0, 1.0)),
        ({"think_temperature": 1, "answer_temperature": "auto"}, (None, 1.0)),
        ({"answer_temperature": "auto", "temperature": None}, (None, 1.0)),
        ({"think_temperature": 1e-30, "answer_temperature": 1}, (1.0, 0.01)),
    ],
)
def test_requests_may_think_and_answer_at_temperatures_of_their_own(arguments, wanted):
    check_temperature(arguments, 1, has_selector="auto" in arguments.values(), has_phases=True)
    assert wanted_temperatures(arguments) == wanted


@pytest.mark.parametrize("value", [0, -1, True, math.inf, math.nan, "hot", [1.0], "0.5"])
@pytest.mark.parametrize("name", ["think_temperature", "answer_temperature"])
def test_temperatures_of_phases_that_are_none(name, value):
    with pytest.raises(DecodingError, match=f"{name} must be a positive number, not "):
        check_temperature({"think_temperature": 1.0, name: value}, 1, has_selector=True, has_phases=True)


@pytest.mark.parametrize(
    ("arguments", "own", "served", "reason"),
    [
        ({"think_temperature": 1.0}, 1, (True, False), "does not tell thinking from answering; start it with --phases"),
        ({"think_temperature": "auto"}, 1, (True, True), 'must be a number: "auto" is for the answer'),
        ({"answer_temperature": "auto"}, 1, (False, True), "no temperature selector; start it with --temperature-sel"),
        ({"think_temperature": 1, "temperature": "auto"}, 1, (True, True), 'write "answer_temperature": "auto"'),
        ({"think_temperature": 1, "temperature": 0.5}, 1, (True, True), "not 0.5: a number belongs"),
        ({"think_temperature": 1}, 0, (True, True), "with think_temperature the request's own .* must be 1, not 0 "),
        (
            {"think_temperature": 1, "answer_temperature": 1},
            0.6,
            (True, True),
            "with think_temperature and answer_temperature .* must be 1, not 0.6 .*--generation-config vllm",
        ),
    ],
)
def test_what_phases_refuse(arguments, own, served, reason):
    with pytest.raises(DecodingError, match=reason):
        check_temperature(arguments, own, *served)


@pytest.mark.parametrize(
    ("asked", "own", "is_served", "reason"),
    [
        (0.7, 1, True, '"auto" alone, not 0.7: a number belongs in the request\'s own temperature'),
        (0, 1, True, "not 0: a number"),
        ("Auto", 1, True, "not 'Auto'"),
        (["auto"], 1, True, "not \\['auto'\\]"),
        (True, 1, True, "not True"),
        ("auto", 0, True, "must be 1, not 0 .*--generation-config vllm"),
        ("auto", 0.6, True, "must be 1, not 0.6 "),
        ("auto", 1, False, "no temperature selector; start it with --temperature-selector"),
    ],
)
def test_what_the_selector_refuses(asked, own, is_served, reason):
    with pytest.raises(DecodingError, match=reason):
        check_temperature({"temperature": asked}, own, is_served)


@pytest.mark.parametrize(("params", "is_cut"), CUT)
def test_the_selectors_top_p_goes_with_its_temperature(params, is_cut):
    if params.extra_args is not None:
        check_temperature(params.extra_args, 1, has_selector=True)
    assert chosen_top_p(params, TOP_P) == (TOP_P if is_cut else None)
    assert chosen_top_p(params, None) is None


def test_the_selectors_top_p_goes_with_phases_whose_answer_is_chosen():
    chosen, fixed = ({"think_temperature": 1.0, "answer_temperature": value} for value in ("auto", 0.3))
    assert chosen_top_p(sampling(chosen), TOP_P) == TOP_P
    assert chosen_top_p(sampling(fixed), TOP_P) is chosen_top_p(sampling({"think_temperature": 1.0}), TOP_P) is None
    check_temperature(chosen | {"temperature_top_p": False}, 1, has_selector=True, has_phases=True)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"temperature": "auto", "temperature_top_p": 0.9}, "must be true or false, not 0.9"),
        ({"temperature": "auto", "temperature_top_p": "no"}, "must be true or false, not 'no'"),
        ({"temperature": "auto", "temperature_top_p": [1]}, "must be true or false"),
        ({"temperature_top_p": True}, 'goes with a temperature that is "auto"'),
        ({"temperature_top_p": 0, "think_temperature": 1.0}, 'goes with a temperature that is "auto"'),
    ],
)
def test_what_the_top_p_refuses(arguments, reason):
    with pytest.raises(DecodingError, match=reason):
        check_temperature(arguments, 1, has_selector=True, has_phases=True)


def test_what_a_server_does_not_have_is_refused(monkeypatch):
    monkeypatch.delenv("DECODING_STYLES", raising=False)
    monkeypatch.delenv("DECODING_TEMPERATURE", raising=False)
    auto, styled = (SimpleNamespace(temperature=1.0, extra_args={key: "auto"}) for key in ("temperature", "style"))
    for params, reason in ((auto, "no temperature selector"), (styled, "unknown style 'auto'")):
        with pytest.raises(DecodingError, match=reason):
            check_request(params)
    monkeypatch.setenv("DECODING_TEMPERATURE", "{}")
    check_request(auto)
    phased = SimpleNamespace(temperature=1.0, extra_args={"think_temperature": 0.5})
    with pytest.raises(DecodingError, match="--phases"):
        check_request(phased)
    monkeypatch.setenv("DECODING_TEMPERATURE", '{"selector": false, "phases": true}')
    check_request(phased)
    with pytest.raises(DecodingError, match="no temperature selector"):
        check_request(auto)


def test_rows_become_layers():
    first, second = layers_of([[(2, 0.5)], [], [(2, 0.25), (1, 0.125)]], torch.device("cpu"))
    assert first.prior == 2
    assert first.strength.tolist() == [0.5, 0, 0.25]
    assert second.prior == 1
    assert second.strength.tolist() == [0, 0, 0.125]
    (mixed,) = layers_of([[(2, 0.5)], [], [(1, 0.25)]], torch.device("cpu"))
    assert mixed.prior.tolist() == [2, 0, 1]
    assert layers_of([[], []], torch.device("cpu")) == []


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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(None, None), ({"style": "a"}, None), ({"kv_budget": 4096}, 4096), ({"kv_budget": "full"}, UNLIMITED)],
)
def test_budgets_that_requests_ask_for(arguments, wanted):
    assert requested_budget(arguments, is_served=True) == wanted


@pytest.mark.parametrize("budget", [0, -5, True, 2.0, "2048", "all", [2048]])
def test_budgets_that_are_refused(budget):
    with pytest.raises(DecodingError, match="kv_budget must be a whole number"):
        requested_budget({"kv_budget": budget}, is_served=True)


def test_a_budget_where_no_chunks_are_selected_is_refused(monkeypatch):
    monkeypatch.delenv("DECODING_CHUNKS", raising=False)
    with pytest.raises(DecodingError, match="selects no chunks"):
        check_request(SimpleNamespace(extra_args={"kv_budget": 2048}, temperature=1))
    monkeypatch.setenv("DECODING_CHUNKS", "{}")
    check_request(SimpleNamespace(extra_args={"kv_budget": 2048}, temperature=1))


def test_texts_and_saved_styles_are_styles(saved, tokenizer, style_file, tmp_path):
    declared = {"text": str(style_file), "saved": str(saved["folder"]), "file": str(saved["file"])}
    styles = load_styles(declared, tokenizer, 60, "cpu")
    scores, history = torch.randn(3, 60), torch.tensor([[3, 4], [5, 6], [3, 4]])
    rows = [[(0, 0.5)], [(1, 0.5)], [(2, 0.5)]]
    got = styles.add(scores.clone(), history, layers_of(rows, torch.device("cpu")))
    for row, spec in enumerate(declared.values()):
        own = StylePrior(spec, λ=0.5, tokenizer=tokenizer)
        assert_same_distribution(got[row : row + 1], own(history[row : row + 1], scores[row : row + 1]))


@pytest.mark.parametrize("steer_stop", [False, True])
def test_ends_of_texts_are_left_alone(tokenizer, style_file, tmp_path, steer_stop):
    prior = StylePrior(style_file, λ=0.5, steer_stop=steer_stop, tokenizer=tokenizer)
    prior.save_pretrained(tmp_path / "one")
    styles = load_styles({"one": str(tmp_path / "one")}, tokenizer, 60, "cpu", stop_ids=[7])
    scores, history = torch.randn(2, 60), torch.tensor([[3, 4], [5, 6]])
    scores[:, 5] += 6  # a word of the text
    got = styles.add(scores.clone(), history, layers_of([[(0, 1.0)], []], torch.device("cpu")))
    assert torch.equal(got[1], scores[1])
    stops = [tokenizer.eos_token_id, 7]
    others = [i for i in range(60) if i not in stops]
    before, after = (each[0, stops] - each[0, others].max() for each in (scores, got))
    assert torch.allclose(before, after, atol=1e-4) is not steer_stop


def test_a_prior_with_an_id_more_than_the_model_scores(tokenizer, style_file, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    StylePrior(style_file, λ=0.5, tokenizer=tokenizer).save_pretrained(tmp_path / "one")
    width = len(tokenizer) - 1
    styles = load_styles({"one": str(tmp_path / "one")}, tokenizer, width, "cpu")
    scores, history = torch.randn(2, width), torch.tensor([[3, 4], [5, 6]])
    got = styles.add(scores.clone(), history, layers_of([[(0, 0.5)]] * 2, torch.device("cpu")))
    assert_same_distribution(got, StylePrior(tmp_path / "one", tokenizer=tokenizer)(history, scores))


def test_a_requests_own_stops_are_left_alone(tokenizer, style_file, tmp_path):
    for name, steer_stop in (("left", False), ("steered", True)):
        prior = StylePrior(style_file, λ=1, steer_stop=steer_stop, tokenizer=tokenizer)
        prior.save_pretrained(tmp_path / name)
    declared = {name: str(tmp_path / name) for name in ("left", "steered")}
    styles = load_styles(declared, tokenizer, 60, "cpu")
    asks = [("left", [7, 9, 1]), ("left", None), ("steered", [7]), (None, [8]), ("left", [9])]
    params = [SimpleNamespace(extra_args=name and {"style": name}, stop_token_ids=ids) for name, ids in asks]
    own = [styles.own_stops(each) for each in params]
    assert own == [[7, 9], [], [], [], [9]]
    scores = torch.randn(5, 60)
    history = torch.tensor([[3, 4]] * 5)
    rows = [styles.resolve(each.extra_args) for each in params]
    layers = layers_of(rows, torch.device("cpu"))
    got = styles.add(scores.clone(), history, layers, stops_table(own))
    plain = styles.add(scores.clone(), history, layers)
    assert torch.equal(got[1:4], plain[1:4]) and torch.equal(got[3], scores[3])
    for row, ends in ((0, [1, 7, 9]), (4, [1, 9])):
        others = [i for i in range(60) if i not in ends]
        assert torch.equal(got[row, others], plain[row, others])
        own_ends = [end for end in ends if end != 1]
        before, after = (each[row, own_ends] - each[row, others].max() for each in (scores, got))
        torch.testing.assert_close(before, after)
