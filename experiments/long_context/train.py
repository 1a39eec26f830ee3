"""``decoding chunk train``: adapters from texts, judged on others, in a folder that `ChunkAdapters` opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from chunkllm.training.loop import STATE_FILE, Training, TrainingOptions
from decoding.environment import environment
from decoding.errors import DecodingError
from decoding.files import require_writable
from decoding.style.source import Corpus, StyleSource, load_corpus
from experiments.lab.progress import progress_of_cells
from experiments.lab.runs import check_unused, settings_of
from experiments.long_context import training_report

CHECKPOINT = "checkpoint"


def load_texts(
    data: Sequence[str | StyleSource], held_out: Sequence[str | StyleSource], field: str | None = None
) -> tuple[list[Corpus], list[Corpus]]:
    """Corpora to learn from and to judge by.

    Raises:
        DecodingError: as `load_corpus`, or one that is both.
    """
    learnt, judged = ([load_corpus(spec, field) for spec in specs] for specs in (data, held_out))
    known = {corpus.sha256 for corpus in learnt}
    if both := [corpus.name for corpus in judged if corpus.sha256 in known]:
        raise DecodingError(f"{both[0]} is to be learnt from: hold out another text")
    return learnt, judged


def require_folder(out: Path, resume: bool, state: str = STATE_FILE, what: str = "training") -> None:
    """Refuses a folder that holds other things than a training, one that is not to be gone on with, or is read-only.

    Args:
        out: the folder.
        resume: whether it may hold one.
        state: the file in its checkpoint that tells of one.
        what: it is, if no training.

    Raises:
        DecodingError: as said.
    """
    if not (out / CHECKPOINT / state).is_file():
        check_unused(out)
    elif not resume:
        raise DecodingError(f"{out} holds a {what} already: add --resume to go on with it, or choose another --out")
    else:
        require_writable(out)


def train(
    model: Any,
    tokenizer: Any,
    name: str,
    texts: tuple[Sequence[Corpus], Sequence[Corpus]],
    options: TrainingOptions,
    out: Path,
    resume: bool,
    command: str,
    widths: Sequence[int] = (),
) -> str:
    """Trains, judges and writes adapters, ``training.json``, ``results.md`` and ``training.png``; the table as text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        name: of the model.
        texts: as `load_texts` gives them.
        options: how.
        out: the folder. Its ``checkpoint`` holds what a resumed run goes on from.
        resume: whether the folder may hold a run already.
        command: that made them.
        widths: of further adapters that learn from the same readings, for the table alone.

    Raises:
        ChunkError: as `Training`.
    """
    about = settings_of(name, model)
    learnt, judged = (["\n\n".join(corpus.documents) for corpus in corpora] for corpora in texts)
    training = Training(model, tokenizer, learnt, judged, options, out / CHECKPOINT, resume, about)
    with progress_of_cells() as progress:
        bars = _Bars(progress)
        training.run(bars.show)
        training.measure_sensitivity(bars.show)
    adapters = training.adapters
    results = {
        **about,
        "options": asdict(options),
        "texts": {corpus.name: corpus.sha256 for corpus in texts[0]},
        "held_out_texts": {corpus.name: corpus.sha256 for corpus in texts[1]},
        "tokens": len(training.readings) * options.reading.context,
        "threshold": adapters.config.threshold,
        "sensitivity": adapters.config.sensitivity,
        **environment(),
        "held_out": _judged(training),
        "history": training.history,
    }
    kept = {key: results[key] for key in (*about, "texts", "held_out_texts", "tokens")}
    figures = {part: training_report.rounded(results["held_out"][part]) for part in ("detector", "mean")}
    chosen = {"options": results["options"], "held_out": figures}
    adapters.config = replace(adapters.config, about={"command": command, **kept, **chosen})
    adapters.half().save_pretrained(out)
    results["widths"] = {width: _ablation(training, width) for width in dict.fromkeys(widths) if width != options.width}
    return training_report.write_training(results, out)


def _judged(training: Training) -> dict[str, Any]:
    training.adapters.half().float()  # judged as they are saved
    return training.judge()


def _ablation(training: Training, width: int) -> dict[str, Any]:
    with progress_of_cells() as progress:
        bars = _Bars(progress)
        other = training.of_width(width)
        adapters = other.run(lambda what, done, total: bars.show(f"width {width}: {what}", done, total))
    return {"threshold": adapters.config.threshold, "held_out": _judged(other), "history": other.history}


class _Bars:
    """A bar for each of a training's parts, added when it begins."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
