"""What a server's ``/metrics`` show of ours: the one list of counters and histograms."""

from __future__ import annotations

from typing import NamedTuple

from decoding.temperature.abilities import ABILITIES


class Metric(NamedTuple):
    """A counter, or a histogram."""

    name: str  # without the _total that Prometheus's client appends to a counter's
    what: str  # its help text
    label: str | None = None  # by which it is told apart, if by any
    borders: tuple[float, ...] = ()  # upper ends of a histogram's buckets, but for the last; () for a counter

    @property
    def size(self) -> int:
        """How many numbers are kept for each value of the label: a counter's value, or buckets and a sum."""
        return len(self.borders) + 2 if self.borders else 1


NONE = "none"  # the style of requests that have none
KINDS = (*ABILITIES, "unknown")

REQUESTS = Metric(
    "decoding:requests",
    'Requests by style, "none" for those without; one with several styles counts for each.',
    "style",
)
LAMBDA = Metric(
    "decoding:lambda",
    "λ of requests, by style.",
    "style",
    (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
TEMPERATURE = Metric(
    "decoding:chosen_temperature",
    "Temperatures chosen for requests by their prompts, by the prompt's most probable ability.",
    "ability",
    tuple(tenth / 10 for tenth in range(1, 21)),
)
TOKENS_HELD = Metric(
    "decoding:chunk_tokens_held",
    "Tokens in the cache of requests with more of them than their budget, added up over the tokens that they wrote.",
)
TOKENS_READ = Metric("decoding:chunk_tokens_read", "Of these tokens those that attention read, on average over layers.")
SELECTIONS = Metric("decoding:chunk_selections", "How often a request's chunks were chosen anew.")
FALLBACKS = Metric(
    "decoding:fallbacks",
    "Requests or steps that vLLM went on with as if a part were not there, since it failed.",
    "part",
)
METRICS = {each.name: each for each in (REQUESTS, LAMBDA, TEMPERATURE, TOKENS_HELD, TOKENS_READ, SELECTIONS, FALLBACKS)}
