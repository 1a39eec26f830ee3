"""How a model scores on tasks at each temperature: samples every prompt with every sampler and keeps texts and scores.

A prompt is read once and its cache shared by all of its samples, which are the rows of one batch: every sampler × seed.
All sample from the top-p nucleus after the temperature, as transformers does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from chunkllm.models import cache_argument
from decoding.temperature.processors import (
    DynamicTemperature,
    EntropyDependentTemperature,
    FixedTemperature,
    Temperature,
)
from experiments.lab.runs import RunFolder, progress_of_cells
from experiments.temperature.tasks import Item, Task

TEMPERATURES = (0.1, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9)
ENTROPY_BASED: dict[str, Temperature] = {
    "EDT 0.4": EntropyDependentTemperature(0.4, theta=1.0),
    "EDT 1.0": EntropyDependentTemperature(1.0, theta=1.0),
    "dynatemp 0.7": DynamicTemperature(0.7, range=0.5),
}


@dataclass(frozen=True)
class CollectOptions:
    """What a user chooses."""

    temperatures: tuple[float, ...] = TEMPERATURES
    seeds: int = 2
    top_p: float = 0.9
    batch_size: int = 8
    entropy_based: bool = True

    @property
    def samplers(self) -> dict[str, Temperature]:
        """By name, fixed temperatures first."""
        fixed: dict[str, Temperature] = {sampler_name(t): FixedTemperature(t) for t in self.temperatures}
        return fixed | (ENTROPY_BASED if self.entropy_based else {})


def sampler_name(temperature: float) -> str:
    """What a fixed temperature's scores are kept under."""
    return f"T={temperature:g}"


class ByBlock(LogitsProcessor):
    """Gives every block of rows a processor of its own.

    Args:
        processors: one for each block; blocks repeat until the rows end.
        size: rows of a block.
    """

    def __init__(self, processors: Sequence[Temperature], size: int):
        self._processors = processors
        self._size = size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B, V], B a multiple of all blocks' rows, each block scaled by its own processor."""
        blocks = scores.view(-1, len(self._processors), self._size, scores.shape[-1])
        scaled = [
            processor(input_ids, blocks[:, i].flatten(0, 1)).view(len(blocks), self._size, -1)
            for i, processor in enumerate(self._processors)
        ]
        return torch.stack(scaled, 1).view_as(scores)


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
        }
        self.folder = RunFolder(out, settings, resume)

    def run(self) -> None:
        """Finishes the batches that are not on disk yet, with progress."""
        with progress_of_cells() as progress:
            todo = [(task, start) for task, start in self._batches() if self.folder.read(_key(task, start)) is None]
            bar = progress.add_task("batches of prompts", total=len(todo))
            for task, start in todo:
                batch = self.items[task][start : start + self.options.batch_size]
                self.folder.write(_key(task, start), self._record(task, batch))
                progress.advance(bar)

    def _batches(self) -> Iterator[tuple[Task, int]]:
        """In turn, so that an unfinished collection has something of every task."""
        longest = max(map(len, self.items.values()), default=0)
        for start in range(0, longest, self.options.batch_size):
            yield from ((task, start) for task, items in self.items.items() if start < len(items))

    def _record(self, task: Task, batch: Sequence[Item]) -> dict[str, Any]:
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
                logits_processor=[ByBlock(list(options.samplers.values()), options.seeds)],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=options.top_p,
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


def _key(task: Task, start: int) -> str:
    return f"{task.name}-{start:05d}"
