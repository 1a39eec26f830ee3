"""`StylePrior`: n-gram style priors in logit space, for transformers' ``generate``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding.corpora import DEFAULT_STYLE
from decoding.errors import DecodingError
from decoding.hub import find_file, upload
from decoding.late import LateAnswer
from decoding.priors import DEFAULT_ORDER, PRIOR_FILE, load_prior, resolve_style
from ngram import NGramModel
from ngram.storage import write_atomically
from ngram.tables import Tables, add_log_prior, mixture_of_orders

Combine = Literal["matching", "interpolated"]
CONFIG_FILE = "style_prior.json"
DEFAULT_LAMBDA = 0.1
ANY_LAMBDA_HINT = "; allow_any_lambda=True (--allow-any-lambda) lifts that"


class StylePrior(LogitsProcessor):
    """Adds λ · log of an n-gram style prior to every row of scores.

    The method of arXiv 2601.16224: train an n-gram model on a style corpus and, while a frozen model generates, add to
    its logits a weighted sum of the log-probabilities of each n-gram order that matches the context, scaled by λ in
    [0, 1]:

        scores′(w) = scores(w) + λ · Σ_k w_k · log p_k(w | last k−1 tokens),    k over the orders whose context matches.

    The paper leaves open, and this implementation chooses: each p_k is the interpolated modified Kneser-Ney model up
    to order k, hence positive on the whole vocabulary (a prior on seen continuations alone would punish them against
    unseen ones); the w_k are equal and sum to 1 by default and are not scaled up when only some orders match; order 1
    always matches; contexts are the model's own tokens, prompt included. Adding log-probabilities also sharpens the
    distribution, as a lower temperature does: compare with an entropy-matched baseline (``decoding reproduce style``).

    Examples:
        >>> generate("path-or-hub-id", "The captain said", logits_processor=[StylePrior(λ=0.1)])
        >>> prior = StylePrior(λ=0.1, style="king-james", tokenizer=tokenizer)
        >>> model.generate(**inputs, logits_processor=[prior])

    Args:
        style: a registered name, a text file, a folder, a saved prior, or an `NGramModel` (needs no tokenizer).
        λ: strength, in [0, 1]; also as ``lambda_``. 0 leaves the scores untouched, bit for bit.
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        orders: n-gram orders to use, all of the model's by default.
        weights: w_k of each of ``orders``; equal ones that sum to 1 by default. For "matching" only.
        combine: "matching", as above, or "interpolated": λ · log p_n of the highest of ``orders``.
        order: order of the n-gram model, where ``style`` is text.
        pad_token_id: leading tokens of this id are padding and no context; by default the tokenizer's.
        allow_any_lambda: accept λ outside [0, 1].

    Attributes:
        model: the n-gram model, once there is a tokenizer.
        mixture: how its orders are weighted, for `ngram.tables.add_log_prior`; None for the plain interpolated prior.

    Raises:
        DecodingError: unusable parameters, or, when called, no tokenizer, NaN scores, or scores narrower than the
            prior's vocabulary. On CUDA devices NaN is reported at a later step, so that no step waits for the device.
    """

    def __init__(
        self,
        style: str | PathLike | NGramModel = DEFAULT_STYLE,
        *,
        λ: float | None = None,
        lambda_: float | None = None,
        tokenizer: Any | None = None,
        orders: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        combine: Combine = "matching",
        order: int = DEFAULT_ORDER,
        pad_token_id: int | None = None,
        allow_any_lambda: bool = False,
    ):
        if λ is not None and lambda_ is not None:
            raise DecodingError("give λ or lambda_, not both: they are the same parameter")
        given = next((value for value in (λ, lambda_) if value is not None), DEFAULT_LAMBDA)
        self.lambda_ = checked_lambda(given, allow_any_lambda)
        if combine not in get_args(Combine):
            raise DecodingError(f"unknown combine {combine!r}: choose from {', '.join(get_args(Combine))}")
        if weights is not None and combine == "interpolated":
            raise DecodingError('weights are for combine="matching"; the interpolated prior has none')
        self.style = style
        self.orders = orders
        self.weights = weights
        self.combine = combine
        self.order = order
        self.pad_token_id = pad_token_id
        self.model: NGramModel | None = None
        self.mixture: Tensor | None = None
        self._tables: Tables | None = None
        self._holds_nan = LateAnswer()
        if tokenizer is not None:
            self.bind(tokenizer)
        elif isinstance(style, NGramModel):
            self._use(style)

    def bind(self, tokenizer: Any) -> StylePrior:
        """Makes the prior for a tokenizer, or checks that it fits. Returns itself."""
        self._use(resolve_style(self.style if self.model is None else self.model, tokenizer, order=self.order))
        if self.pad_token_id is None:
            self.pad_token_id = tokenizer.pad_token_id
        return self

    def _use(self, model: NGramModel) -> None:
        self.model = model
        self.mixture = _mixture(model.order, self.orders, self.weights, self.combine)
        self._tables = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers one step.

        Args:
            input_ids: tokens so far, int64 [B, L].
            scores: float [B, V'], before softmax, V' at least the prior's vocabulary.

        Returns:
            ``scores`` itself at λ = 0, else a new tensor like it.
        """
        if self.lambda_ == 0:
            return scores
        if self.model is None:
            raise DecodingError(
                f"this StylePrior has no tokenizer: write StylePrior(λ={self.lambda_:g}, style={str(self.style)!r}, "
                "tokenizer=tokenizer), or use decoding.generate, which binds it"
            )
        if self._tables is None or self._tables.unigram.shape[1] != scores.shape[1]:
            self._tables = self._tables_for(self.model, scores)
        if self._tables.unigram.device != scores.device:
            self._tables = self._tables.to(scores.device)
            self.mixture = None if self.mixture is None else self.mixture.to(scores.device)
        if self._holds_nan(scores.device, lambda: torch.isnan(scores.amax())):
            raise DecodingError("the scores hold NaN before the style prior: the model or an earlier processor made it")
        strength = torch.full((len(scores),), self.lambda_, device=scores.device)
        return add_log_prior(self._tables, scores, self._history(input_ids, self._tables.order), strength, self.mixture)

    @staticmethod
    def _tables_for(model: NGramModel, scores: Tensor) -> Tables:
        if scores.shape[1] < model.vocab_size:
            raise DecodingError(
                f"the model scores {scores.shape[1]} ids and the prior has {model.vocab_size}: "
                "it belongs to another model"
            )
        return model.tables.widened(scores.shape[1])

    def _history(self, input_ids: Tensor, order: int) -> Tensor:
        """The tokens that can be context, int64 [B, ≤ n−1]: −1 for left padding."""
        longest = max(order - 1, 1)
        window = input_ids[:, -longest:]
        if self.pad_token_id is None:
            return window
        is_pad = window == self.pad_token_id
        leading = is_pad.cumprod(1).bool() & (input_ids[:, :-longest] == self.pad_token_id).all(1, keepdim=True)
        return window.masked_fill(leading, -1)

    def save_pretrained(self, save_directory: str | PathLike) -> None:
        """Writes the bound prior and its settings to a folder."""
        if self.model is None:
            raise DecodingError("only a bound StylePrior can be saved: give it a tokenizer")
        config = {
            "lambda": self.lambda_,
            "orders": self.orders and list(self.orders),
            "weights": self.weights and list(self.weights),
            "combine": self.combine,
        }
        self.model.save(Path(save_directory) / PRIOR_FILE)
        write_atomically(Path(save_directory) / CONFIG_FILE, json.dumps(config, indent=2).encode())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to a repository on the hub, made if needed, and returns its address."""
        return upload(self.save_pretrained, "style prior", repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike, *, tokenizer: Any | None = None, **changes: Any
    ) -> StylePrior:
        """Opens what `save_pretrained` or ``push_to_hub`` wrote.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            tokenizer: checked against the prior's fingerprint.
            changes: parameters of `StylePrior` that replace the saved ones; ``revision`` and ``token`` go to the hub.

        Raises:
            DecodingError: nothing there, damaged, or of another tokenizer.
        """
        hub: dict[str, Any] = {key: changes.pop(key) for key in ("revision", "token") if key in changes}
        model = load_prior(find_file(name_or_path, PRIOR_FILE, "style prior", hub), tokenizer)
        config_path = find_file(name_or_path, CONFIG_FILE, "style prior", hub)
        try:
            config = json.loads(config_path.read_bytes())
            parameters = {key: config[key] for key in ("orders", "weights", "combine")} | {"lambda_": config["lambda"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DecodingError(f"{config_path} is damaged: {error!r}") from error
        if "λ" in changes:
            changes["lambda_"] = changes.pop("λ")
        in_range = isinstance(parameters["lambda_"], int | float) and 0 <= parameters["lambda_"] <= 1
        return cls(model, tokenizer=tokenizer, **({"allow_any_lambda": not in_range} | parameters | changes))


def checked_lambda(value: float, allow_any: bool = False, *, hint: str = ANY_LAMBDA_HINT) -> float:
    """λ as a float. ``hint`` says what to do about a value outside [0, 1].

    Raises:
        DecodingError: not a finite number, or outside [0, 1] and not allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DecodingError(f"λ must be a finite number, not {value!r}")
    if not (allow_any or 0 <= value <= 1):
        raise DecodingError(f"λ must lie in [0, 1], not {value:g}{hint}")
    return float(value)


def _mixture(
    model_order: int, orders: Sequence[int] | None, weights: Sequence[float] | None, combine: Combine
) -> Tensor | None:
    """The ``mixture`` of `add_log_prior`, float32 [1, n, n], or None for the plain interpolated prior."""
    used = list(range(1, model_order + 1) if orders is None else orders)
    if not used or len(set(used)) < len(used) or not all(k in range(1, model_order + 1) for k in used):
        raise DecodingError(f"orders must be some of 1 to {model_order}, each once, not {orders}")
    if combine == "interpolated":
        if max(used) == model_order:
            return None
        mixture = torch.zeros(1, model_order, model_order)
        mixture[:, 0, : max(used)] = 1
        return mixture
    share = [1 / len(used)] * len(used) if weights is None else [float(w) for w in weights]
    if len(share) != len(used) or not all(math.isfinite(w) and w >= 0 for w in share) or not any(share):
        raise DecodingError(f"weights must be {len(used)} finite numbers, none negative and not all 0, not {weights}")
    by_order = dict(zip(used, share, strict=True))
    return mixture_of_orders([by_order.get(k, 0.0) for k in range(1, model_order + 1)])
