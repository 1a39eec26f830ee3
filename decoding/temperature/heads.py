"""What stands on top of a text encoder: a classifier of abilities, and a regression of scores over temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_COMPONENTS = 32
_RIDGES = tuple(10.0**power for power in range(7))


class AbilityHead(NamedTuple):
    """A linear classifier."""

    weight: Tensor  # float32 [classes, width]
    bias: Tensor  # float32 [classes]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Probabilities: float32 [N, width] -> float32 [N, classes]."""
        return (vectors @ self.weight.T + self.bias).softmax(-1)

    @classmethod
    def fit(cls, vectors: Tensor, labels: Sequence[int], classes: int, penalty: float = 3e-4) -> AbilityHead:
        """Logistic regression in which every class weighs the same, however many examples it has.

        Args:
            vectors: float32 [N, width].
            labels: N class indices.
            classes: how many there are.
            penalty: of the squared weights.
        """
        target = torch.tensor(labels)
        weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        share = 1 / torch.bincount(target, minlength=classes).clamp(min=1)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = torch.nn.functional.cross_entropy(vectors @ weight.T + bias, target, weight=share)
            value = fit + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(weight.detach(), bias.detach())


class Prediction(NamedTuple):
    """Scores that are expected at each temperature."""

    mean: Tensor  # float32 [N, K]
    gain: Tensor  # float32 [N, K], over the best fixed temperature
    error: Tensor  # float32 [N, K], the standard error of the gain


class CurveHead(NamedTuple):
    """Linear regression of a model's scores at K temperatures on what a prompt asks for and is about.

    With φ [F] a prompt's probabilities of abilities, standardized principal components of its vector and a constant,
    Φ those of the training prompts and Y [N, K] their scores, φᵀA⁻¹ΦᵀY is expected, A = ΦᵀΦ + diag(penalty). The
    penalty is 1 for abilities (about a prompt's weight), 0 for the constant, and for components the one of least
    leave-one-out error: where prompts of one ability behave alike, components count for nothing.

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
        cls,
        vectors: Tensor,
        abilities: Tensor,
        scores: Tensor,
        weights: Tensor,
        temperatures: Sequence[float],
        fixed: int,
    ) -> CurveHead:
        """Fits the regression.

        Args:
            vectors: float32 [N, width].
            abilities: their probabilities, float32 [N, abilities].
            scores: float32 [N, K].
            weights: how much each prompt counts, float32 [N].
            temperatures: K of them, ascending.
            fixed: index of the best one for all prompts.
        """
        weights = weights / weights.mean()
        centre = (weights[:, None] * vectors).mean(0)
        root = weights.sqrt()[:, None]
        _, sizes, directions = torch.linalg.svd(root * (vectors - centre), full_matrices=False)
        kept = min(_MOST_COMPONENTS, max(len(vectors) // 8, 1), int((sizes > 1e-6 * sizes[0]).sum()))
        components = directions[:kept] / (sizes[:kept, None] / len(vectors) ** 0.5)
        features = root * _features(vectors - centre, components, abilities)
        target = root * scores
        fits = [_ridge(features, target, _penalty(ridge, kept, abilities.shape[1])) for ridge in _RIDGES]
        inverse, coefficients, residuals = min(fits, key=lambda fit: float(fit[2].square().sum()))
        differences = residuals - residuals[:, [fixed]]
        spread = torch.einsum("nf,nk,ng->kfg", features, differences.square(), features)
        errors = inverse @ spread @ inverse
        return cls(torch.tensor(temperatures), torch.tensor([fixed]), centre, components, coefficients, errors)


def _features(centred: Tensor, components: Tensor, abilities: Tensor) -> Tensor:
    """float32 [N, F]: abilities, components, and the constant."""
    return torch.cat((abilities, centred @ components.T, centred.new_ones(len(centred), 1)), -1)


def _penalty(ridge: float, components: int, abilities: int) -> Tensor:
    return torch.tensor([1.0] * abilities + [ridge] * components + [1e-6])


def _ridge(features: Tensor, target: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A⁻¹, the coefficients, and the leave-one-out residuals (Allen's PRESS)."""
    inverse = torch.linalg.inv(features.T @ features + penalty.diag())
    coefficients = inverse @ features.T @ target
    leverage = ((features @ inverse) * features).sum(-1, keepdim=True)
    return inverse, coefficients, (target - features @ coefficients) / (1 - leverage).clamp(min=1e-3)
