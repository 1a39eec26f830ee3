"""How a model scores on tasks at each temperature: samples every prompt with every sampler and keeps texts and scores.

A prompt is read once and its cache shared by all of its samples, which are the rows of one batch: every sampler × seed.

Every prompt belongs to one half for good, by its record: training reads one, evaluation the other. Tasks kept out of
training altogether have their second half alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from chunkllm.models import cache_argument
from decoding.errors import DecodingError
from experiments.lab.cells import Cell
from experiments.lab.runs import CELLS, HEADER, RunFolder, finish
from experiments.temperature.halves import is_for_training
from experiments.temperature.samplers import TEMPERATURES, Draw, Sampler, sampler_name, samplers
from experiments.temperature.tasks import Item, Task, load_tasks


@dataclass(frozen=True)
class CollectOptions:
    """What a user chooses."""

    temperatures: tuple[float, ...] = TEMPERATURES
    seeds: int = 2
    top_p: float = 0.9
    batch_size: int = 8
    baselines: bool = True

    @property
    def samplers(self) -> dict[str, Sampler]:
        """By name, fixed temperatures first."""
        return samplers(self.temperatures, self.top_p, self.baselines)


class ByBlock(LogitsProcessor):
    """Gives every block of rows processors of its own.

    Args:
        samplers: one for each block; blocks repeat until the rows end.
        size: rows of a block.
    """

    def __init__(self, samplers: Sequence[Sampler], size: int):
        self._samplers = samplers
        self._size = size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V], B a multiple of all blocks' rows, each block changed by its own processors."""
        blocks = scores.view(-1, len(self._samplers), self._size, scores.shape[-1])
        changed = []
        for i, processors in enumerate(self._samplers):
            rows = blocks[:, i].flatten(0, 1)
            for processor in processors:
                rows = processor(input_ids, rows)
            changed.append(rows.view(len(blocks), self._size, -1))
        return torch.stack(changed, 1).view_as(scores)


@dataclass(frozen=True)
class BatchCell(Cell):
    """Prompts of a task, from number ``start`` on."""

    task: str
    start: int

    @property
    def label(self) -> str:
        """See `Cell`."""
        return f"{self.task}-{self.start:05d}"


class Collection:
    """Samples and scores prompts, batch by batch, keeping each in a run folder.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, padding on the left.
        about: the model, as settings.
        items: the prompts of each task.
        options: the user's choices.
        out: the run folder's path.
        resume: go on with a run that is there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        about: dict[str, Any],
        items: Mapping[Task, Sequence[Item]],
        options: CollectOptions,
        out: Path,
        resume: bool,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.items = items
        settings = about | {
            "temperatures": list(options.temperatures),
            "samplers": list(options.samplers),
            "seeds": options.seeds,
            "top_p": options.top_p,
            "batch_size": options.batch_size,
            "tasks": {task.name: len(prompts) for task, prompts in items.items()},
            "prompts_sha256": hashlib.sha256(repr([*items.values()]).encode()).hexdigest(),
            "definitions": {task.name: vars(task) for task in items},
        }
        self.folder = RunFolder(out, settings, resume)

    def run(self) -> None:
        """Finishes the batches that are not on disk yet, with progress."""
        finish(self.folder, self._cells(), self._record, title="batches of prompts")

    def _cells(self) -> list[BatchCell]:
        """In turn, so that an unfinished collection has something of every task."""
        longest = max(map(len, self.items.values()), default=0)
        starts = range(0, longest, self.options.batch_size)
        return [
            BatchCell(task.name, start) for start in starts for task, items in self.items.items() if start < len(items)
        ]

    def _record(self, cell: BatchCell) -> dict[str, Any]:
        task = next(task for task in self.items if task.name == cell.task)
        batch = self.items[task][cell.start : cell.start + self.options.batch_size]
        names = list(self.options.samplers)
        texts = self._sample(task, [item.prompt for item in batch])
        repeated = [item for item in batch for _ in range(len(names) * self.options.seeds)]
        scores = task.scores(repeated, texts)
        size = self.options.seeds
        prompts = []
        for row, item in enumerate(batch):
            starts = {name: (row * len(names) + i) * size for i, name in enumerate(names)}
            prompts.append(
                {
                    "position": item.position,
                    "training": item.training,
                    "prompt": item.prompt,
                    "answers": item.answers,
                    "scores": {name: scores[a : a + size] for name, a in starts.items()},
                    "texts": {name: texts[a : a + size] for name, a in starts.items()},
                }
            )
        return {"task": task.name, "ability": task.ability, "prompts": prompts}

    def _sample(self, task: Task, prompts: Sequence[str]) -> list[str]:
        """Texts of every prompt × sampler × seed, in that order."""
        options = self.options
        count = len(options.samplers) * options.seeds
        texts = [self._framed(prompt) for prompt in prompts] if task.chat else list(prompts)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not task.chat)
        ids, mask = inputs["input_ids"].to(self.model.device), inputs["attention_mask"].to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        torch.manual_seed(int.from_bytes(hashlib.sha256("\0".join(prompts).encode()).digest()[:4]))
        with torch.inference_mode():
            if ids.shape[1] > 1:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                kept = {"position_ids": positions[:, :-1], "logits_to_keep": 1, cache_argument(self.model): cache}
                self.model(ids[:, :-1], attention_mask=mask[:, :-1], **kept)
                cache.batch_repeat_interleave(count)
            output = self.model.generate(
                ids.repeat_interleave(count, 0),
                attention_mask=mask.repeat_interleave(count, 0),
                logits_processor=[ByBlock(list(options.samplers.values()), options.seeds), Draw()],
                do_sample=False,
                max_new_tokens=task.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **{cache_argument(self.model): cache},
            )
        return self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)

    def _framed(self, prompt: str) -> str:
        if self.tokenizer.chat_template is None:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@dataclass(frozen=True, eq=False)
class Scores:
    """What was collected of one task."""

    task: str
    ability: str | None
    positions: list[int]
    training: list[bool]  # which half each prompt belongs to
    prompts: list[str]
    by_sampler: dict[str, np.ndarray]  # [prompts], the mean over seeds

    def half(self, training: bool) -> Scores:
        """The prompts of one half."""
        return self.only([i for i, is_for in enumerate(self.training) if is_for == training])

    def only(self, rows: Sequence[int]) -> Scores:
        """Some of the prompts."""
        return Scores(
            self.task,
            self.ability,
            [self.positions[i] for i in rows],
            [self.training[i] for i in rows],
            [self.prompts[i] for i in rows],
            {name: values[list(rows)] for name, values in self.by_sampler.items()},
        )

    def curve(self, temperatures: Sequence[float]) -> np.ndarray:
        """Scores at temperatures, [prompts, K]."""
        return np.stack([self.by_sampler[sampler_name(each)] for each in temperatures], 1)


@dataclass(frozen=True)
class Collected:
    """A finished collection."""

    folder: Path
    settings: dict[str, Any]
    tasks: dict[str, Scores]

    @property
    def temperatures(self) -> list[float]:
        """All that were tried."""
        return list(self.settings["temperatures"])

    def definition(self, task: str) -> Task:
        """A task as it was when it was collected; as it is now, of a collection that does not say."""
        held = self.settings.get("definitions", {}).get(task)
        return load_tasks([task])[0] if held is None else Task(**held)


def read_collection(folder: Path, needed: Iterable[float] = ()) -> Collected:
    """Reads a finished collection.

    Args:
        folder: a run folder.
        needed: temperatures that must have been tried.

    Raises:
        DecodingError: no collection, a damaged or unfinished one, or one that misses temperatures.
    """
    settings, records = _header(folder), _records(folder)
    temperatures = settings["temperatures"]
    for name, count in settings["tasks"].items():
        found = sum(len(record["prompts"]) for record in records.get(name, []))
        if found < count:
            raise DecodingError(
                f"the collection in {folder} has {found} of {count} prompts of {name}: "
                f"finish it with `decoding temperature collect --resume --out {folder}`"
            )
    if missing := sorted(set(needed) - set(temperatures)):
        raise DecodingError(f"the collection in {folder} misses temperature {missing[0]:g}: collect it again")
    if len(temperatures) < 2:
        raise DecodingError(f"the collection in {folder} has one temperature only: there is nothing to choose from")
    return Collected(folder, settings, {name: _scores(records[name]) for name in settings["tasks"]})


def prompts_in(folder: Path, task: str) -> list[dict[str, Any]]:
    """Everything that was collected of a task's prompts: texts, answers and scores."""
    return [prompt for record in _records(folder)[task] for prompt in record["prompts"]]


def _header(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / HEADER).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DecodingError(f"{folder} holds no collection of `decoding temperature collect` ({error})") from error
    for name, what, holds in (
        ("tasks", "whole numbers by name", lambda value: isinstance(value, dict) and _are(int, value.values(), 1)),
        ("temperatures", "positive numbers", lambda value: isinstance(value, list) and _are(float, value, 1e-9)),
        ("samplers", "a list of names", lambda value: isinstance(value, list) and _are(str, value)),
    ):
        if not isinstance(settings, dict) or not holds(settings.get(name)):
            raise DecodingError(
                f"{folder} holds no collection of `decoding temperature collect`: {name} in {HEADER} must be {what}"
            )
    return settings


def _records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The batches of each task, in the order of its prompts."""
    samplers = _header(folder)["samplers"]
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (folder / CELLS).glob("*.json"):
        record = _cell(path, samplers)
        found.setdefault(record["task"], []).append(record)
    return {task: sorted(records, key=lambda each: each["prompts"][0]["position"]) for task, records in found.items()}


def _cell(path: Path, samplers: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        wrong = _wrong_in(record, samplers)
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong is not None:
        resume = f"decoding temperature collect --resume --out {path.parents[1]}"
        raise DecodingError(f"{path} is damaged: {wrong}: remove it, and go on with `{resume}`")
    return record


def _wrong_in(record: Any, samplers: Sequence[str]) -> str | None:
    """Which field of a cell is wrong, and what it must be."""
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        return "task must be a name"
    if not isinstance(record.get("ability"), str | None):
        return "ability must be a name, or null"
    prompts = record.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        return "prompts must be a list with some"
    return next(
        (f"prompts[{i}].{wrong}" for i, each in enumerate(prompts) if (wrong := _wrong_of(each, samplers))), None
    )


def _wrong_of(prompt: Any, samplers: Sequence[str]) -> str | None:
    prompt = prompt if isinstance(prompt, dict) else {}
    kinds = {"position": int, "prompt": str, "answers": list, "scores": dict, "texts": dict}
    for name, kind in kinds.items():
        if type(prompt.get(name)) is not kind:
            return f"{name} must be of type {kind.__name__}"
    for name in samplers:
        scores, texts = prompt["scores"].get(name), prompt["texts"].get(name)
        if not (isinstance(scores, list) and scores and _are(float, scores)):
            return f"scores[{name!r}] must be finite numbers"
        if not (isinstance(texts, list) and len(texts) == len(scores) and _are(str, texts)):
            return f"texts[{name!r}] must be texts, one for each score"
    return None


def _are(kind: type, values: Iterable[Any], least: float = -math.inf) -> bool:
    """Whether all values are of a kind, numbers finite and at least so much. A whole number is a float too."""
    kinds = (int, float) if kind is float else (kind,)
    return all(type(each) in kinds and (kind is str or least <= each < math.inf) for each in values)


def _scores(records: Sequence[Mapping[str, Any]]) -> Scores:
    prompts = [prompt for record in records for prompt in record["prompts"]]
    names = list(prompts[0]["scores"])
    task = records[0]["task"]
    return Scores(
        task,
        records[0]["ability"],
        [prompt["position"] for prompt in prompts],
        [prompt.get("training", is_for_training(task, prompt["position"])) for prompt in prompts],
        [prompt["prompt"] for prompt in prompts],
        {name: np.array([np.mean(prompt["scores"][name]) for prompt in prompts]) for name in names},
    )
