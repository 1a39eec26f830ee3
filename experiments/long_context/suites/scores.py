"""How suites score answers, each as the suite's authors define it. All from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from experiments.lab.libraries import required

EXTRA = "suites"
_NOT_PRINTED = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CHINESE_MARKS = frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_MARKS = frozenset(string.punctuation)
CODE_NOISE = ("`", "#", "//")
_LETTER = re.compile(r"The correct answer is \(?([A-D])\b")

Score = Callable[[str, str, Sequence[str]], float]
"""Of an answer, by one of those that are right, and by all that could be."""


def all_found(written: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_all``: the share of the answers that stand in what was written, in whatever case."""
    return sum(_found(written, answers)) / len(answers)


def any_found(written: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_part``: whether any of them stands there."""
    return float(any(_found(written, answers)))


def _found(written: str, answers: Sequence[str]) -> list[bool]:
    text = _NOT_PRINTED.sub("\n", written).lower()
    return [answer.lower() in text for answer in answers]


def f1(written: str, answer: str, _: Sequence[str]) -> float:
    """Of words, but for case, articles and punctuation, as SQuAD compares."""
    return _f1(_words(written), _words(answer))


def chinese_f1(written: str, answer: str, _: Sequence[str]) -> float:
    """The same of words as jieba finds them."""
    words = ([_bare(word, _MARKS | _CHINESE_MARKS) for word in _cut(text)] for text in (written, answer))
    found, right = ([word for word in each if word] for each in words)
    return _f1(found, right)


def rouge(written: str, answer: str, _: Sequence[str]) -> float:
    """ROUGE-L F1 by the package rouge, as LongBench has it; 0 where it finds no words."""
    try:
        return required("rouge", EXTRA).Rouge().get_scores([written], [answer], avg=True)["rouge-l"]["f"]
    except ValueError:  # it refuses texts without words
        return 0.0


def chinese_rouge(written: str, answer: str, _: Sequence[str]) -> float:
    """The same of words as jieba finds them."""
    return rouge(" ".join(_cut(written)), " ".join(_cut(answer)), ())


def classified(written: str, answer: str, choices: Sequence[str]) -> float:
    """1 over the classes that are named, if the right one is among them; parts of its name do not count."""
    named = [choice for choice in choices if choice in written]
    for choice in named:  # LongBench takes them out of the list that it goes through, so that some are passed over
        if choice in answer and choice != answer:
            named.remove(choice)
    return 1 / len(named) if answer in named else 0.0


def counted(written: str, answer: str, _: Sequence[str]) -> float:
    """The share of the numbers that are the right one."""
    numbers = _NUMBER.findall(written)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieved(written: str, answer: str, _: Sequence[str]) -> float:
    """The same, of a paragraph's number."""
    return counted(written, _NUMBER.findall(answer)[0], ())


def similar_code(written: str, answer: str, _: Sequence[str]) -> float:
    """Similarity of the first line without a comment or quotation (Levenshtein's, of insertions and deletions)."""
    lines = written.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(noise in line for noise in CODE_NOISE)), "")
    return round(required("rapidfuzz.fuzz", EXTRA).ratio(line, answer)) / 100


def letter_chosen(written: str, answer: str, _: Sequence[str]) -> float:
    """LongBench v2's: whether the letter after "The correct answer is" is the right one."""
    found = _LETTER.search(written.replace("*", ""))
    return float(found is not None and found[1] == answer)


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(found) & Counter(right)).values())
    return 2 * same / (len(found) + len(right)) if same else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", "".join(each for each in text.lower() if each not in _MARKS)).split()


def _bare(word: str, marks: frozenset[str]) -> str:
    return "".join(each for each in word.lower() if each not in marks and not each.isspace())


def _cut(text: str) -> list[str]:
    return required("jieba", EXTRA).lcut(text)
