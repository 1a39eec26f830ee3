"""What is known of a run while it is under way: what pages show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from decoding.temperature.explained import Explained


class Token(NamedTuple):
    """One token that was written.

    Attributes:
        text: what it adds.
        before: its probability before the style, of temperature 1 and all tokens; None where nobody tells.
        after: the same behind the style.
        order: the highest n-gram order whose context the style knows; None without a style, or where nobody tells.
    """

    text: str
    before: float | None = None
    after: float | None = None
    order: int | None = None


class Read(NamedTuple):
    """What attention read in one step, the mean over layers, of the tokens that the cache holds."""

    read: float
    held: int


@dataclass
class Side:
    """One of the two texts, as far as it is written.

    Attributes:
        tokens: of the text.
        seconds: that its steps took behind the first one, which also reads the prompt; of no other work.
        steps: how many these are.
        reads: of each step, where chunks are selected.
        explained: why it has its temperature, where that was chosen.
        end: why there is no more: "" while it is being written.
    """

    tokens: list[Token] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    reads: list[Read] = field(default_factory=list)
    explained: Explained | None = None
    end: str = ""

    @property
    def text(self) -> str:
        """What is written."""
        return "".join(token.text for token in self.tokens)

    @property
    def speed(self) -> float | None:
        """Tokens per second; None before the second one."""
        return self.steps / self.seconds if self.steps and self.seconds else None


@dataclass
class View:
    """A run.

    Attributes:
        status: what happens now, a sentence.
        plain: the text without any of the methods.
        steered: the text with them.
    """

    status: str
    plain: Side = field(default_factory=Side)
    steered: Side = field(default_factory=Side)


ENDED, AT_LENGTH, STOPPED = "ended by itself", "reached its length", "stopped"
