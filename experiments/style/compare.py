"""Ways to a style, side by side: priors in all modes, prompting, LoRA, and a prior on top of those.

Every corpus is split (`experiments.style.judge`): one part steers, prompts and trains, a second trains the judges, a
third tests them. Texts continue prompts that no method has seen. They are sampled from the whole distribution, and have
exactly ``max_new_tokens`` tokens; the end of sequence is ruled out. Perplexity is the plain model's, after the plain
prompt, whatever wrote the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import LogitsProcessor

from decoding import metrics
from decoding.errors import DecodingError
from decoding.style.background import Watcher, sample
from decoding.style.bound import FIRST_SHARE
from decoding.style.prior import StylePrior
from decoding.style.ratio import CORPUS, MODEL, MOST_LOG_RATIO, frequencies, log_ratio, ratio_to
from decoding.style.source import Corpus
from decoding.style.strength import held_out_part
from decoding.style.training import prior_of_tokens
from decoding.temperature.processors import FixedTemperature
from decoding.tokens import control_ids, ends_of_sequence, id_count, pad_id, padded, tokenize
from experiments.lab.cells import Cell
from experiments.lab.runs import RunFolder, finish, settings_of
from experiments.style.judge import Split, passages, split_corpus
from experiments.style.lora import LoraRecipe, train_lora, with_lora
from experiments.style.tried import LongestContexts, SparesNames, learnt_weights, written_after

HELD_OUT_PROMPTS = Path(__file__).with_name("held_out_prompts.txt")
TEMPERATURES = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3)
PASSAGES_SHOWN = 3
UNSTEERED = "unsteered"
RECOMMENDED = "ratio"


class Method(NamedTuple):
    """A way to a style.

    Attributes:
        name: of the method.
        lambdas: the strengths that are tried.
        prior: parameters of `StylePrior`. ``background`` may also be "other" or "prompts", ``weights`` "learnt".
        prompting: "zero-shot" or "passages".
        lora: how much of it.
        change: to the prior: "spares names" or "longest contexts".
    """

    name: str
    lambdas: tuple[float, ...] = (0.0,)
    prior: Mapping[str, Any] | None = None
    prompting: str | None = None
    lora: float = 0.0
    change: str | None = None


RATIO: dict[str, Any] = {"mode": "ratio"}
UNIGRAMS: dict[str, Any] = {"mode": "ratio", "orders": (1,)}
METHODS = (
    Method("paper", (0.1, 0.3, 0.5, 1.0), {}),
    Method(RECOMMENDED, (0.2, 0.4, 0.6, 0.8, 1.0), RATIO),
    Method("ratio, no contexts", (0.2, 0.4, 0.6, 0.8, 1.0), UNIGRAMS),
    Method("ratio, no contexts, no cut-off", (0.5, 1.0), {**UNIGRAMS, "most": np.inf}),
    Method("ratio to another corpus, no contexts", (0.5, 1.0), {**UNIGRAMS, "background": "other"}),
    Method("ratio to the corpus", (0.5, 1.0), {**RATIO, "background": CORPUS, "weights": (1 / 3,) * 3}),
    Method("paper, JS within 0.05", (1.0,), {"max_js": 0.05}),
    Method("paper, plausible tokens", (0.5, 1.0), {"plausibility": 0.1}),
    Method("paper, entropy gate", (0.5, 1.0), {"entropy_gate": 4.0}),
    Method("ratio, no contexts, JS within 0.05", (1.0,), {**UNIGRAMS, "max_js": 0.05}),
    Method("zero-shot prompt", prompting="zero-shot"),
    Method("three passages", prompting="passages"),
    Method("three passages + ratio", (0.5, 1.0), RATIO, prompting="passages"),
    Method("LoRA", lora=1.0),
    Method("LoRA + ratio", (0.5,), RATIO, lora=1.0),
    Method("half LoRA", lora=0.5),
    Method("half LoRA + ratio", (0.5, 1.0), RATIO, lora=0.5),
)
TRIED = (
    Method("ratio, names and numbers spared", (0.6, 1.0), RATIO, change="spares names"),
    Method("ratio, longest contexts", (0.6, 1.0), RATIO, change="longest contexts"),
    Method("ratio to what the model writes there", (0.6, 1.0), {**RATIO, "background": "prompts"}),
    Method("ratio to another corpus", (0.6, 1.0), {**RATIO, "background": "other"}),
    Method("ratio, learnt weights", (0.6, 1.0), {**RATIO, "weights": "learnt"}),
)
"""Only where they are asked for by name."""


@dataclass(frozen=True)
class CompareOptions:
    """What a user chooses.

    Attributes:
        prompts: to continue.
        other: name of the corpus that serves as the general background.
        methods: names of those to try.
        samples: texts for each prompt.
        max_new_tokens: of each text.
        batch_size: texts at a time.
        lora: how one is trained.
    """

    prompts: tuple[str, ...]
    other: str
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(method.name for method in METHODS))
    samples: int = 1
    max_new_tokens: int = 64
    batch_size: int = 64
    lora: LoraRecipe = field(default_factory=LoraRecipe)


@dataclass(frozen=True)
class CompareCell(Cell):
    """One generation run over all prompts. ``style`` is None for the unsteered model, at some temperature."""

    style: str | None
    method: str
    lambda_: float = 0.0
    temperature: float = 1.0

    @property
    def label(self) -> str:
        """See `Cell`."""
        readable = f"{self.style or UNSTEERED}-{self.method}-lambda{self.lambda_:g}-t{self.temperature:g}"
        return "".join(c if c.isalnum() or c in "-." else "_" for c in readable)


def methods_named(names: Sequence[str]) -> dict[str, Method]:
    """Those of `METHODS` and `TRIED`, in the order of the names.

    Raises:
        DecodingError: a name that none has.
    """
    known = {method.name: method for method in (*METHODS, *TRIED)}
    for name in names:
        if name not in known:
            raise DecodingError(f"no way to a style is called {name!r}: choose from {', '.join(known)}")
    return {name: known[name] for name in names}


class Style:
    """A corpus, and what methods make of the part that steers."""

    def __init__(self, corpus: Corpus, tokenizer: Any):
        self.name = corpus.name
        self.split: Split = split_corpus(corpus)
        self.tokenizer = tokenizer

    @cached_property
    def documents(self) -> list[np.ndarray]:
        """The steering part's token ids."""
        return tokenize(self.split.steering.documents, self.tokenizer)

    @cached_property
    def prior(self) -> Any:
        """The n-gram model of the steering part."""
        return prior_of_tokens(self.documents, self.split.steering, self.tokenizer, 3, "kneser-ney")

    @cached_property
    def index(self) -> metrics.CorpusIndex:
        """Tells what texts copy."""
        return metrics.CorpusIndex(self.documents)

    def prompted(self, kind: str | None, prompts: Sequence[str]) -> list[str]:
        """Prompts that ask for the style, each ending on the plain prompt."""
        if kind is None:
            return list(prompts)
        if kind == "zero-shot":
            return [self._asked_for(prompt) + prompt for prompt in prompts]
        pool = passages(self.split.steering)
        drawn = np.random.default_rng(0)
        return ["\n\n".join([*drawn.choice(pool, PASSAGES_SHOWN, replace=False), prompt]) for prompt in prompts]

    def _asked_for(self, prompt: str) -> str:
        request = f"Continue this text in the style of {self.name.replace('-', ' ')}: {prompt}"
        if not getattr(self.tokenizer, "chat_template", None):
            return f"{request}\n\n"
        turns = [{"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


class Comparison:
    """Generates and measures cells, keeping each in a run folder.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        model_name: how the user called it.
        corpora: the styles to reach.
        others: more corpora, for judges to tell them from.
        options: the user's choices.
        out: the run folder's path.
        resume: go on with a run that is there.

    Raises:
        DecodingError: a corpus that is too short, or a folder that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        model_name: str,
        corpora: Sequence[Corpus],
        others: Sequence[Corpus],
        options: CompareOptions,
        out: Path,
        resume: bool,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.options = options
        self.styles = {corpus.name: Style(corpus, tokenizer) for corpus in corpora}
        self.others = {corpus.name: Style(corpus, tokenizer) for corpus in others}
        self.methods = methods_named(options.methods)
        self.folder = RunFolder(out, self._settings(), resume, growing=("methods",))
        self.records: dict[CompareCell, dict[str, Any]] = {}
        self._ratios: dict[tuple[str, str, float], Tensor] = {}
        self._weights: dict[str, list[float]] = {}

    def _settings(self) -> dict[str, Any]:
        options = asdict(self.options)
        return {
            **settings_of(self.model_name, self.model, self.tokenizer),
            "styles": {name: style.split.steering.sha256 for name, style in self.styles.items()},
            "others": {name: style.split.steering.sha256 for name, style in self.others.items()},
            **{name: options[name] for name in ("other", "samples", "max_new_tokens", "batch_size", "lora", "methods")},
            "prompts": list(self.options.prompts),
        }

    def cells(self) -> list[CompareCell]:
        """The unsteered model over temperatures, then every style's methods."""
        unsteered = [CompareCell(None, UNSTEERED, temperature=t) for t in TEMPERATURES]
        return unsteered + [
            CompareCell(style, method.name, value)
            for style in self.styles
            for method in self.methods.values()
            for value in method.lambdas
        ]

    def run(self) -> None:
        """Finishes the cells that are not on disk yet, with progress. ``self.records`` then holds all of them."""
        finish(self.folder, self.cells(), self._measured, self.records)

    def _measured(self, cell: CompareCell) -> dict[str, Any]:
        method = self.methods.get(cell.method, Method(UNSTEERED))
        texts: list[dict[str, Any]] = []
        prior = self._prior(cell, method)  # the ratio is to what the plain model writes
        with self._model_of(cell, method):
            batches = [
                (start, prompts, *self._written(cell, method, prior, start, prompts))
                for start, prompts in self._batches()
            ]
        for start, prompts, tokens, steps in batches:
            nll, means = self._nll(prompts, tokens), steps.means()
            for row, ids in enumerate(tokens.cpu()):
                texts.append(
                    {
                        "prompt": (start + row) % len(self.options.prompts),
                        "text": self.tokenizer.decode(ids),
                        "base_nll": float(nll[row]),
                        **{name: float(values[row]) for name, values in means.items()},
                        **{f"distinct_{n}": metrics.distinct_n(ids, n) for n in (1, 2, 3)},
                        "copied_run": self._copied_runs(cell, ids),
                    }
                )
        return {**asdict(cell), "texts": texts}

    def _batches(self) -> Iterator[tuple[int, list[str]]]:
        prompts = list(self.options.prompts) * self.options.samples
        for start in range(0, len(prompts), self.options.batch_size):
            yield start, prompts[start : start + self.options.batch_size]

    def _model_of(self, cell: CompareCell, method: Method) -> AbstractContextManager:
        if not method.lora or cell.style is None:
            return nullcontext()
        style, folder = self.styles[cell.style], self.folder.path / "lora" / cell.style
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # other processes may want it too
            train_lora(self.model, style.documents, folder, self.options.lora, self.tokenizer.eos_token_id)
        return with_lora(self.model, folder, method.lora)

    def _written(
        self, cell: CompareCell, method: Method, prior: LogitsProcessor | None, start: int, prompts: list[str]
    ) -> tuple[Tensor, _Steps]:
        steps = _Steps()
        processors: list[LogitsProcessor] = [steps.before]
        if cell.style is not None:
            prompts = self.styles[cell.style].prompted(method.prompting, prompts)
        if prior is not None:
            processors.append(prior)
        if cell.temperature != 1:
            processors.append(FixedTemperature(cell.temperature))
        torch.manual_seed(start)
        tokens = sample(self.model, self.tokenizer, prompts, self.options.max_new_tokens, [*processors, steps.after])
        return tokens, steps

    def _prior(self, cell: CompareCell, method: Method) -> LogitsProcessor | None:
        if cell.style is None or method.prior is None:
            return None
        settings, style = dict(method.prior), self.styles[cell.style]
        most, background = settings.pop("most", MOST_LOG_RATIO), settings.pop("background", MODEL)
        if settings.get("mode") == "ratio":
            settings["log_ratio"] = self._log_ratio(cell.style, background, most)
        if settings.get("weights") == "learnt":
            settings["weights"] = self._learnt_weights(style, settings["log_ratio"])
        prior = StylePrior(style.prior, λ=cell.lambda_, pad_token_id=pad_id(self.tokenizer), **settings)
        if method.change == "spares names":
            return SparesNames(prior, self.tokenizer)
        if method.change == "longest contexts":
            share = (1 - FIRST_SHARE) / (style.prior.order - 1)
            return LongestContexts(prior, style.documents, self.tokenizer, cell.lambda_ * share)
        return prior

    def _log_ratio(self, name: str, background: str, most: float) -> Tensor:
        key = (name, background, most)
        if key not in self._ratios:
            documents = self.styles[name].documents
            if background == "prompts":
                self._ratios[key] = log_ratio(self._frequencies(documents), self._written_after_prompts, most)
            else:
                source = self.others[self.options.other].documents if background == "other" else background
                self._ratios[key] = ratio_to(source, documents, self.tokenizer, self.model, most)
        return self._ratios[key]

    @cached_property
    def _written_after_prompts(self) -> Tensor:
        return written_after(self.model, self.tokenizer, self.options.prompts, self.options.max_new_tokens)

    def _frequencies(self, documents: Sequence[np.ndarray]) -> Tensor:
        return frequencies(documents, id_count(self.tokenizer), control_ids(self.tokenizer))

    def _learnt_weights(self, style: Style, row: Tensor) -> list[float]:
        if style.name not in self._weights:
            kept, held_out = held_out_part(style.documents)
            prior = prior_of_tokens(kept, style.split.steering, self.tokenizer, style.prior.order, "kneser-ney")
            self._weights[style.name] = learnt_weights(self.model, prior, row, held_out)
        return self._weights[style.name]

    @torch.inference_mode()
    def _nll(self, prompts: list[str], tokens: Tensor) -> Tensor:
        """Mean negative log-probability of each text under the plain model, after the plain prompts: float32 [B]."""
        inputs = padded(prompts, self.tokenizer, tokens.device)
        ids = torch.cat((inputs["input_ids"], tokens), 1)
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(tokens)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        count = tokens.shape[1]
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=count + 1)
        logits = output.logits[:, :-1].float()
        logits[..., ends_of_sequence(self.model, self.tokenizer)] = -torch.inf
        return metrics.mean_nll(metrics.token_log_probs(logits, tokens))

    def _copied_runs(self, cell: CompareCell, ids: Tensor) -> dict[str, int]:
        names = self.styles if cell.style is None else (cell.style,)
        return {name: self.styles[name].index.longest_copied_run(ids) for name in names}


class _Steps:
    """Watches what is sampled from: entropy, and divergence from the scores before the prior."""

    def __init__(self) -> None:
        self.before, self.after = Watcher(self._remember), Watcher(self._measure)
        self._raw: Tensor | None = None
        self._entropy: list[Tensor] = []
        self._js: list[Tensor] = []

    def _remember(self, scores: Tensor) -> None:
        self._raw = scores

    def _measure(self, scores: Tensor) -> None:
        assert self._raw is not None  # ``before`` comes before
        self._entropy.append(metrics.entropy(scores))
        self._js.append(metrics.jensen_shannon(self._raw, scores))

    def means(self) -> dict[str, Tensor]:
        """Over steps, in nats: float32 [B] each."""
        named = {"entropy": self._entropy, "js": self._js}
        return {name: torch.stack(values, 1).mean(1).cpu() for name, values in named.items()}
