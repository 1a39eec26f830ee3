"""`Explained`: why a prompt has its temperature."""

from __future__ import annotations

from dataclasses import dataclass

BLANK = "blank"
UNREAD = "language not read by the encoder"
NO_GAIN = "no gain over the best fixed"


@dataclass(frozen=True)
class Explained:
    """What led to the temperature of a prompt.

    Attributes:
        prompt: the text that was read.
        abilities: the probability of each; 1/6 each where the prompt was not read.
        temperatures: those tried, ascending.
        expected: the score that is expected at each, as a share of the best; None where policy "curve" has not read
            the prompt.
        errors: with policy "curve" the standard error of each score's distance from that at ``best_fixed``; None as
            for ``expected``.
        best_fixed: with policy "curve" the best temperature for all prompts.
        temperature: the chosen one.
        policy: "ability" or "curve".
        reason: why it is what is best for all prompts: `BLANK`, `UNREAD` (also of a script that the encoder does not
            know), or `NO_GAIN`; None where it was chosen for this prompt.
    """

    prompt: str
    abilities: dict[str, float]
    temperatures: tuple[float, ...]
    expected: tuple[float, ...] | None
    errors: tuple[float, ...] | None
    best_fixed: float | None
    temperature: float
    policy: str
    reason: str | None

    @property
    def ability(self) -> str | None:
        """The most probable ability; None where the prompt was not read."""
        return None if self.reason in (BLANK, UNREAD) else max(self.abilities, key=self.abilities.__getitem__)
