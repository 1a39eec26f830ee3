"""A prior that is trained on disk, its steps spread over workers."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.lab.runs import LOCK, alone_in
from experiments.lab.spread import Stage, Workers, run, submit
from ngram.distributed import Step, Training


@dataclass(frozen=True)
class _Tasks:
    """Those of a step. A step itself cannot be pickled."""

    training: Training
    step: str

    def __call__(self, task: int) -> None:
        self.training.run(self._found, task)

    def is_done(self, task: int) -> bool:
        return self.training.is_done(self._found, task)

    @property
    def _found(self) -> Step:
        return next(step for step in self.training.steps if step.name == self.step)


@dataclass(frozen=True)
class _Write:
    """The last step, where nothing waits for it here."""

    training: Training
    out: Path

    def __call__(self, task: int) -> None:
        self.training.write(self.out)


def train(training: Training, workers: Workers, work: Path, out: Path) -> dict[str, float] | None:
    """Does what is left of a training, and writes the model.

    Args:
        training: from `decoding.style.on_disk.training_on_disk`.
        workers: which do it.
        work: the training's folder. What is in it is removed when the model is written; Slurm leaves it.
        out: the model's file.

    Returns:
        Seconds that each step took, by name, and writing; None if Slurm will do it.
    """
    stages = []
    for step in training.steps:
        tasks = _Tasks(training, step.name)
        stages.append(Stage(step.name, step.tasks, tasks, tasks.is_done))
    if workers.kind == "slurm":
        submit([*stages, Stage("write", 1, _Write(training, out.absolute()), lambda _: False)], workers, work)
        return None
    with alone_in(work):
        training.tidy()
        seconds = run(stages, workers)
        began = time.perf_counter()
        training.write(out)
        seconds["write"] = time.perf_counter() - began
        training.remove()
    with suppress(OSError):  # whatever else is there stays
        (work / LOCK).unlink()
        work.rmdir()
    return seconds
