"""``decoding`` as a model of lm-eval (EleutherAI's harness): its ``hf``, under a policy.

lm-eval finds it by the entry point group ``lm_eval.models``. Releases that do not look there yet, 0.4.13 among them,
know it once this module is imported, as ``decoding lm-eval`` does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import copy
from os import PathLike
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import warning_once
from torch import Tensor

from decoding.errors import DecodingError
from decoding.evaluation.scoring import Scoring
from decoding.generation import sample_at_temperature_1
from decoding.models import resolve_model
from decoding.policy import Policy
from decoding.policy.values import FIELDS
from decoding.style.bound import BoundStyle
from decoding.temperature.processors import Temperature

_log = logging.getLogger(__name__)


@register_model("decoding")
class DecodingLM(HFLM):
    """A causal language model of transformers under a policy. Without one it is lm-eval's ``hf``, bit for bit.

    Generations are `Policy.attach`'s: chunks, style, temperature. Greedy ones have no temperature; sampled ones
    (``do_sample=true``) are drawn at the policy's, with its selector's top-p unless the task has a truncation.

    Log-likelihoods are those of the distribution that a generation would sample from, before truncation: the style
    is added at each position, with the tokens before as history, and the temperature divides. A temperature that is
    chosen is chosen by the request's context. Chunks do not act: a text that is given is read in one pass, which is
    read whole.

    Examples:
        >>> model = DecodingLM("path-or-hub-id", policy="my-policy", batch_size=8)
        >>> lm_eval.simple_evaluate(model=model, tasks=["boolq"])

    Args:
        pretrained: a folder, a hub id, the embedded default's name, or a loaded model.
        policy: a `Policy`, a folder or a hub id.
        options: the fields of a policy by their names in its file (``style``, ``lambda``, ``mode``, …) where there is
            no ``policy``; everything else is ``hf``'s.

    Raises:
        DecodingError: both a policy and fields, fields that a policy cannot have, a model with an encoder, tensor
            parallelism, or as `Policy.processors`.
    """

    _scoring: Scoring | None = None  # of one call, in that call's own copy
    _rows: Iterator[Tensor]

    def __init__(self, pretrained: Any, policy: Policy | str | PathLike | None = None, **options: Any):
        fields = {name: options.pop(name) for name in FIELDS if name in options}
        self.policy = _opened(policy, fields)
        if self.policy.parts() and options.get("tp_plan") is not None:
            raise DecodingError("tp_plan splits a model in a way that policies were not tested with: leave one out")
        super().__init__(resolve_model(pretrained) if isinstance(pretrained, str) else pretrained, **options)
        self.policy.processors(self.tokenizer, self.model)  # What is refused or measured is so now.

    def _get_backend(self, *arguments: Any, **options: Any) -> None:
        super()._get_backend(*arguments, **options)
        if self.policy.parts() and self.backend != "causal":
            raise DecodingError(f"a policy needs a causal language model, not {self.backend}: use lm-eval's own hf")

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if not self.policy.parts():
            return super()._model_generate(context, max_length, stop, **options)
        with self.policy.attach(self.model, self.tokenizer) as processors:
            if self.policy.temperature is not None and not options.get("do_sample"):
                warning_once(_log, "greedy texts have no temperature: the policy's does nothing without do_sample=true")
                processors = [each for each in processors if not isinstance(each, Temperature)]
            elif self.policy.temperature is not None:
                if (given := options.get("temperature")) not in (None, 0.0, 1.0):
                    raise DecodingError(f"temperature={given} of the task, and the policy's: leave one out")
                sample_at_temperature_1(self.model, options, self.policy.top_p)
            return super()._model_generate(context, max_length, stop, logits_processor=processors, **options)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        processors = self.policy.processors(self.tokenizer, self.model)
        acting = [each for each in processors if not (isinstance(each, BoundStyle) and each.lambda_ == 0)]
        if not acting:
            return super()._loglikelihood_tokens(requests, *arguments, **options)
        call = copy(self)
        call._scoring = Scoring(acting)
        if call._scoring.reads_contexts:  # the cache takes requests together whose tokens are the same in all
            call.logits_cache = self.logits_cache and all(len(continuation) == 1 for *_, continuation in requests)
        return HFLM._loglikelihood_tokens(call, requests, *arguments, **options)

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        logits = super()._model_call(inps, *arguments, **options)
        if self._scoring is None:
            return logits
        self._rows = iter(inps)
        return logits.float()  # as transformers gives scores to processors

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """The continuation's log-probabilities of one row. ``_model_call``'s rows come in their order."""
        chosen = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        return chosen if self._scoring is None else self._scoring.log_probs(next(self._rows)[:inplen], chosen)

    def get_model_info(self) -> dict[str, Any]:
        """As ``hf``'s, and the policy's fields, for the results' file."""
        return super().get_model_info() | {"policy": self.policy.as_dict()}


def _opened(policy: Policy | str | PathLike | None, fields: dict[str, Any]) -> Policy:
    if policy is None:
        return Policy(**{("lambda_" if name == "lambda" else name): value for name, value in fields.items()})
    if fields:
        raise DecodingError(f"policy={policy}, and {', '.join(fields)} beside it: change the policy, or leave one out")
    return policy if isinstance(policy, Policy) else Policy.from_pretrained(policy)
