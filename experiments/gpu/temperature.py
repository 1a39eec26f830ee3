"""How long the embedded selector takes to choose temperatures, for one prompt and for many."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from decoding.temperature.selector import TemperatureSelector
from experiments.gpu.record import Record
from experiments.lab.device import device_seconds
from experiments.lab.figures import Figure, time_of
from experiments.temperature.bench import WORDS

_CHECK = "abilities as on the host"
_ALLOWED = 1e-3  # of a probability


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batches: prompts that are read together.
        tokens: of each.
        rounds: how often.
    """

    batches: tuple[int, ...] = (1, 64)
    tokens: int = 128
    rounds: int = 30


CARD, TOY = Sizes(), Sizes(batches=(1, 2), tokens=16, rounds=2)


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds milliseconds of choosing. Prompts go in as texts, and temperatures come out as numbers.

    Raises:
        DecodingError: the embedded selector is not installed.
    """
    selector, host = (TemperatureSelector.from_pretrained(device=str(place)) for place in (device, "cpu"))
    prompts = _prompts(selector, max(sizes.batches), sizes.tokens)

    def same() -> tuple[bool, str]:
        apart = float((selector.abilities(prompts).cpu() - host.abilities(prompts)).abs().max())
        return apart <= _ALLOWED, f"furthest apart {apart:.2g}, allowed {_ALLOWED:g}"

    record.check(_CHECK, same)
    for batch in sizes.batches:
        seconds = device_seconds([partial(selector.select, prompts[:batch])], sizes.rounds, device)[0]
        what = f"choosing for {batch} prompt{'s' * (batch > 1)} of {sizes.tokens} tokens"
        record.figure(Figure(what, *time_of(seconds)), _CHECK)


def _prompts(selector: TemperatureSelector, count: int, tokens: int) -> list[str]:
    """So many, which differ, of so many tokens."""
    tokenizer = selector.encoder.tokenizer
    texts = [f"{i} {WORDS}" * (tokens // 16) for i in range(count)]
    return [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]) for text in texts]
