"""Style priors: from a text to what is added to a step's scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoding.style.prior import StylePrior

__all__ = ["StylePrior"]


def __getattr__(name: str) -> Any:
    """Imports it when it is asked for: the command line knows styles' names, and nothing heavy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from decoding.style.prior import StylePrior

    return StylePrior
