"""The ways in which a style is measured: a mode, its guards, and how many priors one batch mixes. On random text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.style.bound import FIRST_SHARE
from decoding.style.paths import steer
from decoding.style.steering import Guards, GuardSettings, Stops, guards_of, mixture_of, stops_of
from experiments.lab.device import no_waiting
from ngram import NGramModel
from ngram.errors import NGramError
from ngram.kernels import SWITCH, uses_triton
from ngram.layout import join
from ngram.tables import Tables

TORCH, TRITON = "torch", "triton"
_LAMBDA, _ENDS = 0.5, (2, 7)


@dataclass(frozen=True)
class Way:
    """How scores are steered.

    Attributes:
        name: of the way.
        mode: "paper" or "ratio".
        guards: of every prior.
        priors: which a batch mixes, row by row.
        leaves_stops: whether ids that end a text are left alone, as ``generate`` has it.
        most: the goal for a step, in seconds, at the batch and vocabulary that it was set for.
    """

    name: str
    mode: str = "ratio"
    guards: GuardSettings = GuardSettings()
    priors: int = 1
    leaves_stops: bool = False
    most: float | None = None


ONE, MANY = Way("mode paper", "paper", most=30e-6), Way("16 priors, mode paper", "paper", priors=16)
WAYS = (
    ONE,
    MANY,
    Way("mode ratio"),
    Way("mode ratio, ends of texts left alone", leaves_stops=True),
    Way("mode ratio, entropy gate", guards=GuardSettings(entropy_gate=4.0), most=100e-6),
    Way("mode ratio, plausible tokens", guards=GuardSettings(plausibility=0.1), most=100e-6),
    Way("mode ratio, JS within 0.05", guards=GuardSettings(max_js=0.05), most=100e-6),
    Way("mode ratio, all guards, ends left alone", guards=GuardSettings(0.1, 0.05, 4.0), leaves_stops=True),
)


@contextmanager
def kernels(path: str) -> Iterator[None]:
    """Has the style computed by one path, `TORCH` or `TRITON`."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def paths(device: torch.device) -> tuple[tuple[str, ...], str | None]:
    """The paths that a device has, torch's first, and why Triton's is not among them."""
    with kernels(TRITON):
        try:
            has_kernels = uses_triton(device)
        except NGramError as error:
            return (TORCH,), str(error)
    return (TORCH, TRITON) if has_kernels else (TORCH,), None if has_kernels else "Triton is not used here"


class Priors:
    """Sixteen priors of random texts over one vocabulary, and scores and contexts to steer.

    Args:
        vocabulary: V.
        order: n.
        tokens: of each text. Ids follow Zipf's law, so that frequent contexts have many continuations.
    """

    def __init__(self, vocabulary: int, order: int, tokens: int):
        self.vocabulary, self.order = vocabulary, order
        count = max(way.priors for way in WAYS)
        self._texts = [np.random.default_rng(i).zipf(1.3, tokens) % vocabulary for i in range(count)]
        self._tables: dict[tuple[str, int], Tables] = {}
        self._scores: tuple[tuple[int, int], Tensor] | None = None

    @cached_property
    def _models(self) -> list[NGramModel]:
        return [NGramModel.train(text, self.vocabulary, order=self.order, pad_vocab=True) for text in self._texts]

    def tables(self, way: Way) -> Tables:
        """On the host; in mode "ratio" with random rows in the place of log p_1."""
        key = way.mode, way.priors
        if key not in self._tables:
            own = [model.tables for model in self._models[: way.priors]]
            if way.mode == "ratio":
                generator = torch.Generator().manual_seed(0)
                rows = torch.randn(way.priors, self.vocabulary, generator=generator).clamp_(-2, 2)
                own = [tables.with_unigram(row) for tables, row in zip(own, rows, strict=True)]
            self._tables[key] = own[0] if way.priors == 1 else join([tables.shape for tables in own], own)
        return self._tables[key]

    def scores(self, batch: int, seed: int) -> Tensor:
        """Float32 [batch, V] on the host, some of them −inf. Not to be changed: those asked for last are kept."""
        if self._scores is None or self._scores[0] != (batch, seed):
            scores = 3 * torch.randn(batch, self.vocabulary, generator=torch.Generator().manual_seed(seed))
            scores[:, 11::97] = -torch.inf
            self._scores = (batch, seed), scores
        return self._scores[1]

    def histories(self, batch: int, seed: int) -> Tensor:
        """Contexts from random places of the texts, int64 [batch, n − 1] on the host: row i from text i modulo 16."""
        places = np.random.default_rng(seed).integers(self.order, len(self._texts[0]), batch)
        texts = [self._texts[i % len(self._texts)] for i in range(batch)]
        rows = [text[place - self.order + 1 : place] for text, place in zip(texts, places, strict=True)]
        return torch.from_numpy(np.stack(rows)).reshape(batch, self.order - 1)


class Steered:
    """A way on a device. Called, it steers its scores, as all engines do; nothing waits.

    Attributes:
        scores: float32 [B, V]; others can be copied to them.
        history: int64 [B, n − 1], likewise.
    """

    def __init__(self, way: Way, priors: Priors, batch: int, device: torch.device, seed: int = 0):
        self.scores = priors.scores(batch, seed).to(device, copy=True)
        self.history = priors.histories(batch, seed).to(device)
        self._tables = priors.tables(way).to(device)
        weighed = FIRST_SHARE if way.mode == "ratio" else None
        mixture = mixture_of(priors.order, None, None, "matching", weighed)
        assert mixture is not None
        self._mixture = mixture.repeat(way.priors, 1, 1).to(device)
        self._strength = torch.full((batch,), _LAMBDA, device=device)
        self._prior: int | Tensor = 0 if way.priors == 1 else (torch.arange(batch) % way.priors).to(device)
        guards = guards_of([way.guards] * way.priors, device)
        self._guards: Guards | None = None if guards is None else guards.of(self._prior)
        self._stops: Stops | None = stops_of(_ENDS, priors.vocabulary, device) if way.leaves_stops else None

    def __call__(self) -> Tensor:
        """Float32 [B, V]."""
        return steer(
            self._tables,
            self.scores,
            self.history,
            self._strength,
            self._mixture,
            self._guards,
            self._stops,
            prior=self._prior,
        )


def furthest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two results on any devices; infinite where they disagree on what is possible."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    return float((found - wanted).masked_fill(~wanted.isfinite(), 0).abs().max())


def allowed(way: Way) -> float:
    """How far two paths may differ: by rounding; under a budget by a few of the search's steps of 1/4096 too."""
    return 2e-2 if way.guards.max_js is not None else 2e-3


def judged(found: Tensor, wanted: Tensor, bound: float) -> tuple[bool, str]:
    """Whether two results are as near as that, and what was seen."""
    apart = furthest(found, wanted)
    return apart <= bound, f"furthest apart {apart:.2g}, allowed {bound:g}"


def as_on_host(here: Steered, way: Way, path: str, wanted: Tensor, device: torch.device) -> tuple[bool, str]:
    """Whether a device computes by a path, without a wait, what torch's operations computed on the host."""
    with kernels(path):
        here()  # the first call may compile
        with no_waiting(device):
            found = here()
    return judged(found, wanted, allowed(way))


def about(priors: Priors) -> dict[str, Any]:
    """For the settings of a record."""
    return {"lambda": _LAMBDA, "order": priors.order, "ends": list(_ENDS)}
