"""The playground on a server: what it asks for, what it makes of the answers. Against a small server of our own."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from decoding import DecodingError

pytest.importorskip("httpx", reason="httpx is not installed; the extra playground brings it")
ServedModel = pytest.importorskip("decoding.playground.served").ServedModel

STYLES = ["king", "queen"]


class Server(BaseHTTPRequestHandler):
    asked: list = []
    release = threading.Event()

    def log_message(self, *_):
        pass

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # noqa: N802  # http.server's name
        known = self.path == "/v1/models"
        self._answer(200 if known else 404, {"data": [{"id": "the/model"}]} if known else {})

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wanted = body.get("vllm_xargs", {})
        if wanted.get("style", "king") not in STYLES:
            said = f"unknown style {wanted['style']!r}; this server has: {', '.join(STYLES) or 'none; start it with'}"
            return self._answer(400, {"error": {"message": said}})
        self.asked.append((self.path, body))
        self.send_response(200)
        self.end_headers()
        for number, piece in enumerate(["Lo", "!\n", "<b>"] if wanted else ["Oh", " no", "."]):
            end = "stop" if number == 2 else None
            if "messages" in body:
                logprobs = {"content": [{"token": piece, "logprob": math.log(0.5)}]}
                choice = {"delta": {"content": piece}, "logprobs": logprobs, "finish_reason": end}
            else:
                logprobs = {"tokens": [piece], "token_logprobs": [math.log(0.25)]}
                choice = {"text": piece, "logprobs": logprobs, "finish_reason": end}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
            if number == 0 and body["prompt" if "prompt" in body else "messages"] == "wait":
                self.release.wait(20)
        self.wfile.write(b"data: [DONE]\n\n")
        return None


@pytest.fixture
def address():
    Server.asked, Server.release = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Server.release.set()
        server.shutdown()


@pytest.mark.parametrize(("chat", "probability"), [(False, 0.25), (True, 0.5)])
def test_both_texts_are_asked_for_and_put_together(address, asked, chat, probability):
    served = ServedModel(f"{address}/v1/")
    assert (served.name, served.styles, served.server) == ("the/model", STYLES, address)
    wanted = asked(style="queen", chat=chat, mode=None, kv_budget=512, lambda_=0.5)
    *_, view = served.write(wanted, threading.Event())
    assert (view.status, view.plain.text, view.steered.text) == ("Done.", "Oh no.", "Lo!\n<b>")
    assert [token.before for token in view.steered.tokens] == [pytest.approx(probability)] * 3
    assert all(token.after is None and token.order is None for token in view.steered.tokens)
    assert view.plain.steps == 2 and view.plain.speed > 0 and view.plain.end == "ended by itself"
    (path, plain), (_, steered) = sorted(Server.asked, key=lambda each: "vllm_xargs" in each[1])
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert "vllm_xargs" not in plain and steered.pop("vllm_xargs") == {
        "style": "queen",
        "lambda": 0.5,
        "kv_budget": 512,
    }
    assert plain == steered


def test_the_servers_reason_is_a_sentence(address, asked):
    served = ServedModel(address)
    with pytest.raises(DecodingError, match="the server refuses: unknown style 'knave'; this server has: king, queen"):
        list(served.write(asked(style="knave"), threading.Event()))


def test_a_stop_does_not_wait_for_the_server(address, asked):
    stop = threading.Event()
    views = ServedModel(address).write(asked(style="king", prompt="wait"), stop)
    while not next(views).steered.tokens:
        pass
    stop.set()
    *_, view = views
    assert (view.status, view.steered.text, view.steered.end) == ("Stopped.", "Lo", "stopped")


def test_a_server_without_styles(address, monkeypatch):
    monkeypatch.setattr("tests.playground.test_served.STYLES", [])
    assert ServedModel(address).styles == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "nonsense"])
def test_no_server_is_a_sentence(address):
    with pytest.raises(DecodingError, match="decoding serve|OpenAI-compatible"):
        ServedModel(address)
