"""A training that runs in steps, each in tasks that need nothing of each other, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ngram.checks import check_markers, check_size, check_whole
from ngram.distributed import settings as steps
from ngram.distributed.adjusting import adjust, discount
from ngram.distributed.assembling import assemble, write
from ngram.distributed.contexts import share
from ngram.distributed.counting import count, plan
from ngram.distributed.interpolating import interpolate
from ngram.distributed.settings import Place, Settings, said
from ngram.errors import NGramError
from ngram.smoothing import Smoothing, checked_cutoffs, checked_weights
from ngram.storage import umask, write_atomically

_FORMAT = "decoding-ngram-training/1"
_SETTINGS = "training.json"
_LEAST_MEMORY = 64 << 20


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: of its folder.
        tasks: in which it is done.
        run: does one of them, into a folder.
    """

    name: str
    tasks: int
    run: Callable[[int, Path], None]


class Training:
    """Trains a model whose n-grams need not fit into memory, like `NGramModel.train` to the last bit.

    Its steps, each when the one before is whole: *count* what occurs, by documents; *plan*, which divides tokens among
    parts; *adjust*, by last tokens, what n-grams count; *discount*, which adds that up; *context*, by first tokens,
    what n-grams share; *interpolate*, by last tokens, probabilities; *assemble*, by first tokens. Tasks of a step may
    run at once, in any processes that see the folder. What is done stays done.

    Args:
        work: a folder for all that is written meanwhile. One that holds a part of this training is gone on with.
        documents: gives those of a task: token ids, 1-D integers each. No n-gram spans two documents.
        vocab_size: number of token ids, V.
        order: length of the longest n-gram, 1 to 6.
        smoothing: as `NGramModel.train` has it, and so ``bos_id``, ``eos_id``, ``pad_vocab``, ``delta``,
            ``interpolation``, ``prune`` and ``metadata``.
        tasks: into which the documents are divided.
        parts: into which n-grams are divided; as many as tasks by default.
        memory: bytes that a task may take for n-grams.
        source: what tells these documents from others: a folder is gone on with for the same alone.

    Raises:
        NGramError: unusable parameters, or a folder of another training.
    """

    def __init__(
        self,
        work: str | PathLike,
        documents: Callable[[int], Iterable[Any]],
        vocab_size: int,
        order: int = 3,
        smoothing: Smoothing = "kneser-ney",
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_vocab: bool = False,
        delta: float = 0.1,
        interpolation: Sequence[float] | None = None,
        prune: int | Sequence[int] = 0,
        metadata: Mapping[str, str] | None = None,
        tasks: int = 1,
        parts: int | None = None,
        memory: int = 1 << 30,
        source: str = "",
    ):
        check_size(vocab_size, order)
        check_markers(vocab_size, bos_id, eos_id)
        parts = tasks if parts is None else parts
        check_whole(tasks=tasks, parts=parts, memory=memory)
        checked_weights(smoothing, interpolation, order, delta)
        if tasks < 1 or parts < 1:
            raise NGramError(f"tasks and parts must be at least 1, not {tasks} and {parts}")
        if memory < _LEAST_MEMORY:
            raise NGramError(f"memory must be at least {_LEAST_MEMORY >> 20} MiB, not {memory} bytes")
        weights = None if interpolation is None else tuple(map(float, interpolation))
        settings = Settings(
            vocab_size,
            order,
            smoothing,
            bos_id,
            eos_id,
            pad_vocab,
            float(delta),
            weights,
            checked_cutoffs(prune, order),
            tasks,
            min(parts, vocab_size),
            memory,
        )
        self._place, self._documents, self._metadata = Place(settings, Path(work)), documents, dict(metadata or {})
        self._begin(source)

    def _begin(self, source: str) -> None:
        path = self._place.work / _SETTINGS
        told = {"format": _FORMAT, "settings": said(self._place.settings), "source": source}
        if not path.exists():
            write_atomically(path, json.dumps(told, indent=1).encode())
            return
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise NGramError(f"{path} is damaged: remove the folder {path.parent}, or give another") from error
        if found != told:
            raise NGramError(f"{path.parent} holds another training: remove it, or give another folder")

    @property
    def steps(self) -> list[Step]:
        """In their order."""
        place, tasks, parts = self._place, self._place.settings.tasks, self._place.settings.parts
        return [
            Step(steps.COUNT, tasks, lambda task, folder: count(place, self._documents(task), folder)),
            Step(steps.PLAN, 1, lambda _, folder: plan(place, folder)),
            Step(steps.ADJUST, parts, lambda part, folder: adjust(place, part, folder)),
            Step(steps.DISCOUNT, 1, lambda _, folder: discount(place, folder)),
            Step(steps.CONTEXT, parts, lambda part, folder: share(place, part, folder)),
            Step(steps.INTERPOLATE, parts, lambda part, folder: interpolate(place, part, folder)),
            Step(steps.ASSEMBLE, parts, lambda part, folder: assemble(place, part, folder)),
        ]

    def is_done(self, step: Step, task: int) -> bool:
        """Whether a task of a step is."""
        return self._place.folder(step.name, task).exists()

    def run(self, step: Step, task: int) -> None:
        """Does a task of a step, if it is not done. All tasks of the steps before must be."""
        if self.is_done(step, task):
            return
        folder = self._place.folder(step.name, task)
        unfinished: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            step.run(task, unfinished)
            unfinished.chmod(0o777 & ~umask())
            os.replace(unfinished, folder)
        except OSError as error:
            if not self.is_done(step, task):  # else another process has done it meanwhile
                raise NGramError(f"task {task} of step {step.name} failed in {folder.parent}: {error}") from error
        finally:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)

    def run_all(self) -> None:
        """Does all tasks, one after the other, in this process."""
        for step in self.steps:
            for task in range(step.tasks):
                self.run(step, task)

    def tidy(self) -> None:
        """Removes what tasks that were killed left behind. No task may run meanwhile."""
        for step in self.steps:
            for left in (self._place.work / step.name).glob(".*"):
                shutil.rmtree(left, ignore_errors=True)

    def remove(self) -> None:
        """Removes all that was written, but for the model."""
        for step in self.steps:
            shutil.rmtree(self._place.work / step.name, ignore_errors=True)
        (self._place.work / _SETTINGS).unlink(missing_ok=True)

    def write(self, path: str | PathLike) -> None:
        """Writes the model, which `NGramModel.load` opens, when all tasks are done.

        Raises:
            NGramError: a file that cannot be written.
        """
        write(self._place, Path(path), self._metadata)
