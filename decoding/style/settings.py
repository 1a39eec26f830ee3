"""How a prior steers: what users choose beside the style and λ, checked in one place, and kept in saved folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import index
from typing import Any, Literal, get_args

from decoding.errors import DecodingError
from decoding.style.steering import Combine, GuardSettings

Mode = Literal["paper", "ratio"]


@dataclass(frozen=True)
class Settings:
    """How a prior steers. Each is a parameter of `StylePrior`, which describes it.

    Raises:
        DecodingError: a value that a parameter cannot have.
    """

    mode: Mode = "paper"
    orders: Sequence[int] | None = None
    weights: Sequence[float] | None = None
    combine: Combine = "matching"
    plausibility: float | None = None
    max_js: float | None = None
    entropy_gate: float | None = None
    steer_stop: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (("combine", self.combine, get_args(Combine)), ("mode", self.mode, get_args(Mode))):
            if value not in known:
                raise DecodingError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
        if self.weights is not None and self.combine == "interpolated":
            raise DecodingError('weights are for combine="matching"; the interpolated prior has none')
        if not isinstance(self.steer_stop, bool):
            raise DecodingError(f"steer_stop must be True or False, not {self.steer_stop!r}")
        take = object.__setattr__  # the numbers, from whatever holds numbers
        take(self, "orders", taken("orders", self.orders, lambda values: [index(each) for each in values]))
        take(self, "weights", taken("weights", self.weights, lambda values: [float(each) for each in values]))
        self.guards.checked()

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Settings:
        """Those of a saved folder: what an older one lacks is as it was then, what a newer one has more is left out."""
        return cls(**(_BEFORE | {name: saved[name] for name in SETTINGS if name in saved}))

    def as_dict(self) -> dict[str, Any]:
        """By name, as JSON can hold them."""
        return asdict(self)

    @property
    def guards(self) -> GuardSettings:
        """What holds the prior back."""
        return GuardSettings(self.plausibility, self.max_js, self.entropy_gate)


_BEFORE = {"steer_stop": True}  # there was no other way
SETTINGS = tuple(field.name for field in fields(Settings))


def taken(name: str, given: Any, take: Callable[[Any], Any]) -> Any:
    """A parameter's numbers, from whatever holds numbers; None stays None.

    Raises:
        DecodingError: anything else.
    """
    if given is None:
        return None
    try:
        return take(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecodingError(f"{name} must hold numbers, whole ones for orders and ids, not {given!r}") from error
