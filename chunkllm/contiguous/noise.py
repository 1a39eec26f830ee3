"""The random numbers of sampling, at hand for every place of a text, as often as it is looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Noise:
    """What ``torch.multinomial`` draws, place by place, from the device's default generator.

    One sample of probabilities p is argmax(p / e) for e of an exponential distribution: so ``torch.multinomial`` takes
    it. Here e is drawn once for each place, in the order of the text, and serves a drafted token and the token that it
    is held to. A text is thus the one that ``generate`` samples from the same seed, whatever was drafted.

    Args:
        device: of the probabilities.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._drawn: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._next: int | None = None

    def pick(self, scores: Tensor, place: int) -> Tensor:
        """Samples the tokens at a place.

        Args:
            scores: float32 [B, V]; B and V are the same in all calls.
            place: tokens before it. The first call gives the first place.

        Returns:
            int64 [B].
        """
        if self._next is None:
            self._next = place
        while self._next <= place:
            self._drawn[self._next] = torch.empty_like(scores).exponential_(1)
            self._next += 1
            self._states[self._next] = self._state()
        return (scores.softmax(-1) / self._drawn[place]).argmax(-1)

    def forget(self, place: int) -> None:
        """Places before it are not asked for any more."""
        for kept in (self._drawn, self._states):
            for old in [each for each in kept if each < place]:
                del kept[old]

    def end(self, place: int) -> None:
        """Leaves the generator as if nothing had been drawn for what comes from a place on."""
        if place in self._states:
            self._module.set_rng_state(self._states[place], *self._which)

    def _state(self) -> Tensor:
        return self._module.get_rng_state(*self._which)

    @property
    def _module(self) -> Any:
        return torch if self._device.type == "cpu" else torch.get_device_module(self._device)

    @property
    def _which(self) -> tuple[torch.device, ...]:
        return () if self._device.type in ("cpu", "mps") else (self._device,)
