"""Ways of sampling against each other, from the scores of prompts alone.

A policy's score on a task is the mean over prompts of the score that was collected at the temperature it picks, as a
share of the mean score at the task's best temperature (in hindsight); the shares are averaged over abilities. Intervals
are 95 % bootstrap intervals over prompts, with the same prompts for all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decoding.errors import DecodingError
from experiments.lab.stats import Estimate, resampled_rows
from experiments.temperature.samplers import FAMILIES, sampler_name

_NEXT_TO_NOTHING = 1e-9  # for tasks on which a model scores 0 throughout
DEFAULTS = (0.1, 1.0)
BY_TRAINING, BY_HINDSIGHT = "best fixed by the training half", "best fixed in hindsight"
BEST_OF_EACH, BEST_OF_ALL = "each ability's best by the training half", "each task's best in hindsight"


@dataclass(frozen=True, eq=False)
class Judged:
    """A task's scores, and the temperatures that selectors chose for its prompts."""

    task: str
    ability: str | None
    training: np.ndarray  # bool [prompts], which half each belongs to
    scores: dict[str, np.ndarray]  # by sampler, float [prompts]
    chosen: dict[str, np.ndarray]  # by policy, temperatures [prompts]
    measured: dict[str, np.ndarray]  # of policies that were run themselves, scores [prompts]; NaN where they were not

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Judged:
        """From `record`."""
        parts = [{name: np.array(x, float) for name, x in record[key].items()} for key in _ROWS]
        return cls(record["task"], record["ability"], np.array(record["training"], bool), *parts)

    def record(self) -> dict[str, Any]:
        """As JSON has it, numbers to four places."""
        rows = {key: {name: _listed(x) for name, x in getattr(self, key).items()} for key in _ROWS}
        return {"task": self.task, "ability": self.ability, "training": self.training.astype(int).tolist(), **rows}

    def half(self, training: bool) -> Judged:
        """The prompts of one half."""
        rows = self.training == training
        parts = [{name: x[rows] for name, x in getattr(self, key).items()} for key in _ROWS]
        return Judged(self.task, self.ability, self.training[rows], *parts)

    def curve(self, temperatures: Sequence[float]) -> np.ndarray:
        """Scores at temperatures, [prompts, K]."""
        return np.stack([self.scores[sampler_name(each)] for each in temperatures], 1)

    def picked(self, policy: str) -> np.ndarray:
        """The scores at the temperatures that a policy chose, [prompts].

        Raises:
            DecodingError: one that was not collected.
        """
        names = [sampler_name(t) for t in self.chosen[policy]]
        if missing := sorted(set(names) - self.scores.keys()):
            raise DecodingError(f"{policy} chooses {missing[0]} for prompts of {self.task}: collect with it")
        return np.array([self.scores[name][row] for row, name in enumerate(names)])


_ROWS = ("scores", "chosen", "measured")


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else round(float(x), 4) for x in values]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a policy reached on tasks, as shares of each task's best."""

    policy: str
    setting: str  # what was chosen for it, if something was
    means: np.ndarray  # [tasks]
    resampled: np.ndarray  # [tasks, resamples]


Picks = Callable[[Judged], np.ndarray]  # a policy's score of every prompt, [prompts]


class Contest:
    """Policies against each other over the abilities of some tasks.

    Args:
        temperatures: that were tried.
        training: scores that settings are chosen by.
        tasks: those judged on, with an ability each.
    """

    def __init__(self, temperatures: Sequence[float], training: Sequence[Judged], tasks: Sequence[Judged]):
        self.temperatures = temperatures
        self.training = training
        self.tasks = tasks

    def outcomes(self) -> list[Outcome]:
        """One for each policy."""
        best = [max(task.curve(self.temperatures).mean(0).max(), _NEXT_TO_NOTHING) for task in self.tasks]
        rng = np.random.default_rng(0)
        drawn = [resampled_rows(len(task.training), rng) for task in self.tasks]
        found = []
        for policy, setting, picks in self._policies():
            shares = [picks(task) / top for task, top in zip(self.tasks, best, strict=True)]
            resampled = [each[rows].mean(1) for each, rows in zip(shares, drawn, strict=True)]
            found.append(Outcome(policy, setting, np.array([each.mean() for each in shares]), np.stack(resampled)))
        return found

    def _policies(self) -> Iterator[tuple[str, str, Picks]]:
        for temperature in DEFAULTS:
            yield sampler_name(temperature), "", self._sampled(sampler_name(temperature))
        fixed = [sampler_name(t) for t in self.temperatures]
        for policy, tasks in ((BY_TRAINING, self.training), (BY_HINDSIGHT, self.tasks)):
            best = self._best(fixed, tasks)
            yield policy, best, self._sampled(best)
        for family, beginning in FAMILIES.items():
            names = [name for name in self.tasks[0].scores if name.startswith(beginning)]
            if names and all(name in task.scores for task in [*self.tasks, *self.training] for name in names):
                best = self._best(names, self.training)
                yield (
                    family,
                    best.removeprefix(beginning.removesuffix("T=").removesuffix("T₀=")).lstrip(", "),
                    self._sampled(best),
                )
        for policy in [each for each in self.tasks[0].chosen if each not in self.tasks[0].measured]:
            yield policy, "", lambda task, policy=policy: task.picked(policy)  # type: ignore[misc]
        for policy in self.tasks[0].measured:
            if not any(np.isnan(task.measured[policy]).any() for task in self.tasks):
                yield policy, "", lambda task, policy=policy: task.measured[policy]  # type: ignore[misc]
        yield BEST_OF_EACH, "", self._best_of_each(self.training, lambda task: task.ability)
        yield BEST_OF_ALL, "", self._best_of_each(self.tasks, lambda task: task.task)

    def _sampled(self, name: str) -> Picks:
        return lambda task: task.scores[name]

    def _best(self, names: Sequence[str], tasks: Sequence[Judged]) -> str:
        """The first of the samplers whose shares are highest over abilities."""
        means = np.array([[task.scores[name].mean() for name in names] for task in tasks])
        tops = [max(task.curve(self.temperatures).mean(0).max(), _NEXT_TO_NOTHING) for task in tasks]
        groups = _groups([task.ability for task in tasks])
        return names[int(_over(groups, means / np.array(tops)[:, None]).argmax())]

    def _best_of_each(self, tasks: Sequence[Judged], key: Callable[[Judged], Any]) -> Picks:
        best = {key(task): int(task.curve(self.temperatures).mean(0).argmax()) for task in tasks}
        return lambda task: task.curve(self.temperatures)[:, best[key(task)]]


def _groups(labels: Sequence[Any]) -> list[list[int]]:
    return [[i for i, each in enumerate(labels) if each == label] for label in dict.fromkeys(labels)]


def _over(groups: Sequence[Sequence[int]], shares: np.ndarray) -> Any:
    """The mean over groups of the mean over a group's tasks: [tasks, …] -> […]."""
    return np.mean([shares[list(group)].mean(0) for group in groups], 0)


def compared(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    """A row for each policy that all contests have: its share, and its gains over the best fixed temperatures.

    Every ability of every contest weighs the same. "worst" is the ability on which a policy falls furthest behind the
    training half's best fixed temperature.
    """
    tables = [{each.policy: each for each in contest.outcomes()} for contest in contests]
    labels = [(i, task.ability) for i, contest in enumerate(contests) for task in contest.tasks]
    groups = _groups(labels)
    joined = {
        policy: (
            np.concatenate([table[policy].means for table in tables]),
            np.concatenate([table[policy].resampled for table in tables]),
            ", ".join(filter(None, dict.fromkeys(table[policy].setting for table in tables))),
        )
        for policy in tables[0]
        if all(policy in table for table in tables)
    }
    rows = []
    for policy, (means, resampled, setting) in joined.items():
        row = {"policy": policy, "setting": setting, "all": _estimate(groups, means, resampled)}
        for key, reference in (("gain", BY_TRAINING), ("gain_in_hindsight", BY_HINDSIGHT)):
            other = joined[reference]
            row[key] = _estimate(groups, means - other[0], resampled - other[1])
        behind = [float((means - joined[BY_TRAINING][0])[group].mean()) for group in groups]
        lowest = int(np.argmin(behind))
        row["worst"] = {"ability": labels[groups[lowest][0]][1], "gain": behind[lowest]}
        row["by_ability"] = {str(labels[group[0]][1]): float(means[group].mean()) for group in groups}
        rows.append(row)
    return rows


def _estimate(groups: Sequence[Sequence[int]], means: np.ndarray, resampled: np.ndarray) -> dict[str, float]:
    return vars(Estimate.of(_over(groups, means), _over(groups, resampled)))


def accuracies(temperatures: Sequence[float], tasks: Sequence[Judged], fixed: str) -> list[dict[str, Any]]:
    """The mean score on each task, and over all questions, of fixed temperatures and of what selectors chose.

    Args:
        temperatures: that were tried.
        tasks: of any ability or none.
        fixed: the fixed temperature that other tasks' training halves put first, "" if none did.
    """
    names = list(dict.fromkeys([*map(sampler_name, DEFAULTS), *filter(None, [fixed])]))
    names = [name for name in names if name in tasks[0].scores]
    by_task = {
        task.task: {name: task.scores[name] for name in names}
        | {policy: task.picked(policy) for policy in task.chosen if policy not in task.measured}
        for task in tasks
    }
    policies = list(next(iter(by_task.values())))
    by_task["all questions"] = {name: np.concatenate([each[name] for each in by_task.values()]) for name in policies}
    rng = np.random.default_rng(0)
    rows = []
    for label, scores in by_task.items():
        drawn = resampled_rows(len(scores[policies[0]]), rng)
        accuracy = {name: vars(Estimate.of(x.mean(), x[drawn].mean(1))) for name, x in scores.items()}
        gains = {
            policy: {name: _gain(scores[policy] - scores[name], drawn) for name in names}
            for policy in policies[len(names) :]
        }
        rows.append({"task": label, "questions": drawn.shape[1], "accuracy": accuracy, "gain": gains})
    return rows


def _gain(differences: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    return vars(Estimate.of(differences.mean(), differences[drawn].mean(1)))


def curves(temperatures: Sequence[float], tasks: Sequence[Judged]) -> list[dict[str, Any]]:
    """Every task's mean score at each temperature, and where it breaks (see `mutation`)."""
    rng = np.random.default_rng(0)
    rows = []
    for task in tasks:
        scores = task.curve(temperatures)
        resampled = scores[resampled_rows(len(scores), rng)].mean(1)
        points = [Estimate.of(*pair) for pair in zip(scores.mean(0), resampled.T, strict=True)]
        rows.append(
            {
                "task": task.task,
                "ability": task.ability,
                "prompts": len(scores),
                "scores": [vars(point) for point in points],
                "mutation": mutation(temperatures, scores.mean(0), resampled),
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
