"""A style for one tokenizer and one model: what a step of ``generate`` needs, which moves together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding.errors import DecodingError
from decoding.hub import upload
from decoding.late import LateAnswer
from decoding.style.files import SavedStyle, write_folder
from decoding.style.paths import steer
from decoding.style.settings import Settings
from decoding.style.steering import Guards, Stops, guards_of, mixture_of, stops_of
from ngram import NGramError, NGramModel
from ngram.layout import unigram_tables
from ngram.tables import Tables, counts_on_host

FIRST_SHARE = 0.6
"""Of the first order, in mode "ratio"."""


class _Placed(NamedTuple):
    """What is added to scores of one width on one device."""

    tables: Tables
    mixture: Tensor | None
    guards: Guards | None
    stops: Stops | None
    holds_nan: LateAnswer


class BoundStyle(LogitsProcessor):
    """An n-gram style prior as it is for one tokenizer and one model. `StylePrior.bind` makes it.

    It does not change, but for what it keeps of the devices that it was used on.

    Args:
        model: the n-gram model.
        lambda_: λ.
        settings: how it is added.
        log_ratio: the row r of mode "ratio", float32 [V].
        pad_token_id: leading tokens of this id are padding and no context.
        stop_ids: ids that end a text, which are left alone unless ``settings.steer_stop``.

    Attributes:
        mixture: how the orders are weighted, for `ngram.tables.add_log_prior`; None for the plain interpolated prior.

    Raises:
        DecodingError: orders or weights that do not fit the model, or mode "ratio" without its row.
    """

    def __init__(
        self,
        model: NGramModel,
        lambda_: float,
        settings: Settings,
        log_ratio: Tensor | None = None,
        *,
        pad_token_id: int | None = None,
        stop_ids: Sequence[int] = (),
    ):
        first = FIRST_SHARE if settings.mode == "ratio" else None
        mixture = mixture_of(model.order, settings.orders, settings.weights, settings.combine, first)
        self._highest_order = max(settings.orders or [model.order])
        if self._highest_order == 1:
            mixture = None if mixture is None else mixture[:, :1, :1]
        if settings.mode == "ratio" and log_ratio is None:
            raise DecodingError('mode="ratio" needs bind(tokenizer, model), or log_ratio')
        if log_ratio is not None and log_ratio.shape != (model.vocab_size,):
            raise DecodingError(f"log_ratio must have the prior's {model.vocab_size} ids, not {len(log_ratio)}")
        self.model = model
        self.lambda_ = lambda_
        self.settings = settings
        self.log_ratio = log_ratio
        self.mixture = mixture
        self.pad_token_id = pad_token_id
        self.stop_ids = tuple(stop_ids)
        self._placed: dict[tuple[int, torch.device], _Placed] = {}

    @property
    def tables(self) -> Tables:
        """What is added, as `ngram.tables.add_log_prior` takes it: the n-gram model's, or with r for log p_1."""
        own = self.model.tables
        row = own.unigram[0] if self.settings.mode == "paper" or self.log_ratio is None else self.log_ratio
        row = row.to(own.unigram.device)
        return unigram_tables(row, self.model.seen) if self._highest_order == 1 else own.with_unigram(row)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers one step.

        Args:
            input_ids: tokens so far, int64 [B, L].
            scores: float [B, W], before softmax.

        Returns:
            ``scores`` itself at λ = 0, else a new tensor like it.

        Raises:
            DecodingError: NaN scores (on CUDA reported at a later step, so that no step waits for the device), or
                scores without ids that the style's text has.
        """
        return self._steered(scores, lambda longest: self._history(input_ids, longest))

    def along(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers the last steps of one text at once, each as it would be steered by itself.

        Args:
            input_ids: the text, int64 [L].
            scores: float [N, W], before softmax, of what follows each of the last N tokens.

        Returns:
            As for one step.

        Raises:
            DecodingError: as for one step.
        """
        return self._steered(scores, lambda longest: self._histories(input_ids, len(scores), longest))

    def _steered(self, scores: Tensor, history: Callable[[int], Tensor]) -> Tensor:
        if self.lambda_ == 0:
            return scores
        tables, mixture, guards, stops, holds_nan = self._placed_for(scores)
        strength = torch.full((len(scores),), self.lambda_, device=scores.device)
        highest = torch.empty(len(scores), device=scores.device)
        tokens = history(max(tables.order - 1, 1)).to(scores.device)
        steered = steer(tables, scores, tokens, strength, mixture, guards, stops, highest=highest)
        if holds_nan(scores.device, lambda: torch.isnan(highest.amax())):  # NaN is the highest of all
            raise DecodingError(
                "the scores hold NaN before the style prior: the model or an earlier processor made it; a model in "
                "float16 may need bfloat16 or float32"
            )
        return steered

    def matching_orders(self, input_ids: Tensor) -> list[int]:
        """The highest order in use whose context the prior has, of each row; 1 where it has none.

        Args:
            input_ids: tokens so far, int64 [B, L].
        """
        tables, used = self.model.tables, set(self.settings.orders or range(1, self.model.order + 1))
        if self._highest_order == 1:
            return [1] * len(input_ids)
        history = self._history(input_ids, tables.order - 1).to(tables.unigram.device)
        found = tables.find(history)
        matched = (found.ends > found.starts).view(len(input_ids), -1).tolist()  # of orders 2 … n
        return [max([k for k, known in enumerate(row, start=2) if known and k in used], default=1) for row in matched]

    def _placed_for(self, scores: Tensor) -> _Placed:
        key = (scores.shape[1], scores.device)
        if key not in self._placed:
            width, device = key
            tables = self.tables
            if not tables.fits(width):
                raise DecodingError(
                    f"the model scores {width} ids and the prior has {tables.vocab_size}: it belongs to another model; "
                    "give StylePrior the tokenizer of the model that writes"
                )
            mixture = None if self.mixture is None else self.mixture.to(device)
            guards = guards_of([self.settings.guards], device)
            own = None if guards is None else guards.of(0)
            stops = None if self.settings.steer_stop else stops_of(self.stop_ids, width, device)
            self._placed[key] = _Placed(tables.widened(width).to(device), mixture, own, stops, LateAnswer())
        return self._placed[key]

    def _history(self, input_ids: Tensor, longest: int) -> Tensor:
        """The tokens that can be context, int64 [B, ≤ longest]: −1 for left padding."""
        window = input_ids[:, -longest:]
        if self.pad_token_id is None:
            return window
        if counts_on_host(input_ids.device) and not any(self.pad_token_id in row for row in window.tolist()):
            return window
        is_pad = window == self.pad_token_id
        leading = is_pad.cumprod(1).bool() & (input_ids[:, :-longest] == self.pad_token_id).all(1, keepdim=True)
        return window.masked_fill(leading, -1)

    def _histories(self, input_ids: Tensor, count: int, longest: int) -> Tensor:
        """As `_history`, int64 [count, longest], of the last positions of one text."""
        seen = input_ids
        if self.pad_token_id is not None:
            seen = seen.masked_fill((seen == self.pad_token_id).cumprod(0).bool(), -1)
        return torch.nn.functional.pad(seen, (longest - 1, 0), value=-1).unfold(0, longest, 1)[-count:]

    def __getstate__(self) -> dict[str, object]:
        """For pickle and copies: without what devices hold."""
        return vars(self) | {"_placed": {}}

    def at(self, lambda_: float) -> BoundStyle:
        """The same at another λ."""
        other = copy(self)
        other.lambda_ = lambda_
        return other

    def save_pretrained(self, save_directory: str | PathLike) -> None:
        """Writes the prior, λ and the settings to a folder, for `StylePrior.from_pretrained`."""
        try:
            write_folder(SavedStyle(self.model, self.lambda_, self.settings, self.log_ratio), save_directory)
        except NGramError as error:  # nothing can be written there
            raise DecodingError(str(error)) from error

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository on the hub, made if needed, and returns its address."""
        return upload(self.save_pretrained, "style prior", repo_id, private, token)
