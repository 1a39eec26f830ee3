"""``decoding chunk eval``: what selecting chunks costs in quality, beside what else could be kept.

Prompts are read once, with full attention. Every method then goes on from their keys and values, one token at a time,
through the cache that users get.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from chunkllm import ChunkAdapters, ChunkCalibration, ChunkSelection
from chunkllm.contiguous.attach import Attachment
from chunkllm.models import bottom_states, cache_argument, decoder_of
from chunkllm.training.calibration import divergence
from decoding.errors import DecodingError
from decoding.metrics import token_log_probs
from decoding.models import model_fingerprint
from decoding.style.source import Corpus, StyleSource, load_corpus
from decoding.tokens import tokenize
from experiments.lab.cells import Cell
from experiments.lab.runs import RunFolder, finish
from experiments.long_context.baselines import ADAPTER, BY_LAYER, FULL, METHODS, Setting, all_methods
from ngram.storage import write_atomically

_LAST = 8  # Tokens of a prompt that the selection's own model pass reads, for their queries.
_RECALL_EVERY = 64
_ANSWER = 8
_SHORT = 512
TEXTS_FILE = "texts.json"

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class TextCell(Cell):
    """Held-out texts under a method that keeps a share of the tokens."""

    method: str
    retention: float

    @property
    def label(self) -> str:
        """See `Cell`."""
        name = "".join(character if character.isalnum() else "-" for character in self.method)
        return f"text-{name}-{self.retention:g}"


@dataclass(frozen=True)
class PasskeyCell(Cell):
    """What all methods answer to prompts of a length, the key at a place."""

    length: int
    place: int

    @property
    def label(self) -> str:
        """See `Cell`."""
        return f"passkey-{self.length}-{self.place}"


@dataclass(frozen=True)
class ShortCell(Cell):
    """Texts from which nothing need be dropped."""

    @property
    def label(self) -> str:
        """See `Cell`."""
        return "short"


Record = dict[str, Any]


@dataclass(frozen=True)
class EvalOptions:
    """What a user chooses.

    Attributes:
        methods: names of `all_methods`.
        retentions: shares of the tokens so far to keep.
        context: tokens of a text, the last ``scored`` of which are predicted.
        scored: tokens to predict in every text.
        passkey_lengths: tokens of passkey prompts.
        passkey_depths: how many places for the key, from the beginning to the end.
        passkey_keys: keys per length and depth.
    """

    methods: tuple[str, ...] = tuple(name for name in METHODS if name != FULL)
    retentions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    context: int = 8192
    scored: int = 512
    passkey_lengths: tuple[int, ...] = (1000, 2000, 4000)
    passkey_depths: int = 6
    passkey_keys: int = 2

    @property
    def compared(self) -> list[TextCell]:
        """Methods and retentions, full attention first: with everything kept all methods are one."""
        shares = sorted({share for share in self.retentions if share < 1}, reverse=True)
        return [TextCell(FULL, 1.0), *(TextCell(method, share) for share in shares for method in self.methods)]

    @property
    def passkeys(self) -> list[PasskeyCell]:
        """Every length with every place."""
        places = range(self.passkey_depths)
        return [PasskeyCell(length, place) for length in self.passkey_lengths for place in places]


@dataclass(frozen=True)
class Read:
    """Prompts that have been read with full attention.

    Attributes:
        ids: int64 [B, T].
        states: keys and values of every layer but for the last tokens, each [B, Hkv, T − last, D].
        bottom: [B, T − last, hidden_size], the bottommost layer's output.
    """

    ids: Tensor
    states: list[tuple[Tensor, Tensor]]
    bottom: Tensor


def read(model: Any, ids: Tensor, following: Tensor | None = None) -> tuple[Read, Tensor | None]:
    """Reads prompts of one length row by row, with full attention.

    Args:
        model: without anything attached.
        ids: int64 [B, T], the prompts.
        following: int64 [B, n], tokens behind them.

    Returns:
        The prompts, and float32 [B, n, V], log-probabilities of what follows, if that is given.
    """
    rows, bottoms, predicted = [], [], []
    name = cache_argument(model)
    decoder_layer = decoder_of(model).layers[0]
    for i, row in enumerate(ids.split(1)):
        cache: Any = DynamicCache(config=model.config)
        hook = decoder_layer.register_forward_hook(lambda module, args, output: bottoms.append(bottom_states(output)))
        try:
            model(input_ids=row[:, :-_LAST], logits_to_keep=1, use_cache=True, **{name: cache})
        finally:
            hook.remove()
        rows.append([(layer.keys, layer.values) for layer in cache.layers])
        if following is not None:
            rest = torch.cat((row[:, -_LAST:], following[i : i + 1, :-1]), 1)
            output = model(input_ids=rest, logits_to_keep=following.shape[1], use_cache=True, **{name: cache})
            predicted.append(output.logits.float().log_softmax(-1))
    layers = zip(*rows, strict=True)
    states = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]
    return Read(ids, states, torch.cat(bottoms)), torch.cat(predicted) if predicted else None


class Continuation:
    """Writes or scores tokens behind prompts that were read, under a selection that is attached."""

    def __init__(self, model: Any, chunks: Attachment, prompts: Read):
        self.model = model
        self.cache = chunks.new_cache()
        self.cache.load(prompts.states, chunks.boundaries(prompts.ids[:, : prompts.bottom.shape[1]], prompts.bottom))
        self.logits = self.step(prompts.ids[:, -_LAST:])

    def step(self, ids: Tensor) -> Tensor:
        """int64 [B, n] -> logits after the last, [B, V]."""
        output = self.model(input_ids=ids, logits_to_keep=1, use_cache=True, **{cache_argument(self.model): self.cache})
        return output.logits[:, -1]


def score_texts(model: Any, chunks: Attachment, prompts: Read, targets: Tensor, full: Tensor) -> dict[str, Any]:
    """Predicts the tokens that follow prompts, given those before.

    Args:
        model: with the selection attached.
        chunks: the selection.
        prompts: B of them.
        targets: int64 [B, n], what follows.
        full: float32 [B, n, V], log-probabilities under full attention.

    Returns:
        Negative log-likelihoods, divergences from full attention and whether the most probable token is the same, B
        lists of n each; recall per layer; the retention.
    """
    writing = Continuation(model, chunks, prompts)
    losses, divergences, agree, recalls = [], [], [], []
    for i in range(targets.shape[1]):
        losses.append(-token_log_probs(writing.logits, targets[:, i]))
        divergences.append(divergence(full[:, i], writing.logits.float().log_softmax(-1)))
        agree.append(writing.logits.argmax(-1) == full[:, i].argmax(-1))
        if i and i % _RECALL_EVERY == 0 and writing.cache.full_layers[0].selected:
            scaling = chunks.plan.shape.scaling
            recalls.append([float(layer.recall(scaling).mean()) for layer in writing.cache.full_layers])
        if i + 1 < targets.shape[1]:
            writing.logits = writing.step(targets[:, i : i + 1])
    return {
        "nll": torch.stack(losses, 1).tolist(),
        "divergence": torch.stack(divergences, 1).tolist(),
        "agree": torch.stack(agree, 1).tolist(),
        "recall": np.mean(recalls, 0).tolist() if recalls else None,
        "kv_retention": chunks.stats["kv_retention"],
        "stats": chunks.stats,
    }


def answer(model: Any, chunks: Attachment, prompts: Read, tokenizer: Any) -> list[str]:
    """What a model writes greedily behind prompts."""
    writing = Continuation(model, chunks, prompts)
    written = [writing.logits.argmax(-1)]
    for _ in range(_ANSWER - 1):
        written.append(writing.step(written[-1][:, None]).argmax(-1))
    return tokenizer.batch_decode(torch.stack(written, 1))


def passkey_prompt(tokenizer: Any, length: int, depth: float, key: str) -> str:
    """The usual template (Mohtashami and Jaggi 2023, arXiv 2305.16300), of at most ``length`` tokens."""
    sizes = [len(tokenizer(text)["input_ids"]) for text in (_TASK + _KEY.format(key=key) + _QUESTION, _FILLER)]
    lines = max((length - sizes[0]) // sizes[1], 0)
    before = round(depth * lines)
    return _TASK + _FILLER * before + _KEY.format(key=key) + _FILLER * (lines - before) + _QUESTION


class Evaluation:
    """Runs the cells that a folder does not have yet.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        adapters: for the methods that want some, or a calibration.
        texts: token ids of held-out texts, at least ``context`` each.
        options: what to measure.
        folder: where cells are kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: ChunkAdapters | ChunkCalibration | None,
        texts: Sequence[np.ndarray],
        options: EvalOptions,
        folder: RunFolder,
    ):
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.texts, self.options, self.folder = texts, options, folder
        self._read: tuple[Read, Tensor] | None = None

    def run(self) -> dict[Cell, Record]:
        """All records, by cell."""
        cells = [*self.options.compared, ShortCell(), *self.options.passkeys]
        with torch.inference_mode():
            return finish(self.folder, cells, self._measured, title="evaluating")

    def _measured(self, cell: Cell) -> Record:
        if isinstance(cell, TextCell):
            return self._score(cell.method, cell.retention)
        return self._find(cell.length, cell.place) if isinstance(cell, PasskeyCell) else self._score_short()

    def attached(self, method: str, retention: float) -> Attachment:
        """A method's selection on the model."""
        setting = Setting(self.model, self.tokenizer, self.adapters, retention)
        return all_methods()[method](setting)

    def _score(self, method: str, retention: float) -> Record:
        prompt = self.options.context - self.options.scored
        ids = torch.from_numpy(np.stack([text[: self.options.context] for text in self.texts])).to(self.model.device)
        targets = ids[:, prompt:]
        if self._read is None:
            prompts, full = read(self.model, ids[:, :prompt], targets)
            assert full is not None
            self._read = prompts, full
        prompts, full = self._read
        if method == FULL:
            losses = -full.gather(-1, targets[..., None])[..., 0]
            return {"nll": losses.tolist(), "recall": None, "kv_retention": 1.0}
        with self.attached(method, retention) as chunks:
            return score_texts(self.model, chunks, prompts, targets, full)

    def _score_short(self) -> dict[str, Any]:
        """Texts from which nothing need be dropped under the default budget: perplexity without selection and with."""
        ids = torch.from_numpy(np.stack([text[:_SHORT] for text in self.texts])).to(self.model.device)
        plain = self._short_losses(ids)
        with ChunkSelection(self.adapters).attach(self.model, self.tokenizer) as chunks:
            selecting = self._short_losses(ids)
        perplexities = [float(losses.mean().exp()) for losses in (plain, selecting)]
        return {
            "tokens": ids.shape[1],
            "perplexity": perplexities[0],
            "with_selection": perplexities[1],
            "identical": bool(torch.equal(plain, selecting)),
            "kv_retention": chunks.stats["kv_retention"],
        }

    def _short_losses(self, ids: Tensor) -> Tensor:
        """Half of the text is the prompt; the other half is predicted token by token."""
        name = cache_argument(self.model)
        losses = []
        half = ids.shape[1] // 2
        output = self.model(input_ids=ids[:, :half], use_cache=True, logits_to_keep=1)
        for i in range(half, ids.shape[1]):
            losses.append(-token_log_probs(output.logits[:, -1], ids[:, i]))
            output = self.model(input_ids=ids[:, i : i + 1], use_cache=True, **{name: output[name]})
        return torch.stack(losses, 1)

    def _find(self, length: int, place: int) -> dict[str, Any]:
        """What every method answers to prompts with the key at one depth."""
        depth = place / max(self.options.passkey_depths - 1, 1)
        rng = random.Random(f"{length} {place}")
        keys = [str(rng.randint(10_000, 99_999)) for _ in range(self.options.passkey_keys)]
        prompts = [passkey_prompt(self.tokenizer, length, depth, key) for key in keys]
        batches = [read(self.model, self._ids(prompt))[0] for prompt in prompts]
        answers = {}
        for cell in self.options.compared:
            found = []
            for batch in batches:
                with self.attached(cell.method, cell.retention) as chunks:
                    found += answer(self.model, chunks, batch, self.tokenizer)
            answers[answers_key(cell)] = found
        hits = {name: [key in text for key, text in zip(keys, texts, strict=True)] for name, texts in answers.items()}
        return {"length": length, "depth": depth, "keys": keys, "answers": answers, "hits": hits}

    def _ids(self, prompt: str) -> Tensor:
        return self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(self.model.device)


def answers_key(cell: TextCell) -> str:
    """Under what a passkey's record has a method's answers."""
    return f"{cell.method} {cell.retention:g}"


def slices(documents: Sequence[np.ndarray], length: int, count: int) -> list[np.ndarray]:
    """``count`` pieces of ``length`` tokens, spread evenly over documents.

    Raises:
        DecodingError: the documents do not have so many.
    """
    pieces = [ids[i : i + length] for ids in documents for i in range(0, len(ids) - length + 1, length)]
    if len(pieces) < count:
        raise DecodingError(
            f"the text has {len(pieces)} pieces of {length} tokens, not {count}: give more, or less --pieces"
        )
    return [pieces[i * len(pieces) // count] for i in range(count)]


def pieces_of(corpora: Sequence[Corpus], tokenizer: Any, length: int, count: int) -> list[np.ndarray]:
    """``count`` pieces of ``length`` tokens, as many of each corpus as of the others.

    Raises:
        DecodingError: as `slices`.
    """
    tokens = [np.concatenate(tokenize(corpus.documents, tokenizer)) for corpus in corpora]
    shares = [count // len(corpora) + (i < count % len(corpora)) for i in range(len(corpora))]
    return [piece for ids, share in zip(tokens, shares, strict=True) for piece in slices([ids], length, share)]


def prepare(
    specs: Sequence[str | StyleSource],
    field: str | None,
    count: int,
    model: Any,
    tokenizer: Any,
    about: dict[str, Any],
    adapters: ChunkAdapters | ChunkCalibration | None,
    options: EvalOptions,
    out: Path,
    resume: bool,
) -> Evaluation:
    """An evaluation in a folder.

    Args:
        specs: held-out texts, as `load_corpus` takes them.
        field: of .jsonl texts.
        count: pieces of text in all, as many of each as of the others.
        model: to evaluate on.
        tokenizer: its tokenizer.
        about: what stands in the settings beside the options.
        adapters: for the methods that want some, or a calibration; without, these are left out.
        options: what to measure.
        out: folder.
        resume: whether it may hold an evaluation already.

    Raises:
        DecodingError: texts too short, or a context longer than the model's positions.
    """
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if options.context > longest or max(options.passkey_lengths, default=0) + _ANSWER > longest:
        raise DecodingError(f"the model has {longest} positions: choose a shorter --context and --passkey-lengths")
    if options.context <= options.scored + 2 * _LAST:
        raise DecodingError("--context must be longer than --scored")
    corpora = [load_corpus(spec, field) for spec in specs]
    texts = pieces_of(corpora, tokenizer, options.context, count)
    settings = {
        **about,
        "texts": [{"text": corpus.name, "sha256": corpus.sha256} for corpus in corpora],
        "pieces": count,
        **asdict(options),
    }
    folder = RunFolder(out, settings, resume)
    held = {"scored": options.scored, "ids": [text[: options.context].tolist() for text in texts]}
    write_atomically(out / TEXTS_FILE, json.dumps(held).encode())  # for methods that run elsewhere
    return Evaluation(model, tokenizer, adapters, texts, options, folder)


def chosen_methods(names: Sequence[str], adapters: ChunkAdapters | ChunkCalibration | None) -> tuple[str, ...]:
    """Those names of `all_methods`, or all but full attention, which always belongs to it.

    Raises:
        DecodingError: no such method, or one that needs adapters where there are none, or layers' sensitivities that
            nothing tells.
    """
    knows_layers = adapters is not None and adapters.config.sensitivity is not None
    known = [
        name
        for name in all_methods()
        if name != FULL
        and (isinstance(adapters, ChunkAdapters) or not name.startswith(ADAPTER))
        and (knows_layers or not name.endswith(BY_LAYER))
    ]
    if unknown := [name for name in names if name not in known]:
        raise DecodingError(f"no method {unknown[0]!r}: choose from {'; '.join(known)}")
    return tuple(names or known)


def fingerprint(adapters: ChunkAdapters | ChunkCalibration | None) -> str | None:
    """Of adapters or a calibration."""
    if isinstance(adapters, ChunkCalibration):
        return hashlib.sha256(json.dumps(asdict(adapters.config), sort_keys=True).encode()).hexdigest()
    return None if adapters is None else model_fingerprint(adapters)


def checked_retentions(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares of keys and values to keep.

    Raises:
        DecodingError: one outside (0, 1].
    """
    if not all(0 < share <= 1 for share in shares):
        raise DecodingError("retentions must lie in (0, 1]")
    return tuple(shares)
