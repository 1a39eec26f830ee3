"""RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654), made here: needles, chains of variables, words to count.

Wordings, numbers and scores are RULER's, so that tables lie side by side. Its haystack of essays is a text of the
user's choice here, and so are the questions of its last two tasks.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from scipy.special import zeta

from decoding.errors import DecodingError
from experiments.lab.libraries import required
from experiments.long_context.suites.questions import Questions
from experiments.long_context.suites.scores import EXTRA, all_found, any_found
from experiments.long_context.suites.tasks import Example, Task, Window

SUITE = "ruler"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = [round(depth) for depth in np.linspace(0, 100, 40)]
_SENTENCE = re.compile(r"\S.*?[.!?][\"'”’)\]]*(?=\s|$)|\S.+?$", re.DOTALL)
_HOPS, _COMMON = 4, 10

Kind = Literal["words", "numbers", "uuids"]


class Haystack:
    """A text to hide things in, from its beginning on.

    Args:
        documents: its parts, in their order.
    """

    def __init__(self, documents: Sequence[str]):
        self._documents = documents

    @cached_property
    def sentences(self) -> list[str]:
        """Of all documents, their white space made even."""
        return _SENTENCE.findall(re.sub(r"\s+", " ", " ".join(self._documents)))


class _AllWanted:
    """All answers are asked for."""

    def score(self, written: str, example: Example) -> float:
        """See `Task`."""
        return all_found(written, example.answers)


@dataclass(frozen=True, eq=False)
class Needles(_AllWanted):
    """Sentences that tell a value of a key, hidden among others; the values of some keys are asked for.

    Attributes:
        among: noise, a text, or other needles.
        haystack: the text.
        keys, values, queries: keys that are hidden, values of each, keys that are asked for.
        key_kind, value_kind: what they look like.
    """

    name: str
    among: Literal["noise", "text", "needles"]
    haystack: Haystack
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        hidden = self.keys * self.values
        text = self.haystack.sentences if self.among == "text" else ()
        return window.longest(lambda units: self._made(number, units), hidden, len(text) or None)

    def _made(self, number: int, units: int) -> Example:
        rng = _rng(self.name, number)
        keys = [_drawn(self.key_kind, rng) for _ in range(self.keys)]
        values = [[_drawn(self.value_kind, rng) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(key, value) for key, each in zip(keys, values, strict=True) for value in each]
        rng.shuffle(needles)
        asked = rng.sample(range(self.keys), self.queries)
        kind = self.value_kind if self.queries * self.values > 1 else self.value_kind[:-1]
        names = [keys[i] for i in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
        return self._asked(kind, query, self._hidden(needles, units, rng), [v for i in asked for v in values[i]])

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _hidden(self, needles: list[str], units: int, rng: random.Random) -> str:
        """Needles among so many other sentences, or repetitions of the noise."""
        if self.among == "text":
            sentences = self.haystack.sentences[:units]
            depths = sorted(rng.sample(_DEPTHS, len(needles)))
            return " ".join(_inserted(sentences, needles, [len(sentences) * depth // 100 for depth in depths]))
        if self.among == "noise":
            others = [_NOISE] * units
        else:
            others = [self._needle(_drawn(self.key_kind, rng), _drawn(self.value_kind, rng)) for _ in range(units)]
        return "\n".join(_inserted(others, needles, sorted(rng.sample(range(units), len(needles)))))

    def _asked(self, kind: str, query: str, context: str, answers: Sequence[str]) -> Example:
        is_one = len(answers) == 1
        some, all_are, are = ("A", "is", "is") if is_one else ("Some", "are all", "are")
        prompt = (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n{context}\nWhat {all_are} the special magic {kind} for {query} "
            "mentioned in the provided text?"
        )
        opening = f" The special magic {kind} for {query} mentioned in the provided text {are}"
        return Example(prompt, opening, tuple(answers), 128)


@dataclass(frozen=True)
class VariableTracking(_AllWanted):
    """A value goes from variable to variable; those that have it are asked for. One solved example comes before."""

    name: str = "vt"

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        return window.longest(lambda units: self._made(number, units), _HOPS + 1)

    def _made(self, number: int, units: int) -> Example:
        rng = _rng(self.name, number)
        solved, opening, names = self._chain(rng, 3, 16)  # of some 500 tokens
        prompt, its_opening, its_names = self._chain(rng, 5, units)
        shot = f"{solved}{opening} {' '.join(names)}\n"
        return Example(shot + prompt, its_opening, tuple(its_names), 30)

    def _chain(self, rng: random.Random, letters: int, units: int) -> tuple[str, str, list[str]]:
        """A question, the beginning of its answer, and the variables."""
        names = _different(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), _HOPS + 1)
        value = rng.randint(10_000, 99_999)
        told = [f"VAR {names[0]} = {value}"]
        told += [f"VAR {after} = VAR {before} " for before, after in zip(names, names[1:], strict=False)]
        context = "\n".join(_inserted([_NOISE] * units, told, sorted(rng.sample(range(units), len(told)))))
        prompt = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )
        opening = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are: "
        )
        return prompt, opening, names


@dataclass(frozen=True)
class CommonWords(_AllWanted):
    """A list of words, of which ten are much more frequent than the others. One solved example comes before."""

    name: str = "cwe"

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        few, many = ((20, 3, 1), (6, 1)) if window.tokens < 4096 else ((40, 10, 3), (30, 3))
        return window.longest(lambda units: self._made(number, units, few, many), 2 * _COMMON, len(_all_words()))

    def _made(self, number: int, units: int, few: tuple[int, int, int], many: tuple[int, int]) -> Example:
        rng = _rng(self.name, number)
        solved, found = self._list(rng, *few)
        prompt, answers = self._list(rng, units, *many)
        opening = " Answer: The top 10 words that appear most often in the list are:"
        shot = f"{solved}{opening} {_numbered(found)}\n"
        return Example(shot + prompt, opening, tuple(answers), 120)

    def _list(self, rng: random.Random, units: int, often: int, seldom: int) -> tuple[str, list[str]]:
        """A question, and the common words."""
        words = rng.sample(_all_words(), units)
        common, others = words[:_COMMON], words[_COMMON:]
        listed = common * often + others * seldom
        rng.shuffle(listed)
        prompt = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(listed)}\n"
            "Question: What are the 10 most common words in the above list?"
        )
        return prompt, common


@dataclass(frozen=True)
class FrequentWords(_AllWanted):
    """Made-up words, as frequent as a zeta distribution of exponent 2 has them; the most frequent three are asked for.

    The first in rank is written as dots, and does not count.
    """

    name: str = "fwe"

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        size = max((window.tokens - 50) // 50, 10)
        return window.longest(lambda units: self._made(number, units, size), 50)

    def _made(self, number: int, units: int, size: int) -> Example:
        rng = _rng(self.name, number)
        vocabulary = ["...", *_different(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), size - 1)]
        counts = (units * np.arange(1, size + 1) ** -2.0 / zeta(2.0)).astype(int)
        words = [word for word, count in zip(vocabulary, counts.tolist(), strict=True) for _ in range(count)]
        rng.shuffle(words)
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(words)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '....'. What are the three most frequently appeared words in the above coded text?"
        )
        opening = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return Example(prompt, opening, tuple(vocabulary[1:4]), 50)


@dataclass(frozen=True, eq=False)
class Answering:
    """Questions about documents that stand among others."""

    name: str
    questions: Questions

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        if number >= len(self.questions.asked):
            raise DecodingError(f"{self.name} has {len(self.questions.asked)} questions: choose fewer --examples")
        asked = self.questions.asked[number]
        others = self.questions.others(number, _rng(self.name, number))

        def made(units: int) -> Example:
            documents = [*asked.documents, *others[: units - len(asked.documents)]]
            _rng(self.name, number).shuffle(documents)
            return _about(documents, asked.question, asked.answers)

        return window.longest(made, len(asked.documents), len(asked.documents) + len(others))

    def score(self, written: str, example: Example) -> float:
        """See `Task`."""
        return any_found(written, example.answers)


def _about(documents: Sequence[str], question: str, answers: Sequence[str]) -> Example:
    told = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    context = "\n\n".join(f"Document {i + 1}:\n{document}" for i, document in enumerate(documents))
    prompt = f"{told}\n\nThe following are given documents.\n\n{context}\n\n{told}\n\nQuestion: {question}"
    return Example(prompt, " Answer:", tuple(answers), 32)


def tasks(haystack: Haystack, questions: dict[str, Questions]) -> Iterator[Task]:
    """All of them, in RULER's order; those with questions for each set of these."""
    yield Needles("niah_single_1", "noise", haystack)
    yield Needles("niah_single_2", "text", haystack)
    yield Needles("niah_single_3", "text", haystack, value_kind="uuids")
    yield Needles("niah_multikey_1", "text", haystack, keys=4)
    yield Needles("niah_multikey_2", "needles", haystack)
    yield Needles("niah_multikey_3", "needles", haystack, key_kind="uuids", value_kind="uuids")
    yield Needles("niah_multivalue", "text", haystack, values=4)
    yield Needles("niah_multiquery", "text", haystack, keys=4, queries=4)
    yield from (VariableTracking(), CommonWords(), FrequentWords())
    yield from (Answering(f"qa_{name}", each) for name, each in questions.items())


def _rng(task: str, number: int) -> random.Random:
    return random.Random(f"{task} {number}")


def _inserted(others: Sequence[str], hidden: Sequence[str], before: Sequence[int]) -> list[str]:
    """Hidden things among others, each before one of them, or behind the last."""
    made: list[str] = []
    at = 0
    for place, each in zip(before, hidden, strict=True):
        made += [*others[at:place], each]
        at = place
    return [*made, *others[at:]]


def _different(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _drawn(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(_words('adjective'))}-{rng.choice(_words('noun'))}"


@cache
def _words(category: str) -> list[str]:
    return sorted(set(required("wonderwords", EXTRA).RandomWord().filter(include_categories=[category])))


@cache
def _all_words() -> list[str]:
    return sorted({word for category in ("noun", "adjective", "verb") for word in _words(category)})
