"""What vLLM's server would drop, or change, of a request's arguments before the engine has them: such a request is
answered with the reason. Does not import vLLM.

- Beams are made of requests without arguments (``vllm/entrypoints/generate/beam_search/online.py``).
- Some endpoints take ``vllm_xargs`` as they take any unknown field, and leave them out.
- True and false become 1 and 0 (``vllm_xargs`` are texts, numbers and lists of these), so that λ would be 1.

Bodies are JSON objects or, where audio is sent, forms: there ``vllm_xargs`` are the text of an object.
"""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from decoding.errors import DecodingError
from decoding.vllm.declaration import declared_policy
from decoding.vllm.requests import ARGUMENTS, FLAGS, resembled

MIDDLEWARE = "decoding.vllm.dropped.RefuseDropped"
CARRYING = (
    "/v1/completions",
    "/v1/completions/render",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/messages",
    "/v1/messages/render",
    "/v1/responses",
    "/v1/responses/render",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/invocations",
)
"""The ends of the paths at which vLLM hands ``vllm_xargs`` on."""
_TRUE = ("true", "1", "on", "yes", "t", "y")  # what pydantic takes for it
_NAMES = (b"vllm_xargs", b"use_beam_search")
_TELLTALE = (*_NAMES, rb"\u", b"\0")  # or, in JSON, names written otherwise: escaped, in UTF-16
_FORM = b"multipart/form-data"


def refuse_dropped(path: str, body: bytes, kind: bytes = b"application/json") -> None:
    """Refuses a request of which vLLM would drop or change an argument of ours.

    Args:
        path: where it was sent.
        body: what was sent. Other than a JSON object or a form is left to vLLM.
        kind: of the body, as its header ``Content-Type`` has it.

    Raises:
        DecodingError: says which, and what to do.
    """
    asked = _fields(body, kind) if kind.lower().startswith(_FORM) else _object(body)
    given = asked.get("vllm_xargs")
    ours = {name: given[name] for name in given if _is_ours(name)} if isinstance(given, Mapping) else {}
    named = ", ".join(ours)
    if _is_true(asked.get("use_beam_search")):
        if ours:
            raise DecodingError(f"beam search would leave {named} out: send use_beam_search or these, not both")
        if declared_policy():
            raise DecodingError(
                "beam search would leave this server's policy out: sample, or ask a server without a policy"
            )
    if ours and not path.rstrip("/").endswith(CARRYING):
        raise DecodingError(f"{path} would leave {named} out: send vllm_xargs to one of {', '.join(CARRYING[:-1])}")
    for name, value in ours.items():
        if name not in FLAGS and any(
            isinstance(each, bool) for each in (value if isinstance(value, list) else [value])
        ):
            raise DecodingError(f"{name} cannot be true or false")


def _object(body: bytes) -> Mapping[str, Any]:
    """A JSON object that may name what matters; empty for any other body."""
    if not any(each in body for each in _TELLTALE):
        return {}
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return asked if isinstance(asked, Mapping) else {}


def _fields(body: bytes, kind: bytes) -> Mapping[str, Any]:
    """What matters of a form, read with the parser that vLLM's server has. Few forms name it: files are large."""
    if not any(each in body for each in _NAMES):
        return {}
    from python_multipart import parse_form

    found: dict[str, Any] = {}

    def take(field: Any) -> None:
        if field.field_name in _NAMES:
            found[field.field_name.decode()] = (field.value or b"").decode(errors="replace")

    try:
        parse_form({"Content-Type": kind}, io.BytesIO(body), take, lambda file: file.close())
        found["vllm_xargs"] = json.loads(found.get("vllm_xargs", "null"))
    except (ValueError, RecursionError):
        return {}
    return found


def _is_ours(name: str) -> bool:
    return name in ARGUMENTS or resembled(name) is not None


def _is_true(value: Any) -> bool:
    return value.lower() in _TRUE if isinstance(value, str) else value == 1


class RefuseDropped:
    """ASGI middleware: `refuse_dropped` for every request, HTTP 400 with the reason, in vLLM's own form.

    It looks at a body while the server reads it, so whoever is not let in has nothing read. ``decoding serve`` adds it.
    Beside ``vllm serve``, write ``--middleware decoding.vllm.dropped.RefuseDropped``.

    Args:
        app: what is asked next.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Hands a request on, to be looked at."""
        if scope["type"] == "http" and scope["method"] == "POST":
            receive = _looking(scope["path"], dict(scope["headers"]).get(b"content-type", b""), receive)
        await self._app(scope, receive, send)


def _looking(path: str, kind: bytes, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    parts: list[bytes] = []

    async def looked() -> Any:
        message = await receive()
        if message["type"] == "http.request":
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                body = b"".join(parts)
                parts.clear()
                _answer_400(path, body, kind)
        return message

    return looked


def _answer_400(path: str, body: bytes, kind: bytes) -> None:
    from fastapi import HTTPException  # vLLM's server has it; this package does not need it otherwise

    try:
        refuse_dropped(path, body, kind)
    except DecodingError as error:
        raise HTTPException(400, str(error)) from error
