"""Priors: n-gram models bound to a tokenizer by its fingerprint, made from any style."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from decoding.style.source import (
    DEFAULT_STYLE,
    Corpus,
    cache_dir,
    load_corpus,
    split_name,
    tokenize,
    tokenizer_fingerprint,
)
from ngram import NGramError, NGramModel
from ngram.storage import FORMAT

DEFAULT_ORDER = 3
DEFAULT_SMOOTHING = "kneser-ney"
PRIOR_FILE = "prior.safetensors"


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
    return prior_of_tokens(tokenize(corpus, tokenizer), corpus, tokenizer, order, smoothing)


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


def is_saved_prior(style: str | PathLike) -> bool:
    """Whether a path names a saved prior: a .safetensors file, or a folder with one named as we name it."""
    path = Path(style)
    return path.suffix == ".safetensors" or (path / PRIOR_FILE).is_file()


def may_be_hub_id(source: str) -> bool:
    """Whether a text that names nothing here has the form of a repository on the hub, OWNER/NAME."""
    return source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()


def require_distinct(names: Sequence[str]) -> None:
    """Refuses styles of one name.

    Raises:
        DecodingError: as said.
    """
    if len(set(names)) < len(names):
        raise DecodingError(f"two styles have one name ({', '.join(names)}): name them with NAME=SPEC")


def load_prior(path: str | PathLike, tokenizer: Any | None = None) -> NGramModel:
    """Opens a saved prior, and checks it against a tokenizer if one is given.

    Raises:
        DecodingError: no such prior, a damaged one, or one of another tokenizer.
    """
    path = Path(path)
    try:
        model = NGramModel.load(path / PRIOR_FILE if path.is_dir() else path)
    except NGramError as error:
        raise DecodingError(str(error)) from error
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    return model


def check_tokenizer(model: NGramModel, tokenizer: Any) -> None:
    """Refuses a prior whose token ids mean something else. A model without a fingerprint is taken at its word.

    Raises:
        DecodingError: another tokenizer's prior, or one with more ids than the tokenizer.
    """
    name, sha256 = tokenizer_fingerprint(tokenizer)
    if model.metadata.get("tokenizer_sha256", sha256) != sha256:
        raise DecodingError(
            f"the prior was trained with tokenizer {model.metadata.get('tokenizer')!r}, and this one is {name!r}: "
            "train it again with `decoding style train`"
        )
    if model.vocab_size > len(tokenizer):
        raise DecodingError(f"the prior has {model.vocab_size} token ids, tokenizer {name!r} has {len(tokenizer)}")


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
    parts = (FORMAT, corpus.sha256, tokenizer_fingerprint(tokenizer)[1], str(order), smoothing)
    path = cache_dir() / "priors" / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.safetensors"
    if not path.is_file():
        train_prior(corpus, tokenizer, order, smoothing).save(path)
    return corpus.name, str(path)


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
