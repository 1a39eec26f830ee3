"""The server over loopback, as a client sees it."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from decoding import Policy, StylePrior, TemperatureSelector, generate
from decoding.models import DEFAULT_MODEL, load_tokenizer, resolve_model
from decoding.style.training import name_and_file
from experiments.long_context.passkeys import passkey_prompt
from tests.serving.test_grafana import OF_VLLM

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.real

START = 300  # seconds
PROMPT = "The captain said that"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log.txt"


GUARDED = {"λ": 0.8, "max_js": 0.05}


@pytest.fixture(scope="module")
def policy(tmp_path_factory, selector_folder):
    """All that it can have, in a folder."""
    folder = tmp_path_factory.mktemp("policy")
    chunks = {"adapters": "default", "budget": 384}
    policy = Policy("king-james", **GUARDED, temperature="auto", selector=selector_folder, chunks=chunks)
    policy.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(log, policy):
    _, presidents = name_and_file("presidents", load_tokenizer(), order=3, smoothing="kneser-ney")
    port = free_port()
    command = [sys.executable, "-m", "decoding", "serve", "--policy", str(policy), "--style", f"speeches={presidents}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--dtype", "float32"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serving(command, port, log, VLLM_LOGGING_LEVEL="DEBUG"):
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)


@contextmanager
def serving(command, port, log, **environment):
    """A server that answers, which is not to die meanwhile."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_healthy(server, port, log)
        yield server
        assert server.poll() is None, "the server died"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_healthy(server, port, log):
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no answer within {START} s: {log.read_text()[-3000:]}")


def complete(client, style=None, value=None, **options):
    """As if there were no policy."""
    asked = {"policy": "off"} | ({"style": style} if style else {}) | ({} if value is None else {"lambda": value})
    return asking(client, asked, **options)


def asking(client, asked, **options):
    options = {"temperature": 0, "max_tokens": 24, "prompt": PROMPT} | options
    extra = {} if asked is None else {"vllm_xargs": asked}
    return client.completions.create(model=DEFAULT_MODEL, extra_body=extra, **options)


def test_completions(client):
    plain, king, both, off = (
        complete(client, *asked).choices[0].text
        for asked in ((), ("king-james", 0.8), (["king-james", "speeches"], [0.4, 0.8]), ("king-james", 0))
    )
    assert len({plain, king, both}) == 3
    assert off == plain


def test_chat_and_streaming(client):
    asked = {"vllm_xargs": {"style": "speeches", "lambda": 0.8}}
    common = {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "Tell me about the weather."}]}
    common |= {"temperature": 0, "max_tokens": 24}
    off = {"vllm_xargs": {"policy": "off"}}
    plain = client.chat.completions.create(**common, extra_body=off).choices[0].message.content
    steered = client.chat.completions.create(**common, extra_body=asked).choices[0].message.content
    parts = client.chat.completions.create(**common, extra_body=asked, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert plain != steered == streamed
    chunks = complete(client, "king-james", 0.8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == complete(client, "king-james", 0.8).choices[0].text


TOOL = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def test_tool_calls_are_steered_and_their_arguments_whole(client, selector_folder):
    """The text of a city is open, and the grammar is not: what it rules out stays out."""
    question = "What will the weather be like in the city of your choice?"
    (chosen,) = TemperatureSelector.from_pretrained(selector_folder).select([question], "small")
    tool = {"type": "function", "function": {"name": "forecast", "parameters": TOOL, "strict": True}}
    common = {"model": DEFAULT_MODEL, "max_tokens": 96, "tools": [tool]}
    common |= {"tool_choice": {"type": "function", "function": {"name": "forecast"}}}
    common["messages"] = [{"role": "user", "content": question}]

    def called(asked, temperature=0):
        extra = {"vllm_xargs": {"policy": "off"} | asked}
        answer = client.chat.completions.create(**common, temperature=temperature, seed=3, extra_body=extra)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "forecast"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "days"} and isinstance(arguments["city"], str)
        assert type(arguments["days"]) is int and 1 <= arguments["days"] <= 9
        return arguments

    plain = called({})
    assert called({"style": "king-james", "lambda": 0.3, "max_js": "off"}) != plain
    assert called({"kv_budget": 384}) == plain  # a short conversation is within its budget
    assert called({"temperature": "auto"}, 1) == called({}, chosen) != called({}, 1)
    with pytest.raises(openai.BadRequestError, match="unknown style 'nobody'"):
        called({"style": "nobody"})


def test_thirty_two_at_once_get_what_each_gets_alone(client):
    kinds = [(), ("king-james", 0.3), ("speeches", 0.6), (["king-james", "speeches"], [0.2, 0.2])]
    alone = [complete(client, *kind).choices[0].text for kind in kinds]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda i: complete(client, *kinds[i % 4]).choices[0].text, range(32)))
    assert got == alone * 8


@pytest.mark.parametrize(
    ("style", "value", "reason"),
    [
        ("nobody", 0.1, "unknown style 'nobody'; this server has: king-james, speeches"),
        ("king-james", 1.5, "λ must lie in [0, 1], not 1.5"),
        ("king-james", "much", "finite number"),
        (["king-james", "speeches"], [0.1], "same length"),
        (["king-james", "speeches"], 0.1, "same length"),
    ],
)
def test_bad_arguments_are_a_400_with_the_reason_and_the_server_lives_on(client, style, value, reason):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, style, value)
    assert error.value.status_code == 400
    assert reason in error.value.message
    assert complete(client, "king-james", 0.3).choices[0].text


@pytest.mark.parametrize(
    ("asked", "steering"),
    [
        (None, GUARDED),
        ({"max_js": "off", "lambda": 0.6}, {"λ": 0.6}),
        ({"plausibility": 0.3, "steer_stop": True}, GUARDED | {"plausibility": 0.3, "steer_stop": True}),
        ({"style": "off"}, None),
        ({"policy": "off"}, None),
    ],
)
def test_requests_have_the_policy_and_its_fields_say_otherwise(client, real_model, asked, steering):
    """Whatever a plain request says, and as transformers writes it."""
    model, tokenizer = real_model
    prior = [] if steering is None else [StylePrior("king-james", **steering)]
    written = generate(model, PROMPT, tokenizer=tokenizer, logits_processor=prior, do_sample=False, max_new_tokens=24)
    assert asking(client, asked).choices[0].text == written


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"lamda": 0.1}, "unknown argument 'lamda': did you mean 'lambda'?"),
        ({"mode": "ratio"}, 'style \'king-james\' is served in mode "paper", not "ratio"'),
        ({"selector": "mine"}, "selector 'mine' is not this server's"),
        ({"max_js": 3}, "max_js must be a number above 0"),
    ],
)
def test_what_is_no_field_or_cannot_vary_is_a_400(client, asked, reason):
    with pytest.raises(openai.BadRequestError) as error:
        asking(client, asked)
    assert reason in error.value.message


POEM = "Write a poem about rain."
AUTO = {"vllm_xargs": {"policy": "off", "temperature": "auto"}}
OFF = {"vllm_xargs": {"policy": "off"}}


def sample(client, temperature, **asked):
    options = {"prompt": POEM, "max_tokens": 24, "seed": 5} | (
        {} if temperature is None else {"temperature": temperature}
    )
    return (
        client.completions.create(model=DEFAULT_MODEL, extra_body=asked | {"ignore_eos": True}, **options)
        .choices[0]
        .text
    )


def test_a_chosen_temperature_is_as_ones_own(client, selector_folder):
    (chosen,) = TemperatureSelector.from_pretrained(selector_folder).select([POEM], "small")
    assert chosen != 1
    assert sample(client, 1, **AUTO) == sample(client, chosen, **OFF) != sample(client, 1, **OFF)
    assert sample(client, None) == sample(client, chosen) != sample(client, 0.5)
    assert sample(client, None, vllm_xargs={"temperature": "off"}) != sample(client, None)


@pytest.mark.parametrize(("temperature", "asked"), [(0.5, "auto"), (0, "auto"), (1, "hot"), (0.6, 0.5)])
def test_two_temperatures_are_a_400(client, temperature, asked):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        sample(client, temperature, vllm_xargs={"temperature": asked})
    assert sample(client, 1, **AUTO)


def figures(client, prefix="decoding:"):
    """What ``/metrics`` has under a prefix, by the names of samples with their labels."""
    text = urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=10).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(prefix)]
    return {name.removeprefix(prefix): float(value) for name, value in lines if "_created" not in name}


def rise(before, after):
    return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}


def test_what_is_chosen_shows_in_the_servers_figures_and_its_log(client, selector_folder, log):
    selector = TemperatureSelector.from_pretrained(selector_folder)
    (explained,) = selector.explain([POEM])
    kind, value = explained.ability, explained.temperature
    before = figures(client, "decoding:chosen_temperature")
    for _ in range(3):  # the second and third prompt are remembered, and count all the same
        sample(client, 1, **AUTO)
    sample(client, 0.5)
    unknown = {"vllm_xargs": {"policy": "off", "temperature": "auto", "temperature_top_p": False}}
    options = {"prompt": [load_tokenizer().eos_token_id], "max_tokens": 1, "temperature": 1}
    client.completions.create(model=DEFAULT_MODEL, extra_body=unknown, **options)
    found = rise(before, figures(client, "decoding:chosen_temperature"))
    assert found[f'_count{{ability="{kind}"}}'] == 3
    assert found[f'_sum{{ability="{kind}"}}'] == pytest.approx(3 * value)
    assert found[f'_bucket{{ability="{kind}",le="{value:g}"}}'] == 3
    assert f'_bucket{{ability="{kind}",le="{value - 0.1:.1f}"}}' not in found
    assert found['_count{ability="unknown"}'] == 1
    assert f"temperature {value:g} for a request of kind {kind}" in log.read_text()


def test_requests_count_by_their_styles(client):
    before = figures(client)
    for style, value in ((None, None), ("king-james", 0.3), ("king-james", 0.8), ("speeches", 0)):
        complete(client, style, value, max_tokens=2)
    complete(client, ["king-james", "speeches"], [0.2, 0.05], max_tokens=2, n=2, temperature=1)  # two texts
    asking(client, None, max_tokens=2)  # the policy's
    with pytest.raises(openai.BadRequestError):
        complete(client, "nobody", 0.1)
    found = rise(before, figures(client))
    names = ("king-james", "speeches", "none")
    assert [found[f'requests_total{{style="{name}"}}'] for name in names] == [5, 2, 2]
    assert [found[f'lambda_count{{style="{name}"}}'] for name in names[:2]] == [5, 2]
    assert found['lambda_sum{style="king-james"}'] == pytest.approx(0.3 + 0.8 + 2 * 0.2 + GUARDED["λ"])
    assert found['lambda_bucket{le="0.25",style="king-james"}'] == 2
    assert found['lambda_bucket{le="0.3",style="king-james"}'] == 3
    assert found['lambda_bucket{le="0.05",style="speeches"}'] == 2
    assert not [name for name in found if name.startswith(("chunk", "fallbacks"))]
    assert not [name for name in found if name.startswith("lambda") and 'style="none"' in name]


def test_tokens_read_of_tokens_held_are_those_behind_the_budget(client):
    """1,800 tokens, of which a fifth is read, for the seven tokens that follow the first one."""
    prompt = passkey_prompt(load_tokenizer(), 1800, 0.3, "52917")
    held = len(load_tokenizer()(prompt)["input_ids"])
    before = figures(client)
    asking(client, {"style": "off"}, prompt=prompt, max_tokens=8)
    after = figures(client)
    found = rise(before, after)
    assert found["chunk_tokens_held_total"] == 7 * held + sum(range(1, 8))
    # Each step as many blocks of 32 as fit the budget, the last of them not yet full.
    assert 7 * (384 - 2 * 32) < found["chunk_tokens_read_total"] <= 7 * 384
    assert 1 <= found["chunk_selections_total"] <= 7
    asking(client, {"style": "off"}, max_tokens=8)  # short ones do not count
    asking(client, {"style": "off", "kv_budget": "full"}, prompt=prompt, max_tokens=8)
    assert not [name for name in rise(after, figures(client)) if name.startswith("chunk")]


def test_vllms_metrics_that_the_board_shows_are_there(client):
    complete(client, max_tokens=3)
    there = {f"vllm:{name.partition('{')[0]}" for name in figures(client, "vllm:")}
    assert there >= OF_VLLM


BENCHMARK = re.search(
    r"```sh\n(for round .*?vllm bench serve .*?)```",
    (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


RUN = """
import argparse, json, sys
from vllm.benchmarks.serve import add_cli_args, main
for line in json.loads(sys.argv[1]):
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(line))
"""


def test_the_benchmark_in_the_docs_runs(client, tmp_path):
    """Its lines as they stand, of one round, with as many requests as a test can wait for."""
    (tmp_path / "vllm").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "vllm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = subprocess.run(["bash", "-ec", BENCHMARK[1]], env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("[")]
    assert {tuple(line[:2]) for line in lines} == {("bench", "serve")}
    assert len(lines) == 9
    before, few = figures(client), {"--random-input-len": "40", "--random-output-len": "4", "--num-prompts": "3"}
    few |= {"--max-concurrency": "3", "--num-warmups": "1"}
    of_server = ["--port", str(client.base_url.port), "--tokenizer", resolve_model(DEFAULT_MODEL)]
    fewer = [[few.get(name, word) for name, word in itertools.pairwise(line)][1:] + of_server for line in lines[:3]]
    result = subprocess.run([sys.executable, "-c", RUN, json.dumps(fewer)], capture_output=True, text=True)
    assert len(re.findall(r"Successful requests: +3\s", result.stdout)) == 3, result.stderr
    assert len(re.findall(r"Failed requests: +0\s", result.stdout)) == 3
    found = rise(before, figures(client))
    assert found['lambda_bucket{le="0.1",style="king-james"}'] == 4  # three, and one to warm up
    assert sum(value for name, value in found.items() if name.startswith("chosen_temperature_count")) >= 4


def test_passkeys_are_found_among_selected_chunks(client):
    """1,800 tokens, of which a fifth is read; the key at three places."""
    tokenizer = load_tokenizer()
    for depth, key in ((0.1, "61934"), (0.5, "30728"), (0.8, "85216")):
        prompt = passkey_prompt(tokenizer, 1800, depth, key)
        assert 1700 < len(tokenizer(prompt)["input_ids"]) <= 1800
        assert key in asking(client, {"style": "off"}, prompt=prompt, max_tokens=8).choices[0].text


@pytest.mark.parametrize("budget", [0, "much", [1]])
def test_bad_budgets_are_a_400(client, budget):
    with pytest.raises(openai.BadRequestError, match="kv_budget must be"):
        client.completions.create(model=DEFAULT_MODEL, prompt=PROMPT, extra_body={"vllm_xargs": {"kv_budget": budget}})
    options = {"model": DEFAULT_MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    texts = [
        client.completions.create(**options, extra_body={"vllm_xargs": {"policy": "off", "kv_budget": each}})
        .choices[0]
        .text
        for each in (512, "full", 2**64 - 1)
    ]
    assert {*texts} == {complete(client).choices[0].text}
