"""What suites are made of: examples, tasks that make them and score answers, and windows that they must fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.tokens import as_chats, has_chat_template

_FEW = 16


@dataclass(frozen=True)
class Example:
    """A prompt, and what is right behind it.

    Attributes:
        prompt: what a user says.
        opening: of the answer, which the model goes on from.
        answers: any or all of which are right: the task's score tells.
        new_tokens: the most that an answer has.
        choices: what could be right, where a score wants to know.
        is_chat: whether the model's chat template goes around the prompt, if it has one.
        ends_line: whether the answer ends with its first line.
    """

    prompt: str
    opening: str
    answers: tuple[str, ...]
    new_tokens: int
    choices: tuple[str, ...] = ()
    is_chat: bool = True
    ends_line: bool = False


class Task(Protocol):
    """One line of a suite's table."""

    @property
    def name(self) -> str:
        """In the table."""

    def example(self, number: int, window: Window) -> Example:
        """The same one for the same number and window.

        Raises:
            DecodingError: there are fewer, or none that fits.
        """

    def score(self, written: str, example: Example) -> float:
        """Of an answer, from 0 to 1."""


@dataclass(frozen=True)
class Window:
    """Room for a prompt and its answer.

    Attributes:
        tokenizer: the model's.
        tokens: the most of both together.
    """

    tokenizer: Any
    tokens: int

    def ids(self, example: Example) -> Tensor:
        """What the model reads, int64 [1, T]."""
        return torch.tensor([self._encoded(example)])

    def fits(self, example: Example) -> bool:
        """Whether there is room."""
        return self._left(example) >= 0

    def _left(self, example: Example) -> int:
        """Tokens for which there is still room; fewer than 0 if it does not fit."""
        return self.tokens - len(self._encoded(example)) - example.new_tokens

    def _encoded(self, example: Example) -> list[int]:
        if example.is_chat and has_chat_template(self.tokenizer):
            (text,) = as_chats([example.prompt], self.tokenizer)
            return self.tokenizer(text + example.opening, add_special_tokens=False)["input_ids"]
        return self.tokenizer(example.prompt + example.opening)["input_ids"]

    def longest(self, make: Callable[[int], Example], least: int, most: int | None = None) -> Example:
        """The example of most units that fits.

        Args:
            make: an example of so many units, which grows with them, the same one each time.
            least: units that it must have.
            most: units that there are; None if there is no end of them.

        Raises:
            DecodingError: the smallest is too long, or the largest much too short.
        """
        if not self.fits(make(least)):
            raise DecodingError(f"prompts of {self.tokens:,} tokens have no room for the task: choose longer ones")
        few, more = (len(self._encoded(make(least + count))) for count in (0, _FEW))
        bound = least + 2 * self.tokens * _FEW // max(more - few, _FEW)
        if most is not None and (left := self._left(whole := make(most))) >= 0:
            self._require_nearly_filled(left)
            return whole
        units = range(least + 1, bound if most is None else min(bound, most + 1))
        return make(least + bisect_left(units, True, key=lambda count: not self.fits(make(count))))

    def _require_nearly_filled(self, left: int) -> None:
        if left > 0.1 * self.tokens:
            raise DecodingError(
                f"there is text for {self.tokens - left:,} of {self.tokens:,} tokens: give more, or shorter --lengths"
            )

    def cut(self, example: Example) -> Example:
        """An example whose prompt lacks its middle, if it is too long: LongBench's way."""
        if self.fits(example):
            return example
        ids = self.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
        around = len(self._encoded(example)) - len(ids)
        half = (self.tokens - example.new_tokens - around - _FEW) // 2  # the halves, joined, may be other tokens
        if half < 1:
            raise DecodingError(f"prompts of {self.tokens:,} tokens have no room for the task: choose longer ones")
        ends = (self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        return replace(example, prompt="".join(ends))
