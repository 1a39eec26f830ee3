"""What a request asks for, and the priors that answer it. Knows nothing of vLLM's runners, and does not import vLLM."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from decoding.errors import DecodingError
from decoding.style.prior import StylePrior
from decoding.style.source import StyleSource
from decoding.style.steering import Guards, Stops, guards_of, steer, stops_of
from decoding.style.strength import checked_lambda
from decoding.style.training import name_and_file
from decoding.temperature.processors import checked_temperature
from decoding.vllm.declaration import (
    checked_budget,
    declared_chunks,
    declared_phases,
    declared_selector,
    declared_styles,
)
from ngram import NGramError
from ngram.layout import join
from ngram.tables import Tables

MOST_STYLES_PER_REQUEST = 8
AUTO = "auto"
_TOP_P = "temperature_top_p"
_TEMPERATURES = _WHOLE, _THINK, _ = "temperature", "think_temperature", "answer_temperature"
_LEAST = 1e-2  # what vLLM raises lower temperatures to, before scores overflow
FULL = "full"
UNLIMITED = 2**31 - 1


def check_request(params: Any) -> None:
    """Refuses what this process's environment does not offer, so that it is not silently left out.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        DecodingError: as `requested_styles`, `check_temperature` and `requested_budget`.
    """
    requested_styles(params.extra_args, declared_styles())
    has_selector, has_phases = declared_selector() is not None, declared_phases() is not None
    check_temperature(params.extra_args, params.temperature, has_selector, has_phases)
    requested_budget(params.extra_args, is_served=declared_chunks() is not None)


def requested_styles(extra_args: Mapping[str, Any] | None, known: Collection[str]) -> list[tuple[str, float | None]]:
    """The styles that a request's arguments name, and the λ of each, None where it gives none.

    Args:
        extra_args: a request's own arguments: ``style``, a name or a list of names, and ``lambda``, a number or as
            many. Others are somebody else's.
        known: names that are served.

    Raises:
        DecodingError: an unknown style, λ outside [0, 1], or lists that do not fit each other.
    """
    style, lambda_ = (extra_args or {}).get("style"), (extra_args or {}).get("lambda")
    if style is None:
        if lambda_ is not None:
            raise DecodingError("lambda without a style: name one in style")
        return []
    names = style if isinstance(style, list) else [style]
    lambdas = [None] * len(names) if lambda_ is None else lambda_ if isinstance(lambda_, list) else [lambda_]
    if len(names) != len(lambdas):
        raise DecodingError(f"style and lambda must have the same length: {len(names)} and {len(lambdas)}")
    if len(names) > MOST_STYLES_PER_REQUEST:
        raise DecodingError(f"a request can have {MOST_STYLES_PER_REQUEST} styles, not {len(names)}")
    for name in names:
        if not isinstance(name, str) or name not in known:
            served = ", ".join(sorted(known)) or "none; start it with --style NAME=FILE"
            raise DecodingError(f"unknown style {name!r}; this server has: {served}")
    return [
        (name, None if value is None else checked_lambda(value, hint=""))
        for name, value in zip(names, lambdas, strict=True)
    ]


def check_temperature(
    extra_args: Mapping[str, Any] | None, own: float, has_selector: bool, has_phases: bool = False
) -> None:
    """Refuses a request that asks for the temperature selector or for phases, and cannot have them.

    Args:
        extra_args: a request's own arguments: ``temperature``, "auto" or not there; or ``think_temperature``, a number,
            and ``answer_temperature``, a number or "auto", both or one of them; beside "auto" ``temperature_top_p``,
            true or false. Others are somebody else's.
        own: the request's own temperature, by which vLLM divides as well.
        has_selector: whether the server has a selector.
        has_phases: whether it tells thinking from answering.

    Raises:
        DecodingError: other values, no selector, no phases, or an own temperature other than 1.
    """
    asked = {name: value for name in _TEMPERATURES if (value := (extra_args or {}).get(name)) is not None}
    top_p = (extra_args or {}).get(_TOP_P)
    if top_p not in (None, True, False):
        raise DecodingError(f"{_TOP_P} must be true or false, not {top_p!r}")
    if top_p is not None and AUTO not in asked.values():
        raise DecodingError(f'{_TOP_P} goes with a temperature that is "{AUTO}"')
    if not asked:
        return
    if asked.get(_WHOLE, AUTO) != AUTO:
        raise DecodingError(
            f'the temperature in extra_args or vllm_xargs can be "{AUTO}" alone, not {asked[_WHOLE]!r}: '
            "a number belongs in the request's own temperature"
        )
    if _WHOLE in asked and len(asked) > 1:
        raise DecodingError(
            f'"temperature": "{AUTO}" is for a whole text: beside {_THINK} write "answer_temperature": "{AUTO}"'
        )
    if _WHOLE not in asked and not has_phases:
        raise DecodingError("this server does not tell thinking from answering; start it with --phases")
    for name, value in asked.items():
        if value != AUTO:
            checked_temperature(value, name, hint="" if name == _THINK else f' or "{AUTO}"')
        elif name == _THINK:
            raise DecodingError(f'{_THINK} must be a number: "{AUTO}" is for the answer')
    if AUTO in asked.values() and not has_selector:
        raise DecodingError("this server has no temperature selector; start it with --temperature-selector default")
    if own != 1:
        what = f'"{AUTO}"' if _WHOLE in asked else " and ".join(asked)
        raise DecodingError(
            f"with {what} the request's own temperature must be 1, not {own:g} (where a request has none, the "
            "model's generation_config.json may set one, unless the server has --generation-config vllm)"
        )


class Temperatures(NamedTuple):
    """The temperatures that a request wants of us."""

    answer: float | None = None  # None to have it chosen
    think: float | None = None  # None for no other than the answer's


def wanted_temperatures(extra_args: Mapping[str, Any] | None) -> Temperatures | None:
    """What a request that `check_temperature` let pass wants; None for nothing.

    A phase that it does not name is sampled at the request's own temperature, which is 1.
    """
    whole, think, answer = ((extra_args or {}).get(name) for name in _TEMPERATURES)
    if think is None and answer is None:
        return Temperatures() if whole == AUTO else None
    chosen = answer == AUTO
    return Temperatures(None if chosen else _of_phase(answer), _of_phase(think))


def chosen_top_p(params: Any, top_p: float | None) -> float | None:
    """The top-p that goes with the temperature chosen for a request that `check_temperature` let pass.

    None where none is chosen, where something of the request's own leaves tokens out (vLLM sees to that), and where it
    says ``temperature_top_p: false``.

    Args:
        params: vLLM's ``SamplingParams``.
        top_p: the selector's.
    """
    wanted = wanted_temperatures(params.extra_args)
    if top_p is None or wanted is None or wanted.answer is not None:
        return None
    is_whole = params.top_p == 1 and params.top_k <= 0 and params.min_p == 0
    return top_p if is_whole and params.extra_args.get(_TOP_P) in (None, True) else None


def _of_phase(value: float | None) -> float:
    return 1.0 if value is None else max(float(value), _LEAST)


def requested_budget(extra_args: Mapping[str, Any] | None, is_served: bool) -> int | None:
    """How many tokens of its keys and values a request wants to read at most; None for what the server says.

    Args:
        extra_args: a request's own arguments: ``kv_budget``, a number, or "full" for all. Others are somebody else's.
        is_served: whether there is chunk selection.

    Raises:
        DecodingError: another value, or no chunk selection.
    """
    asked = (extra_args or {}).get("kv_budget")
    if asked is None:
        return None
    if not is_served:
        raise DecodingError("this server selects no chunks; start it with --kv-budget TOKENS or --chunk-adapters DIR")
    return UNLIMITED if asked == FULL else checked_budget(asked)


class Layer(NamedTuple):
    """At most one prior for each row of a batch; a request's second style stands in a second layer."""

    prior: int | Tensor  # one for all rows, or int64 [rows]
    strength: Tensor  # λ, float32 [rows], 0 for rows without one


class LoadedStyles:
    """Priors on a device, joined so that every row of a batch can have others.

    Args:
        names: of the styles.
        opened: gives the prior of a name. Called twice for each, so that no more than one need be in memory beside
            the joined ones.
        width: columns of the model's logits.
        device: where the logits are.
        stop_ids: more ids that end a text than the priors know of.

    Attributes:
        context: how many tokens back a prior looks.
    """

    def __init__(
        self,
        names: Sequence[str],
        opened: Callable[[str], StylePrior],
        width: int,
        device: torch.device | str,
        stop_ids: Sequence[int] = (),
    ):
        self._index = {name: i for i, name in enumerate(names)}
        self._lambdas: list[float] = []
        self._tables: Tables | None = None
        self._guards: Guards | None = None
        self._stops: Stops | None = None
        self._stop_ids = set(stop_ids)
        self._steer_stop: list[bool] = []
        self._width = width
        self.context = 1
        if not names:
            return
        shapes, mixtures, guards = [], [], []
        for name in names:
            prior = opened(name)
            self._lambdas.append(float(prior.lambda_))
            shapes.append(prior.tables.shape)
            mixtures.append(_mixture_of(prior))
            guards.append(prior.guards)
            self._steer_stop.append(prior.settings.steer_stop)
            self._stop_ids.update(prior.stop_ids)
        self._tables = join(shapes, (opened(name).tables for name in names), width).to(device)
        self._guards = guards_of(guards, device)
        self._stops = stops_of(sorted(self._stop_ids), self._steer_stop, width, device)
        order = self._tables.order
        self._mixtures = torch.cat([pad(each, (0, order - each.shape[1]) * 2) for each in mixtures]).to(device)
        self.context = max(order - 1, 1)

    def resolve(self, extra_args: Mapping[str, Any] | None) -> list[tuple[int, float]]:
        """Index and λ of each prior that a request asks for, those with λ = 0 left out."""
        styles = [(self._index[name], value) for name, value in requested_styles(extra_args, self._index)]
        chosen = [(i, self._lambdas[i] if value is None else value) for i, value in styles]
        return [(i, value) for i, value in chosen if value != 0]

    def own_stops(self, params: Any) -> list[int]:
        """The ids at which this request alone ends, if its styles leave such ids alone.

        Args:
            params: vLLM's ``SamplingParams``.
        """
        chosen = self.resolve(params.extra_args)
        if not chosen or all(self._steer_stop[index] for index, _ in chosen):
            return []
        asked = getattr(params, "stop_token_ids", None) or []
        return sorted({each for each in asked if 0 <= each < self._width} - self._stop_ids)

    def add(self, logits: Tensor, history: Tensor, layers: Iterable[Layer], own_stops: Tensor | None = None) -> Tensor:
        """Adds every layer's priors to ``logits`` in place, up to a number that is the same for a whole row.

        The guards of a request's second style look at what its first one left.

        Args:
            logits: float32 [rows, W].
            history: int64 [rows, context], −1 where there is no token.
            layers: from `layers_of`, or a runner's own.
            own_stops: from `stops_table`, of each row, int64 [rows, K]; None where no row has any.
        """
        before = None if own_stops is None else self._ends(logits, own_stops)
        for prior, strength in layers:
            assert self._tables is not None  # nobody can have asked for a style otherwise
            steer(
                self._tables,
                logits,
                history,
                strength,
                self._mixtures,
                self._guards,
                self._stops,
                prior=prior,
                shift=False,
                out=logits,
            )
        if own_stops is not None and before is not None:
            moved = (self._ends(logits, own_stops)[1] - before[1]).nan_to_num_(0)  # −inf less −inf
            logits.scatter_(1, own_stops.clamp(min=0), _chosen(own_stops, before[0] + moved, logits))
        return logits

    def _ends(self, logits: Tensor, own_stops: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of each row's own stops, [rows, K], and the highest one of what ends no text, [rows, 1]."""
        ids = own_stops.clamp(min=0)
        nothing = logits.new_full((1, 1), -torch.inf)
        others = logits.scatter(1, ids, _chosen(own_stops, nothing, logits))
        if self._stops is not None:
            others.index_fill_(1, self._stops.ids, -torch.inf)
        return logits.gather(1, ids), others.amax(-1, keepdim=True)


def stops_table(rows: Sequence[Sequence[int]]) -> Tensor | None:
    """What `LoadedStyles.own_stops` gave for each row, int64 [rows, K] on the host: the first again, or −1, to fill up.

    None if there is nothing.
    """
    widest = max(map(len, rows), default=0)
    if not widest:
        return None
    return torch.tensor([[*ids, *[ids[0] if ids else -1] * (widest - len(ids))] for ids in rows])


def _chosen(own_stops: Tensor, values: Tensor, logits: Tensor) -> Tensor:
    """``values`` in rows with stops of their own, and what stands there in others."""
    return torch.where(own_stops >= 0, values, logits.gather(1, own_stops.clamp(min=0)))


def _mixture_of(prior: StylePrior) -> Tensor:
    """How a prior weighs its orders, float32 [1, n, n]."""
    if prior.mixture is not None:
        return prior.mixture
    order = prior.tables.order  # log p_n: the terms of all orders, whichever contexts match
    return pad(torch.ones(1, 1, order), (0, 0, 0, order - 1))


def load_styles(
    declared: Mapping[str, str], tokenizer: Any | None, width: int, device: Any, stop_ids: Sequence[int] = ()
) -> LoadedStyles:
    """Opens styles and checks them against the model.

    Args:
        declared: a style for every name, as `StyleSource.parse` takes it. Texts are trained once, and kept.
        tokenizer: the model's; None to take saved priors at their word.
        width: columns of the model's logits.
        device: where the logits are.
        stop_ids: as for `LoadedStyles`.

    Raises:
        DecodingError: a style that is missing, damaged, or of another tokenizer.
    """

    @lru_cache
    def source_of(name: str) -> str:
        source = StyleSource.parse(declared[name])  # a text is read, and trained on, once
        return name_and_file(source, tokenizer)[1] if source.is_text else declared[name]

    def opened(name: str) -> StylePrior:
        try:
            prior = StylePrior(source_of(name), tokenizer=tokenizer)
        except DecodingError as error:
            raise DecodingError(f"style {name!r}: {error}") from error
        size = prior.tables.vocab_size
        if not prior.tables.fits(width):
            raise DecodingError(f"style {name!r} has {size} token ids, the model scores {width}: another model's")
        return prior

    try:
        return LoadedStyles(list(declared), opened, width, device, stop_ids)
    except NGramError as error:
        raise DecodingError(str(error)) from error
    finally:
        _give_back_freed_memory()


def _give_back_freed_memory() -> None:
    """Opening files leaves some 200 MB with glibc's allocator, which a server would hold for good."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def layers_of(rows: Sequence[Sequence[tuple[int, float]]], device: torch.device) -> list[Layer]:
    """What `LoadedStyles.resolve` gave for each row of a batch, as layers."""
    layers = []
    for depth in range(max(map(len, rows), default=0)):
        here = [row[depth] if depth < len(row) else None for row in rows]
        used = [each for each in here if each is not None]
        strength = torch.tensor([each[1] if each else 0.0 for each in here]).to(device)
        if len({index for index, _ in used}) == 1:
            layers.append(Layer(used[0][0], strength))
        else:
            layers.append(Layer(torch.tensor([each[0] if each else 0 for each in here]).to(device), strength))
    return layers
