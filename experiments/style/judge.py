"""Judges of style that know nothing of the n-gram model that steers.

A text's perplexity under the model that steered it falls by construction. So a corpus is split: one part steers, a
second trains the judges here, a third tests them. One judge is a classifier of character n-grams, which also sees
topic and names. Another, Burrows's Delta (Burrows 2002, doi 10.1093/llc/17.3.267), counts only function words, which
hold little topic; it stands beside the length of sentences. A third verifies authors (`experiments.style.likeness`).
What each says of held-out text, the author's own and others', are its ceiling and its floor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from decoding.errors import DecodingError
from decoding.style.source import Corpus
from experiments.lab.libraries import required
from experiments.style.likeness import Embed, Likeness

PART_ENDS = (0.7, 0.9)  # of steering and of judging, as shares of the text
PASSAGE = 260  # characters, as 64 generated tokens are
BUNDLE = 20  # passages: function words are too rare to count in one
MOST_JUDGING, MOST_TESTING = 800, 300  # passages of a corpus
FUNCTION_WORDS = (
    "a about after again against all also always am among an and another any are as at be because been before being "
    "between both but by can could did do does down every for from had hath have he her here him himself his how i if "
    "in into is it its itself may me might more most much must my never no nor not now of off on one only or other "
    "our out over own shall she should so some such than that the thee their them then there therefore these they "
    "this those thou though through thy till to too unto up upon very was we were what when where whether which while "
    "who will with without would yet you your"
)
_PARAGRAPH = re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")


class Split(NamedTuple):
    """Parts of a corpus, in its order and without overlap: what steers, what trains a judge and what tests it."""

    steering: Corpus
    judging: Corpus
    testing: Corpus


def split_corpus(corpus: Corpus) -> Split:
    """The first 70 % of a corpus's characters, the next 20 % and the last 10 %, cut where paragraphs end.

    Raises:
        DecodingError: a part has fewer passages than a judge needs.
    """
    paragraphs = [(i, text) for i, document in enumerate(corpus.documents) for text in _PARAGRAPH.findall(document)]
    lengths = np.array([len(text) for _, text in paragraphs])
    middles = (lengths.cumsum() - lengths / 2) / lengths.sum()
    first, second = np.searchsorted(middles, PART_ENDS)
    parts = (paragraphs[:first], paragraphs[first:second], paragraphs[second:])
    split = Split(*(Corpus(corpus.name, _documents(part)) for part in parts))
    for part in (split.judging, split.testing):
        _require_passages(part.name, passages(part))
    return split


def _documents(paragraphs: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    grouped = groupby(paragraphs, key=lambda paragraph: paragraph[0])
    texts = ("".join(text for _, text in group).strip() for _, group in grouped)
    return tuple(text for text in texts if text)


def passages(corpus: Corpus, characters: int = PASSAGE) -> list[str]:
    """A corpus in pieces of whole words that reach ``characters``, on one line each, without the shorter rest.

    A piece runs on into the next document, since those of some corpora are shorter than a piece.
    """
    text = " ".join(word for document in corpus.documents for word in document.split())
    return re.findall(rf"\S.{{{characters - 1},}}?(?= |$)", text)


def _require_passages(name: str, texts: Sequence[str]) -> None:
    if len(texts) < BUNDLE:
        raise DecodingError(
            f"style corpus {name} is too short to judge by: a part of it has {len(texts)} passages of {PASSAGE} "
            f"characters and {BUNDLE} are needed, so give a text of at least "
            f"{BUNDLE * PASSAGE * 12:,} characters with blank lines between its paragraphs"
        )


class Authors:
    """Corpora to tell apart, and what the judges of each of them share.

    Args:
        judging: a corpus to learn from, for each of two or more authors.
        testing: text of the same authors to measure the judges on.
        embed: makes unit vectors for `StyleJudge.likeness`; TF-IDF of character n-grams by default.

    Attributes:
        names: of the authors, in order.
        function_words: what measures Delta.
        vectorizer: makes TF-IDF of character n-grams, fitted on the judging passages.
        passages: at most `MOST_TESTING` testing passages of each author, by name.
        judging: sparse float64 [J, F], vectors of at most `MOST_JUDGING` passages an author.
        testing: sparse float64 [T, F], vectors of those in ``passages``.
        judging_authors: str [J].
        testing_authors: str [T].
        likeness: to each author, by name.

    Raises:
        DecodingError: fewer than two authors, not the same ones, too little text of one, or without scikit-learn.
    """

    def __init__(self, judging: Mapping[str, Corpus], testing: Mapping[str, Corpus], embed: Embed | None = None):
        if len(judging) < 2 or judging.keys() != testing.keys():
            raise DecodingError("a judge needs two or more style corpora, each with a part to judge by and one to test")
        self.names = list(judging)
        learnt = [_drawn(judging[name], MOST_JUDGING) for name in self.names]
        tested = [_drawn(testing[name], MOST_TESTING) for name in self.names]
        self.function_words = FunctionWords(learnt, tested)
        self.passages = dict(zip(self.names, tested, strict=True))
        self.vectorizer = required("sklearn.feature_extraction.text", "compare").TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=3, max_features=60_000
        )
        self.judging = self.vectorizer.fit_transform([text for texts in learnt for text in texts])
        self.testing = self.vectorizer.transform([text for texts in tested for text in texts])
        self.judging_authors = np.repeat(self.names, [len(texts) for texts in learnt])
        self.testing_authors = np.repeat(self.names, [len(texts) for texts in tested])
        likeness = partial(Likeness, embed or self.vectorizer.transform)
        self.likeness = {name: likeness(texts) for name, texts in zip(self.names, learnt, strict=True)}


def _drawn(corpus: Corpus, most: int) -> list[str]:
    texts = passages(corpus)
    _require_passages(corpus.name, texts)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:most]]


class FunctionWords:
    """Burrows's Delta to each of several authors.

    Frequencies of function words are z-scored over bundles of passages. Delta is the mean absolute difference of two
    texts' z-scores.

    Args:
        judging: passages to learn from, by author.
        testing: passages to measure on, by author.

    Attributes:
        accuracy: share of the testing bundles whose nearest author is their own.
        sentence_words: mean length of each author's sentences.
    """

    def __init__(self, judging: Sequence[Sequence[str]], testing: Sequence[Sequence[str]]):
        bundles = np.stack([_frequencies(bundle) for texts in judging for bundle in _bundles(texts)])
        self._mean, deviation = bundles.mean(0), bundles.std(0)
        self._scale = np.where(deviation > 0, deviation, np.inf)  # what no bundle has, or all alike, says nothing
        self._authors = np.stack([self._z_scores(texts) for texts in judging])
        self.accuracy = float(
            np.mean([self.deltas(b).argmin() == i for i, texts in enumerate(testing) for b in _bundles(texts)])
        )
        self.sentence_words = [_sentence_words(texts) for texts in judging]

    def deltas(self, texts: Sequence[str]) -> np.ndarray:
        """Delta between the texts, taken together, and each author, float64 [A].

        Raises:
            DecodingError: the texts hold no word.
        """
        return np.abs(self._z_scores(texts) - self._authors).mean(1)

    def _z_scores(self, texts: Sequence[str]) -> np.ndarray:
        return (_frequencies(texts) - self._mean) / self._scale


def _bundles(texts: Sequence[str]) -> list[Sequence[str]]:
    return [texts[i : i + BUNDLE] for i in range(0, len(texts) - BUNDLE + 1, BUNDLE)]


def _frequencies(texts: Sequence[str]) -> np.ndarray:
    words = _words(texts)
    counts = Counter(words)
    return np.array([counts[word] for word in FUNCTION_WORDS.split()]) / len(words)


def _words(texts: Sequence[str]) -> list[str]:
    words = _WORD.findall(" ".join(texts).lower())
    if not words:
        raise DecodingError("a text without words has no style to judge: give texts with words")
    return words


def _sentence_words(texts: Sequence[str]) -> float:
    return len(_words(texts)) / max(1, len(_SENTENCE_END.findall(" ".join(texts))))


class StyleJudge:
    """Says how much texts are like one author out of several.

    Args:
        target: the author.
        judging: a corpus to learn from, for each of two or more authors.
        testing: text of the same authors to measure the judge on.

    Attributes:
        accuracy: of `probability` above ½ on the testing passages, balanced: mean of the target's and of the others'.
        function_word_accuracy: share of all authors' testing bundles that have the smallest Delta to their own author.
        target_sentence_words: mean length of the target's sentences in words.
        likeness: cosine of each text, as an embedding, to the target's.

    Raises:
        DecodingError: no such target, or as `Authors`.
    """

    def __init__(self, target: str, judging: Mapping[str, Corpus], testing: Mapping[str, Corpus]):
        self._learn(target, Authors(judging, testing))

    @classmethod
    def among(cls, authors: Authors, target: str) -> StyleJudge:
        """A judge that shares its features with those of other targets.

        Raises:
            DecodingError: no such target.
        """
        judge = cls.__new__(cls)
        judge._learn(target, authors)
        return judge

    def _learn(self, target: str, authors: Authors) -> None:
        if target not in authors.names:
            raise DecodingError(f"no style corpus {target!r} to judge by: take one of {', '.join(authors.names)}")
        self._vectorizer = authors.vectorizer
        self._classifier = required("sklearn.linear_model", "compare").LogisticRegression(
            C=5.0, class_weight="balanced", solver="newton-cg", max_iter=300
        )  # lbfgs, the default, gets to the same place in three times as long
        self._classifier.fit(authors.judging, authors.judging_authors == target)
        is_target = authors.testing_authors == target
        right = self._classifier.predict(authors.testing) == is_target
        self.accuracy = float((right[is_target].mean() + right[~is_target].mean()) / 2)
        self._function_words = authors.function_words
        self._passages, self._target = authors.passages, target
        self.likeness = authors.likeness[target]
        self._index = authors.names.index(target)
        self.function_word_accuracy = authors.function_words.accuracy
        self.target_sentence_words = authors.function_words.sentence_words[self._index]

    def probability(self, texts: Sequence[str]) -> np.ndarray:
        """How likely each text is the target's and not another author's, by its character n-grams.

        Args:
            texts: at least one, of about a passage's length.

        Returns:
            float64 [N].
        """
        return self._classifier.predict_proba(self._vectorizer.transform(texts))[:, 1]

    def delta(self, texts: Sequence[str]) -> float:
        """Burrows's Delta between the texts, taken together, and the target.

        Fewer words give a larger Delta, so compare it only between sets of texts of one size.

        Raises:
            DecodingError: the texts hold no word.
        """
        return float(self._function_words.deltas(texts)[self._index])

    def sentence_words(self, texts: Sequence[str]) -> float:
        """Mean length of the texts' sentences in words, to set beside `target_sentence_words`.

        It is words over ends of sentences, so that a text cut within a sentence counts with its share of that. Ends are
        found by punctuation, which is fast; an abbreviation's full stop passes for one, in all texts alike.

        Raises:
            DecodingError: the texts hold no word.
        """
        return _sentence_words(texts)

    def measures(self, texts: Sequence[str]) -> dict[str, float]:
        """What all judges say of texts, by name: means over texts, and of the texts together."""
        return {
            "judge": float(self.probability(texts).mean()),
            "likeness": float(self.likeness(texts).mean()),
            "delta": self.delta(texts),
            "sentence_words": self.sentence_words(texts),
        }

    def ceiling(self, count: int) -> dict[str, float]:
        """`measures` of at most ``count`` held-out passages of the author: as many as there are texts to set beside."""
        return self.measures(self._passages[self._target][:count])

    def floor(self, count: int) -> dict[str, float]:
        """Likewise of each other author, in the mean."""
        others = [self.measures(texts[:count]) for name, texts in self._passages.items() if name != self._target]
        return {key: float(np.mean([other[key] for other in others])) for key in others[0]}


def train_judges(
    corpora: Mapping[str, Split], targets: Sequence[str], embed: Embed | None = None
) -> dict[str, StyleJudge]:
    """A judge for each target, out of all the corpora.

    Raises:
        DecodingError: as `StyleJudge`.
    """
    judging = {name: split.judging for name, split in corpora.items()}
    authors = Authors(judging, {name: split.testing for name, split in corpora.items()}, embed)
    return {target: StyleJudge.among(authors, target) for target in targets}
