"""What a request asks for, read once from its arguments and the server's policy. Does not import vLLM.

A request's arguments are ``SamplingParams(extra_args={…})``, over HTTP ``vllm_xargs``, whose values are texts, numbers
or lists of these: so "off" says what null says in Python, and 0 and 1 say what false and true say.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any, NamedTuple, get_args

from decoding.errors import DecodingError
from decoding.policy.values import AUTO, EMBEDDED, OF_STYLES
from decoding.style.settings import Mode
from decoding.style.steering import GuardSettings
from decoding.style.strength import checked_lambda
from decoding.temperature.processors import checked_temperature
from decoding.vllm.declaration import (
    POLICY_VARIABLE,
    Offer,
    checked_budget,
    checked_room,
    declared_policy,
    offered,
)
from decoding.vllm.fallbacks import fell_back

MOST_STYLES_PER_REQUEST = 8
UNLIMITED = 2**31 - 1
OFF, FULL = "off", "full"
_WHOLE, _THINK, _ANSWER, _TOP_P = "temperature", "think_temperature", "answer_temperature", "temperature_top_p"
_OF_TEMPERATURES = (_WHOLE, _THINK, _ANSWER, _TOP_P)
_OF_CHUNKS = ("chunks", "kv_budget")
ARGUMENTS = ("policy", "style", *OF_STYLES, *_OF_TEMPERATURES, "selector", *_OF_CHUNKS)
FLAGS = ("steer_stop", "temperature_top_p", "chunks")
"""Those that can be true or false."""
_ALIKE = 0.9  # of two words' letters, for one to be taken for the other: not "model" for "mode"
_ALPHABET = str.maketrans(
    {"λ": "lambda"} | dict(zip("асԁеһіјкӏмоорѕтѵхуαειικνορτυχγ", "acdehijklmoopstvxyaeiiknoptuxy", strict=True))
)
"""Letters of other alphabets that look like, or stand for, those of arguments."""
_LONGEST_NAME = 64  # of an argument, for it to resemble one of ours
_LONGEST_TEXT = 4096  # of a value: a path may be as long
_LARGEST = 2**64  # a whole number of which this is too large is no number of anything here
_LEAST = 1e-2  # what vLLM raises lower temperatures to, before scores overflow
_MOST = 1e6  # likewise: scores are even by then, and masked ones stay masked


class Held(NamedTuple):
    """What holds a style back."""

    guards: GuardSettings = GuardSettings()
    steer_stop: bool = False


class Temperatures(NamedTuple):
    """The temperatures that a request wants of us."""

    answer: float | None = None  # None to have it chosen
    think: float | None = None  # None for no other than the answer's


@dataclass(frozen=True)
class Request:
    """What a request asks for. `read_request` makes it, and nothing else looks at the values of a request's arguments.

    Attributes:
        styles: names, and the λ of each, None for the style's own.
        mode: that its styles must have; None for any.
        guards: those that it says itself, by name; None for without.
        steer_stop: likewise; None as the styles have it.
        stop_ids: ids at which it alone ends.
        temperatures: that it wants of us; None for none.
        takes_top_p: whether the selector's top-p goes with a chosen temperature: nothing of its own leaves tokens out.
        selector: that must be the server's; None for any.
        budget: tokens of keys and values to read at most, up to `UNLIMITED`; None for what the server says.
        selects: whether the server must select chunks.
    """

    styles: tuple[tuple[str, float | None], ...] = ()
    mode: Mode | None = None
    guards: tuple[tuple[str, float | None], ...] = ()
    steer_stop: bool | None = None
    stop_ids: tuple[int, ...] = ()
    temperatures: Temperatures | None = None
    takes_top_p: bool = False
    selector: str | None = None
    budget: int | None = None
    selects: bool = False

    def held(self, own: Held) -> Held:
        """What holds one of its styles back, which has ``own`` by itself."""
        steer_stop = own.steer_stop if self.steer_stop is None else self.steer_stop
        return Held(own.guards._replace(**dict(self.guards)), steer_stop)


PLAIN = Request(budget=UNLIMITED)
"""One that is answered as vLLM answers it by itself."""


def read_request(params: Any) -> Request:
    """Reads a request, with the policy that this process's environment declares as defaults.

    Args:
        params: vLLM's ``SamplingParams``. Arguments in ``extra_args`` that are not among `ARGUMENTS` are somebody
            else's.

    Raises:
        DecodingError: values that an argument cannot have, arguments that contradict each other, or one that resembles
            ours and is none.
    """
    own = params.extra_args or {}
    policy = declared_policy()
    if not own and not policy:
        return Request()
    if not isinstance(own, Mapping):
        raise DecodingError(f"extra_args must map arguments to values, which a {type(own).__name__} does not")
    _refuse_misspelt(own)
    for name in ARGUMENTS:
        _refuse_shapeless(name, own.get(name))
        _refuse_shapeless(name, policy.get(name))
    given = _with_policy(own, policy, params.temperature)
    styles = _styles(given)
    _refuse_without_style(given, styles)
    temperatures = _temperatures(given, params.temperature)
    budget, selects = _budget(given)
    is_whole = params.top_p == 1 and params.top_k <= 0 and params.min_p == 0
    return Request(
        styles=styles,
        mode=_mode(given),
        guards=_guards(given),
        steer_stop=_flag(given, "steer_stop"),
        stop_ids=tuple(params.stop_token_ids or ()),
        temperatures=temperatures,
        takes_top_p=_takes_top_p(given, temperatures) and is_whole,
        selector=_selector(given),
        budget=budget,
        selects=selects,
    )


def read_admitted(params: Any, part: str) -> Request:
    """What a hook reads of a request that is in the engine, which serves others: it never raises.

    Args:
        params: vLLM's ``SamplingParams``.
        part: what the hook does. What cannot be read is `PLAIN`, and counted for this part.
    """
    try:
        return read_request(params)
    except Exception:  # Whatever it is.
        fell_back(part)
        return PLAIN


def check_request(params: Any) -> None:
    """Refuses what this process's environment does not offer, so that it is not silently left out.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        DecodingError: as `read_request`; a style, a mode, a selector, phases or chunks that the server does not have;
            a budget that leaves nothing to choose.
    """
    request, offer = read_request(params), offered()
    _check_styles(request, offer)
    _check_temperatures(request, offer)
    if request.selects and not offer.has_chunks:
        raise DecodingError("this server selects no chunks; start it with --kv-budget TOKENS or --chunk-adapters DIR")
    if request.selects and request.budget is not None:
        checked_room(request.budget)


def check_policy(params: Any) -> None:
    """Refuses a policy in the environment that no request could have.

    Args:
        params: ``SamplingParams`` that say nothing.

    Raises:
        DecodingError: names the variable.
    """
    if unknown := [name for name in declared_policy() if name not in ARGUMENTS or name == "policy"]:
        raise DecodingError(f"{POLICY_VARIABLE} can have {', '.join(ARGUMENTS[1:])}, not {', '.join(unknown)}")
    try:
        check_request(params)
    except DecodingError as error:
        raise DecodingError(f"{POLICY_VARIABLE}: {error}") from error


def resembled(name: Any) -> str | None:
    """The one of `ARGUMENTS` that a name is taken for, if it is none of them and looks like one: in other cases, signs,
    letters that look alike, as a plural, or with a letter more or less.
    """
    if name in ARGUMENTS or len(str(name)) > _LONGEST_NAME:
        return None
    plain = unicodedata.normalize("NFKC", str(name)).casefold().translate(_ALPHABET)
    letters = "".join(filter(str.isalnum, plain))
    ours = {each.replace("_", ""): each for each in ARGUMENTS}
    for like in (letters, letters + "s", letters.removesuffix("s")):
        if like in ours:
            return ours[like]
    near = get_close_matches(letters, ours, 1, _ALIKE)
    return ours[near[0]] if near else None


def _refuse_misspelt(own: Mapping[str, Any]) -> None:
    for name in own:
        if near := resembled(name):
            raise DecodingError(f"unknown argument {name!r}: did you mean {near!r}?")


def _refuse_shapeless(name: str, value: Any) -> None:
    """Refuses what no argument can be, before anything else looks at it: errors may then show any value."""
    parts = [value]
    if isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, Mapping) and name == "chunks":
        parts = [*value, *value.values()]
    if len(parts) > MOST_STYLES_PER_REQUEST and name != "style":
        raise DecodingError(f"{name} can hold {MOST_STYLES_PER_REQUEST} values at most, not {len(parts)}")
    for each in parts:
        if not isinstance(each, str | Real | None):
            raise DecodingError(f"{name} must be a text, a number or a list of these: it holds a {type(each).__name__}")
        if isinstance(each, str) and len(each) > _LONGEST_TEXT:
            raise DecodingError(f"{name} names nothing: it holds a text of {len(each)} characters")
        if isinstance(each, int) and not -_LARGEST <= each <= _LARGEST:
            raise DecodingError(f"{name} holds a whole number that is too large: it must fit in 64 bits")


def _with_policy(own: Mapping[str, Any], policy: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """A request's arguments over the policy's.

    What belongs to the policy's style goes with that style; a temperature of the request's own is one that it has
    chosen.
    """
    if own.get("policy") not in (None, OFF):
        raise DecodingError(f'policy can be "{OFF}" alone, which leaves the server\'s out, not {own["policy"]!r}')
    given = {name: own[name] for name in ARGUMENTS if name in own}
    if given.get("kv_budget", OFF) is None:
        del given["kv_budget"]
    if own.get("policy") == OFF:
        left = {"chunks": OFF} if any(name in policy for name in _OF_CHUNKS) else {}
    else:
        left = dict(policy)
        _leave_out(left, OF_STYLES if "style" in given else ())
        _leave_out(left, (_WHOLE, _ANSWER) if _WHOLE in given or _ANSWER in given else ())
        _leave_out(left, _OF_TEMPERATURES if temperature != 1 and not any(map(given.get, _OF_TEMPERATURES)) else ())
    _leave_out(left, _OF_CHUNKS if any(name in given for name in _OF_CHUNKS) else ())
    return left | given


def _leave_out(values: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        values.pop(name, None)


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == OFF)


def _styles(given: Mapping[str, Any]) -> tuple[tuple[str, float | None], ...]:
    style, lambda_ = given.get("style"), given.get("lambda")
    if _is_off(style):
        return ()
    names = style if isinstance(style, list | tuple) else [style]
    lambdas = lambda_ if isinstance(lambda_, list | tuple) else [lambda_]
    if lambda_ is None:
        lambdas = [None] * len(names)
    if len(names) != len(lambdas):
        raise DecodingError(f"style and lambda must have the same length: {len(names)} and {len(lambdas)}")
    if len(names) > MOST_STYLES_PER_REQUEST:
        raise DecodingError(f"a request can have {MOST_STYLES_PER_REQUEST} styles, not {len(names)}")
    for name in names:
        if not isinstance(name, str):
            raise DecodingError(f"a style is named by a text, not by {name!r}")
        if names.count(name) > 1:
            raise DecodingError(f"style {name!r} is named twice: once is enough, with the λ that it is to have")
    return tuple(
        (name, None if value is None else checked_lambda(value, hint=""))
        for name, value in zip(names, lambdas, strict=True)
    )


def _refuse_without_style(given: Mapping[str, Any], styles: tuple[Any, ...]) -> None:
    alone = [name for name in OF_STYLES if not _is_off(given.get(name))]
    if alone and not styles:
        raise DecodingError(f"{', '.join(alone)} without a style: name one in style")


def _mode(given: Mapping[str, Any]) -> Mode | None:
    mode = given.get("mode")
    if mode not in (None, *get_args(Mode)):
        raise DecodingError(f"unknown mode {mode!r}: choose from {', '.join(get_args(Mode))}")
    return mode


def _guards(given: Mapping[str, Any]) -> tuple[tuple[str, float | None], ...]:
    said = {name: given[name] for name in GuardSettings._fields if name in given}
    guards = {name: None if _is_off(value) else value for name, value in said.items()}
    GuardSettings(**guards).checked()
    return tuple(guards.items())


def _flag(given: Mapping[str, Any], name: str) -> bool | None:
    if name not in given:
        return None
    value = given[name]
    if _is_off(value):
        return False
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise DecodingError(f"{name} must be true or false, not {value!r}")
    return bool(value)


def _temperatures(given: Mapping[str, Any], own: float) -> Temperatures | None:
    """What is asked for. A phase that is not named is sampled at the request's own temperature, which is 1."""
    names = (_WHOLE, _THINK, _ANSWER)
    asked: dict[str, Any] = {name: given[name] for name in names if not _is_off(given.get(name))}
    if _WHOLE in asked and _ANSWER in asked:
        raise DecodingError(f"{_WHOLE} and {_ANSWER} are the same beside {_THINK}: give one of them")
    for name, value in asked.items():
        if not (isinstance(value, str) and value == AUTO):
            checked_temperature(value, name, hint="" if name == _THINK else f' or "{AUTO}"')
        elif name == _THINK:
            raise DecodingError(f'{_THINK} must be a number: "{AUTO}" is for the answer')
    if not asked or asked == {_WHOLE: own}:  # then vLLM divides by it
        return None
    if own != 1:
        what = f'"{AUTO}"' if asked == {_WHOLE: AUTO} else " and ".join(asked)
        raise DecodingError(
            f"with {what} the request's own temperature must be 1, not {own:g} (where a request has none, the server's "
            "policy or the model's generation_config.json may set one, unless the server has --generation-config vllm: "
            "write 1)"
        )
    answer = asked.get(_WHOLE, asked.get(_ANSWER, 1.0))
    has_phases = _THINK in asked or _ANSWER in asked
    think = _held(asked.get(_THINK, 1.0)) if has_phases else None
    return Temperatures(None if answer == AUTO else _held(answer), think)


def _held(temperature: float) -> float:
    """A temperature that scores can be divided by, and stay numbers."""
    return min(max(float(temperature), _LEAST), _MOST)


def _takes_top_p(given: Mapping[str, Any], temperatures: Temperatures | None) -> bool:
    is_chosen = temperatures is not None and temperatures.answer is None
    if given.get(_TOP_P) is None:
        return is_chosen
    if not is_chosen:
        raise DecodingError(f'{_TOP_P} goes with a temperature that is "{AUTO}"')
    return bool(_flag(given, _TOP_P))


def _selector(given: Mapping[str, Any]) -> str | None:
    selector = given.get("selector")
    if _is_off(selector):
        return None
    if not isinstance(selector, str):
        raise DecodingError(f"selector must be the name of the server's, not {selector!r}")
    return selector


def _budget(given: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The budget, and whether chunks must be selected."""
    named = [name for name in _OF_CHUNKS if name in given]
    if len(named) == len(_OF_CHUNKS):
        raise DecodingError(f"{' and '.join(named)} are the same: give one of them")
    if not named:
        return None, False
    (name,) = named
    asked = given[name]
    if name == "chunks":
        if isinstance(asked, Mapping):
            asked = _budget_of(asked)
            if asked is None:
                return None, True
        elif _is_off(asked) or (isinstance(asked, int) and asked == 0):
            return UNLIMITED, False
        elif isinstance(asked, int) and asked == 1:  # so true comes over HTTP, and nobody reads one token
            return None, True
    if isinstance(asked, str) and asked == FULL:
        return UNLIMITED, True
    return min(checked_budget(asked, name), UNLIMITED), True


def _budget_of(chunks: Mapping[str, Any]) -> Any:
    """That of `ChunkSelection`'s settings; None if they have none."""
    if other := [name for name, value in chunks.items() if name != "budget" and value is not None]:
        raise DecodingError(
            f"of chunks a request can have another budget alone: {', '.join(map(str, other))} is the server's, for all"
        )
    return chunks.get("budget")


def _check_styles(request: Request, offer: Offer) -> None:
    for name, _ in request.styles:
        if name not in offer.styles:
            served = ", ".join(sorted(offer.styles)) or "none; start it with --style NAME=FILE"
            raise DecodingError(f"unknown style {name!r}; this server has: {served}")
        if request.mode is not None and request.mode != (mode := offer.styles[name].mode()):
            raise DecodingError(
                f'style {name!r} is served in mode "{mode}", not "{request.mode}": have it served in that mode under '
                f"another name, --style NAME=FOLDER, from `decoding style train --mode {request.mode} --out FOLDER`"
            )


def _check_temperatures(request: Request, offer: Offer) -> None:
    served = None if offer.selector is None else offer.selector.selector or EMBEDDED
    if request.selector not in (None, served):
        has = "none" if served is None else repr(served)
        raise DecodingError(f"selector {request.selector!r} is not this server's, which has {has} for all requests")
    wanted = request.temperatures
    if wanted is None:
        return
    if wanted.think is not None and not offer.has_phases:
        raise DecodingError("this server does not tell thinking from answering; start it with --phases")
    if wanted.answer is None and offer.selector is None:
        raise DecodingError("this server has no temperature selector; start it with --temperature-selector default")
    if not offer.has_temperatures:
        raise DecodingError(
            f"this server sets no temperatures beside vLLM: a number, such as {wanted.answer:g}, belongs in the "
            "request's own temperature"
        )
