"""Questions about documents, from the files that sets of questions come in."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from decoding.errors import DecodingError
from decoding.style.opening import read_lines


@dataclass(frozen=True)
class Asked:
    """A question, the documents that it is about, and its answers, any of which will do."""

    question: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]
    title: str | None = None


class Questions:
    """A set of questions, whose documents can stand among each other's.

    Args:
        told: in their order; those that have no answer, as some of SQuAD 2, have documents all the same.

    Attributes:
        asked: those that have one.
    """

    def __init__(self, told: Sequence[Asked]):
        self._told = told
        self.asked = [each for each in told if each.answers]

    @classmethod
    def read(cls, path: Path) -> Questions:
        """Reads a file of JSON lines.

        Each has a question and answers as SQuAD has them (``question``, ``context``, ``answers``: {"text": […]}) or as
        HotpotQA does (``question``, ``answer``, ``context``: {"title": […], "sentences": [[…]]}). A ``title`` says
        whose documents are alike.

        Raises:
            DecodingError: it cannot be read, or a line lacks something.
        """
        found = cls([_asked(path, place, line) for place, line in enumerate(read_lines(path), 1) if line.strip()])
        if not found.asked:
            raise DecodingError(f"{path} has no questions with an answer")
        return found

    def others(self, number: int, rng: random.Random) -> list[str]:
        """Documents that a question is not about: those of its title first, then the others, each in any order."""
        mine = self.asked[number]
        alike = [each for each in self._told if mine.title is not None and each.title == mine.title]
        found: dict[str, None] = {}
        for group in (alike, self._told):
            documents = sorted({document for each in group for document in each.documents})
            rng.shuffle(documents)
            found |= dict.fromkeys(documents)
        return [document for document in found if document not in mine.documents]


def _asked(path: Path, place: int, line: str) -> Asked:
    try:
        held = json.loads(line)
        context, answers = held["context"], held["answers"] if "answers" in held else [held["answer"]]
        answers = answers["text"] if isinstance(answers, dict) else answers
        if isinstance(context, dict):
            parts = zip(context["title"], context["sentences"], strict=True)
            context = [f"{title}\n{''.join(sentences)}" for title, sentences in parts]
        documents = (context,) if isinstance(context, str) else tuple(context)
        return Asked(held["question"], documents, tuple(dict.fromkeys(answers)), held.get("title"))
    except (ValueError, KeyError, TypeError) as error:
        raise DecodingError(
            f"{path}, line {place}: it must have a question, a context, and answers, as SQuAD or HotpotQA has them "
            f"({type(error).__name__}: {error})"
        ) from error
