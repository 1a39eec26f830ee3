"""What a classifier of abilities learns from and is judged by: prompts of known ability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.selector import TemperatureSelector
from experiments.temperature.tasks import Task, load_tasks
from experiments.temperature.wordings import (
    PROMPTS_OF_A_WORDING,
    Wording,
    load_apart,
    load_apart_systems,
    load_manners,
    load_systems,
    load_wordings,
)

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
# What a task counts in training, against `PROMPTS_OF_A_WORDING` requests: with less, its own templates are forgotten.
_TASK_WEIGHT = 9.0
_OPENING_WEIGHT = 1.8  # Texts without a request must not make every text one to go on with.
_EVERY = 3  # Each third prompt of a wording is learnt from behind a system prompt too, and each third with manners.


@dataclass(frozen=True)
class Labelled:
    """Prompts of one task."""

    task: str
    ability: str
    prompts: list[str]
    is_wording: bool = False
    weight: float = _TASK_WEIGHT  # of all its prompts together


def wording_prompts(data: Path) -> list[Labelled]:
    """Natural requests to learn from, by wording, some of them behind a system prompt, and some with manners.

    Every request counts alike.
    """
    parts = []
    for at, wording in enumerate(load_wordings(data)):
        framed = _behind_systems(wording.prompts[at % _EVERY :: _EVERY], at)
        polite = _with_manners(wording.prompts[(at + 1) % _EVERY :: _EVERY], at)
        for what, prompts in (
            ("", wording.prompts),
            (", behind a system prompt", framed),
            (", with manners", polite),
        ):
            if prompts:
                weight = len(prompts) / PROMPTS_OF_A_WORDING
                parts.append(Labelled(_named(wording) + what, wording.ability, prompts, True, weight))
    return parts


def kept_out_wordings() -> list[Labelled]:
    """Natural requests in wordings that nothing is learnt from."""
    return [Labelled(_named(each), each.ability, each.prompts, True) for each in load_wordings(kept_out=True)]


def requests_written_apart(behind_systems: bool = False) -> list[Labelled]:
    """Natural requests by somebody who had not read those that a classifier learns from.

    Args:
        behind_systems: whether each stands in plain text below one of that author's system prompts.
    """
    systems, parts = load_apart_systems(), []
    for at, each in enumerate(load_apart()):
        prompts = each.prompts
        if behind_systems:
            prompts = [f"{systems[(at + i) % len(systems)]}\n\n{prompt}" for i, prompt in enumerate(prompts)]
        parts.append(Labelled(_named(each), each.ability, prompts, True))
    return parts


def _named(wording: Wording) -> str:
    return f"{wording.ability}: {wording.name}"


def _behind_systems(prompts: Sequence[str], at: int) -> list[str]:
    systems, borders = load_systems(), ("\n\n", "\n", " ")
    return [
        f"{systems[(i + at) % len(systems)]}{borders[(i + at // 2) % len(borders)]}{prompt}"
        for i, prompt in enumerate(prompts)
    ]


def _with_manners(prompts: Sequence[str], at: int) -> list[str]:
    manners = load_manners()
    chosen = (manners[(i + at) % len(manners)] for i in range(len(prompts)))
    return [before + prompt + behind for (before, behind), prompt in zip(chosen, prompts, strict=True)]


def training_prompts(data: Path, names: Sequence[str] | None = None) -> list[Labelled]:
    """The training halves of tasks (all of a task that holds its prompts itself), each prompt in one of its templates.

    By default those of `TRAINED`, and natural requests in all wordings that are not kept out.

    Raises:
        DecodingError: a task that is unknown, has no ability, or whose data are missing.
    """
    tasks = load_tasks(names or TRAINED)
    parts = [_labelled(task, data, None if task.source is None else True) for task in tasks]
    return parts if names else [*parts, *wording_prompts(data)]


def held_out_prompts(data: Path, names: Sequence[str] = TRAINED_ON) -> list[Labelled]:
    """The other halves of tasks trained on, of those whose prompts are made of a data set."""
    return [_labelled(task, data, False) for task in load_tasks(names) if task.source is not None]


def prompts_to_judge_by(data: Path, names: Sequence[str], seen: Collection[str]) -> dict[str, list[Labelled]]:
    """By kind: held-out halves of tasks trained on, data sets that are there and wordings that nothing was learnt from.

    Args:
        data: the folder that the tasks' sources are relative to.
        names: of tasks trained on; by default those of the embedded selector.
        seen: tasks that the judged selector learnt from.

    Raises:
        DecodingError: tasks that hold their prompts themselves alone, of which none is held out.
    """
    held_out = held_out_prompts(data, names or TRAINED_ON)
    if not held_out:
        raise DecodingError("these tasks hold their prompts themselves, and none was held out: give one of a data set")
    others = [task for task in load_tasks(KEPT_OUT) if task.name not in seen and (data / str(task.source)).is_file()]
    unseen = [_labelled(task, data, None) for task in others]
    return {
        "prompts held out": held_out,
        "data sets kept out": unseen,
        "wordings kept out": kept_out_wordings(),
        "requests written apart": requests_written_apart(),
        "requests written apart, below a system prompt in plain text": requests_written_apart(behind_systems=True),
    }


def _labelled(task: Task, data: Path, training: bool | None) -> Labelled:
    if task.ability is None:
        raise DecodingError(f"task {task.name} has no ability: a classifier cannot learn from it")
    items = task.items(data, MOST_PROMPTS, all_templates=True)
    chosen = [item.prompt for item in items if training in (None, item.training)]
    is_opening = task.name.endswith("-continuation") or task.name == "wikinews"
    return Labelled(task.name, task.ability, chosen, weight=_OPENING_WEIGHT if is_opening else _TASK_WEIGHT)


def classification(selector: TemperatureSelector, parts: Sequence[Labelled]) -> dict[str, Any]:
    """How many prompts of each task are told to be of its ability, and the means over prompts and over abilities.

    Also what most of the wrong ones are taken for, and the worst ability and task.
    """
    rows: list[dict[str, Any]] = []
    right: dict[str, list[np.ndarray]] = {}
    for part in parts:
        shares = selector.abilities(part.prompts).cpu()
        found = shares.argmax(-1).numpy() == ABILITIES.index(part.ability)
        # Unread is told to be nothing.
        found &= (shares.amax(-1) > shares.amin(-1)).numpy()
        taken = Counter(ABILITIES[i] for i in shares.argmax(-1).tolist())
        row = {"task": part.task, "ability": part.ability, "prompts": len(found), "accuracy": float(found.mean())}
        rows.append(row | {"taken_for": dict(taken.most_common())})
        right.setdefault(part.ability, []).append(found)
    by_ability = {ability: float(np.mean([each.mean() for each in parts])) for ability, parts in right.items()}
    return {
        "tasks": rows,
        "by_ability": by_ability,
        "worst_ability": min(by_ability.values()),
        "worst_task": min(row["accuracy"] for row in rows),
        "over_prompts": float(np.concatenate([each for parts in right.values() for each in parts]).mean()),
        "over_abilities": float(np.mean(list(by_ability.values()))),
    }
