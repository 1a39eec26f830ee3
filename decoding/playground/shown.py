"""A `View` as HTML: texts with their tokens by colour, speeds, why the temperature, what was read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from decoding.playground.asked import AUTO, Asked
from decoding.playground.view import Read, Side, Token, View
from decoding.temperature.abilities import NAMES
from decoding.temperature.explained import BLANK, NO_GAIN, UNREAD, Explained

ALL_TOLD = (
    "Colour is how far the style moved the log-probability of the token that was drawn; hover, tap or focus shows "
    "more. Probabilities are those before temperature and top-p."
)
SERVED = (
    "A server tells no more of a token than one probability (vLLM's own: before the style, unless it was started with "
    "--logprobs-mode processed_logprobs). How far the style moved it, and the order that matched, it does not tell."
)
_SIZE = (400, 90)  # of the picture
_REASONS = {
    BLANK: "There was nothing to read, so it is what is best for prompts of all kinds.",
    UNREAD: "The encoder does not read this language, so it is what is best for prompts of all kinds.",
    NO_GAIN: "Nothing is gained over the best temperature for all prompts, so it is that.",
}


def panes(asked: Asked, view: View, tells_all: bool) -> str:
    """Both texts.

    Args:
        asked: what was asked for.
        view: what is known.
        tells_all: whether more is known of a token than a probability.
    """
    return str(_macros().panes(asked, view, ALL_TOLD if tells_all else SERVED, tells_all))


def details(view: View, top_p: float | None) -> str:
    """Why the temperature is what it is, and what was read; nothing where neither is known.

    Args:
        view: what is known.
        top_p: that of the selector.
    """
    side = view.steered
    parts = [_macros().why(side.explained, top_p)] if side.explained else []
    parts += [_macros().reads(side.reads)] if side.reads else []
    return str(Markup("").join(parts))


def status(text: str, is_error: bool = False) -> str:
    """A sentence that screen readers tell at once."""
    kind = Markup('class="status error" role="alert"') if is_error else Markup('class="status" role="status"')
    return str(Markup("<p {}>{}</p>").format(kind, text))


def about(token: Token) -> str:
    """What is known of a token, in words."""
    if token.before is None:
        return "nothing is told of this token"
    if token.after is None or token.order is None:
        return f"probability {token.before:.2g}"
    return f"{token.before:.2g} → {token.after:.2g} ({_shift(token):+.2f} nats), order {token.order} matched"


def _shift(token: Token) -> float:
    """How far the style moved the token's log-probability, in nats."""
    if not token.before or not token.after:
        return 0.0
    return math.log(token.after / token.before)


def _facts(side: Side) -> str:
    speed = "" if side.speed is None else f", {side.speed:.1f} tokens per second"
    return f"{len(side.tokens)} tokens{speed}{f', {side.end}' if side.end else ''}"


def _plain_caption(asked: Asked) -> str:
    return f"the model alone, temperature {asked.plain_temperature:g}"


def _steered_caption(asked: Asked) -> str:
    temperature = "chosen" if asked.temperature == AUTO else f"{asked.temperature:g}"
    if asked.think_temperature is not None:
        temperature = f"{asked.think_temperature:g} to think, {temperature} to answer"
    reads = "" if asked.kv_budget is None else f", reads {asked.kv_budget} tokens"
    mode = "" if asked.mode is None else f", mode {asked.mode}"
    return f"{asked.style_name}, λ {asked.lambda_:g}{mode}, temperature {temperature}{reads}"


def _reason(explained: Explained) -> str:
    if explained.reason is not None:
        return _REASONS[explained.reason]
    read = f"The prompt reads as {NAMES[str(explained.ability)]}."
    way = "scores of this very model" if explained.policy == "curve" else "published scores of models of its size"
    return f"{read} By {way} this temperature is expected to do best, the lowest of those within their noise."


def _points(steps: Sequence[Read], name: str) -> str:
    """A line of the picture."""
    width, height = _SIZE
    most = max(step.held for step in steps)
    values = [getattr(step, name) / most for step in steps]
    across = width / max(len(values) - 1, 1)
    return " ".join(f"{i * across:.1f},{height - 2 - (height - 4) * value:.1f}" for i, value in enumerate(values))


@cache
def _macros() -> Any:
    text = Path(__file__).with_name("shown.html").read_text(encoding="utf-8")
    templates = Environment(autoescape=True, undefined=StrictUndefined)
    known = {"shift": _shift, "about": about, "facts": _facts, "points": _points, "reason": _reason, "names": NAMES}
    known["pairs"] = lambda explained: zip(explained.temperatures, explained.expected, strict=True)
    templates.globals |= known | {"plain_caption": _plain_caption, "steered_caption": _steered_caption}
    return templates.from_string(text).module
