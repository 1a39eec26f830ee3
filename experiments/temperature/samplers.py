"""The ways of sampling that a model is scored with: fixed temperatures, and what a selector has to beat.

Each family has as many settings as it takes to choose one of them on training data, as fixed temperatures do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import MinPLogitsWarper

from decoding.temperature.nucleus import cut_to_nucleus
from decoding.temperature.processors import DynamicTemperature, EntropyDependentTemperature, FixedTemperature

TEMPERATURES = (0.1, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9)
_CUT = (0.7, 1.0)  # where the paper's cuts are meant to be used, and below
_DYNAMIC = (0.4, 1.0)
# Names of families, in tables' order, and their settings' beginnings.
FAMILIES = {
    "min-p 0.05": "min-p 0.05, T=",
    "min-p 0.1": "min-p 0.1, T=",
    "top-nσ": "top-nσ 1, T=",
    "EDT (θ=1)": "EDT T₀=",
    "dynamic temperature (±0.3)": "dynatemp ",
}
Sampler = Sequence[LogitsProcessor]


def sampler_name(temperature: float) -> str:
    """What a fixed temperature's scores are kept under."""
    return f"T={temperature:g}"


def samplers(temperatures: Sequence[float], top_p: float, baselines: bool) -> dict[str, Sampler]:
    """By name, fixed temperatures first.

    Args:
        temperatures: the fixed ones.
        top_p: the nucleus behind fixed and entropy-based temperatures; the others cut by themselves.
        baselines: whether to add `FAMILIES`: min-p (arXiv 2407.01082) at two thresholds and top-nσ (2411.07641), each
            at two temperatures, EDT (2403.14541) and llama.cpp's dynamic temperature at two.
    """
    nucleus = Nucleus(top_p)
    found: dict[str, Sampler] = {sampler_name(t): (FixedTemperature(t), nucleus) for t in temperatures}
    if baselines:
        found |= {f"min-p {p}, T={t:g}": (MinPLogitsWarper(p), FixedTemperature(t)) for p in (0.05, 0.1) for t in _CUT}
        found |= {f"top-nσ 1, T={t:g}": (TopNSigma(1.0), FixedTemperature(t)) for t in _CUT}
        found |= {f"EDT T₀={t:g}": (EntropyDependentTemperature(t), nucleus) for t in _DYNAMIC}
        found |= {f"dynatemp {t:g}": (DynamicTemperature(t, range=0.3), nucleus) for t in _DYNAMIC}
    return found


class Nucleus(LogitsProcessor):
    """Top-p (Holtzman et al. 2020), as transformers' own, without sorting whole vocabularies where a few tokens do.

    Args:
        top_p: the mass to keep at least.
        among: how many tokens are tried first; rows that need more are sorted.
    """

    def __init__(self, top_p: float, among: int = 256):
        self.top_p = top_p
        self._among = among

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V], with all others at −inf."""
        if self.top_p >= 1:
            return scores
        best, tokens = scores.topk(min(self._among, scores.shape[-1]), -1)
        mass = (best - scores.logsumexp(-1, keepdim=True)).exp()
        before = mass.cumsum(-1) - mass
        best = best.where(before < self.top_p, -torch.inf)
        kept = torch.full_like(scores, -torch.inf).scatter(-1, tokens, best)
        wide = (before[:, -1] + mass[:, -1] < self.top_p).nonzero()[:, 0]
        kept[wide] = cut_to_nucleus(scores[wide], scores.new_full((len(wide),), self.top_p))
        return kept


class Draw(LogitsProcessor):
    """Draws each row's token, which greedy search then takes: as sampling does, but among the tokens that are left.

    Softmax and multinomial over whole vocabularies take longer than a small model's step; the Gumbel-max trick needs
    the kept tokens alone.

    Args:
        among: rows with more tokens than this are drawn from their whole vocabulary.
    """

    def __init__(self, among: int = 256):
        self._among = among

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V] to 0 for the drawn token and −inf for all others."""
        best, tokens = scores.topk(min(self._among, scores.shape[-1]), -1)
        noise = -torch.empty_like(best).exponential_().log()
        drawn = tokens.gather(-1, (best + noise).argmax(-1, keepdim=True))
        wide = best[:, -1].isfinite().nonzero()[:, 0]
        if len(wide):
            drawn[wide] = torch.multinomial(scores[wide].softmax(-1), 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


class TopNSigma(LogitsProcessor):
    """Top-nσ (arXiv 2411.07641): keeps tokens whose logits come within n standard deviations of the largest.

    Args:
        n: how many. The deviation is over all tokens that are not ruled out.
    """

    def __init__(self, n: float):
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V], with all others at −inf."""
        allowed = ~scores.isneginf()
        count = allowed.sum(-1, keepdim=True)
        known = scores.where(allowed, 0)
        mean = known.sum(-1, keepdim=True) / count
        sigma = ((known - mean).square().where(allowed, 0).sum(-1, keepdim=True) / count).sqrt()
        return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - self.n * sigma, -torch.inf)
