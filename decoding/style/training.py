"""What users call a style, as an n-gram model for a tokenizer: trained on a text, or opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np

from decoding.cache import Key, kept_file
from decoding.errors import DecodingError
from decoding.style.files import check_tokenizer
from decoding.style.registered import DEFAULT_STYLE
from decoding.style.source import Corpus, StyleSource
from decoding.tokens import (
    control_ids,
    encoding_fingerprint,
    id_count,
    texts_within,
    tokenize,
    tokenizer_fingerprint,
)
from ngram import NGramError, NGramModel
from ngram.smoothing import Smoothing, checked_cutoffs
from ngram.storage import FORMAT
from ngram.tables import MAX_ORDER

DEFAULT_ORDER = 3
DEFAULT_SMOOTHING = "kneser-ney"


def check_training(order: int, smoothing: str, prune: Sequence[int] = (0,)) -> None:
    """Refuses parameters of `train_prior` before a text is read.

    Raises:
        DecodingError: as said.
    """
    if isinstance(order, bool) or not isinstance(order, Integral) or not 1 <= order <= MAX_ORDER:
        raise DecodingError(f"order must be a whole number from 1 to {MAX_ORDER}, not {order!r}")
    if smoothing not in get_args(Smoothing):
        raise DecodingError(f"unknown smoothing {smoothing!r}: choose from {', '.join(get_args(Smoothing))}")
    try:
        checked_cutoffs(prune, int(order))
    except NGramError as error:
        raise DecodingError(str(error)) from error


def train_prior(
    corpus: Corpus,
    tokenizer: Any,
    order: int = DEFAULT_ORDER,
    smoothing: str = DEFAULT_SMOOTHING,
    prune: Sequence[int] = (0,),
) -> NGramModel:
    """Trains an n-gram model of a corpus and marks it with the tokenizer's fingerprint.

    Every document ends on the tokenizer's end-of-sequence token, so that the prior knows where texts end. Unseen ids
    share in the uniform distribution (``pad_vocab`` of `NGramModel.train`): a model may write words that the corpus
    lacks. ``prune`` is that of `NGramModel.train`.

    Raises:
        DecodingError: the corpus is too short, or the parameters are off.
    """
    check_training(order, smoothing, prune)
    return prior_of_tokens(tokenize(corpus.documents, tokenizer), corpus, tokenizer, order, smoothing, prune)


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one, which is called as the first."""
    return Corpus(corpora[0].name, tuple(text for corpus in corpora for text in corpus.documents))


def prior_of_tokens(
    documents: Sequence[np.ndarray],
    corpus: Corpus,
    tokenizer: Any,
    order: int,
    smoothing: str,
    prune: Sequence[int] = (0,),
) -> NGramModel:
    """`train_prior` for a corpus that is tokenized already."""
    controls = control_ids(tokenizer)
    texts = [text for ids in documents for text in texts_within(ids, controls)]
    options = options_of(corpus.name, tokenizer)
    options["metadata"] |= {"corpus_sha256": corpus.sha256}
    try:
        return NGramModel.train(texts, order=order, smoothing=smoothing, prune=prune, **options)  # type: ignore[arg-type]
    except NGramError as error:
        raise DecodingError(f"cannot train a prior of style {corpus.name!r}: {error}") from error


def options_of(style: str, tokenizer: Any) -> dict[str, Any]:
    """What `NGramModel.train` is told of a style and a tokenizer, for every prior."""
    name, sha256 = tokenizer_fingerprint(tokenizer)
    return {
        "vocab_size": id_count(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_vocab": True,
        "metadata": {"style": style, "tokenizer": name, "tokenizer_sha256": sha256},
    }


def name_and_file(
    spec: str | PathLike | StyleSource,
    tokenizer: Any,
    *,
    order: int = DEFAULT_ORDER,
    smoothing: str = DEFAULT_SMOOTHING,
) -> tuple[str, str]:
    """A style's name, and the saved prior or style that holds it, for engines that open these themselves.

    Args:
        spec: as for `StyleSource.parse`. A text is trained once, and kept in the cache folder.
        tokenizer: the generating model's.
        order: as for `train_prior`.
        smoothing: as for `train_prior`.

    Raises:
        DecodingError: an unknown style, or a prior of another tokenizer.
    """
    source = StyleSource.parse(spec)
    if source.is_text:
        return source.name, str(trained_file(source.corpus(), tokenizer, order, smoothing))
    if source.kind == "hub":
        return source.name, source.where
    return source.name_of(source.saved(tokenizer).model), source.where


def trained_file(corpus: Corpus, tokenizer: Any, order: int, smoothing: str) -> Path:
    """The prior of a corpus, trained once and kept in the cache folder.

    Raises:
        DecodingError: as `train_prior`.
    """

    def train(path: Path) -> None:
        train_prior(corpus, tokenizer, order, smoothing).save(path)

    key = _PriorKey(FORMAT, _RULES, corpus.name, corpus.sha256, encoding_fingerprint(tokenizer), order, smoothing)
    return kept_file(key.path, train, _opens)


_RULES = "plain text, texts apart"
"""How texts become tokens to count; another sentence where that changes."""


@dataclass(frozen=True)
class _PriorKey(Key):
    folder: ClassVar[str] = "priors"
    suffix: ClassVar[str] = ".safetensors"
    format: str
    rules: str
    name: str
    text: str
    tokenizer: str
    order: int
    smoothing: str


def _opens(path: Path) -> bool:
    try:
        NGramModel.load(path)
    except NGramError:
        return False
    return True


def resolve_style(
    style: str | PathLike | NGramModel | StyleSource = DEFAULT_STYLE,
    tokenizer: Any | None = None,
    *,
    order: int = DEFAULT_ORDER,
    smoothing: str = DEFAULT_SMOOTHING,
) -> NGramModel:
    """The n-gram model of what users call a style: a model, or anything that `StyleSource.parse` takes.

    Raises:
        DecodingError: an unknown style, text without a tokenizer, or a prior of another tokenizer.
    """
    if isinstance(style, NGramModel):
        if tokenizer is not None:
            check_tokenizer(style, tokenizer)
        return style
    source = StyleSource.parse(style)
    if not source.is_text:
        return source.saved(tokenizer).model
    if tokenizer is None:
        raise DecodingError(f"style {source.where!r} needs a tokenizer to become a prior")
    return NGramModel.load(trained_file(source.corpus(), tokenizer, order, smoothing))
