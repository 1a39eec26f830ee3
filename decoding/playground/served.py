"""A model that a running ``decoding serve`` has. It tells less of what it does than one on this machine."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import httpx

from decoding.errors import DecodingError
from decoding.playground.asked import Asked
from decoding.playground.turns import until_done
from decoding.playground.view import AT_LENGTH, ENDED, STOPPED, Side, Token, View

_TIMEOUT = httpx.Timeout(10, read=300)
_NAMES = re.compile(r"this server has: (.+)$")
_NO_NAMES = "none; "


class ServedModel:
    """Writes by way of a server's OpenAI-compatible interface; both texts in one batch, if the server has room.

    Args:
        address: of the server, with or without ``/v1``.

    Attributes:
        server: its address.
        name: of the model.
        styles: that it has, as far as it tells.

    Raises:
        DecodingError: no such server there.
    """

    chats = True
    adapters = None

    def __init__(self, address: str):
        self.server = address.rstrip("/").removesuffix("/v1")
        # Not by way of a proxy of the environment: nothing goes anywhere else.
        self._client = httpx.Client(base_url=self.server, timeout=_TIMEOUT, trust_env=False)
        try:
            self.name: str = self._get_models()["data"][0]["id"]
            self.styles = self._served_styles()
        except (KeyError, IndexError, TypeError, ValueError, httpx.InvalidURL) as error:
            raise DecodingError(f"{address} is no server of an OpenAI-compatible interface ({error!r})") from error

    def _get_models(self) -> dict[str, Any]:
        try:
            answer = self._client.get("/v1/models")
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPStatusError, httpx.TransportError) as error:
            raise _no_answer(self.server, error) from error

    def _served_styles(self) -> list[str]:
        """The names that the server's refusal of an unknown one lists."""
        asked = {"model": self.name, "prompt": "a", "max_tokens": 1, "vllm_xargs": {"style": "?"}}
        found = _NAMES.search(_message(self._client.post("/v1/completions", json=asked)))
        return [] if found is None or found[1].startswith(_NO_NAMES) else found[1].split(", ")

    def write(self, asked: Asked, stop: threading.Event) -> Generator[View]:
        """As `decoding.playground.local.LocalModel.write`.

        Raises:
            DecodingError: the server's own reason, or no answer.
        """
        view = View("Writing.")
        workers = ThreadPoolExecutor(2)
        try:
            writers = [
                workers.submit(self._stream, asked.plain_request(self.name), view.plain, stop),
                workers.submit(self._stream, asked.request(self.name), view.steered, stop),
            ]
            for _ in until_done(writers):
                if stop.is_set():
                    break
                yield view
        finally:
            workers.shutdown(wait=False)  # a thread that waits for the server ends with what comes next
        if stop.is_set():
            view.plain.end = view.plain.end or STOPPED
            view.steered.end = view.steered.end or STOPPED
        view.status = "Stopped." if stop.is_set() else "Done."
        yield view

    def _stream(self, request: tuple[str, dict[str, Any]], side: Side, stop: threading.Event) -> None:
        path, body = request
        body = body | {"stream": True, "logprobs": True if "messages" in body else 0}
        began = None
        try:
            with self._client.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise DecodingError(f"the server refuses: {_message(answer)}")
                for line in answer.iter_lines():
                    if stop.is_set():
                        return
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    now = perf_counter()
                    _take(json.loads(line.removeprefix("data: ")), side)
                    if began is None and side.tokens:
                        began, first = now, len(side.tokens)
                    elif began is not None:
                        side.seconds, side.steps = now - began, len(side.tokens) - first
        except httpx.TransportError as error:
            raise _no_answer(self.server, error) from error


def _take(event: dict[str, Any], side: Side) -> None:
    """Adds what one event of a stream tells."""
    if "error" in event:
        raise DecodingError(f"the server says: {event['error'].get('message', event['error'])}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta", choice)
        text = "".join(delta.get(name) or "" for name in ("reasoning", "reasoning_content", "content", "text"))
        side.tokens += _tokens(text, choice.get("logprobs"))
        if reason := choice.get("finish_reason"):
            side.end = AT_LENGTH if reason == "length" else ENDED


def _tokens(text: str, logprobs: dict[str, Any] | None) -> list[Token]:
    told = logprobs or {}
    of_chat = told.get("content") or []
    pieces = told.get("tokens") or [each["token"] for each in of_chat]
    values = told.get("token_logprobs") or [each["logprob"] for each in of_chat]
    if len(pieces) == 1:
        return [Token(text, _probability(values[0]))]
    if "".join(pieces) == text:
        return [Token(piece, _probability(value)) for piece, value in zip(pieces, values, strict=True)]
    return [Token(text)] if text else []


def _probability(value: float | None) -> float | None:
    return None if value is None else math.exp(value)


def _message(answer: httpx.Response) -> str:
    """What a server says is wrong; "" if nothing is."""
    if not answer.is_error:
        return ""
    try:
        told = answer.json()
        return str(told.get("error", told)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {answer.status_code}, {answer.text[:200]}"


def _no_answer(server: str, error: Exception) -> DecodingError:
    return DecodingError(
        f"no answer from {server} ({error or type(error).__name__}): start one by `decoding serve`, or give its address"
    )
