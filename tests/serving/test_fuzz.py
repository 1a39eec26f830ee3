"""Random arguments: at admission, and of requests to a running server, bad ones between good ones.

A few hundred by default; ``DECODING_FUZZ=10000 pytest -m fuzz tests/serving/test_fuzz.py`` sends as many as it says.
Sixteen are under way at a time, which is as many as the engine has in a step.
"""

import json
import math
import os
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from decoding import DecodingError
from decoding.vllm import fallbacks
from decoding.vllm.dropped import CARRYING
from decoding.vllm.requests import PLAIN, UNLIMITED, Request, check_request, read_admitted, read_request
from tests.conftest import WORDS
from tests.serving.conftest import make_tiny, sampling

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
pytestmark = pytest.mark.fuzz
COUNT = int(os.environ.get("DECODING_FUZZ", "300"))
AT_ONCE = 16
RANDOM = hypothesis.settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

GUARDS = {"plausibility": 1.0, "max_js": math.log(2), "entropy_gate": math.inf}
ALIKE = ["styles", "Style", "styl\u0435", "lamda", "λ", "kv-budget", "modes", "st yle", "temperature_", "ＭＯＤＥ"]
OTHERS = ["model", "seed", "x", "", "стиль"]  # nobody's: vLLM reads some of its own there, and may not check them
TEXTS = st.sampled_from(["off", "auto", "full", "default", "a", "b", "paper", "ratio", "c", "1", "0.5", "true", ""])
NUMBERS = st.sampled_from(
    [0, 1, 0.0, 1.0, 0.5, 0.3, 0.05, 2, 159, 160, 512, 512.0, -1, -0.0, 1e-30, 1e300, math.inf, -math.inf, math.nan]
    + [2**31, 2**63, 2**64 - 1, 2**64 + 1, 10**40, -(10**40)]
)
SCALARS = st.one_of(st.none(), st.booleans(), TEXTS, NUMBERS, st.integers(), st.floats(), st.text(max_size=5))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=10), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=12,
)
LIKELY = {
    "policy": st.sampled_from([None, "off"]),
    "style": st.one_of(
        st.sampled_from(["a", "b", "off", None]), st.lists(st.sampled_from(["a", "b"]), max_size=3), st.lists(TEXTS)
    ),
    "lambda": st.one_of(st.floats(0, 1), st.sampled_from([0, 1, None]), st.lists(st.floats(0, 1), max_size=3)),
    "mode": st.sampled_from(["paper", "ratio", None]),
    **{name: st.one_of(st.floats(0.01, 0.7), st.sampled_from(["off", None])) for name in GUARDS},
    "steer_stop": st.sampled_from([0, 1, True, False, "off", None]),
    **dict.fromkeys(
        ("temperature", "think_temperature", "answer_temperature"),
        st.one_of(st.floats(0.1, 3), st.sampled_from([1, "auto", "off", None])),
    ),
    "temperature_top_p": st.sampled_from([0, 1, True, "off", None]),
    "selector": st.sampled_from(["default", "off", None]),
    "kv_budget": st.one_of(st.integers(150, 4096), st.sampled_from(["full", None])),
    "chunks": st.one_of(
        st.sampled_from([0, 1, True, False, "off", None, 512]),
        st.fixed_dictionaries({}, optional={"budget": st.sampled_from([None, 512, 1, "full"]), "vote": st.none()}),
    ),
}


@st.composite
def arguments(draw):
    """Those of a request: half of them of the right kind, in the others some of any."""
    names, is_wild = draw(st.lists(st.sampled_from(list(LIKELY)), max_size=4, unique=True)), draw(st.booleans())
    if not is_wild:
        if {"lambda", "mode", "steer_stop", *GUARDS} & {*names}:
            return {"style": "a", **{name: draw(LIKELY[name]) for name in names if name != "style"}}
        return {name: draw(LIKELY[name]) for name in names} | draw(st.sampled_from([{}, {"x": 1}]))
    given = {name: draw(st.one_of(LIKELY[name], LIKELY[name], JUNK)) for name in names}
    if draw(st.integers(0, 9)) == 0:
        given[draw(st.sampled_from(ALIKE))] = draw(JUNK)
    if draw(st.integers(0, 4)) == 0:
        given[draw(st.sampled_from(OTHERS))] = draw(JUNK)
    return given


def is_off(value):
    return value is None or value == "off"


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def is_flag(value):
    return is_off(value) or type(value) is bool or (type(value) is int and value in (0, 1))


def is_budget(value):
    return value == "full" or (type(value) is int and 160 <= value <= 2**64)


def has_shape(name, value):
    parts = value if type(value) is list else [*value, *value.values()] if type(value) is dict else [value]
    if (type(value) is dict and name != "chunks") or (len(parts) > 8 and name != "style"):
        return False
    return all(
        each is None or type(each) in (bool, float, str) or (type(each) is int and -(2**64) <= each <= 2**64)
        for each in parts
    )


def are_styles(given):
    style, value = given.get("style"), given.get("lambda")
    names = style if type(style) is list else [] if is_off(style) else [style]
    if not all(type(name) is str and name in ("a", "b") for name in names) or len(set(names)) < len(names):
        return False
    alone = ["lambda", "mode", *GUARDS, "steer_stop"]
    if not names:
        return all(is_off(given.get(name)) for name in alone) and given.get("mode") is None
    strengths = value if type(value) is list else [None] * len(names) if value is None else [value]
    return (
        len(strengths) == len(names)
        and all(each is None or (is_number(each) and 0 <= each <= 1) for each in strengths)
        and given.get("mode") in (None, "paper")
        and all(
            is_off(given.get(name)) or (is_number(given[name]) and 0 < given[name] <= most)
            for name, most in GUARDS.items()
        )
        and is_flag(given.get("steer_stop"))
    )


def are_temperatures(given, own, offer):
    asked = {
        name: given[name]
        for name in ("temperature", "think_temperature", "answer_temperature")
        if not is_off(given.get(name))
    }
    for name, value in asked.items():
        if not (value == "auto" if type(value) is str else is_number(value) and value > 0):
            return False
        if name == "think_temperature" and value == "auto":
            return False
    if "temperature" in asked and "answer_temperature" in asked:
        return False
    is_ours = bool(asked) and asked != {"temperature": own}
    chosen = is_ours and "auto" in asked.values()
    if is_ours and own != 1:
        return False
    if not offer["phases"] and ("think_temperature" in asked or "answer_temperature" in asked):
        return False
    top_p = given.get("temperature_top_p")
    return top_p is None or (chosen and is_flag(top_p))


def are_chunks(given):
    if "chunks" not in given:
        return given.get("kv_budget") is None or is_budget(given["kv_budget"])
    chunks = given["chunks"]
    if given.get("kv_budget") is not None:
        return False
    if type(chunks) is dict:
        others = [value for name, value in chunks.items() if name != "budget"]
        return all(value is None for value in others) and (chunks.get("budget") is None or is_budget(chunks["budget"]))
    return is_flag(chunks) or is_budget(chunks)


def is_valid(given, own, offer):
    """What the docs say, as plainly as can be."""
    ours = {name: value for name, value in given.items() if name in LIKELY}
    return (
        not any(name in ALIKE for name in given)
        and all(has_shape(name, value) for name, value in ours.items())
        and is_off(ours.get("policy"))
        and are_styles(ours)
        and are_temperatures(ours, own, offer)
        and (is_off(ours.get("selector")) or ours["selector"] == offer["selector"])
        and are_chunks(ours)
    )


@pytest.fixture
def everything(monkeypatch):
    declared = {"STYLES": {"a": "a.safetensors", "b": "b.safetensors"}, "TEMPERATURE": {"phases": True}, "CHUNKS": {}}
    for name, value in declared.items():
        monkeypatch.setenv(f"DECODING_{name}", json.dumps(value))
    monkeypatch.delenv("DECODING_POLICY", raising=False)
    monkeypatch.setattr(fallbacks, "counts", Counter())


def test_admission_takes_what_is_valid_and_refuses_the_rest_with_a_reason(everything):
    seen = Counter()

    @RANDOM
    @hypothesis.given(arguments(), st.sampled_from([1.0, 1.0, 0.0, 0.5]))
    def check(given, own):
        params = sampling(given, temperature=own)
        wanted = is_valid(given, own, {"phases": True, "selector": "default"})
        seen[wanted] += 1
        before = sum(fallbacks.counts.values())
        try:
            check_request(params)
        except DecodingError as error:
            assert not wanted, f"refused: {error}"
            assert 0 < len(str(error)) < 3 * 4096
            assert isinstance(read_admitted(params, "style"), Request)  # whatever it is, the hook goes on
            return
        assert wanted, "taken"
        request = read_request(params)
        assert request == read_admitted(params, "style") and hash(request) is not None
        assert request.budget is None or 160 <= request.budget <= UNLIMITED
        assert sum(fallbacks.counts.values()) == before

    check()
    assert min(seen[True], seen[False]) > COUNT // 10, seen
    assert fallbacks.counts == {"style": fallbacks.counts["style"]} and PLAIN.budget == UNLIMITED


# Over HTTP.

SERVED = {"phases": False, "selector": "SELECTOR"}
PROMPT = " ".join(WORDS[:8])
GOOD = [
    {},
    {"style": "a", "lambda": 1},
    {"style": ["b", "a"], "lambda": [0.9, 0.5]},
    {"style": "b", "lambda": 1, "plausibility": 0.001, "kv_budget": 256},
    {"kv_budget": "full", "temperature": "off"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, selector_folder):
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
    httpx = pytest.importorskip("httpx")
    from tests.serving.test_server import free_port, serving

    folder, port = tmp_path_factory.mktemp("fuzz"), free_port()
    make_tiny(folder)
    command = [sys.executable, "-m", "decoding", "serve", "--model", str(folder / "model"), "--kv-budget", "512"]
    command += [f"--style={name}={folder / name}.safetensors" for name in "ab"]
    command += ["--temperature-selector", str(selector_folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "1024", "--enforce-eager", "--dtype", "float32", "--served-model-name", "tiny"]
    command += ["--max-num-seqs", str(AT_ONCE), "--disable-uvicorn-access-log", "--enable-scale-out"]
    log = folder / "log.txt"
    alone = httpx.Limits(max_keepalive_connections=0)  # a request to a connection that a 500 has closed is lost
    with (
        serving(command, port, log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=alone) as client,
    ):
        SERVED["selector"] = str(selector_folder)
        yield SimpleNamespace(client=client, log=log, process=process)
    assert "vLLM goes on without it" not in log.read_text()


def ask(server, given, path="/v1/completions", **options):
    body = {"model": "tiny", "temperature": 0, "max_tokens": 4, "vllm_xargs": given} | options
    if path.startswith("/v1/chat"):
        body["messages"] = [{"role": "user", "content": PROMPT}]
    elif path == "/v1/completions":
        body.setdefault("prompt", PROMPT)
    return server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def written(answer):
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["text"]


def side_by_side(ask_one, tasks):
    """What is answered to each, with several under way. The first failure ends it, and no more are sent."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(ask_one, tasks)


def is_carried(given):
    """Whether ``vllm_xargs`` can hold it: no null, no objects, whole numbers of 64 bits, no true for a number."""

    def is_part(value):
        return type(value) in (str, float, bool) or (type(value) is int and -(2**63) <= value < 2**64)

    flags = ("steer_stop", "temperature_top_p", "chunks")
    for name, value in given.items():
        parts = value if type(value) is list else [value]
        if not all(map(is_part, parts)):
            return False
        if name in LIKELY and name not in flags and bool in map(type, parts):
            return False
    return True


def random_requests():
    """``COUNT`` arguments and own temperatures, the same at each run."""
    found = []

    @RANDOM
    @hypothesis.given(arguments(), st.sampled_from([0, 1]))
    def collect(given, own):
        found.append((given, own))

    collect()
    assert len(found) >= COUNT
    return found[:COUNT]


def test_bad_requests_between_good_ones_harm_nobody(server):
    """None is lost, none wrong, none a 500: bad ones are a 400 with a reason, good ones get what they got before."""
    alone = [written(ask(server, given)) for given in GOOD]
    assert len(set(alone[:4])) >= 3, alone
    seen = Counter()

    def bad(asked):
        given, own = asked
        answer = ask(server, given, temperature=own)
        wanted = 200 if is_carried(given) and is_valid(given, own, SERVED) else 400
        assert answer.status_code == wanted, (given, own, answer.text)
        if wanted == 400:
            assert answer.json()["error"]["message"]
        return wanted

    def good(number):
        assert written(ask(server, GOOD[number])) == alone[number]
        return "good"

    waiting = random_requests()
    tasks = [(bad, each) for each in waiting] + [(good, number % len(GOOD)) for number in range(len(waiting) // 4)]
    random.Random(0).shuffle(tasks)
    seen.update(side_by_side(lambda task: task[0](task[1]), tasks))
    assert seen[200] + seen[400] == len(waiting) and min(seen[200], seen[400]) > len(waiting) // 20, seen
    assert seen["good"] == len(waiting) // 4


TURN = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
ENDPOINTS = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": TURN,
    "/v1/chat/completions/batch": {"messages": [TURN["messages"]], "max_tokens": 4},
    "/v1/responses": {"input": PROMPT},
    "/v1/messages": TURN,
}


def test_every_endpoint_that_takes_arguments_hands_them_on_or_says_that_it_does_not(server):
    def post(path, given, body):
        asked = {"model": "tiny", "vllm_xargs": given} | body
        return server.client.post(path, json=asked)

    schema = server.client.get("/openapi.json").json()
    schemas = schema["components"]["schemas"]
    for path, methods in schema["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        parts = [content["schema"], *content["schema"].get("anyOf", [])]
        named = [schemas[part["$ref"].rsplit("/", 1)[-1]] for part in parts if "$ref" in part]
        takes = any("vllm_xargs" in each.get("properties", {}) for each in named)
        assert path.endswith(CARRYING) or not takes, f"{path} takes arguments: name it in CARRYING"
        if not path.endswith(CARRYING):
            answer = post(path, {"style": "a"}, {})
            assert answer.status_code == 400 and "would leave style out" in answer.text, path
    tokens = {"token_ids": [3, 4, 5], "sampling_params": {"max_tokens": 4, "extra_args": {"style": "a"}}}
    assert server.client.post("/inference/v1/generate", json=tokens).status_code == 200
    tokens["sampling_params"]["extra_args"]["style"] = "nobody"
    answer = server.client.post("/inference/v1/generate", json=tokens)
    assert answer.status_code == 400 and "unknown style" in answer.text
    for path, body in ENDPOINTS.items():
        assert post(path, {"style": "a"}, body).status_code == 200, path
        answer = post(path, {"style": "nobody"}, body)
        assert answer.status_code == 400 and "unknown style" in answer.text, path


def test_beams_have_no_arguments(server):
    beams = {"use_beam_search": True, "n": 2}
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert len(ask(server, None, path, **beams).json()["choices"]) == 2
        for given in ({"style": "a"}, {"temperature": "auto"}, {"kv_budget": 256}):
            answer = ask(server, given, path, **beams)
            assert answer.status_code == 400 and f"beam search would leave {[*given][0]} out" in answer.text


LONG = " ".join(WORDS[(i * i) % len(WORDS)] for i in range(400))  # more than a budget of 160
SAME = [
    ({}, {}),
    ({"style": "a", "lambda": 1}, {}),
    ({"temperature": "auto"}, {"temperature": 1, "seed": 5}),
    ({"kv_budget": 160}, {"prompt": LONG}),
]


@pytest.mark.parametrize(("given", "options"), SAME)
def test_an_echo_stands_before_the_same_text_and_a_stream_is_it(server, given, options):
    options = {"max_tokens": 8} | options
    text = written(ask(server, given, **options))
    assert written(ask(server, given, **options, echo=True)) == options.get("prompt", PROMPT) + text
    lines = ask(server, given, **options, stream=True).text.splitlines()
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == text and len(parts) > 2


@pytest.mark.parametrize("path", [path for path in ENDPOINTS if not path.endswith("batch")])
def test_bodies_by_and_against_the_servers_own_schema_harm_nobody(server, path):
    """Schemathesis writes them; vLLM refuses most. None is a 500, and good requests between get what they got.

    But for bodies that vLLM itself answers with 500, without any arguments of ours: some of `/v1/responses`, in 0.32.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.generation import GenerationMode

    operation = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())[path]["POST"]
    alone, contents = [written(ask(server, given)) for given in GOOD], []

    def collect(case):
        body = case.body
        if isinstance(body, dict):
            body = body | {"model": "tiny", "max_tokens": 2, "max_output_tokens": 2, "stream": False}
        with suppress(TypeError, ValueError):  # it also writes what is no JSON
            contents.append(json.dumps(body))

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        given = hypothesis.given(operation.as_strategy(generation_mode=mode))
        hypothesis.settings(RANDOM, max_examples=max(COUNT // 10, 10))(given(collect))()

    def post(content):
        return server.client.post(path, content=content, headers={"content-type": "application/json"})

    def is_vllms_own(answer, content):
        body = json.loads(content)
        plain = {k: v for k, v in body.items() if k != "vllm_xargs"} if isinstance(body, dict) else body
        return post(json.dumps(plain)).text == answer.text

    def check(task):
        number, content = task
        answer = post(content)
        assert answer.status_code < 500 or is_vllms_own(answer, content), (content, answer.text)
        if number % 8 == 0:
            assert written(ask(server, GOOD[number // 8 % len(GOOD)])) == alone[number // 8 % len(GOOD)]
        return answer.status_code

    sent = Counter(side_by_side(check, enumerate(contents)))
    assert sent[400] and sum(sent.values()) == len(contents) >= COUNT // 10
