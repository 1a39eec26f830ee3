"""What a classifier of abilities learns from and is judged by: prompts of known ability."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.selector import TemperatureSelector
from experiments.temperature.collect import is_for_training
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


def classification(selector: TemperatureSelector, parts: Sequence[Labelled]) -> dict[str, Any]:
    """How many prompts of each task are told to be of its ability, and the means over prompts and over abilities."""
    rows = []
    right: dict[str, list[np.ndarray]] = {}
    for part in parts:
        found = selector.abilities(part.prompts).argmax(-1).cpu().numpy() == ABILITIES.index(part.ability)
        rows.append(
            {"task": part.task, "ability": part.ability, "prompts": len(found), "accuracy": float(found.mean())}
        )
        right.setdefault(part.ability, []).append(found)
    return {
        "tasks": rows,
        "over_prompts": float(np.concatenate([each for parts in right.values() for each in parts]).mean()),
        "over_abilities": float(np.mean([np.mean([each.mean() for each in parts]) for parts in right.values()])),
    }
