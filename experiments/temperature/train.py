"""Trains a temperature selector: the classifier of abilities, and one model's scores over temperature."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from decoding.errors import DecodingError
from decoding.models import model_fingerprint
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.encoder import Encoder
from decoding.temperature.heads import AbilityHead, CurveHead
from decoding.temperature.selector import ENCODER_FOLDER, TemperatureSelector
from experiments.temperature.collect import Collected, Scores
from experiments.temperature.data import Labelled, classification

_BATCH = 16
# What a selector says of the collection that its curve was fitted to, and of what its classifier was taught by.
_OF_COLLECTION = ("model", "model_fingerprint", "dtype", "seeds", "top_p")
_OF_CLASSIFIER = ("encoder", "prompts", "wordings", "fine_tuned", "held_out_accuracy")


def train(
    encoder: Encoder,
    labelled: Sequence[Labelled],
    held_out: Sequence[Labelled],
    collected: Collected | None,
    epochs: int = 0,
    curve_of: TemperatureSelector | None = None,
) -> TemperatureSelector:
    """A selector, its curve from the training half of a collection if there is one, or another selector's.

    Args:
        encoder: reads the prompts.
        labelled: prompts of all six abilities.
        held_out: others, to say how many of them it tells right.
        collected: one model's scores.
        epochs: of fine-tuning the encoder; 0 leaves it frozen.
        curve_of: whose curve to keep, with the classifier that it was fitted to.

    Raises:
        DecodingError: an ability without prompts or scores, or a selector without a curve, or of another encoder.
    """
    prompts = [prompt for each in labelled for prompt in each.prompts]
    labels = [ABILITIES.index(each.ability) for each in labelled for _ in each.prompts]
    if missing := [ability for i, ability in enumerate(ABILITIES) if i not in labels]:
        raise DecodingError(f"no prompts of ability {missing[0]}: the classifier needs some of each")
    halves = [] if collected is None else _training_halves(collected, [each.task for each in labelled])
    if epochs:
        encoder = fine_tuned(encoder, prompts, labels, epochs)
    weights = torch.tensor([each.weight / len(each.prompts) for each in labelled for _ in each.prompts])
    head = AbilityHead.fit_hidden(_encoded(encoder, prompts), labels, len(ABILITIES), weights)
    about: dict[str, Any] = {
        "prompts": {each.task: len(each.prompts) for each in labelled if not each.is_wording},
        "wordings": _by_ability([each for each in labelled if each.is_wording]),
        "fine_tuned": epochs,
    }
    selector = TemperatureSelector(encoder, head, about=about)
    rows = classification(selector, held_out)["tasks"] if held_out else []
    about["held_out_accuracy"] = {row["task"]: round(row["accuracy"], 4) for row in rows}
    if collected is not None:
        _learn_curve(selector, halves, collected)
    elif curve_of is not None:
        _keep_curve(selector, curve_of)
    return selector


def with_curve(selector: TemperatureSelector, collected: Collected, names: Sequence[str] = ()) -> TemperatureSelector:
    """A selector's encoder and classifier, with a curve from the training halves of a collection's tasks.

    Args:
        selector: whose classifier is kept.
        collected: one model's scores.
        names: of tasks; all by default.

    Raises:
        DecodingError: a training half without prompts, or none of the tasks.
    """
    halves = _training_halves(collected, names or list(collected.tasks))
    about = {key: selector.about[key] for key in _OF_CLASSIFIER if key in selector.about}
    about["classifier_command"] = selector.about.get("classifier_command", selector.about.get("command"))
    about["prompts"] = {half.task: len(half.prompts) for half in halves} | about.get("prompts", {})
    made = replace(selector, curve=None, curve_ability=None, about=about)
    _learn_curve(made, halves, collected)
    return made


def _learn_curve(selector: TemperatureSelector, halves: Sequence[Scores], collected: Collected) -> None:
    selector.curve = fit_curve(selector, halves, collected.temperatures)
    selector.about |= {key: collected.settings[key] for key in _OF_COLLECTION}
    selector.about["best_fixed_temperature"] = round(float(selector.curve.temperatures[selector.curve.fixed]), 4)


def _by_ability(parts: Sequence[Labelled]) -> dict[str, int]:
    """How many prompts there are of each ability."""
    counts: Counter[str] = Counter()
    for each in parts:
        counts[each.ability] += len(each.prompts)
    return dict(counts)


def _keep_curve(selector: TemperatureSelector, other: TemperatureSelector) -> None:
    """Puts another selector's curve in, with its classifier: the curve's features are that one's probabilities."""
    if other.curve is None:
        raise DecodingError("the selector whose curve is to be kept has none")
    if model_fingerprint(other.encoder.model) != model_fingerprint(selector.encoder.model):
        raise DecodingError("the selector whose curve is to be kept has another encoder")
    selector.curve, selector.curve_ability = other.curve, other.curve_ability or other.ability
    kept = (*_OF_COLLECTION, "best_fixed_temperature", "curve_command")
    found = {"curve_command": other.about.get("command"), **other.about}
    selector.about |= {key: found[key] for key in kept if key in found}


def _training_halves(collected: Collected, names: Sequence[str]) -> list[Scores]:
    halves = [collected.tasks[name].half(True) for name in names if name in collected.tasks]
    if not halves:
        raise DecodingError(f"the collection in {collected.folder} has none of the tasks {', '.join(names)}")
    if empty := [half.task for half in halves if not half.prompts]:
        raise DecodingError(f"no prompt of {empty[0]} in {collected.folder} is in the half to learn from: collect more")
    return halves


def fit_curve(selector: TemperatureSelector, halves: Sequence[Scores], temperatures: Sequence[float]) -> CurveHead:
    """The regression of scores over temperature, from the training halves of tasks.

    Scores are shares of their task's best mean score, so that metrics of different ranges count alike, and prompts are
    weighted so that abilities do.
    """
    targets = torch.from_numpy(np.concatenate([relative(half, temperatures) for half in halves])).float()
    sizes = Counter(half.ability for half in halves for _ in half.prompts)
    weights = torch.tensor([1 / sizes[half.ability] for half in halves for _ in half.prompts])
    fixed = int((weights[:, None] * targets).sum(0).argmax())
    vectors = _encoded(selector.encoder, [prompt for half in halves for prompt in half.prompts])
    return CurveHead.fit(selector.ability(vectors), targets, weights, temperatures, fixed, vectors.shape[1])


def relative(scores: Scores, temperatures: Sequence[float]) -> np.ndarray:
    """A task's scores as shares of its best mean score, [prompts, K]."""
    curve = scores.curve(temperatures)
    return curve / max(float(curve.mean(0).max()), 1e-9)


def fine_tuned(encoder: Encoder, prompts: Sequence[str], labels: Sequence[int], epochs: int) -> Encoder:
    """A copy of an encoder whose weights were trained, with a classifier on top, to tell abilities apart.

    AdamW, learning rate 5e-5 falling to 0, batches of 16.
    """
    model = copy.deepcopy(encoder.model).train()
    tuned = Encoder(model, encoder.tokenizer, ENCODER_FOLDER, encoder.window, encoder.reading, encoder.multilingual)
    classifier = torch.nn.Linear(tuned.width, len(ABILITIES)).to(model.device)
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    generator = torch.Generator().manual_seed(0)
    order = [i for _ in range(epochs) for i in torch.randperm(len(prompts), generator=generator).tolist()]
    steps = range(0, len(order), _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for start in track(steps, "fine-tuning the encoder", console=Console(stderr=True)):
        rows = order[start : start + _BATCH]
        vectors = tuned.forward([prompts[i] for i in rows])
        target = torch.tensor([labels[i] for i in rows], device=vectors.device)
        torch.nn.functional.cross_entropy(classifier(vectors), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return tuned


def _encoded(encoder: Encoder, prompts: Sequence[str]) -> Tensor:
    size = 32
    starts = track(range(0, len(prompts), size), "encoding prompts", console=Console(stderr=True))
    parts = [encoder(prompts[i : i + size]) for i in starts]
    return torch.cat(parts).cpu()
