"""What a sweep is made of: what a user chooses, styles with their priors, and cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from decoding import metrics
from decoding.errors import DecodingError
from decoding.style.ratio import MODEL, ratio_to
from decoding.style.settings import Settings
from decoding.style.source import StyleSource, require_distinct
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
    """A prior, its corpus where there is one (a saved prior has none), and how it steers if a saved style says so."""

    name: str
    prior: NGramModel
    documents: list[np.ndarray] | None
    log_ratio: Tensor | None = None  # for mode "ratio"
    settings: Settings | None = None

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
    specs: Sequence[str | StyleSource],
    tokenizer: Any,
    field: str | None = None,
    order: int = 3,
    smoothing: str = "kneser-ney",
    *,
    asked: Mapping[str, Any] | None = None,
) -> list[Style]:
    """Reads corpora and trains their priors, or opens saved ones.

    Args:
        specs: as for `StyleSource.parse`.
        tokenizer: the generating model's.
        field: of texts.
        order, smoothing: of the priors that are trained.
        asked: settings that replace those of a saved style.

    Raises:
        DecodingError: a style that cannot be read, or two of one name.
    """
    styles = []
    for spec in specs:
        source = StyleSource.parse(spec, field)
        if not source.is_text:
            saved = source.saved(tokenizer)
            settings = None if saved.settings is None else replace(saved.settings, **(asked or {}))
            styles.append(Style(source.name_of(saved.model), saved.model, None, saved.log_ratio, settings))
            continue
        corpus = source.corpus()
        documents = tokenize(corpus.documents, tokenizer)
        styles.append(Style(corpus.name, prior_of_tokens(documents, corpus, tokenizer, order, smoothing), documents))
    require_distinct([style.name for style in styles])
    return styles


def with_ratio(style: Style, tokenizer: Any, model: Any, mode: str) -> Style:
    """A style with its ratio to what the model writes by itself, if its mode is "ratio" and it has none.

    Args:
        style: from `load_styles`.
        tokenizer, model: the generating model's.
        mode: of styles that have none of their own.

    Raises:
        DecodingError: a saved prior, whose text is not known.
    """
    if style.log_ratio is not None or (mode if style.settings is None else style.settings.mode) != "ratio":
        return style
    if style.documents is None:
        raise DecodingError(f"mode ratio needs the text of style {style.name!r}, not a saved prior")
    return replace(style, log_ratio=ratio_to(MODEL, style.documents, tokenizer, model))
