"""`StylePrior`: n-gram style priors in logit space, for transformers' ``generate``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from operator import index
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding.errors import DecodingError
from decoding.hub import upload
from decoding.late import LateAnswer
from decoding.style.files import SavedStyle, is_saved_prior, read_folder, write_folder
from decoding.style.ratio import MODEL, ratio_to
from decoding.style.registered import DEFAULT_STYLE
from decoding.style.source import Corpus, load_corpus
from decoding.style.steering import Combine, Guards, GuardSettings, guards_of, mixture_of, steer
from decoding.style.strength import (
    DEFAULT_TOLERANCE,
    checked_lambda,
    checked_tolerance,
    chosen_strength,
    held_out_part,
)
from decoding.style.training import DEFAULT_ORDER, DEFAULT_SMOOTHING, prior_of_tokens, resolve_style
from decoding.tokens import pad_id, tokenize
from ngram import NGramModel
from ngram.layout import unigram_tables
from ngram.tables import Tables

Mode = Literal["paper", "ratio"]
DEFAULT_LAMBDAS = {"paper": 0.1, "ratio": 0.6}
FIRST_SHARE = 0.6
"""Of the first order, in mode "ratio"."""
AUTO: Literal["auto"] = "auto"


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

    Guards hold either mode back: ``entropy_gate``, ``plausibility``, ``max_js`` (formulas: `steering.steer`).

    Examples:
        >>> generate("path-or-hub-id", "The captain said", logits_processor=[StylePrior(λ=0.5, mode="ratio")])
        >>> prior = StylePrior(λ=0.5, style="king-james", mode="ratio", tokenizer=tokenizer, model=model)
        >>> model.generate(**inputs, logits_processor=[prior])
        >>> StylePrior(λ="auto", style="my.txt", mode="ratio", tokenizer=tokenizer, model=model).lambda_

    Args:
        style: a registered name, a text file, a folder, a saved prior, or an `NGramModel` (needs no tokenizer).
        λ: strength, in [0, 1], by default 0.1 in mode "paper" and 0.6 in mode "ratio"; also as ``lambda_``. 0 leaves
            the scores untouched, bit for bit. "auto" has it chosen for the bound model, by a held-out part of the
            style's text (`decoding.style.strength.choose_strength`).
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        model: the generating model, which λ="auto" and the background "model" measure, once.
            `decoding.generate` binds it.
        mode: "paper" or "ratio".
        background: of mode "ratio": "model", what the model writes by itself; "corpus", the style's own frequencies,
            which leaves what contexts add; or a corpus, like ``style``.
        log_ratio: the row r of mode "ratio", float32 [V], where it is known; then nothing is measured.
        orders: n-gram orders to use, all of the model's by default. With (1,) nothing is looked up.
        weights: w_k of each of ``orders``; by default they sum to 1, equal ones in mode "paper", as above in mode
            "ratio". For "matching" only.
        combine: "matching", as above, or "interpolated": λ · log p_n of the highest of ``orders``.
        plausibility: α in (0, 1]: only tokens with at least α times the probability of the likeliest are moved.
        max_js: budget of every step, in nats: λ is lowered until the Jensen-Shannon divergence is within.
        entropy_gate: in nats: λ is lowered in proportion where the model's entropy is below.
        tolerance: of λ="auto": the share by which base perplexity may rise. Distinct-2 may fall by a tenth.
        order, smoothing: of the n-gram model, where ``style`` is text.
        pad_token_id: leading tokens of this id are padding and no context; by default the tokenizer's.
        allow_any_lambda: accept λ outside [0, 1].

    Attributes:
        model: the n-gram model, once there is a tokenizer.
        log_ratio: the row r of mode "ratio", once it is known.
        mixture: how the orders are weighted, for `ngram.tables.add_log_prior`; None for the plain interpolated prior.

    Raises:
        DecodingError: unusable parameters, or, when called, no tokenizer, NaN scores, or scores narrower than the
            prior's vocabulary. On CUDA devices NaN is reported at a later step, so that no step waits for the device.
    """

    def __init__(
        self,
        style: str | PathLike | NGramModel = DEFAULT_STYLE,
        *,
        λ: float | Literal["auto"] | None = None,
        lambda_: float | Literal["auto"] | None = None,
        tokenizer: Any | None = None,
        model: Any | None = None,
        mode: Mode = "paper",
        background: str | PathLike = MODEL,
        log_ratio: Tensor | np.ndarray | None = None,
        orders: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        combine: Combine = "matching",
        plausibility: float | None = None,
        max_js: float | None = None,
        entropy_gate: float | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        order: int = DEFAULT_ORDER,
        smoothing: str = DEFAULT_SMOOTHING,
        pad_token_id: int | None = None,
        allow_any_lambda: bool = False,
    ):
        if λ is not None and lambda_ is not None:
            raise DecodingError("give λ or lambda_, not both: they are the same parameter")
        for what, value, known in (("combine", combine, get_args(Combine)), ("mode", mode, get_args(Mode))):
            if value not in known:
                raise DecodingError(f"unknown {what} {value!r}: choose from {', '.join(known)}")
        if weights is not None and combine == "interpolated":
            raise DecodingError('weights are for combine="matching"; the interpolated prior has none')
        given = next((value for value in (λ, lambda_) if value is not None), DEFAULT_LAMBDAS[mode])
        self.lambda_: float | Literal["auto"] = AUTO if given == AUTO else checked_lambda(given, allow_any_lambda)
        self.style = style
        self.mode = mode
        self.background = str(background)
        self.log_ratio = _taken("log_ratio", log_ratio, lambda row: torch.as_tensor(row).float())
        self.orders = _taken("orders", orders, lambda values: [index(each) for each in values])
        self.weights = _taken("weights", weights, lambda values: [float(each) for each in values])
        self.combine = combine
        self.guards = GuardSettings(plausibility, max_js, entropy_gate).checked()
        self.tolerance = checked_tolerance(tolerance)
        self.order = order
        self.smoothing = smoothing
        self.pad_token_id = pad_token_id
        self.model: NGramModel | None = None
        self.mixture: Tensor | None = None
        self._tables: Tables | None = None
        self._guards: Guards | None = None
        self._holds_nan = LateAnswer()
        if tokenizer is not None:
            self.bind(tokenizer, model)
        elif isinstance(style, NGramModel):
            self._use(style)

    @property
    def needs_model(self) -> bool:
        """Whether `bind` will want the model, to measure it."""
        needs_ratio = self.mode == "ratio" and self.log_ratio is None
        return self.lambda_ == AUTO or (needs_ratio and self.background == MODEL)

    def bind(self, tokenizer: Any, model: Any | None = None) -> StylePrior:
        """Makes the prior for a tokenizer, and for a model where one is needed, or checks that it fits. Returns itself.

        Raises:
            DecodingError: the style cannot be read, or λ="auto" or a ratio wants a model, or the style's text, and has
                none.
        """
        needs_ratio = self.mode == "ratio" and self.log_ratio is None
        if self.lambda_ == AUTO or needs_ratio:
            corpus = self._corpus()
            documents = tokenize(corpus.documents, tokenizer)
            if self.lambda_ == AUTO:
                self.lambda_ = self._chosen_lambda(corpus, documents, tokenizer, model)
            if needs_ratio:
                self.log_ratio = ratio_to(self.background, documents, tokenizer, model)
        style = self.style if self.model is None else self.model
        self._use(resolve_style(style, tokenizer, order=self.order, smoothing=self.smoothing))
        if self.pad_token_id is None:
            self.pad_token_id = pad_id(tokenizer)
        return self

    def _corpus(self) -> Corpus:
        if isinstance(self.style, NGramModel) or is_saved_prior(self.style):
            wanted = 'λ="auto"' if self.lambda_ == AUTO else 'mode="ratio"'
            raise DecodingError(
                f"{wanted} needs the style's text, not a trained n-gram model: give the text, or open a folder that "
                "StylePrior.save_pretrained wrote with StylePrior.from_pretrained"
            )
        return load_corpus(str(self.style))

    def _chosen_lambda(
        self, corpus: Corpus, documents: Sequence[np.ndarray], tokenizer: Any, model: Any | None
    ) -> float:
        if model is None:
            raise DecodingError('λ="auto" needs the model: StylePrior(λ="auto", tokenizer=tokenizer, model=model)')
        kept, held_out = held_out_part(documents)
        settings, row = self._settings(), self.log_ratio
        if self.mode == "ratio" and row is None:
            row = ratio_to(self.background, kept, tokenizer, model)
        trained = prior_of_tokens(kept, corpus, tokenizer, self.order, self.smoothing)

        def steered(value: float) -> StylePrior:
            return StylePrior(trained, λ=value, tokenizer=tokenizer, log_ratio=row, **settings)

        about = {"text": corpus.sha256, "order": self.order, "smoothing": self.smoothing, **settings}
        about["log_ratio"] = None if row is None else hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()
        return chosen_strength(steered, held_out, model, tokenizer, self.tolerance, about)

    def _settings(self) -> dict[str, Any]:
        """How the prior is added: what `save_pretrained` keeps beside λ."""
        return {
            "mode": self.mode,
            "orders": self.orders,
            "weights": self.weights,
            "combine": self.combine,
            **self.guards._asdict(),
        }

    def _use(self, model: NGramModel) -> None:
        first = FIRST_SHARE if self.mode == "ratio" else None
        mixture = mixture_of(model.order, self.orders, self.weights, self.combine, first)
        if self._highest_order(model) == 1:
            mixture = None if mixture is None else mixture[:, :1, :1]
        if self.log_ratio is not None and self.log_ratio.shape != (model.vocab_size,):
            raise DecodingError(f"log_ratio must have the prior's {model.vocab_size} ids, not {len(self.log_ratio)}")
        self.model, self.mixture, self._tables = model, mixture, None

    def _highest_order(self, model: NGramModel) -> int:
        return max(self.orders or [model.order])

    @property
    def tables(self) -> Tables:
        """What is added, as `ngram.tables.add_log_prior` takes it: the n-gram model's, or with r for log p_1.

        Raises:
            DecodingError: no tokenizer yet.
        """
        if self.model is None:
            raise DecodingError(
                f"this StylePrior has no tokenizer: write StylePrior(λ={self.lambda_}, style={str(self.style)!r}, "
                "tokenizer=tokenizer), or use decoding.generate, which binds it"
            )
        row = self.model.tables.unigram[0] if self.mode == "paper" else self.log_ratio
        if row is None:
            raise DecodingError('mode="ratio" needs bind(tokenizer, model), or log_ratio')
        if self._highest_order(self.model) == 1:
            return unigram_tables(row, self.model.seen)
        return self.model.tables.with_unigram(row)

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
        if self.lambda_ == AUTO:
            raise DecodingError('λ="auto" was not chosen yet: bind(tokenizer, model) does')
        if self._tables is None or self._tables.unigram.shape[1] != scores.shape[1]:
            self._tables = self._widened(scores.shape[1])
            self._guards = guards_of([self.guards], scores.device)
        if self._tables.unigram.device != scores.device:
            self._tables = self._tables.to(scores.device)
            self.mixture = None if self.mixture is None else self.mixture.to(scores.device)
        if self._holds_nan(scores.device, lambda: torch.isnan(scores.amax())):
            raise DecodingError("the scores hold NaN before the style prior: the model or an earlier processor made it")
        strength = torch.full((len(scores),), self.lambda_, device=scores.device)
        history = self._history(input_ids, self._tables.order)
        return steer(self._tables, scores, history, strength, self.mixture, self._guards)

    def _widened(self, width: int) -> Tables:
        tables = self.tables
        if width < tables.vocab_size:
            raise DecodingError(
                f"the model scores {width} ids and the prior has {tables.vocab_size}: it belongs to another model"
            )
        return tables.widened(width)

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
        if self.model is None or self.lambda_ == AUTO:
            raise DecodingError("only a bound StylePrior can be saved: give it a tokenizer")
        write_folder(SavedStyle(self.model, self.lambda_, self._settings(), self.log_ratio), save_directory)

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
        saved = read_folder(name_or_path, tokenizer, hub)
        parameters = {"lambda_": saved.lambda_, "log_ratio": saved.log_ratio, **saved.settings}
        if "λ" in changes:
            changes["lambda_"] = changes.pop("λ")
        return cls(saved.model, tokenizer=tokenizer, **(parameters | changes))


def _taken(name: str, given: Any, take: Callable[[Any], Any]) -> Any:
    """A parameter's numbers, from whatever holds numbers; None stays None.

    Raises:
        DecodingError: anything else.
    """
    if given is None:
        return None
    try:
        return take(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DecodingError(f"{name} must hold numbers, whole ones for orders, not {given!r}") from error
