"""`StylePrior`: n-gram style priors in logit space, for transformers' ``generate``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from operator import index
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding.errors import DecodingError
from decoding.models import model_fingerprint
from decoding.style.bound import BoundStyle
from decoding.style.files import SavedStyle, check_tokenizer, read_folder
from decoding.style.ratio import MODEL, NEEDS_MODEL, checked_background, ratio_to
from decoding.style.registered import DEFAULT_STYLE
from decoding.style.settings import Mode, Settings, taken
from decoding.style.source import Corpus, StyleSource
from decoding.style.steering import Combine, GuardSettings
from decoding.style.strength import (
    DEFAULT_TOLERANCE,
    checked_lambda,
    checked_tolerance,
    chosen_strength,
    held_out_part,
)
from decoding.style.training import DEFAULT_ORDER, DEFAULT_SMOOTHING, check_training, prior_of_tokens, trained_file
from decoding.tokens import encoding_fingerprint, ends_of_sequence, pad_id, tokenize
from ngram import NGramModel
from ngram.tables import Tables

DEFAULT_LAMBDAS = {"paper": 0.1, "ratio": 0.6}
AUTO: Literal["auto"] = "auto"
_AUTO_NEEDS_MODEL = 'λ="auto" needs the model: StylePrior(λ="auto", tokenizer=tokenizer, model=model)'


class StylePrior(LogitsProcessor):
    """Adds λ times an n-gram style prior to every row of scores.

    Mode "paper" is the method of arXiv 2601.16224: train an n-gram model on a style corpus and, while a frozen model
    generates, add to its logits a weighted sum of the log-probabilities of each n-gram order that matches the context,
    scaled by λ in [0, 1]:

        scores′(w) = scores(w) + λ · Σ_k w_k · log p_k(w | last k−1 tokens),    k over the orders whose context matches.

    The paper leaves open, and this implementation chooses: each p_k is the interpolated modified Kneser-Ney model up
    to order k, hence positive on the whole vocabulary (a prior on seen continuations alone would punish them against
    unseen ones); the w_k are equal and sum to 1 by default and are not scaled up when only some orders match; order 1
    always matches; contexts are the model's own tokens, prompt included. Adding log-probabilities also sharpens the
    distribution, as a lower temperature does: texts become likelier and more alike, and repeat themselves at high λ.

    Mode "ratio", the one to use, asks how much likelier a token is in the style than in a background:

        r(w) = log((p(w) + ε) / (q(w) + ε)) within ±c,

    with relative frequencies p of the style and q of what the model writes by itself (`decoding.style.ratio`),
    ε = 5·10⁻⁵, c = 2. So r stands where log p_1 stands in the paper's sum, which becomes
    Σ_k w_k · (r + log p_k − log p_1): the likelihood ratio of every order.
    Order 1 weighs 0.6 by default, the others share 0.4. The ratio moves style and does not sharpen; contexts sharpen a
    little, which makes up for the fluency that style costs.

    In either mode the ids that end a text are left alone (`steering.steer` says how), or answers would get the length
    of the style's texts; ``steer_stop=True`` steers them too, as the paper does.
    Guards hold either mode back: ``entropy_gate``, ``plausibility``, ``max_js`` (formulas: `steering.steer`).

    This is a recipe, and does not change. What it becomes for a tokenizer and a model is a `BoundStyle`, made by
    `bind`. As a processor it does what it was bound to last.

    Examples:
        >>> generate("path-or-hub-id", "The captain said", logits_processor=[StylePrior(λ=0.5, mode="ratio")])
        >>> prior = StylePrior(λ=0.5, style="king-james", mode="ratio", tokenizer=tokenizer, model=model)
        >>> model.generate(**inputs, logits_processor=[prior])
        >>> StylePrior(λ="auto", style="my.txt", mode="ratio", tokenizer=tokenizer, model=model).lambda_

    Args:
        style: a registered name, a text file, a folder of texts, a file with its field (``FILE.jsonl#FIELD``), a saved
            prior, what `save_pretrained` or ``push_to_hub`` wrote, whose λ and settings apply where none are given
            here, or an `NGramModel` (needs no tokenizer).
        λ: strength, in [0, 1], by default 0.1 in mode "paper" and 0.6 in mode "ratio"; also as ``lambda_``. 0 leaves
            the scores untouched, bit for bit. "auto" has it chosen for the bound model, by a held-out part of the
            style's text (`decoding.style.strength.choose_strength`).
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        model: the generating model, which λ="auto" and the background "model" measure, once, and which says at which
            ids it stops. `decoding.generate` binds it.
        mode: "paper" (the default) or "ratio".
        background: of mode "ratio": "model", what the model writes by itself; "corpus", the style's own frequencies,
            which leaves what contexts add; or a corpus, like ``style``.
        log_ratio: the row r of mode "ratio", float [V], where it is known; then nothing is measured.
        orders: n-gram orders to use, all of the model's by default. With (1,) nothing is looked up.
        weights: w_k of each of ``orders``; by default they sum to 1, equal ones in mode "paper", as above in mode
            "ratio". For "matching" only.
        combine: "matching" (the default), as above, or "interpolated": λ · log p_n of the highest of ``orders``.
        plausibility: α in (0, 1]: only tokens with at least α times the probability of the likeliest are moved.
        max_js: budget of every step, in nats: λ is lowered until the Jensen-Shannon divergence is within.
        entropy_gate: in nats: λ is lowered in proportion where the model's entropy is below.
        steer_stop: also steer the ids that end a text. False by default.
        tolerance: of λ="auto": the share by which base perplexity may rise. Distinct-2 may fall by a tenth.
        order: of the n-gram model, where ``style`` is text.
        smoothing: likewise: "kneser-ney", "witten-bell" or "additive".
        unwrap: whether to join the lines of hard-wrapped paragraphs, where ``style`` is text. By default they are in a
            Project Gutenberg frame and in scripts without spaces, and a warning says so.
        pad_token_id: leading tokens of this id are padding and no context; by default the tokenizer's.
        allow_any_lambda: accept λ outside [0, 1].

    Attributes:
        source: where the style comes from, or None for an `NGramModel`.
        settings: how the prior is added.

    Raises:
        DecodingError: unusable parameters, or no such style; when called, no tokenizer, or as `BoundStyle`.
    """

    def __init__(
        self,
        style: str | PathLike | StyleSource | NGramModel = DEFAULT_STYLE,
        *,
        λ: float | Literal["auto"] | None = None,
        lambda_: float | Literal["auto"] | None = None,
        tokenizer: Any | None = None,
        model: Any | None = None,
        mode: Mode | None = None,
        background: str | PathLike = MODEL,
        log_ratio: Tensor | np.ndarray | None = None,
        orders: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        combine: Combine | None = None,
        plausibility: float | None = None,
        max_js: float | None = None,
        entropy_gate: float | None = None,
        steer_stop: bool | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        order: int = DEFAULT_ORDER,
        smoothing: str = DEFAULT_SMOOTHING,
        unwrap: bool | None = None,
        pad_token_id: int | None = None,
        allow_any_lambda: bool = False,
    ):
        if λ is not None and lambda_ is not None:
            raise DecodingError("give λ or lambda_, not both: they are the same parameter")
        given: dict[str, Any] = {
            "mode": mode,
            "orders": orders,
            "weights": weights,
            "combine": combine,
            "plausibility": plausibility,
            "max_js": max_js,
            "entropy_gate": entropy_gate,
            "steer_stop": steer_stop,
        }
        asked = {name: value for name, value in given.items() if value is not None}
        Settings(**asked)  # before anything is read
        self.source = None if isinstance(style, NGramModel) else StyleSource.parse(style, unwrap=unwrap)
        self._saved = _saved(style, self.source)
        held = None if self._saved is None else self._saved.settings
        self.settings = Settings(**((held.as_dict() if held else {}) | asked))
        self._allow_any_lambda = allow_any_lambda
        self._strength = self._strength_of(λ if lambda_ is None else lambda_)
        self._log_ratio = taken("log_ratio", log_ratio, lambda row: torch.as_tensor(row).float())
        if self._log_ratio is None and self._saved is not None:
            self._log_ratio = self._saved.log_ratio
        self.background = checked_background(background)
        self.tolerance = checked_tolerance(tolerance)
        check_training(order, smoothing)
        self.order = order
        self.smoothing = smoothing
        self._pad_token_id = taken("pad_token_id", pad_token_id, index)
        self._require_text_if_needed()
        self._bound: BoundStyle | None = None
        self._last: tuple[Any, BoundStyle] | None = None
        if tokenizer is not None:
            self.bind(tokenizer, model)
        elif self._saved is not None:
            self._bound = self._of(self._saved.model, [self._saved.model.eos_id], pad_token_id)

    def _strength_of(self, given: float | Literal["auto"] | None) -> float | Literal["auto"]:
        """λ as given, as saved (for the same mode), or by default."""
        saved = self._saved
        if given is None and saved is not None and saved.settings is not None and saved.settings.mode == self.mode:
            given = saved.lambda_
        given = DEFAULT_LAMBDAS[self.mode] if given is None else given
        return AUTO if given == AUTO else checked_lambda(given, self._allow_any_lambda)

    def _require_text_if_needed(self) -> None:
        if self._needs_text and (self.source is None or not self.source.is_text):
            wanted = 'λ="auto"' if self._strength == AUTO else 'mode="ratio"'
            raise DecodingError(
                f"{wanted} needs the style's text, not a trained n-gram model: give the text, a folder that "
                "StylePrior.save_pretrained wrote in that mode, or a number for λ and the row log_ratio"
            )

    @property
    def style(self) -> str | NGramModel:
        """What ``style`` was."""
        return self.source.where if self.source else self._saved.model  # type: ignore[union-attr]

    @property
    def mode(self) -> Mode:
        """As given, or as saved."""
        return self.settings.mode

    @property
    def guards(self) -> GuardSettings:
        """What holds the prior back."""
        return self.settings.guards

    @property
    def lambda_(self) -> float | Literal["auto"]:
        """λ: of what this is bound to, else as given."""
        return self._strength if self._bound is None else self._bound.lambda_

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        """Another λ, from the next step on."""
        strength = checked_lambda(value, self._allow_any_lambda)
        self._strength, self._last = strength, None
        self._bound = None if self._bound is None else self._bound.at(strength)

    @property
    def log_ratio(self) -> Tensor | None:
        """The row r of mode "ratio", float32 [V], once it is known."""
        return self._log_ratio if self._bound is None else self._bound.log_ratio

    @property
    def model(self) -> NGramModel | None:
        """The n-gram model, once there is a tokenizer."""
        return None if self._bound is None else self._bound.model

    @property
    def mixture(self) -> Tensor | None:
        """As of `BoundStyle`, once there is a tokenizer."""
        return None if self._bound is None else self._bound.mixture

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """As of `BoundStyle`, once there is a tokenizer."""
        return () if self._bound is None else self._bound.stop_ids

    @property
    def tables(self) -> Tables:
        """As of `BoundStyle`.

        Raises:
            DecodingError: no tokenizer yet.
        """
        return self._as_bound().tables

    @property
    def needs_model(self) -> bool:
        """Whether `bind` will want the model, to measure it."""
        return self._strength == AUTO or (self._needs_ratio and self.background == MODEL)

    @property
    def _needs_ratio(self) -> bool:
        return self.mode == "ratio" and self._log_ratio is None

    @property
    def _needs_text(self) -> bool:
        return self._strength == AUTO or self._needs_ratio

    @property
    def _text(self) -> StyleSource:
        assert self.source is not None and self.source.is_text  # checked at the start
        return self.source

    def bind(self, tokenizer: Any, model: Any | None = None) -> BoundStyle:
        """Makes the prior for a tokenizer, and for a model where one is needed, and remembers it.

        Costs nothing where neither changed since the last time.

        Raises:
            DecodingError: the style cannot be read, is another tokenizer's, or λ="auto" or a ratio wants a model, or
                the style's text, and has none.
        """
        self._bound = self.bound(tokenizer, model)
        return self._bound

    def bound(self, tokenizer: Any, model: Any | None = None, stop_ids: Any = None) -> BoundStyle:
        """As `bind`, for one call: whatever this is bound to stays so.

        Args:
            tokenizer: the generating model's.
            model: the generating model.
            stop_ids: more ids that end a text, in this call.
        """
        if not hasattr(tokenizer, "get_vocab"):
            raise DecodingError(f"{tokenizer!r} is no tokenizer: load it first, by AutoTokenizer.from_pretrained")
        if model is None and self.needs_model:
            raise DecodingError(_AUTO_NEEDS_MODEL if self._strength == AUTO else NEEDS_MODEL)
        stops = ends_of_sequence(model, tokenizer, stop_ids)
        pad = pad_id(tokenizer) if self._pad_token_id is None else self._pad_token_id
        weights = None if model is None or not self.needs_model else model_fingerprint(model)
        key = (encoding_fingerprint(tokenizer), weights, tuple(stops), pad)
        last = self._last
        if last is None or last[0] != key:
            last = self._last = (key, self._made(tokenizer, model, stops, pad))
        self._bound = self._bound or last[1]
        return last[1]

    def _made(self, tokenizer: Any, model: Any | None, stops: Sequence[int], pad: int) -> BoundStyle:
        lambda_, row = self._strength, self._log_ratio
        if not self._needs_text:
            return self._of(self._prior(tokenizer), stops, pad)
        corpus = self._text.corpus()
        documents = tokenize(corpus.documents, tokenizer)
        if lambda_ == AUTO:
            lambda_ = self._chosen_lambda(corpus, documents, tokenizer, model, stops)
        if self._needs_ratio:
            row = ratio_to(self.background, documents, tokenizer, model)
        return self._of(self._prior(tokenizer), stops, pad, lambda_, row)

    def _of(
        self,
        model: NGramModel,
        stops: Sequence[int | None],
        pad: int | None,
        lambda_: float | None = None,
        row: Tensor | None = None,
    ) -> BoundStyle:
        return BoundStyle(
            model,
            float(self._strength) if lambda_ is None else lambda_,
            self.settings,
            self._log_ratio if row is None else row,
            pad_token_id=pad,
            stop_ids=[each for each in stops if each is not None],
        )

    def _prior(self, tokenizer: Any) -> NGramModel:
        if self._saved is not None:
            check_tokenizer(self._saved.model, tokenizer)
            return self._saved.model
        return NGramModel.load(trained_file(self._text.corpus(), tokenizer, self.order, self.smoothing))

    def _chosen_lambda(
        self,
        corpus: Corpus,
        documents: Sequence[np.ndarray],
        tokenizer: Any,
        model: Any | None,
        stops: Sequence[int],
    ) -> float:
        kept, held_out = held_out_part(documents)
        row = self._log_ratio
        if self._needs_ratio:
            row = ratio_to(self.background, kept, tokenizer, model)
        trained = prior_of_tokens(kept, corpus, tokenizer, self.order, self.smoothing)

        def steered(value: float) -> BoundStyle:
            return BoundStyle(trained, value, self.settings, row, pad_token_id=pad_id(tokenizer), stop_ids=stops)

        about = {"text": corpus.sha256, "order": self.order, "smoothing": self.smoothing, **self.settings.as_dict()}
        about["log_ratio"] = None if row is None else hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()
        about["stop_ids"] = list(stops)
        return chosen_strength(steered, held_out, model, tokenizer, self.tolerance, about)

    def _as_bound(self) -> BoundStyle:
        if self._bound is None and self._strength == AUTO:
            raise DecodingError('λ="auto" was not chosen yet: bind(tokenizer, model) does, and decoding.generate')
        if self._bound is None:
            raise DecodingError(
                f"this StylePrior has no tokenizer: write StylePrior(λ={self.lambda_}, style={str(self.style)!r}, "
                'tokenizer=tokenizer), and model=model for mode="ratio", or use decoding.generate, '
                "which binds it"
            )
        return self._bound

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers one step, as `BoundStyle` does.

        Args:
            input_ids: tokens so far, int64 [B, L].
            scores: float [B, W], before softmax.

        Returns:
            ``scores`` itself at λ = 0, else a new tensor like it.
        """
        return scores if self.lambda_ == 0 else self._as_bound()(input_ids, scores)

    def save_pretrained(self, save_directory: str | PathLike) -> None:
        """Writes what the prior is bound to, with its settings, to a folder."""
        self._as_bound().save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository on the hub, made if needed, and returns its address."""
        return self._as_bound().push_to_hub(repo_id, private=private, token=token)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike, *, tokenizer: Any | None = None, **changes: Any
    ) -> StylePrior:
        """Opens what `save_pretrained` or ``push_to_hub`` wrote.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            tokenizer: checked against the prior's fingerprint.
            changes: parameters of `StylePrior` that replace the saved ones, None too; ``revision`` and ``token`` go to
                the hub.

        Raises:
            DecodingError: nothing there, damaged, or of another tokenizer.
        """
        hub: dict[str, Any] = {key: changes.pop(key) for key in ("revision", "token") if key in changes}
        saved = read_folder(name_or_path, tokenizer, hub)
        assert saved.settings is not None
        parameters = {"lambda_": saved.lambda_, "log_ratio": saved.log_ratio, **saved.settings.as_dict()}
        if "λ" in changes:
            changes["lambda_"] = changes.pop("λ")
        return cls(saved.model, tokenizer=tokenizer, **(parameters | changes))


def _saved(style: Any, source: StyleSource | None) -> SavedStyle | None:
    """What needs no training: a trained model, or a saved one."""
    if source is None:
        return SavedStyle(style)
    return None if source.is_text else source.saved()
