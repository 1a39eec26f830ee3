"""Whether a card computes what the host computes, without waiting for it, called and replayed from a CUDA graph."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm import ChunkSelection
from chunkllm.contiguous.reading import Reading
from chunkllm.models import cache_argument
from experiments.gpu import paged
from experiments.gpu.record import Record
from experiments.gpu.ways import TORCH, WAYS, Priors, Steered, Way, about, allowed, as_on_host, judged, kernels, paths
from experiments.lab.device import no_waiting, replayed
from experiments.long_context.bench import CHUNK, BenchOptions, random_model, selection

LOSSLESS = "the lossless mode: the model's own tokens"
_NEAR, _SAME_PLACES = 1e-2, 0.99
_LARGER = 10  # weights than they are drawn, so that attention is not flat


@dataclass(frozen=True)
class Sizes:
    """What is compared.

    Attributes:
        priors: ids that are scored, and the order.
        batch: rows.
        tokens: of each prior's text.
        shape: of the model in which chunks are selected.
        prompt: tokens that it reads.
        budget: tokens that it keeps of them.
        written: tokens behind them, one at a time.
        paged: the same over a paged cache.
    """

    priors: tuple[tuple[int, int], ...] = ((151_936, 3), (49_152, 2), (49_152, 5))
    batch: int = 8
    tokens: int = 50_000
    shape: str = "toy"
    prompt: int = 600
    budget: int = 160
    written: int = 64
    paged: paged.Sizes = paged.Sizes()


CARD = Sizes()
TOY = Sizes(
    priors=((64, 2),),
    batch=2,
    tokens=300,
    prompt=200,
    budget=110,
    written=24,
    paged=paged.Sizes(layers=2, rows=3, prompt=400, budget=192, steps=20),
)


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Makes all checks."""
    found, why_not = paths(device)
    record.note(paths=list(found), without_kernels=why_not)
    model = random_weights(sizes.shape, sizes.prompt + sizes.written)
    record.check("chunk selection: as on the host", partial(_as_on_host, model, sizes, device))
    record.check("chunk selection: no step waits", partial(_without_a_wait, model, sizes, device))
    record.check("chunk selection in vLLM: replayed, as called", partial(paged.as_called, sizes.paged, device))
    record.check(LOSSLESS, partial(lossless_text, model, sizes.prompt, sizes.budget, sizes.written, device))
    with torch.inference_mode():
        for vocabulary, order in sizes.priors:
            priors = Priors(vocabulary, order, sizes.tokens)
            record.note(**about(priors))
            for way in WAYS:
                style = _Style(way, priors, sizes.batch, device)
                for path in found:
                    where = f"{path}: {way.name}, order {order}, V={vocabulary:,}"
                    record.check(f"{where}: as on the host, without a wait", partial(style.as_on_host, path))
                    record.check(f"{where}: replayed on other scores, as called", partial(style.as_called, path))


class _Style:
    """One way."""

    def __init__(self, way: Way, priors: Priors, batch: int, device: torch.device):
        self._way, self._priors, self._batch, self._device = way, priors, batch, device

    @cached_property
    def _on_host(self) -> Tensor:
        with kernels(TORCH):
            return self._on(torch.device("cpu"))()

    def _on(self, device: torch.device, seed: int = 0) -> Steered:
        return Steered(self._way, self._priors, self._batch, device, seed)

    def as_on_host(self, path: str) -> tuple[bool, str]:
        """Against torch's operations there."""
        return as_on_host(self._on(self._device), self._way, path, self._on_host, self._device)

    def as_called(self, path: str) -> tuple[bool, str]:
        """A graph that was captured with other scores and contexts. Torch's sums have no order on a card."""
        here, other = self._on(self._device), self._on(self._device, seed=1)
        with kernels(path):
            run = replayed(here, self._device)
            here.scores.copy_(other.scores)
            here.history.copy_(other.history)
            return judged(run(), other(), allowed(self._way) if path == TORCH else 0.0)


def random_weights(shape: str, length: int) -> Any:
    """A model on the host, in float32, that attends to some places more than to others."""
    model = random_model(BenchOptions(shape, torch.float32, (length,)), torch.device("cpu"))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(_LARGER)
    return model


def _as_on_host(model: Any, sizes: Sizes, device: torch.device) -> tuple[bool, str]:
    """Scores of given tokens, and the places that were chosen for them."""
    wanted, places = _scores(model, sizes, torch.device("cpu"))
    found, its = _scores(model, sizes, device)
    apart = float((found - wanted).norm() / wanted.norm())
    same = float(np.mean([(a.kept & b.kept).sum() / a.kept.sum() for a, b in zip(places, its, strict=True)]))
    passed = apart <= _NEAR and same >= _SAME_PLACES
    return passed, f"{100 * same:.1f} % of the places of {len(its)} choices, scores {apart:.2g} apart"


def _without_a_wait(model: Any, sizes: Sizes, device: torch.device) -> tuple[bool, str]:
    _scores(model, sizes, device, may_wait=False)
    return True, f"{sizes.written} steps"


@torch.inference_mode()
def _scores(model: Any, sizes: Sizes, device: torch.device, may_wait: bool = True) -> tuple[Tensor, list[Reading]]:
    """Scores [T, V] on the host behind a prompt and each given token, and what was read."""
    here = deepcopy(model).to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, sizes.prompt + sizes.written), generator=generator).to(device)
    torch.manual_seed(0)  # of the adapters
    with selection(here, budget=sizes.budget).attach(here, record=may_wait) as chunks:
        options = {cache_argument(here): chunks.new_cache(), "use_cache": True, "logits_to_keep": 1}
        found = [here(input_ids=ids[:, : sizes.prompt], **options).logits]
        for place in range(sizes.prompt, ids.shape[1]):
            allowed_to_wait = may_wait or place < sizes.prompt + CHUNK  # the first choice makes room
            with no_waiting(torch.device("cpu") if allowed_to_wait else device):
                found.append(here(input_ids=ids[:, place : place + 1], **options).logits)
        return torch.cat(found)[:, 0].cpu(), chunks.readings if may_wait else []


@torch.inference_mode()
def lossless_text(model: Any, prompt: int, budget: int, written: int, device: torch.device) -> tuple[bool, str]:
    """Whether the lossless mode writes what full attention writes: in float64, where there are no ties."""
    here = deepcopy(model).double().to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, prompt), generator=generator).to(device)
    options = {"do_sample": False, "min_new_tokens": written, "max_new_tokens": written, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    own = here.generate(ids, attention_mask=mask, **options)
    with ChunkSelection(budget=budget, verify=True).attach(here) as chunks:
        found = here.generate(ids, attention_mask=mask, **options)
        share = chunks.stats["acceptance"]
    same = int((found == own)[:, prompt:].sum())
    seen = (
        f"{same} of {2 * written} tokens; of drafted ones {'none' if share is None else f'{100 * share:.0f} %'} right"
    )
    return same == 2 * written, seen
