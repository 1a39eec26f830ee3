"""``decoding chunk train``: adapters from texts, judged on others, in a folder that `ChunkAdapters` opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from chunkllm.training import STATE_FILE, Training, TrainingOptions
from decoding.corpora import Corpus, load_corpus
from decoding.errors import DecodingError
from decoding.models import model_fingerprint
from experiments import chunk_report
from experiments.runs import check_unused, environment, progress_of_cells

CHECKPOINT = "checkpoint"


def load_texts(data: Sequence[str], held_out: Sequence[str]) -> tuple[list[Corpus], list[Corpus]]:
    """Corpora to learn from and to judge by.

    Raises:
        DecodingError: as `load_corpus`, or one that is both.
    """
    learnt, judged = [load_corpus(spec) for spec in data], [load_corpus(spec) for spec in held_out]
    known = {corpus.sha256 for corpus in learnt}
    if both := [corpus.name for corpus in judged if corpus.sha256 in known]:
        raise DecodingError(f"{both[0]} is to be learnt from: hold out another text")
    return learnt, judged


def require_folder(out: Path) -> None:
    """Refuses a folder that holds other things than a training.

    Raises:
        DecodingError: as said.
    """
    if not (out / CHECKPOINT / STATE_FILE).is_file():
        check_unused(out)


def train(
    model: Any,
    tokenizer: Any,
    name: str,
    texts: tuple[Sequence[Corpus], Sequence[Corpus]],
    options: TrainingOptions,
    out: Path,
    resume: bool,
    command: str,
) -> str:
    """Trains, judges and writes adapters, ``training.json`` and ``training.png``; the table as text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        name: of the model.
        texts: as `load_texts` gives them.
        options: how.
        out: the folder. Its ``checkpoint`` holds what a resumed run goes on from.
        resume: whether the folder may hold a run already.
        command: that made them.

    Raises:
        ChunkError: as `Training`.
    """
    about = {
        "model": name,
        "model_fingerprint": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    learnt, judged = (["\n\n".join(corpus.documents) for corpus in corpora] for corpora in texts)
    training = Training(model, tokenizer, learnt, judged, options, out / CHECKPOINT, resume, about)
    with progress_of_cells() as progress:
        adapters = training.run(_Bars(progress).show)
    adapters.half().float()  # judged as they are saved
    results = {
        **about,
        "options": asdict(options),
        "texts": {corpus.name: corpus.sha256 for corpus in texts[0]},
        "held_out_texts": {corpus.name: corpus.sha256 for corpus in texts[1]},
        "tokens": len(training.readings) * options.reading.context,
        "threshold": adapters.config.threshold,
        **environment(),
        "held_out": training.judge(),
        "history": training.history,
    }
    kept = {key: results[key] for key in (*about, "texts", "held_out_texts", "tokens")}
    figures = {part: chunk_report.rounded(results["held_out"][part]) for part in ("detector", "mean")}
    chosen = {"options": results["options"], "held_out": figures}
    adapters.config = replace(adapters.config, about={"command": command, **kept, **chosen})
    adapters.half().save_pretrained(out)
    return chunk_report.write_training(results, out)


class _Bars:
    """A bar for each of a training's parts, added when it begins."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
