import json
import math

import pytest

from decoding import DecodingError, Policy, StylePrior
from decoding.vllm.requests import (
    MOST_STYLES_PER_REQUEST,
    UNLIMITED,
    Held,
    Temperatures,
    check_policy,
    check_request,
    read_request,
)
from tests.serving.conftest import CUT, sampling

VARIABLES = ("DECODING_STYLES", "DECODING_TEMPERATURE", "DECODING_CHUNKS", "DECODING_POLICY")
EVERYTHING = {
    "DECODING_STYLES": {"a": "a.safetensors", "b": "b.safetensors"},
    "DECODING_TEMPERATURE": {"phases": True},
    "DECODING_CHUNKS": {},
}


@pytest.fixture
def serve(monkeypatch):
    """Declares what a server offers."""

    def declare(declared, policy=None):
        declared = declared if policy is None else declared | {"DECODING_POLICY": policy}
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
            if name in declared:
                monkeypatch.setenv(name, json.dumps(declared[name]))

    declare({})
    return declare


@pytest.fixture
def everything(serve):
    serve(EVERYTHING)


def checked(arguments, **options):
    params = sampling(arguments, **options)
    check_request(params)
    return read_request(params)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (None, ()),
        ({}, ()),
        ({"other": 1, "kv_transfer_params": {}, "session_id": "x", "model": 1, "стиль": 1, 3: 4, "x" * 999: 1}, ()),
        ({"style": ("a", "b"), "lambda": (0.1, 0)}, (("a", 0.1), ("b", 0.0))),
        ({"style": "a"}, (("a", None),)),
        ({"style": "a", "lambda": 0.5}, (("a", 0.5),)),
        ({"style": ["a"], "lambda": 1}, (("a", 1.0),)),
        ({"style": ["a", "b"]}, (("a", None), ("b", None))),
        ({"style": ["a", "b"], "lambda": [0.1, 0]}, (("a", 0.1), ("b", 0.0))),
        ({"style": []}, ()),
        ({"style": "off"}, ()),
        ({"style": None, "lambda": None, "max_js": None}, ()),
    ],
)
def test_what_requests_ask_for(everything, arguments, wanted):
    assert checked(arguments).styles == wanted


def test_guards_that_requests_say_stand_in_for_a_styles_own(everything):
    own = Held(StylePrior("king-james", max_js=0.1, entropy_gate=2.0).guards, steer_stop=True)
    request = checked({"style": "a", "max_js": "off", "plausibility": 0.2, "steer_stop": 0, "mode": "paper"})
    assert request.held(own) == ((0.2, None, 2.0), False)
    assert checked({"style": "a", "entropy_gate": None}).held(own) == ((None, 0.1, None), True)
    assert checked({"style": "a", "steer_stop": True}).held(Held()) == Held(steer_stop=True)
    assert checked({"style": "a"}).held(own) == own


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"style": "c"}, "unknown style 'c'; this server has: a, b"),
        ({"style": 3}, "a style is named by a text, not by 3"),
        ({"style": ["a", True]}, "a style is named by a text, not by True"),
        ({"style": {"a": 1}}, "style must be a text, a number or a list of these: it holds a dict"),
        ({"style": ["a", ["b"]]}, "it holds a list"),
        ({"style": "a" * 5000}, "style names nothing: it holds a text of 5000 characters"),
        ({"style": "a", "lambda": [0.1] * 9}, "lambda can hold 8 values at most, not 9"),
        ({"style": "a", "lambda": 10**5000}, "lambda holds a whole number that is too large"),
        ({"style": "a", "lambda": [[0.1]]}, "lambda must be .*: it holds a list"),
        ({"style": "a", "lambda": []}, "same length: 1 and 0"),
        ({"style": "a", "lambda": math.inf}, "finite number"),
        ({"style": "a", "entropy_gate": math.inf}, "entropy_gate must be a number above 0, not inf"),
        ({"style": "a", "max_js": math.nan}, "max_js must be a number"),
        ({"style": ["a", "off"]}, "unknown style 'off'"),
        ({"style": ["a", "b", "a"]}, "style 'a' is named twice"),
        ({"lambda": 0.1}, "lambda without a style"),
        ({"max_js": 0.1, "style": "off"}, "max_js without a style"),
        ({"style": "a", "lambda": 1.1}, r"λ must lie in \[0, 1\], not 1.1$"),
        ({"style": "a", "lambda": -0.1}, "λ must lie"),
        ({"style": "a", "lambda": "0.1"}, "finite number"),
        ({"style": "a", "lambda": True}, "finite number"),
        ({"style": "a", "lambda": float("nan")}, "finite number"),
        ({"style": "a", "lambda": [0.1, 0.2]}, "same length: 1 and 2"),
        ({"style": ["a", "b"], "lambda": 0.1}, "same length: 2 and 1"),
        ({"style": list("abcdefghi")}, f"{MOST_STYLES_PER_REQUEST} styles, not 9"),
        ({"style": "a", "max_js": 0.7}, "max_js must be a number above 0 and at most 0.6931, not 0.7"),
        ({"style": "a", "max_js": True}, "max_js must be a number"),
        ({"style": "a", "entropy_gate": [1.0]}, "entropy_gate must be a number above 0, not"),
        ({"style": "a", "plausibility": "much"}, "plausibility must be a number"),
        ({"style": "a", "steer_stop": 2}, "steer_stop must be true or false, not 2"),
        ({"style": "a", "mode": "Ratio"}, "unknown mode 'Ratio': choose from paper, ratio"),
        ({"styles": "a"}, "unknown argument 'styles': did you mean 'style'"),
        ({"style": "a", "lamda": 1}, "unknown argument 'lamda': did you mean 'lambda'"),
        ({"style": "a", "λ": 1}, "did you mean 'lambda'"),
        ({"style": "a", "Max-JS": 1}, "did you mean 'max_js'"),
        ({"kvbudget": 3}, "did you mean 'kv_budget'"),
        ({"KV budget ": 3}, "did you mean 'kv_budget'"),
        ({"modes": 1}, "did you mean 'mode'"),
        ({"st\u200byle": "a"}, "did you mean 'style'"),
        ({"ｓｔｙｌｅ": "a"}, "did you mean 'style'"),
        ({"styl\u0435": "a"}, "did you mean 'style'"),  # a Cyrillic letter
        ({"policy": "mine"}, 'policy can be "off" alone'),
        ({"selector": 3}, "selector must be the name of the server's, not 3"),
        ({"selector": "mine"}, "selector 'mine' is not this server's, which has 'default' for all requests"),
    ],
)
def test_what_is_refused(everything, arguments, reason):
    with pytest.raises(DecodingError, match=reason):
        checked(arguments)


def test_a_style_in_another_mode_is_refused_and_the_reason_says_how_to_get_it(serve, saved):
    serve({"DECODING_STYLES": {"a": str(saved["folder"]), "b": {"style": "text.txt", "mode": "ratio"}}})
    assert checked({"style": "a", "mode": "paper"}) and checked({"style": "b", "mode": "ratio"})
    for name, mode, other in (("a", "paper", "ratio"), ("b", "ratio", "paper")):
        reason = f'style \'{name}\' is served in mode "{mode}", not "{other}".*style train --mode {other}'
        with pytest.raises(DecodingError, match=reason):
            checked({"style": name, "mode": other})


def test_without_styles_the_reason_says_how_to_get_some(serve):
    with pytest.raises(DecodingError, match="has: none; start it with --style"):
        checked({"style": "a"})


@pytest.mark.parametrize("arguments", [None, {}, {"style": "off"}, {"temperature": None}, {"temperature": "off"}])
@pytest.mark.parametrize("declared", [{}, EVERYTHING])
def test_requests_may_leave_temperatures_alone(serve, arguments, declared):
    serve(declared)
    assert checked(arguments, temperature=0.3).temperatures is None


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"style": "a", "temperature": "auto"}, (None, None)),
        ({"temperature": 0.5}, (0.5, None)),
        ({"think_temperature": 1.5, "answer_temperature": 0.3, "style": "a"}, (0.3, 1.5)),
        ({"think_temperature": 1.5, "temperature": 0.3}, (0.3, 1.5)),
        ({"think_temperature": 1.5}, (1.0, 1.5)),
        ({"answer_temperature": 2, "think_temperature": None}, (2.0, 1.0)),
        ({"think_temperature": 1, "answer_temperature": "auto"}, (None, 1.0)),
        ({"think_temperature": 1, "temperature": "auto"}, (None, 1.0)),
        ({"answer_temperature": "auto", "temperature": None}, (None, 1.0)),
        ({"think_temperature": 1e-30, "answer_temperature": 1}, (1.0, 0.01)),
        ({"temperature": 1}, None),
        ({"temperature": 1e300, "think_temperature": 2**64}, (1e6, 1e6)),  # float32 has no such numbers
    ],
)
def test_temperatures_that_requests_ask_for(everything, arguments, wanted):
    assert checked(arguments).temperatures == wanted


def test_a_temperature_that_is_the_requests_own_is_left_to_vllm(serve):
    assert checked({"temperature": 0.7}, temperature=0.7).temperatures is None


@pytest.mark.parametrize("value", [0, -1, True, math.inf, math.nan, "hot", [1.0], "0.5"])
@pytest.mark.parametrize("name", ["temperature", "think_temperature", "answer_temperature"])
def test_temperatures_that_are_none(everything, name, value):
    with pytest.raises(DecodingError, match=f"{name} must be a positive number, not "):
        checked({name: value})


@pytest.mark.parametrize(
    ("arguments", "own", "declared", "reason"),
    [
        ({"temperature": 0.7}, 1, None, "such as 0.7, belongs in the request's own temperature"),
        ({"temperature": "auto"}, 1, False, "no temperature selector; start it with --temperature-selector"),
        ({"temperature": "auto"}, 0, True, 'with "auto" the request\'s own .* must be 1, not 0 .*--generation-config'),
        ({"temperature": 0.7}, 0.6, True, "with temperature the request's own temperature must be 1, not 0.6"),
        ({"think_temperature": 1.0}, 1, None, "does not tell thinking from answering; start it with --phases"),
        ({"think_temperature": "auto"}, 1, True, 'must be a number: "auto" is for the answer'),
        ({"answer_temperature": "auto"}, 1, False, "no temperature selector; start it with --temperature-selector"),
        ({"answer_temperature": 1, "temperature": "auto"}, 1, True, "are the same beside think_temperature: give one"),
        ({"think_temperature": 1}, 0, True, "with think_temperature the request's own .* must be 1, not 0 "),
        (
            {"think_temperature": 1, "answer_temperature": 1},
            0.6,
            True,
            "with think_temperature and answer_temperature .* must be 1, not 0.6 .*--generation-config vllm",
        ),
        ({"temperature": "auto", "temperature_top_p": 0.9}, 1, True, "must be true or false, not 0.9"),
        ({"temperature": "auto", "temperature_top_p": "no"}, 1, True, "must be true or false, not 'no'"),
        ({"temperature": "auto", "temperature_top_p": [1]}, 1, True, "must be true or false"),
        ({"temperature_top_p": True}, 1, True, 'goes with a temperature that is "auto"'),
        ({"temperature_top_p": 0, "think_temperature": 1.0}, 1, True, 'goes with a temperature that is "auto"'),
    ],
)
def test_temperatures_that_are_refused(serve, arguments, own, declared, reason):
    """On a server with a selector and phases, with phases alone, or with neither."""
    temperature = {} if declared is None else {"DECODING_TEMPERATURE": {"phases": True, "selector": None}}
    if declared is False:
        temperature["DECODING_TEMPERATURE"]["selector"] = False
    serve(temperature)
    with pytest.raises(DecodingError, match=reason):
        checked(arguments, temperature=own)


@pytest.mark.parametrize(("params", "is_cut"), CUT)
def test_the_selectors_top_p_goes_with_its_temperature(serve, params, is_cut):
    assert read_request(params).takes_top_p is is_cut


def test_the_selectors_top_p_goes_with_phases_whose_answer_is_chosen(everything):
    chosen, fixed = ({"think_temperature": 1.0, "answer_temperature": value} for value in ("auto", 0.3))
    assert checked(chosen).takes_top_p
    assert not checked(fixed).takes_top_p and not checked({"think_temperature": 1.0}).takes_top_p
    assert not checked(chosen | {"temperature_top_p": False}).takes_top_p


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (None, (None, False)),
        ({"style": "a"}, (None, False)),
        ({"kv_budget": None}, (None, False)),
        ({"kv_budget": 4096}, (4096, True)),
        ({"kv_budget": "full"}, (UNLIMITED, True)),
        ({"kv_budget": 9223372036854775808}, (UNLIMITED, True)),
        ({"kv_budget": 160}, (160, True)),
        ({"chunks": {"budget": "full"}}, (UNLIMITED, True)),
        ({"chunks": 4096}, (4096, True)),
        ({"chunks": {"budget": 4096, "adapters": None}}, (4096, True)),
        ({"chunks": True}, (None, True)),
        ({"chunks": 1}, (None, True)),  # true over HTTP
        ({"chunks": {}}, (None, True)),
        *[({"chunks": off}, (UNLIMITED, False)) for off in (False, 0, None, "off")],
    ],
)
def test_budgets_that_requests_ask_for(everything, arguments, wanted):
    request = checked(arguments)
    assert (request.budget, request.selects) == wanted


@pytest.mark.parametrize("budget", [0, -5, True, 2.0, "2048", "all", [2048]])
def test_budgets_that_are_refused(everything, budget):
    with pytest.raises(DecodingError, match="kv_budget must be a whole number"):
        checked({"kv_budget": budget})


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"chunks": -5}, "chunks must be a whole number of tokens above 0, not -5"),
        ({"chunks": "2048"}, "chunks must be a whole number"),
        ({"chunks": {"budget": 99, "adapters": "default"}}, "another budget alone: adapters is the server's"),
        ({"chunks": {"budget": True}}, "chunks must be a whole number"),
        ({"chunks": {"budget": [512]}}, "chunks must be a text, a number or a list of these: it holds a list"),
        *[
            (arguments, f"kv_budget of {value} tokens leaves nothing to choose: .* of 32 tokens take 128, so .* 160")
            for value in (1, 159)
            for arguments in ({"kv_budget": value}, {"chunks": {"budget": value}})
        ],
        ({"chunks": 2}, "kv_budget of 2 tokens leaves nothing to choose"),
        ({"chunks": 99, "kv_budget": 99}, "chunks and kv_budget are the same: give one"),
    ],
)
def test_chunks_that_are_refused(everything, arguments, reason):
    with pytest.raises(DecodingError, match=reason):
        checked(arguments)


def test_a_budget_where_no_chunks_are_selected_is_refused(serve):
    for arguments in ({"kv_budget": 2048}, {"kv_budget": "full"}, {"chunks": True}):
        with pytest.raises(DecodingError, match="selects no chunks"):
            checked(arguments)
    assert checked({"chunks": False})


@pytest.mark.parametrize("arguments", ["style", [1], 3])
def test_arguments_that_are_no_mapping_are_refused(everything, arguments):
    with pytest.raises(DecodingError, match="extra_args must map arguments to values"):
        checked(arguments)


PHASED = {"style": "a", "temperature": "auto", "think_temperature": 1.5, "chunks": 512}


@pytest.mark.parametrize(
    ("arguments", "own", "styles", "temperatures", "budget"),
    [
        (None, 1, [("a", None)], (None, 1.5), 512),
        ({"other": 1}, 1, [("a", None)], (None, 1.5), 512),
        ({"lambda": 0.3}, 1, [("a", 0.3)], (None, 1.5), 512),
        ({"style": "b"}, 1, [("b", None)], (None, 1.5), 512),
        ({"style": "off"}, 1, [], (None, 1.5), 512),
        ({"style": None}, 1, [], (None, 1.5), 512),
        ({"temperature": 0.5}, 1, [("a", None)], (0.5, 1.5), 512),
        ({"answer_temperature": 0.5}, 1, [("a", None)], (0.5, 1.5), 512),
        ({"think_temperature": 2}, 1, [("a", None)], (None, 2.0), 512),
        ({"think_temperature": "off"}, 1, [("a", None)], (None, None), 512),
        ({"temperature": "off"}, 1, [("a", None)], (1.0, 1.5), 512),
        ({"temperature": "off", "think_temperature": "off"}, 1, [("a", None)], None, 512),
        (None, 0.7, [("a", None)], None, 512),
        (None, 0, [("a", None)], None, 512),
        ({"kv_budget": 999}, 1, [("a", None)], (None, 1.5), 999),
        ({"kv_budget": None}, 1, [("a", None)], (None, 1.5), 512),
        ({"chunks": False}, 1, [("a", None)], (None, 1.5), UNLIMITED),
        ({"policy": "off"}, 1, [], None, UNLIMITED),
        ({"policy": "off", "style": "b", "kv_budget": 999}, 1, [("b", None)], None, 999),
    ],
)
def test_requests_have_a_servers_policy_unless_they_say_otherwise(serve, arguments, own, styles, temperatures, budget):
    serve(EVERYTHING, PHASED)
    check_policy(sampling(None))
    request = checked(arguments, temperature=own)
    assert list(request.styles) == styles
    assert request.temperatures == (None if temperatures is None else Temperatures(*temperatures))
    assert request.budget == budget


def test_what_belongs_to_the_policys_style_goes_with_it(serve):
    serve(EVERYTHING, {"style": "a", "lambda": 0.3, "max_js": 0.1})
    assert (checked(None).styles, checked(None).guards) == ((("a", 0.3),), (("max_js", 0.1),))
    assert checked({"max_js": "off"}).guards == (("max_js", None),)
    other = checked({"style": "b"})
    assert (other.styles, other.guards) == ((("b", None),), ())


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"style": "c"}, "DECODING_POLICY: unknown style 'c'"),
        ({"styles": "a"}, "DECODING_POLICY can have style, lambda, .*, not styles"),
        ({"policy": "off"}, "not policy"),
        ({"chunks": 100}, "DECODING_POLICY: a kv_budget of 100 tokens leaves nothing to choose"),
        ({"style": {"a": 1}}, "DECODING_POLICY: style must be a text"),
        ({"style": "a", "lambda": 2}, "DECODING_POLICY: λ must lie"),
        ([], "DECODING_POLICY must be a JSON object"),
    ],
)
def test_a_spoilt_policy_is_refused(serve, policy, reason):
    serve(EVERYTHING, policy)
    with pytest.raises(DecodingError, match=reason):
        check_policy(sampling(None))


def test_a_policy_says_itself_as_a_requests_arguments(everything, serve, style_file, saved):
    policy = Policy(style_file, λ=0.3, mode="paper", max_js=0.1, steer_stop=True, temperature=0.5, think_temperature=2)
    arguments = policy.request_args()
    assert json.loads(json.dumps(arguments)) == arguments
    serve(EVERYTHING | {"DECODING_STYLES": {style_file.stem: str(style_file)}})
    request = checked(arguments)
    assert request.styles == ((style_file.stem, 0.3),)
    assert request.held(Held()) == ((None, 0.1, None), True)
    assert request.temperatures == (0.5, 2.0)
    assert checked(Policy(temperature="auto", selector="default").request_args()).temperatures == (None, None)
    assert checked(Policy(chunks=True).request_args()).budget == 2048
    assert Policy(saved["folder"]).request_args() == {"style": style_file.stem}
    assert Policy().request_args() == {}
    for unfit, reason in ((Policy(style_file, λ="auto"), "give a number"), (Policy(chunks={"vote": True}), "vote of")):
        with pytest.raises(DecodingError, match=reason):
            unfit.request_args()
