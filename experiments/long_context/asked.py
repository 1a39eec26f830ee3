"""What ``decoding chunk eval`` is asked for, and the cells that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkllm import ChunkAdapters, ChunkCalibration
from decoding.errors import DecodingError
from experiments.lab.cells import Cell
from experiments.long_context.baselines import ADAPTER, BY_LAYER, FULL, METHODS, all_methods

PERPLEXITY, PASSKEY = "perplexity", "passkey"


@dataclass(frozen=True)
class TextCell(Cell):
    """Held-out texts under a method.

    Attributes:
        method: of `all_methods`.
        kept: a share of the tokens so far, up to 1, or else so many tokens.
    """

    method: str
    kept: float

    @property
    def label(self) -> str:
        """See `Cell`."""
        name = "".join(character if character.isalnum() else "-" for character in self.method)
        return f"text-{name}-{self.kept:g}"

    @property
    def name(self) -> str:
        """Under what the record of a cell of all methods has this one."""
        return f"{self.method} {self.kept:g}"


@dataclass(frozen=True)
class PasskeyCell(Cell):
    """What all methods answer to prompts of a length, the key at a place."""

    length: int
    place: int

    @property
    def label(self) -> str:
        """See `Cell`."""
        return f"passkey-{self.length}-{self.place}"


@dataclass(frozen=True)
class ShortCell(Cell):
    """Texts from which nothing need be dropped."""

    @property
    def label(self) -> str:
        """See `Cell`."""
        return "short"


@dataclass(frozen=True)
class AnswerCell(Cell):
    """What all methods answer to an example of a task, whose prompt and answer have room in so many tokens."""

    task: str
    length: int
    number: int

    @property
    def label(self) -> str:
        """See `Cell`."""
        return f"{self.task}-{self.length}-{self.number}"


@dataclass(frozen=True)
class EvalOptions:
    """What a user chooses.

    Attributes:
        suites: what is measured: perplexity, passkeys, or suites of tasks.
        methods: names of `all_methods`.
        retentions: shares of the tokens so far to keep.
        budgets: numbers of tokens to keep.
        context: tokens of a text, the last ``scored`` of which are predicted.
        scored: tokens to predict in every text.
        passkey_lengths: tokens of passkey prompts.
        passkey_depths: how many places for the key, from the beginning to the end.
        passkey_keys: keys per length and depth.
        lengths: tokens of suites' prompts with their answers.
        examples: of each task and length.
        lossless: whether the lossless mode answers suites' prompts, too.
    """

    suites: tuple[str, ...] = (PERPLEXITY, PASSKEY)
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != FULL)
    retentions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    budgets: tuple[int, ...] = ()
    context: int = 8192
    scored: int = 512
    passkey_lengths: tuple[int, ...] = (1000, 2000, 4000)
    passkey_depths: int = 6
    passkey_keys: int = 2
    lengths: tuple[int, ...] = (4096, 8192)
    examples: int = 10
    lossless: bool = False

    @property
    def kept(self) -> list[float]:
        """What methods keep, most first, shares before numbers of tokens."""
        shares = {share for share in self.retentions if share < 1}  # with everything kept all methods are one
        return [*sorted(shares, reverse=True), *sorted(set(self.budgets), reverse=True)]

    @property
    def compared(self) -> list[TextCell]:
        """Every method with all that is kept, full attention first."""
        return [TextCell(FULL, 1.0), *(TextCell(method, kept) for kept in self.kept for method in self.methods)]

    @property
    def passkeys(self) -> list[PasskeyCell]:
        """Every length with every place."""
        if PASSKEY not in self.suites:
            return []
        places = range(self.passkey_depths)
        return [PasskeyCell(length, place) for length in self.passkey_lengths for place in places]

    def answers(self, tasks: Sequence[str]) -> list[AnswerCell]:
        """Every task with every length, an example of each before the next ones."""
        return [
            AnswerCell(task, length, number)
            for length in sorted(self.lengths)
            for number in range(self.examples)
            for task in tasks
        ]


def chosen_methods(names: Sequence[str], adapters: ChunkAdapters | ChunkCalibration | None) -> tuple[str, ...]:
    """Those names of `all_methods`, or all but full attention, which always belongs to it.

    Raises:
        DecodingError: no such method, or one that needs adapters where there are none, or layers' sensitivities that
            nothing tells.
    """
    knows_layers = adapters is not None and adapters.config.sensitivity is not None
    known = [
        name
        for name in all_methods()
        if name != FULL
        and (isinstance(adapters, ChunkAdapters) or not name.startswith(ADAPTER))
        and (knows_layers or not name.endswith(BY_LAYER))
    ]
    if unknown := [name for name in names if name not in known]:
        raise DecodingError(f"no method {unknown[0]!r}: choose from {'; '.join(known)}")
    return tuple(names or known)


def checked_retentions(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares of keys and values to keep.

    Raises:
        DecodingError: one outside (0, 1].
    """
    if not all(0 < share <= 1 for share in shares):
        raise DecodingError("retentions must lie in (0, 1]")
    return tuple(shares)
