"""Style priors: from a text to what is added to a step's scores."""

from decoding.style.prior import StylePrior

__all__ = ["StylePrior"]
