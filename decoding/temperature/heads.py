"""What stands on top of a text encoder: a classifier of abilities, and a regression of scores over temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

_HIDDEN = 64
_MEMBERS = 3
_PASSES = 12
_BATCH = 256
_LEAST_SCALE = 2e-3  # Some features hardly vary.
_MOST_SHARE = 8.0  # No single example may lead a batch.


class AbilityHead(NamedTuple):
    """A linear classifier, or one with a hidden layer: W gelu(H x + h) + b."""

    weight: Tensor  # float32 [classes, width], or [classes, hidden]
    bias: Tensor  # float32 [classes]
    hidden: Tensor | None = None  # float32 [hidden, width]
    hidden_bias: Tensor | None = None  # float32 [hidden]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Probabilities: float32 [N, width] -> float32 [N, classes]."""
        if self.hidden is not None and self.hidden_bias is not None:
            vectors = gelu(vectors @ self.hidden.T + self.hidden_bias)
        return (vectors @ self.weight.T + self.bias).softmax(-1)

    @property
    def width(self) -> int:
        """Length of the vectors that it reads."""
        return (self.weight if self.hidden is None else self.hidden).shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def fit_hidden(cls, vectors: Tensor, labels: Sequence[int], classes: int, weights: Tensor) -> AbilityHead:
        """A classifier with a hidden layer, trained with dropout: the average of three, in one.

        A request and the text that it is about stand in one vector. Whether a text means anything depends on whether a
        request stands beside it, which no linear classifier can express. AdamW at 2e-3, falling to 0, 12 passes in
        batches of 256, a quarter of the inputs and half of the hidden units left out, labels smoothed by 5 %.

        Args:
            vectors: float32 [N, width].
            labels: N class indices.
            classes: how many there are.
            weights: how much each example counts within its class, float32 [N].
        """
        centre, scale = vectors.mean(0), vectors.std(0).clamp(min=_LEAST_SCALE)
        inputs, target = (vectors - centre) / scale, torch.tensor(labels)
        share = weights / torch.zeros(classes).index_add_(0, target, weights)[target]
        share = (share / share.mean()).clamp(max=_MOST_SHARE)
        members = [_member(inputs, target, share, classes, seed) for seed in range(_MEMBERS)]
        hidden, hidden_bias, weight, bias = zip(*members, strict=True)
        scaled = torch.cat(hidden) / scale  # The scaling goes into the layer.
        return cls(
            torch.cat(weight, 1) / _MEMBERS,
            torch.stack(bias).mean(0),
            scaled,
            torch.cat(hidden_bias) - scaled @ centre,
        )

    @classmethod
    def fit(
        cls,
        vectors: Tensor,
        labels: Sequence[int],
        classes: int,
        penalty: float = 3e-4,
        weights: Tensor | None = None,
    ) -> AbilityHead:
        """Logistic regression in which every class weighs the same, however many examples it has.

        Args:
            vectors: float32 [N, width].
            labels: N class indices.
            classes: how many there are.
            penalty: of the squared weights.
            weights: how much each example counts within its class, float32 [N]; alike by default.
        """
        target = torch.tensor(labels)
        weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        weights = torch.ones(len(target)) if weights is None else weights
        share = weights / torch.zeros(classes).index_add_(0, target, weights)[target]
        share = share / share.sum()
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = cross_entropy(vectors @ weight.T + bias, target, reduction="none")
            value = fit @ share + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(weight.detach(), bias.detach())


def _shapes(inputs: Tensor, classes: int) -> list[tuple[int, int]]:
    return [(_HIDDEN, inputs.shape[1]), (classes, _HIDDEN)]


class Prediction(NamedTuple):
    """Scores that are expected at each temperature."""

    mean: Tensor  # float32 [N, K]
    gain: Tensor  # float32 [N, K], over the best fixed temperature
    error: Tensor  # float32 [N, K], the standard error of the gain


class CurveHead(NamedTuple):
    """Linear regression of a model's scores at K temperatures on what a prompt asks for.

    With φ [F] a prompt's probabilities of abilities and a constant, Φ those of the training prompts and Y [N, K] their
    scores, φᵀA⁻¹ΦᵀY is expected, A = ΦᵀΦ + diag(penalty). The penalty is 1 for abilities (about a prompt's weight) and
    next to 0 for the constant. So what is expected of a prompt is what prompts of its ability scored, in whatever words
    they ask. Curves of version 0.1 also have principal components of the prompts' vectors in φ, which far from the
    training prompts said nothing.

    The error of a gain over the fixed temperature f is √(φᵀ Eₖ φ), with Eₖ = A⁻¹ Φᵀ diag(dₖ²) Φ A⁻¹ and dₖ the
    differences of the leave-one-out residuals at k and f (White 1980 in MacKinnon and White's form HC3, 1985), since
    scores of some tasks are much noisier than others'.
    """

    temperatures: Tensor  # float32 [K], ascending
    fixed: Tensor  # int64 [1], which of them is best for all prompts
    centre: Tensor  # float32 [width]
    components: Tensor  # float32 [k, width]
    coefficients: Tensor  # float32 [F, K]
    errors: Tensor  # float32 [K, F, F]

    def __call__(self, vectors: Tensor, abilities: Tensor) -> Prediction:
        """Scores to expect of prompts: float32 [N, width], probabilities [N, abilities] -> `Prediction`."""
        features = _features(vectors - self.centre, self.components, abilities)
        mean = features @ self.coefficients
        variance = torch.einsum("nf,kfg,ng->nk", features, self.errors, features)
        return Prediction(mean, mean - mean[:, self.fixed], variance.clamp(min=0).sqrt())

    @classmethod
    def fit(
        cls, abilities: Tensor, scores: Tensor, weights: Tensor, temperatures: Sequence[float], fixed: int, width: int
    ) -> CurveHead:
        """Fits the regression.

        Args:
            abilities: probabilities, float32 [N, abilities].
            scores: float32 [N, K].
            weights: how much each prompt counts, float32 [N].
            temperatures: K of them, ascending.
            fixed: index of the best one for all prompts.
            width: of the prompts' vectors.
        """
        root = (weights / weights.mean()).sqrt()[:, None]
        features = root * torch.cat((abilities, abilities.new_ones(len(abilities), 1)), -1)
        target = root * scores
        penalty = torch.tensor([1.0] * abilities.shape[1] + [1e-6])
        inverse = torch.linalg.inv(features.T @ features + penalty.diag())
        coefficients = inverse @ features.T @ target
        leverage = ((features @ inverse) * features).sum(-1, keepdim=True)
        residuals = (target - features @ coefficients) / (1 - leverage).clamp(min=1e-3)  # Allen's PRESS
        differences = residuals - residuals[:, [fixed]]
        spread = torch.einsum("nf,nk,ng->kfg", features, differences.square(), features)
        errors = inverse @ spread @ inverse
        centre, components = torch.zeros(width), torch.zeros(0, width)
        return cls(torch.tensor(temperatures), torch.tensor([fixed]), centre, components, coefficients, errors)


def _member(
    inputs: Tensor, target: Tensor, share: Tensor, classes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One classifier's layers: H [hidden, width], h [hidden], W [classes, hidden], b [classes]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(rows, columns, generator=generator) for rows, columns in _shapes(inputs, classes)]
    first, second = (torch.nn.Parameter(layer / layer.shape[1] ** 0.5) for layer in layers)
    hidden_bias, bias = (torch.nn.Parameter(torch.zeros(len(layer))) for layer in layers)
    parameters = [first, hidden_bias, second, bias]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    steps = _PASSES * -(-len(inputs) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)

    def kept(values: Tensor, part: float) -> Tensor:
        return values * (torch.rand(values.shape, generator=generator) < part) / part

    for _ in range(_PASSES):
        for rows in torch.randperm(len(inputs), generator=generator).split(_BATCH):
            units = kept(gelu(kept(inputs[rows], 0.75) @ first.T + hidden_bias), 0.5)
            losses = cross_entropy(units @ second.T + bias, target[rows], reduction="none", label_smoothing=0.05)
            (losses * share[rows]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return first.detach(), hidden_bias.detach(), second.detach(), bias.detach()


def _features(centred: Tensor, components: Tensor, abilities: Tensor) -> Tensor:
    """float32 [N, F]: abilities, components, and the constant."""
    return torch.cat((abilities, centred @ components.T, centred.new_ones(len(centred), 1)), -1)
