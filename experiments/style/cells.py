"""What a sweep is made of: what a user chooses, styles with their priors, and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from decoding import metrics
from decoding.errors import DecodingError
from decoding.style.files import is_saved_prior, load_prior
from decoding.style.ratio import MODEL, ratio_to
from decoding.style.source import load_corpus, require_distinct, split_name
from decoding.style.training import prior_of_tokens
from decoding.tokens import tokenize
from experiments.lab.cells import Cell
from ngram import NGramModel

DEFAULT_STYLES = ("king-james", "presidents")


@dataclass(frozen=True)
class SweepOptions:
    """What a user chooses. Prompts are the text of the prompts file's lines."""

    prompts: tuple[str, ...]
    lambdas: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int = 48
    batch_size: int = 24
    combine: str = "matching"
    mode: str = "paper"
    allow_any_lambda: bool = False


@dataclass(frozen=True)
class Style:
    """A prior, and its corpus where there is one (a saved prior has none)."""

    name: str
    prior: NGramModel
    documents: list[np.ndarray] | None
    log_ratio: Tensor | None = None  # for mode "ratio"

    @cached_property
    def index(self) -> metrics.CorpusIndex | None:
        """For measures against the corpus."""
        return None if self.documents is None else metrics.CorpusIndex(self.documents)


@dataclass(frozen=True)
class SweepCell(Cell):
    """One generation run over all prompts. ``style`` is None where nothing steers."""

    style: str | None
    lambda_: float
    temperature: float
    seed: int

    @property
    def label(self) -> str:
        """See `Cell`."""
        return f"{self.style or 'unsteered'}-lambda{self.lambda_:g}-t{self.temperature:.4f}-seed{self.seed}"


def load_styles(
    specs: Sequence[str], tokenizer: Any, field: str | None = None, order: int = 3, smoothing: str = "kneser-ney"
) -> list[Style]:
    """Reads corpora and trains their priors, or opens saved ones.

    Raises:
        DecodingError: a style that cannot be read, or two of one name.
    """
    styles = []
    for spec in specs:
        name, source = split_name(spec)
        if is_saved_prior(source):
            prior = load_prior(source, tokenizer)
            styles.append(Style(name or prior.metadata.get("style", Path(source).stem), prior, None))
            continue
        corpus = load_corpus(spec, field)
        documents = tokenize(corpus.documents, tokenizer)
        styles.append(Style(corpus.name, prior_of_tokens(documents, corpus, tokenizer, order, smoothing), documents))
    require_distinct([style.name for style in styles])
    return styles


def with_ratio(style: Style, tokenizer: Any, model: Any) -> Style:
    """A style with its ratio to what the model writes by itself.

    Raises:
        DecodingError: a saved prior, whose text is not known.
    """
    if style.documents is None:
        raise DecodingError(f"mode ratio needs the text of style {style.name!r}, not a saved prior")
    return replace(style, log_ratio=ratio_to(MODEL, style.documents, tokenizer, model))
