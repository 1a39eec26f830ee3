"""What vLLM's server would drop of a request's arguments."""

import asyncio
import json

import pytest

from decoding import DecodingError
from decoding.vllm.dropped import CARRYING, RefuseDropped, refuse_dropped

fastapi = pytest.importorskip("fastapi", reason="it comes with vLLM, and with Gradio")
pytest.importorskip("python_multipart", reason="likewise")
STYLE = {"style": "a", "lambda": 0.1}


def look(body, path="/v1/completions"):
    refuse_dropped(path, json.dumps({"prompt": "x"} | body).encode())


@pytest.fixture(autouse=True)
def no_policy(monkeypatch):
    monkeypatch.delenv("DECODING_POLICY", raising=False)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"use_beam_search": True, "n": 2},
        {"use_beam_search": True, "vllm_xargs": {"other": True, "session_id": "x"}},
        {"use_beam_search": False, "vllm_xargs": STYLE},
        {"use_beam_search": "false", "vllm_xargs": STYLE},
        {"use_beam_search": None, "vllm_xargs": STYLE},
        {"vllm_xargs": STYLE | {"steer_stop": True, "chunks": True, "temperature_top_p": False}},
        {"vllm_xargs": None},
        {"vllm_xargs": "style"},
        {"vllm_xargs": [1]},
    ],
)
def test_what_is_carried_is_let_through(body):
    for path in (*CARRYING, "/proxy/v1/completions", "/v1/completions/"):
        look(body, path)


@pytest.mark.parametrize("truth", [True, 1, 1.0, "true", "Yes"])
@pytest.mark.parametrize("given", [STYLE, {"temperature": "auto"}, {"kv_budget": 512}, {"policy": "off"}])
def test_beam_search_with_arguments_of_ours_is_refused(truth, given):
    with pytest.raises(DecodingError, match=f"beam search would leave {', '.join(given)} out: send use_beam_search or"):
        look({"use_beam_search": truth, "vllm_xargs": given})


def test_beam_search_is_refused_where_the_server_has_a_policy(monkeypatch):
    monkeypatch.setenv("DECODING_POLICY", '{"style": "a"}')
    with pytest.raises(DecodingError, match="beam search would leave this server's policy out"):
        look({"use_beam_search": True})
    look({"n": 2, "use_beam_search": False})


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/embeddings", "/pooling", "/score", "/v2/chat"])
def test_endpoints_that_leave_arguments_out_are_refused(path):
    for given in (STYLE, {"styles": "a"}):
        with pytest.raises(
            DecodingError, match=f"{path} would leave {', '.join(given)} out: send vllm_xargs to one of"
        ):
            look({"vllm_xargs": given}, path)
    look({"vllm_xargs": {"other": 1}}, path)


@pytest.mark.parametrize("given", [{"lambda": True}, {"kv_budget": False}, {"lambda": [0.1, True]}, {"style": True}])
def test_true_and_false_are_refused_where_they_would_be_numbers(given):
    with pytest.raises(DecodingError, match=f"{next(iter(given))} cannot be true or false"):
        look({"vllm_xargs": given})


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text.replace("use_beam_search", r"use\u005fbeam_search").encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-32"),
    ],
)
def test_other_ways_to_write_it_do_not_help(write):
    body = json.dumps({"use_beam_search": True, "vllm_xargs": STYLE})
    with pytest.raises(DecodingError, match="beam search would leave style, lambda out"):
        refuse_dropped("/v1/completions", write(body))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"vllm_xargs", b"[" * 10**5 + b"vllm_xargs", b"\xff\xfe\0", b'["vllm_xargs"]']
)
def test_what_is_no_json_object_is_left_to_the_server(body):
    refuse_dropped("/v1/completions", body)


def form(asked, sound=b"\0\\u00ff"):
    """A form with a file in it, as clients of vLLM's audio endpoints send it; and its kind."""
    parts = [f'form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in asked.items()]
    parts.insert(1, b'form-data; name="file"; filename="use_beam_search"\r\nContent-Type: audio/wav\r\n\r\n' + sound)
    body = b"".join(b"--edge\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--edge--\r\n"
    return body, b"Multipart/form-data; boundary=edge"


AUDIO = "/v1/audio/transcriptions"
MINE = {"vllm_xargs": json.dumps(STYLE)}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"use_beam_search": "false"} | MINE,
        {"use_beam_search": "true", "vllm_xargs": '{"other": 1}'},
        {"use_beam_search": "true", "vllm_xargs": "no JSON"},
        {"vllm_xargs": '{"steer_stop": true}'},
        {"prompt": 'use_beam_search=true, vllm_xargs={"style": "a"}'},
    ],
)
def test_forms_that_are_carried_are_let_through(asked):
    for sound in (b"", b'name="use_beam_search"\r\n\r\ntrue', bytes(2**21)):
        refuse_dropped(AUDIO, *form({"model": "x"} | asked, sound))


@pytest.mark.parametrize("truth", ["true", "1", "on", "Yes"])
def test_forms_are_refused_for_what_json_is_refused_for(truth, monkeypatch):
    with pytest.raises(DecodingError, match="beam search would leave style, lambda out"):
        refuse_dropped(AUDIO, *form({"model": "x", "use_beam_search": truth} | MINE))
    with pytest.raises(DecodingError, match="/v1/other would leave style, lambda out"):
        refuse_dropped("/v1/other", *form({"model": "x"} | MINE))
    with pytest.raises(DecodingError, match="lambda cannot be true or false"):
        refuse_dropped(AUDIO, *form({"model": "x", "vllm_xargs": '{"style": "a", "lambda": true}'}))
    monkeypatch.setenv("DECODING_POLICY", '{"style": "a"}')
    with pytest.raises(DecodingError, match="beam search would leave this server's policy out"):
        refuse_dropped(AUDIO, *form({"model": "x", "use_beam_search": truth}))


@pytest.mark.parametrize("kind", [b"multipart/form-data", b"multipart/form-data; boundary=other", b"text/plain"])
def test_what_is_no_form_is_left_to_the_server(kind):
    refuse_dropped(AUDIO, form({"model": "x", "use_beam_search": "true"} | MINE)[0], kind)


def answered(body, kind=b"application/json", path="/v1/completions", pieces=3, method="POST"):
    """The status and the text of what an app behind the middleware answers, which reads its body first."""
    app = fastapi.FastAPI()

    @app.api_route("/v1/completions", methods=["POST", "PUT"])
    async def complete(asked: dict):
        return {"got": asked}

    @app.post(AUDIO)
    async def transcribe(file: fastapi.UploadFile, vllm_xargs: str = fastapi.Form()):
        return {"got": json.loads(vllm_xargs), "bytes": len(await file.read())}

    app.add_middleware(RefuseDropped)
    size = -(-len(body) // pieces)
    parts = [body[i * size : (i + 1) * size] for i in range(pieces)]
    messages = [{"type": "http.request", "body": part, "more_body": i < pieces - 1} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b""}
    asyncio.run(app(scope | {"headers": [(b"content-type", kind)]}, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_the_server_answers_400_with_the_reason_and_gets_all_others_whole():
    good = {"prompt": "x" * 1000, "vllm_xargs": STYLE}
    assert answered(json.dumps(good).encode()) == (200, {"got": good})
    status, answer = answered(json.dumps(good | {"use_beam_search": True}).encode())
    assert status == 400 and "beam search would leave style, lambda out" in answer["detail"]


def test_the_server_answers_forms_likewise():
    assert answered(*form({"model": "x"} | MINE, b"\0" * 1000), AUDIO) == (200, {"got": STYLE, "bytes": 1000})
    status, answer = answered(*form({"model": "x", "use_beam_search": "true"} | MINE, b"\0" * 1000), AUDIO)
    assert status == 400 and "beam search would leave style, lambda out" in answer["detail"]
