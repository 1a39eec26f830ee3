"""The priors that answer requests, joined on a device. Knows nothing of vLLM's runners, and does not import vLLM."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.style.paths import has_guards_on, steer
from decoding.style.prior import StylePrior
from decoding.style.source import StyleSource
from decoding.style.steering import Guards, Stops, guards_of, stops_of
from decoding.style.training import name_and_file
from decoding.vllm.declaration import DeclaredStyle
from decoding.vllm.fallbacks import fell_back
from decoding.vllm.joined import Joined
from decoding.vllm.requests import Held, Request, read_request
from ngram import NGramError
from ngram.layout import join
from ngram.tables import Shape, Tables


class Chosen(NamedTuple):
    """One of a request's styles."""

    prior: int  # its number among `LoadedStyles`
    strength: float  # λ
    held: Held | None = None  # None as the prior is by itself


class Asked(NamedTuple):
    """What a request in the engine has of `LoadedStyles`."""

    styles: list[Chosen]
    own_stops: list[int]  # at which it alone ends, and which its styles leave alone


class Layer(NamedTuple):
    """At most one prior for each row of a batch. A request's last style stands in the last layer, whoever has more."""

    prior: int | Tensor  # one for all rows, or int64 [rows]
    strength: Tensor  # λ, float32 [rows], 0 for rows without one
    holds: Holds | None = None  # where requests say what holds theirs back; None for all as they are by themselves


class Holds(NamedTuple):
    """`Held` of rows, or of several."""

    guards: Guards | None
    stops: Stops | None

    def of(self, which: int | Tensor) -> Holds:
        """As `Guards.of`."""
        guards, stops = self
        return Holds(None if guards is None else guards.of(which), None if stops is None else stops.of(which))


class LoadedStyles:
    """Priors on a device, joined so that every row of a batch can have others.

    Args:
        names: of the styles.
        opened: gives the prior of a name. Called twice for each, so that no more than one need be in memory beside
            the joined ones.
        width: columns of the model's logits.
        device: where the logits are.
        stop_ids: more ids that end a text than the priors know of.
        joined: joins them, as `ngram.layout.join` does.

    Attributes:
        names: of the styles.
        context: how many tokens back a prior looks.
    """

    def __init__(
        self,
        names: Sequence[str],
        opened: Callable[[str], StylePrior],
        width: int,
        device: torch.device | str,
        stop_ids: Sequence[int] = (),
        joined: Callable[[Sequence[Shape], Iterable[Tables], int], Tables] = join,
    ):
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}
        self._lambdas: list[float] = []
        self._held: list[Held] = []
        self._tables: Tables | None = None
        self._stops: Stops | None = None
        self._stop_ids = set(stop_ids)
        self._width = width
        self._device = device
        self.context = 1
        if not names:
            return
        has_guards_on(torch.device(device))  # tried, or refused, at an engine's start and not in its first step
        shapes, mixtures = [], []
        for name in names:
            prior = opened(name)
            self._lambdas.append(float(prior.lambda_))
            shapes.append(prior.tables.shape)
            mixtures.append(_mixture_of(prior))
            self._held.append(Held(prior.guards, prior.settings.steer_stop))
            self._stop_ids.update(prior.stop_ids)
        self._tables = joined(shapes, (opened(name).tables for name in names), width).to(device)
        self._stops = stops_of(sorted(self._stop_ids), width, device)
        self._own = self.holds(self._held)
        order = self._tables.order
        self._mixtures = torch.cat([pad(each, (0, order - each.shape[1]) * 2) for each in mixtures]).to(device)
        self.context = max(order - 1, 1)

    def asked(self, params: Any) -> Asked:
        """What a request asks for, by vLLM's ``SamplingParams``.

        It never raises, since the engine serves others: nothing where it cannot be read or had, which is counted.
        """
        try:
            request = read_request(params)
            styles = self.resolve(request)
            if any(each.held is not None for each in styles):
                self.holds([self.held(each) for each in styles])  # else it would fail for all rows of a step
            return Asked(styles, self.own_stops(styles, request.stop_ids))
        except Exception:  # Whatever it is.
            fell_back("style")
            return Asked([], [])

    def resolve(self, request: Request) -> list[Chosen]:
        """The styles that a request asks for, those with λ = 0 left out."""
        chosen = []
        for name, asked in request.styles:
            index = self._index[name]
            own = self._held[index]
            held = request.held(own)
            strength = self._lambdas[index] if asked is None else asked
            chosen.append(Chosen(index, strength, None if held == own else held))
        return [each for each in chosen if each.strength != 0]

    def held(self, chosen: Chosen) -> Held:
        """What holds one of a request's styles back."""
        return self._held[chosen.prior] if chosen.held is None else chosen.held

    def holds(self, held: Sequence[Held]) -> Holds:
        """That of several, on the device."""
        guards = guards_of([each.guards for each in held], self._device)
        stops = self._stops
        return Holds(guards, None if stops is None else stops.left_by([each.steer_stop for each in held]))

    def own_stops(self, chosen: Sequence[Chosen], stop_ids: Iterable[int]) -> list[int]:
        """The ids at which a request alone ends, if its styles leave such ids alone.

        Args:
            chosen: its styles.
            stop_ids: those that it names.
        """
        if all(self.held(each).steer_stop for each in chosen):
            return []
        return sorted({each for each in stop_ids if 0 <= each < self._width} - self._stop_ids)

    def layers(self, rows: Sequence[Sequence[Chosen]]) -> list[Layer]:
        """What `resolve` gave for each row of a batch, as layers."""
        return [
            self._layer([row[-1 - behind] if behind < len(row) else None for row in rows])
            for behind in reversed(range(max(map(len, rows), default=0)))
        ]

    def _layer(self, rows: Sequence[Chosen | None]) -> Layer:
        used = [each for each in rows if each is not None]
        priors = torch.tensor([0 if each is None else each.prior for each in rows])
        strength = torch.tensor([0.0 if each is None else each.strength for each in rows])
        is_one = len({each.prior for each in used}) == 1
        holds = None
        if any(each.held is not None for each in used):
            of_rows = self.holds([Held() if each is None else self.held(each) for each in rows])
            holds = of_rows.of(send(torch.arange(len(rows)), self._device))
        return Layer(used[0].prior if is_one else send(priors, self._device), send(strength, self._device), holds)

    def add(
        self,
        logits: Tensor,
        history: Tensor,
        layers: Sequence[Layer],
        own_stops: Tensor | None = None,
        several: Tensor | None = None,
    ) -> Tensor:
        """Adds every layer's priors to ``logits`` in place, up to a number that is the same for a whole row.

        The guards of a request's second style look at what its first one left. Where a layer cannot be added, none is:
        one by itself has looked at everything before it writes, and what those before the last have written is taken
        back.

        Args:
            logits: float32 [rows, W].
            history: int64 [rows, context], −1 where there is no token.
            layers: from `layers`, or a runner's own.
            own_stops: from `stops_table`, of each row, int64 [rows, K]; None where no row has any.
            several: the rows with more than one style, int64 [S], of which a copy is kept meanwhile; None for all.
        """
        if not logits.is_contiguous():  # vLLM cuts off what its vocabulary has to fill up
            return logits.copy_(self.add(logits.contiguous(), history, layers, own_stops, several))
        ends = None if own_stops is None else self._ends(logits, own_stops)
        before = None
        if len(layers) > 1:
            before = logits.clone() if several is None else logits[several]
        try:
            for layer in layers:
                self._add(logits, history, layer)
        except Exception:
            if before is not None:
                logits[slice(None) if several is None else several] = before
            raise
        if own_stops is not None and ends is not None:
            moved = (self._ends(logits, own_stops)[1] - ends[1]).nan_to_num_(0)  # −inf less −inf
            logits.scatter_(1, own_stops.clamp(min=0), _chosen(own_stops, ends[0] + moved, logits))
        return logits

    def _add(self, logits: Tensor, history: Tensor, layer: Layer) -> None:
        assert self._tables is not None  # nobody can have asked for a style otherwise
        prior, strength, holds = layer
        guards, stops = self._own.of(prior) if holds is None else holds
        steer(
            self._tables,
            logits,
            history,
            strength,
            self._mixtures,
            guards,
            stops,
            prior=prior,
            shift=False,
            out=logits,
        )

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
    declared: Mapping[str, DeclaredStyle], tokenizer: Any | None, width: int, device: Any, stop_ids: Sequence[int] = ()
) -> LoadedStyles:
    """Opens styles and checks them against the model.

    Args:
        declared: a style for every name. Texts are trained once, and kept.
        tokenizer: the model's; None to take saved priors at their word.
        width: columns of the model's logits.
        device: where the logits are.
        stop_ids: as for `LoadedStyles`.

    Raises:
        DecodingError: a style that is missing, damaged, or of another tokenizer.
    """

    @lru_cache
    def source_of(name: str) -> str:
        source = StyleSource.parse(declared[name].style)  # a text is read, and trained on, once
        return name_and_file(source, tokenizer)[1] if source.is_text else source.where

    def opened(name: str) -> StylePrior:
        try:
            prior = StylePrior(source_of(name), tokenizer=tokenizer, **declared[name].parameters())
        except DecodingError as error:
            raise DecodingError(f"style {name!r}: {error}") from error
        size = prior.tables.vocab_size
        if not prior.tables.fits(width):
            raise DecodingError(f"style {name!r} has {size} token ids, the model scores {width}: another model's")
        return prior

    try:
        on_disk = None
        if torch.device(device).type == "cpu":
            on_disk = Joined.of(declared, list(map(source_of, declared)), width)
        return LoadedStyles(list(declared), opened, width, device, stop_ids, on_disk.tables if on_disk else join)
    except NGramError as error:
        raise DecodingError(str(error)) from error
    finally:
        _give_back_freed_memory()


def _give_back_freed_memory() -> None:
    """Opening files leaves some 200 MB with glibc's allocator, which a server would hold for good."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
