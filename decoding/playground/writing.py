"""One text while `decoding.generate` writes it: what its steps say, and how long they take."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor
from transformers import LogitsProcessor

from decoding.generation import generate
from decoding.playground.asked import Asked
from decoding.playground.turns import Stopped, Turns
from decoding.playground.view import AT_LENGTH, ENDED, STOPPED, Read, Side, Token
from decoding.style.bound import BoundStyle
from decoding.temperature.processors import BoundTemperature
from decoding.tokens import TokenTexts, ends_of_sequence


class _Step(NamedTuple):
    """Scores of one row before and behind the style, float [1, V] each, and the order that matched."""

    before: Tensor
    after: Tensor
    order: int | None


class _Watched(LogitsProcessor):
    """A style, or none, that remembers what it did until somebody asks."""

    def __init__(self, style: BoundStyle | None):
        self._style = style
        self.steps: deque[_Step] = deque()
        self.seconds = 0.0  # of watching, which belongs to no step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        after = scores if self._style is None else self._style(input_ids, scores)
        began = perf_counter()
        order = None if self._style is None else self._style.matching_orders(input_ids)[0]
        self.steps.append(_Step(scores, after, order))
        self.seconds += perf_counter() - began
        return after


class Writing:
    """Writes one text in turns with others, into a `Side` that somebody else reads meanwhile. A streamer.

    Args:
        asked: what is to be written.
        turns: whose ``who``-th thread this is.
        who: likewise.
        side: what it becomes.
        chunks: an attached selection, or None.
    """

    def __init__(self, asked: Asked, turns: Turns, who: int, side: Side, chunks: Any | None = None):
        self._asked, self._turns, self._who, self._side, self._chunks = asked, turns, who, side, chunks
        self._has_prompt = False
        self._began = 0.0
        self._counted = Read(0, 0)
        self._temperature: BoundTemperature | None = None

    def write(self, model: Any, tokenizer: Any, processors: Sequence[Any]) -> None:
        """Does so.

        Args:
            model: reads chunks if ``chunks`` is attached to it.
            tokenizer: its own.
            processors: bound ones.
        """
        self._texts = TokenTexts(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        self._ends = ends_of_sequence(model, tokenizer)
        self._temperature = next((each for each in processors if isinstance(each, BoundTemperature)), None)
        self._watched = _Watched(next((each for each in processors if isinstance(each, BoundStyle)), None))
        others = [each for each in processors if not isinstance(each, BoundStyle)]
        try:
            with self._turns.turn(self._who, self._asked.seed):
                generate(
                    model,
                    self._asked.prompt,
                    tokenizer=tokenizer,
                    logits_processor=[self._watched, *others],
                    chat=self._asked.chat,
                    max_new_tokens=self._asked.max_new_tokens,
                    streamer=self,
                )
        except Stopped:
            self._side.end = STOPPED

    def put(self, tokens: Tensor) -> None:
        """Takes in the prompt, int64 [1, L], and then a token at a time, and lets the others take their steps."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        side = self._side
        if side.tokens:
            side.seconds += perf_counter() - self._began - self._watched.seconds
            side.steps += 1
        elif self._temperature is not None:
            (side.explained,) = self._temperature.explained()
        side.tokens.append(self._token(int(tokens)))
        if self._chunks is not None:
            self._count_reads()
        if int(tokens) in self._ends:
            side.end = ENDED
        elif len(side.tokens) == self._asked.max_new_tokens:
            side.end = AT_LENGTH
        else:
            self._turns.passes(self._who)
        self._began, self._watched.seconds = perf_counter(), 0.0

    def end(self) -> None:
        """Shows what the last tokens began and did not end."""
        if rest := self._texts.rest():
            last = self._side.tokens.pop()
            self._side.tokens.append(last._replace(text=last.text + rest))

    def _token(self, id_: int) -> Token:
        step = self._watched.steps.popleft()
        before, after = (float(scores[0].float().log_softmax(-1)[id_]) for scores in (step.before, step.after))
        return Token(self._texts.add(id_), math.exp(before), math.exp(after), step.order)

    def _count_reads(self) -> None:
        assert self._chunks is not None
        stats = self._chunks.stats
        now = Read(stats["read"], stats["held"])
        if now.held > self._counted.held:
            self._side.reads.append(Read(now.read - self._counted.read, now.held - self._counted.held))
            self._counted = now
