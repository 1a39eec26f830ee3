"""Judges temperature selectors on prompts that they were not trained on.

What selectors chose for the prompts of collections stands beside their scores (`judged`, as data), and all tables are
made of that (`tables`), so that they can be made again without prompts, models or selectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.environment import environment
from decoding.errors import DecodingError
from decoding.models import load_tokenizer
from decoding.temperature.selector import TemperatureSelector
from experiments.temperature.collect import Collected, Scores, prompts_in
from experiments.temperature.contest import BY_TRAINING, Contest, Judged, accuracies, compared, curves
from experiments.temperature.data import Labelled, classification
from experiments.temperature.shipped import Shipped
from experiments.temperature.task_metrics import spbleu
from experiments.temperature.tasks import load_tasks

AS_SHIPPED = "selector, through generate"
_ALIKE = ("dtype", "temperatures", "seeds", "top_p")


@dataclass(frozen=True)
class Selectors:
    """Those that are judged on one model's scores."""

    own: TemperatureSelector
    others: Mapping[str, TemperatureSelector]  # whose curves are other models', by the model's name
    size: str  # of the model, for policy "ability"


def evaluate(
    selectors: Sequence[TemperatureSelector],
    collections: Sequence[Collected],
    labelled: Mapping[str, Sequence[Labelled]],
    model_size: str,
    shipped: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that was measured, and what it comes to.

    Args:
        selectors: the first tells abilities apart, and chooses by the paper's table. The one whose curve is of a
            collection's model chooses by its curve; the curves of the others are tried too.
        collections: of one model or several.
        labelled: prompts by their kind, to be told apart.
        model_size: of the collections' models.
        shipped: the data folder, to run held-out prompts through `decoding.generate` too.

    Raises:
        DecodingError: collections of one model that are not alike, or hold the same task.
    """
    models = []
    for parts in _by_model(collections):
        chosen = _for_model(selectors, parts[0], model_size)
        models.append(judged(chosen, parts, shipped))
    data = {"models": models}
    first = selectors[0]
    results = {
        "selector": first.about,
        "environment": environment(),
        "classification": {kind: classification(first, part) for kind, part in labelled.items() if part},
        **tables(data),
    }
    return data, results


def _by_model(collections: Sequence[Collected]) -> list[list[Collected]]:
    found: dict[str, list[Collected]] = {}
    for each in collections:
        found.setdefault(each.settings["model_fingerprint"], []).append(each)
    for parts in found.values():
        first, names = parts[0], [name for part in parts for name in part.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DecodingError(f"two collections of {first.settings['model']} hold task {twice[0]}: give one of them")
        for part in parts[1:]:
            if differing := [key for key in _ALIKE if part.settings[key] != first.settings[key]]:
                raise DecodingError(f"{first.folder} and {part.folder} have another {differing[0]}: judge them apart")
    return list(found.values())


def _for_model(selectors: Sequence[TemperatureSelector], collected: Collected, size: str) -> Selectors:
    is_own = [each.about.get("model_fingerprint") == collected.settings["model_fingerprint"] for each in selectors]
    own = next((each for each, own in zip(selectors, is_own, strict=True) if own), selectors[0])
    others = {
        _short(each.about.get("model", "another model")): each
        for each, is_this in zip(selectors, is_own, strict=True)
        if not is_this and each.curve is not None
    }
    return Selectors(own, others, size)


def judged(selectors: Selectors, collections: Sequence[Collected], shipped: Path | None) -> dict[str, Any]:
    """One model's scores, and what was chosen for each prompt: all that its tables are made of."""
    first = collections[0]
    call = None if shipped is None else Shipped(selectors.own, first.settings, shipped)
    rows, translations = [], {}
    for collected in collections:
        for scores in collected.tasks.values():
            chosen, measured, sides = _choices(selectors, scores), {}, np.array(scores.training, bool)
            if call is not None and scores.ability is not None:
                measured[AS_SHIPPED], chosen[AS_SHIPPED] = call.scores(collected.definition(scores.task), scores)
            rows.append(Judged(scores.task, scores.ability, sides, scores.by_sampler, chosen, measured).record())
        if "ntrex" in collected.tasks:
            translations = translation(collected, "ntrex")
    return {
        "model": _short(first.settings["model"]),
        "size": selectors.size,
        **{key: first.settings[key] for key in _ALIKE},
        "trained_on": [row["task"] for row in rows if row["task"] in selectors.own.about["prompts"]],
        "translation": translations,
        "tasks": rows,
    }


def _short(model: str) -> str:
    """A model's name without the folders that it lies in."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".")) else model


def _choices(selectors: Selectors, scores: Scores) -> dict[str, np.ndarray]:
    own = selectors.own
    vectors = own.encoder(scores.prompts)
    chosen = {f"selector, ability ({selectors.size})": own.temperatures_of(vectors, selectors.size, "ability")}
    is_of_model = own.curve is not None and own not in selectors.others.values()
    if is_of_model:
        chosen["selector, curve"] = own.temperatures_of(vectors, selectors.size, "curve")
    for name, other in selectors.others.items():
        chosen[f"selector, curve of {name}"] = other.temperatures_of(other.encoder(scores.prompts), policy="curve")
    return {policy: np.round(values.double().numpy(), 4) for policy, values in chosen.items()}


def translation(collected: Collected, task: str) -> dict[str, dict[str, float]]:
    """chrF, and BLEU over the pieces of the model's tokenizer, of each sampler's translations, in %.

    Published spBLEU is over the pieces of a SentencePiece model that sacrebleu downloads; this one compares within the
    table alone.
    """
    pieces = load_tokenizer(collected.settings["model"]).tokenize
    definition = collected.definition(task)
    answered = [
        (definition.parse(text), prompt["answers"][0], name)
        for prompt in prompts_in(collected.folder, task)
        for name, texts in prompt["texts"].items()
        for text in texts
    ]
    return {
        name: {
            "chrf": 100 * float(mean.mean()),
            "bleu": spbleu([pair for *pair, by in answered if by == name], pieces),
        }
        for name, mean in collected.tasks[task].by_sampler.items()
    }


def tables(data: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the reports show of scores, made of `judged`'s data alone."""
    found = [_tables(model) for model in data["models"]]
    contests = [contest for _, contest in found if contest is not None]
    together = compared(contests) if len(contests) > 1 else []
    return {"models": [model for model, _ in found], "together": together}


def _tables(model: Mapping[str, Any]) -> tuple[dict[str, Any], Contest | None]:
    temperatures, tasks = model["temperatures"], [Judged.of(record) for record in model["tasks"]]
    with_ability = [task for task in tasks if task.ability is not None]
    # A selector that was trained on none of them has seen no half: one chooses the fixed temperatures, one judges.
    trained = [task for task in with_ability if task.task in model["trained_on"]] or with_ability
    found = {key: model[key] for key in ("model", "size", "translation", *_ALIKE)}
    found["curves"] = curves(temperatures, with_ability)
    parts = {
        "held_out": [task.half(False) for task in trained],
        "held_out_without_creativity": [task.half(False) for task in trained if task.ability != "CT"],
        "kept_out": [task for task in with_ability if task not in trained],
    }
    contests = {}
    for part, members in parts.items():
        abilities = {task.ability for task in members}
        training = [task.half(True) for task in trained if task.ability in abilities]
        members = [task for task in members if task.ability in {each.ability for each in training}]
        contests[part] = Contest(temperatures, training, members) if members else None
        found[part] = compared([contest]) if (contest := contests[part]) else []
        found[f"{part}_prompts"] = {task.task: len(task.training) for task in members}
    fixed = next((row["setting"] for row in found["held_out"] if row["policy"] == BY_TRAINING), "")
    superglue = {task.name for task in load_tasks(suite="superglue")}
    groups = {
        "superglue": [task for task in tasks if task.task in superglue],
        "others": [task for task in tasks if task.ability is None and task.task not in superglue],
    }
    for part, members in groups.items():
        is_there = any(task.ability is None for task in members)
        found[part] = accuracies(temperatures, members, fixed) if is_there else []
    return found, contests["held_out"]
