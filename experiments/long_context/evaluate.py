"""``decoding chunk eval``: what selecting chunks costs in quality, beside what else could be kept.

Prompts are read once, with full attention. Every method then goes on from their keys and values, one token at a time,
through the cache that users get.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkllm import Attachment, ChunkAdapters, ChunkCalibration, ChunkSelection
from chunkllm.models import cache_argument
from decoding.errors import DecodingError
from decoding.metrics import token_log_probs
from decoding.models import model_fingerprint
from decoding.style.source import Corpus
from decoding.tokens import tokenize
from experiments.lab.cells import Cell
from experiments.lab.runs import RunFolder, finish
from experiments.long_context.asked import PERPLEXITY, AnswerCell, EvalOptions, PasskeyCell, ShortCell, TextCell
from experiments.long_context.baselines import FULL, Setting, all_methods
from experiments.long_context.passkeys import ANSWER, find
from experiments.long_context.reading import LAST, Read, read, score_texts
from experiments.long_context.suites.answering import Examination
from experiments.long_context.suites.opening import SUITES
from experiments.long_context.suites.tasks import Task
from ngram.storage import write_atomically

_SHORT = 512
TEXTS_FILE = "texts.json"
Record = dict[str, Any]


class Evaluation:
    """Runs the cells that a folder does not have yet.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        adapters: for the methods that want some, or a calibration.
        texts: token ids of held-out texts, at least ``context`` each; none without perplexity.
        tasks: of suites, by name.
        options: what to measure.
        folder: where cells are kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: ChunkAdapters | ChunkCalibration | None,
        texts: Sequence[np.ndarray],
        tasks: Mapping[str, Task],
        options: EvalOptions,
        folder: RunFolder,
    ):
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.texts, self.tasks, self.options, self.folder = texts, tasks, options, folder
        self._read: tuple[Read, Tensor] | None = None

    def run(self) -> dict[Cell, Record]:
        """All records, by cell."""
        texts = [*self.options.compared, ShortCell()] if PERPLEXITY in self.options.suites else []
        cells = [*texts, *self.options.passkeys, *self.options.answers(list(self.tasks))]
        with torch.inference_mode():
            return finish(self.folder, cells, self._measured, title="evaluating")

    def _measured(self, cell: Cell) -> Record:
        if isinstance(cell, TextCell):
            return self._score(cell)
        if isinstance(cell, PasskeyCell):
            return find(self.model, self.tokenizer, cell, self.options, self.attached)
        return self._examination.answered(cell) if isinstance(cell, AnswerCell) else self._score_short()

    def attached(self, compared: TextCell) -> Attachment:
        """A method's selection on the model."""
        return all_methods()[compared.method](Setting(self.model, self.tokenizer, self.adapters, compared.kept))

    @cached_property
    def _examination(self) -> Examination:
        options = self.options
        losslessly = options.kept if options.lossless else []
        return Examination(
            self.model,
            self.tokenizer,
            self.adapters,
            self.tasks,
            options.compared,
            losslessly,
            self.attached,
            self.folder.path,
        )

    def _score(self, compared: TextCell) -> Record:
        prompt = self.options.context - self.options.scored
        ids = torch.from_numpy(np.stack([text[: self.options.context] for text in self.texts])).to(self.model.device)
        targets = ids[:, prompt:]
        if self._read is None:
            prompts, full = read(self.model, ids[:, :prompt], targets)
            assert full is not None
            self._read = prompts, full
        prompts, full = self._read
        if compared.method == FULL:
            losses = -full.gather(-1, targets[..., None])[..., 0]
            return {"nll": losses.tolist(), "recall": None, "kv_retention": 1.0}
        with self.attached(compared) as chunks:
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
    corpora: Sequence[Corpus],
    count: int,
    tasks: Mapping[str, Task],
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
        corpora: held-out texts.
        count: pieces of text in all, as many of each as of the others.
        tasks: of suites, by name.
        model: to evaluate on.
        tokenizer: its tokenizer.
        about: what stands in the settings beside the options.
        adapters: for the methods that want some, or a calibration; without, these are left out.
        options: what to measure.
        out: folder.
        resume: whether it may hold an evaluation already.

    Raises:
        DecodingError: texts too short, or prompts longer than the model's positions.
        ChunkError: a budget that leaves nothing to choose.
    """
    _require_positions(model, options)
    for budget in options.budgets:
        ChunkSelection(adapters, budget=budget)  # refuses one that leaves nothing to choose
    texts = []
    if PERPLEXITY in options.suites:
        texts = pieces_of(corpora, tokenizer, options.context, count)
    settings = {
        **about,
        "texts": [{"text": corpus.name, "sha256": corpus.sha256} for corpus in corpora],
        "pieces": count,
        "tasks": list(tasks),
        **asdict(options),
    }
    folder = RunFolder(out, settings, resume, growing=("suites", "tasks", "lengths", "examples"))
    if texts:
        held = {"scored": options.scored, "ids": [text[: options.context].tolist() for text in texts]}
        write_atomically(out / TEXTS_FILE, json.dumps(held).encode())  # for methods that run elsewhere
    return Evaluation(model, tokenizer, adapters, texts, tasks, options, folder)


def _require_positions(model: Any, options: EvalOptions) -> None:
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    wanted = {
        "--context": options.context if PERPLEXITY in options.suites else 0,
        "--passkey-lengths": max((cell.length + ANSWER for cell in options.passkeys), default=0),
        "--lengths": max(options.lengths, default=0) if set(options.suites) & set(SUITES) else 0,
    }
    for name, tokens in wanted.items():
        if tokens > longest:
            raise DecodingError(f"the model has {longest} positions: choose a shorter {name}")
    if PERPLEXITY in options.suites and options.context <= options.scored + 2 * LAST:
        raise DecodingError("--context must be longer than --scored")


def fingerprint(adapters: ChunkAdapters | ChunkCalibration | None) -> str | None:
    """Of adapters or a calibration."""
    if isinstance(adapters, ChunkCalibration):
        return hashlib.sha256(json.dumps(asdict(adapters.config), sort_keys=True).encode()).hexdigest()
    return None if adapters is None else model_fingerprint(adapters)
