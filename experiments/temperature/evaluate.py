"""Judges a temperature selector on prompts that it was not trained on.

A policy's score on a task is the mean over prompts of the score that was collected at the temperature it picks, as a
share of the mean score at the task's best temperature (in hindsight); the shares are averaged over abilities. Intervals
are 95 % bootstrap intervals over prompts, with the same prompts for all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from decoding.environment import environment
from decoding.errors import DecodingError
from decoding.models import load_tokenizer
from decoding.temperature.selector import Policy, TemperatureSelector
from experiments.lab.stats import Estimate, resampled_rows
from experiments.temperature.collect import ENTROPY_BASED, Collected, Scores, prompts_in, sampler_name
from experiments.temperature.data import Labelled, classification
from experiments.temperature.task_metrics import spbleu
from experiments.temperature.tasks import load_tasks

_NEXT_TO_NOTHING = 1e-9  # for tasks on which a model scores 0 throughout
DEFAULTS = (0.1, 1.0)


def curves(collected: Collected, tasks: Sequence[Scores]) -> list[dict[str, Any]]:
    """Every task's mean score at each temperature, and where it breaks (see `mutation`)."""
    rng = np.random.default_rng(0)
    rows = []
    for task in tasks:
        scores = task.curve(collected.temperatures)
        resampled = scores[resampled_rows(len(scores), rng)].mean(1)
        points = [Estimate.of(*pair) for pair in zip(scores.mean(0), resampled.T, strict=True)]
        rows.append(
            {
                "task": task.task,
                "ability": task.ability,
                "prompts": len(scores),
                "scores": [vars(point) for point in points],
                "mutation": mutation(collected.temperatures, scores.mean(0), resampled),
            }
        )
    return rows


def mutation(temperatures: Sequence[float], means: np.ndarray, resampled: np.ndarray) -> list[float] | None:
    """The neighbouring temperatures between which the score falls most, if it falls beyond chance (95 %).

    Args:
        temperatures: K of them.
        means: scores [K].
        resampled: bootstrap means [R, K].
    """
    steepest = int(np.diff(means).argmin())
    falls = resampled[:, steepest + 1] - resampled[:, steepest]
    is_sure = means[steepest + 1] < means[steepest] and np.quantile(falls, 0.975) < 0
    return [temperatures[steepest], temperatures[steepest + 1]] if is_sure else None


Picks = Callable[[Scores], np.ndarray]  # a policy's score of every prompt, [prompts]


class Contest:
    """Policies against each other over the abilities of some tasks.

    Args:
        temperatures: that were tried.
        training: scores that policies may be chosen by.
        tasks: those judged on, with an ability each.
        selector: the one that is judged.
        model_size: for its policy "ability".
    """

    def __init__(
        self,
        temperatures: Sequence[float],
        training: Sequence[Scores],
        tasks: Sequence[Scores],
        selector: TemperatureSelector,
        model_size: str,
    ):
        self.temperatures = temperatures
        self.training = training
        self.tasks = tasks
        self.selector = selector
        self.size = model_size
        self._vectors = {task.task: selector.encoder(task.prompts) for task in tasks}

    def run(self) -> list[dict[str, Any]]:
        """A row for each policy: its share over abilities, of each ability, and its gain over the best fixed."""
        policies = dict(self._policies())
        values = {name: [picks(task) for task in self.tasks] for name, picks in policies.items()}
        best = [max(task.curve(self.temperatures).mean(0).max(), _NEXT_TO_NOTHING) for task in self.tasks]
        rng = np.random.default_rng(0)
        drawn = [resampled_rows(len(task.prompts), rng) for task in self.tasks]
        means = {
            name: [each.mean() / top for each, top in zip(rows, best, strict=True)] for name, rows in values.items()
        }
        resampled = {
            name: np.stack([each[at].mean(1) / top for each, at, top in zip(rows, drawn, best, strict=True)])
            for name, rows in values.items()
        }
        over = partial(_over_abilities, self.tasks)
        (reference,) = (name for name in policies if name.startswith("best fixed on the training half"))
        return [
            {
                "policy": name,
                "all": vars(Estimate.of(over(means[name]), over(resampled[name]))),
                "gain": vars(
                    Estimate.of(
                        over(means[name]) - over(means[reference]),
                        over(resampled[name]) - over(resampled[reference]),
                    )
                ),
                "by_task": {task.task: float(mean) for task, mean in zip(self.tasks, means[name], strict=True)},
            }
            for name in policies
        ]

    def _policies(self) -> Iterator[tuple[str, Picks]]:
        for temperature in DEFAULTS:
            yield sampler_name(temperature), self._fixed(temperature)
        fixed = self._best_fixed(self.training)
        yield f"best fixed on the training half, {sampler_name(fixed)}", self._fixed(fixed)
        hindsight = self._best_fixed(self.tasks)
        yield f"best fixed in hindsight, {sampler_name(hindsight)}", self._fixed(hindsight)
        for name in ENTROPY_BASED:
            if all(name in task.by_sampler for task in self.tasks):
                yield name, lambda task, name=name: task.by_sampler[name]  # type: ignore[misc]
        yield f"selector, ability ({self.size})", self._selected("ability")
        if self.selector.curve is not None:
            yield "selector, curve", self._selected("curve")
        yield "best of each ability on the training half", self._best_of_each(self.training, lambda task: task.ability)
        yield "best of each task in hindsight", self._best_of_each(self.tasks, lambda task: task.task)

    def _fixed(self, temperature: float) -> Picks:
        return lambda task: task.by_sampler[sampler_name(temperature)]

    def _best_fixed(self, tasks: Sequence[Scores]) -> float:
        means = np.stack([task.curve(self.temperatures).mean(0) for task in tasks])
        return self.temperatures[
            int(_over_abilities(tasks, means / means.max(1, keepdims=True).clip(_NEXT_TO_NOTHING)).argmax())
        ]

    def _selected(self, policy: Policy) -> Picks:
        return lambda task: selected(self.selector, task, self._vectors[task.task], self.size, policy)

    def _best_of_each(self, tasks: Sequence[Scores], key: Callable[[Scores], Any]) -> Picks:
        best = {key(task): int(task.curve(self.temperatures).mean(0).argmax()) for task in tasks}
        return lambda task: task.curve(self.temperatures)[:, best[key(task)]]


def _over_abilities(tasks: Sequence[Scores], shares: Any) -> Any:
    """The mean over abilities of the mean over an ability's tasks: [tasks, …] -> […]."""
    abilities = [task.ability for task in tasks]
    groups = [[i for i, each in enumerate(abilities) if each == ability] for ability in dict.fromkeys(abilities)]
    return np.mean([np.mean(np.asarray(shares)[group], 0) for group in groups], 0)


def selected(
    selector: TemperatureSelector, task: Scores, vectors: Tensor, model_size: str, policy: Policy
) -> np.ndarray:
    """The scores at the temperatures that a selector chooses for a task's encoded prompts, [prompts]."""
    chosen = selector.temperatures_of(vectors, model_size, policy).tolist()
    return np.array([task.by_sampler[sampler_name(round(t, 4))][row] for row, t in enumerate(chosen)])


def superglue(collected: Collected, selector: TemperatureSelector, model_size: str) -> list[dict[str, Any]]:
    """Accuracy on each task at the default temperatures and with the selector's policies, and over all questions."""
    policies: list[Policy] = ["ability"] if selector.curve is None else ["ability", "curve"]
    by_task = {}
    for task in collected.tasks.values():
        vectors = selector.encoder(task.prompts)
        fixed = {sampler_name(t): task.by_sampler[sampler_name(t)] for t in DEFAULTS}
        by_task[task.task] = fixed | {p: selected(selector, task, vectors, model_size, p) for p in policies}
    names = list(next(iter(by_task.values())))
    by_task["all questions"] = {name: np.concatenate([each[name] for each in by_task.values()]) for name in names}
    rng = np.random.default_rng(0)
    rows = []
    for label, scores in by_task.items():
        count = len(scores[names[0]])
        drawn = resampled_rows(count, rng)
        accuracy = {name: vars(Estimate.of(each.mean(), each[drawn].mean(1))) for name, each in scores.items()}
        rows.append({"task": label, "questions": count, "accuracy": accuracy})
    return rows


def translation(collected: Collected, task: str) -> dict[str, dict[str, float]]:
    """chrF, and BLEU over the pieces of the model's tokenizer, of each sampler's translations, in %.

    Published spBLEU is over the pieces of a SentencePiece model that sacrebleu downloads; this one compares within the
    table alone.
    """
    pieces = load_tokenizer(collected.settings["model"]).tokenize
    definition = load_tasks([task])[0]
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


def evaluate(
    selector: TemperatureSelector,
    collections: Sequence[Collected],
    labelled: tuple[Sequence[Labelled], Sequence[Labelled], Sequence[Labelled]],
    model_size: str,
) -> dict[str, Any]:
    """All of the results.

    Args:
        selector: the one that is judged.
        collections: of the six abilities, of SuperGLUE, or of both.
        labelled: prompts held out, prompts of data sets kept out of training, and of wordings kept out.
        model_size: for policy "ability".

    Raises:
        DecodingError: a curve of another model than the collections', or a collection without a task that the selector
            was trained on, which leaves nothing to choose a fixed temperature by.
    """
    for collected in collections:
        _check_fit(selector, collected)
    results: dict[str, Any] = {
        "model_size": model_size,
        "selector": selector.about,
        "environment": environment(),
        "classification": {
            "held_out": classification(selector, labelled[0]),
            "kept_out": classification(selector, labelled[1]),
            "wordings": classification(selector, labelled[2]),
        },
    }
    for collected in collections:
        settings = {key: collected.settings[key] for key in ("model", "dtype", "seeds", "top_p", "tasks")}
        if _is_of_abilities(collected):
            results["abilities"] = settings | _abilities(collected, selector, model_size)
        else:
            results["superglue"] = {**settings, "rows": superglue(collected, selector, model_size)}
    return results


def _is_of_abilities(collected: Collected) -> bool:
    return all(task.ability is not None for task in collected.tasks.values())


def _check_fit(selector: TemperatureSelector, collected: Collected) -> None:
    of = selector.about.get("model_fingerprint")
    if selector.curve is not None and of != collected.settings["model_fingerprint"]:
        raise DecodingError(f"the selector's curve is of another model than {collected.settings['model']}")
    if _is_of_abilities(collected) and not collected.tasks.keys() & selector.about["prompts"].keys():
        raise DecodingError(f"{collected.folder} has no task that the selector was trained on, to compare with")


def _abilities(collected: Collected, selector: TemperatureSelector, model_size: str) -> dict[str, Any]:
    tasks = list(collected.tasks.values())
    trained = [task for task in tasks if task.task in selector.about["prompts"]]
    known = {task.ability for task in trained}
    kept_out = [task for task in tasks if task not in trained and task.ability in known]
    contest = partial(Contest, collected.temperatures, [task.half(True) for task in trained])
    return {
        "temperatures": collected.temperatures,
        "curves": curves(collected, tasks),
        "translation": translation(collected, "ntrex") if "ntrex" in collected.tasks else {},
        "held_out": contest([task.half(False) for task in trained], selector, model_size).run(),
        "kept_out": contest(kept_out, selector, model_size).run() if kept_out else [],
    }
