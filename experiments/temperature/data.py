"""What a temperature selector learns from and is judged by: prompts of known ability, and collected scores.

Every prompt belongs to one half for good, by a hash of its task and place: training reads one, evaluation the other.
Tasks kept out of training altogether have their second half alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from experiments.temperature.collect import sampler_name
from experiments.temperature.tasks import Task, load_tasks

# What the embedded selector learns from: one data set for each ability; plain openings, which ask for nothing but to go
# on; and prompts written for this purpose.
TRAINED_ON = ("e-care", "wikinews", "ag-news", "ifeval", "ntrex", "xsum")
_OPENINGS = ("news", "passage", "encyclopedia", "sentence", "novel", "statement")
TRAINED = (
    *TRAINED_ON,
    *(f"{name}-continuation" for name in _OPENINGS),
    *("creative-writing", "few-shot", "instructions"),
)
# Data sets that it never sees.
KEPT_OUT = (
    "copa",
    "abstracts-continuation",
    "alpaca-creative",
    "sst2",
    "alpaca-instructions",
    "essays-translation",
    "cnn-dailymail",
)
MOST_PROMPTS = 300


@dataclass(frozen=True)
class Labelled:
    """Prompts of one task."""

    task: str
    ability: str
    prompts: list[str]


def is_for_training(task: str, position: int) -> bool:
    """Which half a prompt belongs to."""
    return hashlib.sha256(f"{task} {position}".encode()).digest()[0] % 2 == 0


def training_prompts(data: Path, names: Sequence[str] = TRAINED) -> list[Labelled]:
    """The training halves of tasks (all of a task that holds its prompts itself), each prompt in one of its wordings.

    Raises:
        DecodingError: a task that is unknown, has no ability, or whose data are missing.
    """
    return [_labelled(task, data, None if task.source is None else True) for task in load_tasks(names)]


def held_out_prompts(data: Path, names: Sequence[str] = TRAINED_ON) -> list[Labelled]:
    """The other halves of tasks trained on, of those whose prompts are made of a data set."""
    return [_labelled(task, data, False) for task in load_tasks(names) if task.source is not None]


def kept_out_prompts(data: Path, seen: Collection[str] = ()) -> list[Labelled]:
    """All prompts of the data sets that the embedded selector has never seen, but for tasks that another has."""
    return [_labelled(task, data, None) for name in KEPT_OUT if name not in seen for task in load_tasks([name])]


def _labelled(task: Task, data: Path, training: bool | None) -> Labelled:
    if task.ability is None:
        raise DecodingError(f"task {task.name} has no ability: a classifier cannot learn from it")
    items = task.items(data, MOST_PROMPTS, all_templates=True)
    chosen = [item.prompt for item in items if training in (None, is_for_training(task.name, item.position))]
    return Labelled(task.name, task.ability, chosen)


@dataclass(frozen=True, eq=False)
class Scores:
    """What was collected of one task."""

    task: str
    ability: str | None
    positions: list[int]
    prompts: list[str]
    by_sampler: dict[str, np.ndarray]  # [prompts], the mean over seeds

    def half(self, training: bool) -> Scores:
        """The prompts of one half."""
        return self.only([i for i, at in enumerate(self.positions) if is_for_training(self.task, at) == training])

    def only(self, rows: Sequence[int]) -> Scores:
        """Some of the prompts."""
        return Scores(
            self.task,
            self.ability,
            [self.positions[i] for i in rows],
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


def read_collection(folder: Path, needed: Iterable[float] = ()) -> Collected:
    """Reads what `experiments.temperature.collect` wrote.

    Args:
        folder: a run folder.
        needed: temperatures that must have been tried.

    Raises:
        DecodingError: no collection, an unfinished one, or one that misses temperatures.
    """
    try:
        settings = json.loads((folder / "run.json").read_bytes())
        expected = settings["tasks"]
        temperatures = settings["temperatures"]
        tasks = {name: _scores(_cells(folder, name)) for name in expected}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DecodingError(f"{folder} holds no collection of `decoding temperature collect` ({error!r})") from error
    for name, count in expected.items():
        if len(tasks[name].prompts) < count:
            raise DecodingError(
                f"the collection in {folder} has {len(tasks[name].prompts)} of {count} prompts of {name}: "
                f"finish it with `decoding temperature collect --resume --out {folder}`"
            )
    if missing := sorted(set(needed) - set(temperatures)):
        raise DecodingError(f"the collection in {folder} misses temperature {missing[0]:g}: collect it again")
    if len(temperatures) < 2:
        raise DecodingError(f"the collection in {folder} has one temperature only: there is nothing to choose from")
    return Collected(folder, settings, tasks)


def prompts_in(folder: Path, task: str) -> list[dict[str, Any]]:
    """Everything that was collected of a task's prompts: texts, answers and scores."""
    return [prompt for cell in _cells(folder, task) for prompt in cell["prompts"]]


def _cells(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((folder / "cells").glob(f"{task}-?????.json"))]


def _scores(cells: Sequence[Mapping[str, Any]]) -> Scores:
    prompts = [prompt for cell in cells for prompt in cell["prompts"]]
    names = list(prompts[0]["scores"])
    return Scores(
        cells[0]["task"],
        cells[0]["ability"],
        [prompt["position"] for prompt in prompts],
        [prompt["prompt"] for prompt in prompts],
        {name: np.array([np.mean(prompt["scores"][name]) for prompt in prompts]) for name in names},
    )
