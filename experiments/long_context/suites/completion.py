"""Completion of code: the next line, behind as much of a source file as a prompt holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from decoding.errors import DecodingError
from experiments.long_context.suites.scores import CODE_NOISE, similar_code
from experiments.long_context.suites.tasks import Example, Window

SUITE = "completion"
_SHORTEST = 12  # characters of a line that is worth writing
_TRIED = 1000


@dataclass(frozen=True, eq=False)
class NextLine:
    """The line that follows, as LongBench's lcc scores it.

    Attributes:
        documents: source files; several stand behind one another, as those of a repository.
    """

    documents: Sequence[str]
    name: str = "next_line"

    def example(self, number: int, window: Window) -> Example:
        """See `Task`. The line is any one with enough before it, and without what its score does not count."""
        lines = [line for document in self.documents for line in document.splitlines(keepends=True)]
        rng = random.Random(number)
        for _ in range(_TRIED):
            place = rng.randrange(len(lines))
            line = lines[place].strip()
            is_plain = len(line) >= _SHORTEST and not any(noise in line for noise in CODE_NOISE)
            if not is_plain or window.fits(_behind(lines[:place], line)):
                continue
            before = lines[:place]
            return window.longest(partial(_behind_last, before, line), 1, place)
        raise DecodingError(f"the text has no line behind {window.tokens:,} tokens: give more, or shorter --lengths")

    def score(self, written: str, example: Example) -> float:
        """See `Task`."""
        bare = "\n".join(map(str.strip, written.split("\n")))
        return similar_code(bare, example.answers[0], ())


def _behind_last(lines: Sequence[str], line: str, count: int) -> Example:
    return _behind(lines[-count:], line)


def _behind(lines: Sequence[str], line: str) -> Example:
    return Example("".join(lines), "", (line,), 64, is_chat=False, ends_line=True)
