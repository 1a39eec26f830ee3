"""What users call a style, as an n-gram model for a tokenizer: trained on a text, or opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from decoding.cache import Key, kept_file
from decoding.errors import DecodingError
from decoding.hub import may_be_hub_id
from decoding.style.files import check_tokenizer, is_saved_prior, load_prior
from decoding.style.registered import DEFAULT_STYLE
from decoding.style.source import Corpus, load_corpus, split_name
from decoding.tokens import encoding_fingerprint, tokenize, tokenizer_fingerprint
from ngram import NGramError, NGramModel
from ngram.storage import FORMAT

DEFAULT_ORDER = 3
DEFAULT_SMOOTHING = "kneser-ney"


def train_prior(
    corpus: Corpus, tokenizer: Any, order: int = DEFAULT_ORDER, smoothing: str = DEFAULT_SMOOTHING
) -> NGramModel:
    """Trains an n-gram model of a corpus and marks it with the tokenizer's fingerprint.

    Every document ends on the tokenizer's end-of-sequence token, so that the prior knows where texts end. Unseen ids
    share in the uniform distribution (``pad_vocab`` of `NGramModel.train`): a model may write words that the corpus
    lacks.

    Raises:
        DecodingError: the corpus is too short, or the parameters are off.
    """
    return prior_of_tokens(tokenize(corpus.documents, tokenizer), corpus, tokenizer, order, smoothing)


def prior_of_tokens(
    documents: Sequence[np.ndarray], corpus: Corpus, tokenizer: Any, order: int, smoothing: str
) -> NGramModel:
    """`train_prior` for a corpus that is tokenized already."""
    name, sha256 = tokenizer_fingerprint(tokenizer)
    eos = tokenizer.eos_token_id
    documents = [ids[ids != eos] for ids in documents]
    try:
        return NGramModel.train(
            documents,
            vocab_size=len(tokenizer),
            order=order,
            smoothing=smoothing,  # type: ignore[arg-type]  # checked there
            eos_id=eos,
            pad_vocab=True,
            metadata={
                "style": corpus.name,
                "corpus_sha256": corpus.sha256,
                "tokenizer": name,
                "tokenizer_sha256": sha256,
            },
        )
    except NGramError as error:
        raise DecodingError(f"cannot train a prior of style {corpus.name!r}: {error}") from error


def name_and_file(
    spec: str, tokenizer: Any, *, field: str | None = None, order: int, smoothing: str
) -> tuple[str, str]:
    """A style's name, and the saved prior that holds it, for engines that open priors themselves.

    Args:
        spec: a saved prior, a hub id, or anything `load_corpus` reads, which is trained once and kept in the cache
            folder. ``NAME=SPEC`` names it.
        tokenizer: the generating model's.
        field: as for `load_corpus`.
        order: as for `train_prior`.
        smoothing: as for `train_prior`.

    Raises:
        DecodingError: an unknown style, or a prior of another tokenizer.
    """
    name, source = split_name(spec)
    if is_saved_prior(source):
        prior = load_prior(source, tokenizer)
        return name or prior.metadata.get("style", Path(source).stem), source
    if may_be_hub_id(source):
        return name or source.split("/")[1], source
    corpus = load_corpus(spec, field)

    def train(path: Path) -> None:
        train_prior(corpus, tokenizer, order, smoothing).save(path)

    key = _PriorKey(FORMAT, corpus.name, corpus.sha256, encoding_fingerprint(tokenizer), order, smoothing)
    return corpus.name, str(kept_file(key.path, train, _opens))


@dataclass(frozen=True)
class _PriorKey(Key):
    folder: ClassVar[str] = "priors"
    suffix: ClassVar[str] = ".safetensors"
    format: str
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
    style: str | PathLike | NGramModel = DEFAULT_STYLE,
    tokenizer: Any | None = None,
    *,
    field: str | None = None,
    order: int = DEFAULT_ORDER,
    smoothing: str = DEFAULT_SMOOTHING,
) -> NGramModel:
    """Turns what users call a style into a prior: a model, a saved prior, or anything `load_corpus` reads.

    Raises:
        DecodingError: an unknown style, or text without a tokenizer.
    """
    if isinstance(style, NGramModel):
        if tokenizer is not None:
            check_tokenizer(style, tokenizer)
        return style
    if is_saved_prior(style):
        return load_prior(style, tokenizer)
    if tokenizer is None:
        raise DecodingError(f"style {str(style)!r} needs a tokenizer to become a prior")
    return train_prior(load_corpus(str(style), field), tokenizer, order, smoothing)
