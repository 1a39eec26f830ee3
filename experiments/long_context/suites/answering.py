"""What methods answer to the examples of suites: a prompt is read once, and all go on from a copy of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chunkllm import Attachment, ChunkAdapters, ChunkCalibration, ChunkSelection
from chunkllm.models import cache_argument
from decoding.tokens import continuations, ends_of_sequence
from experiments.long_context.asked import AnswerCell, TextCell
from experiments.long_context.baselines import FULL, limit_of
from experiments.long_context.lossless import always_drafting
from experiments.long_context.reading import LAST, Read, read, write
from experiments.long_context.suites.tasks import Example, Task, Window
from ngram.storage import write_atomically

PROMPTS, OTHERS = "prompts", "others"


@dataclass(frozen=True)
class Examination:
    """Asks a model.

    Attributes:
        model: a causal language model, without anything attached.
        tokenizer: its tokenizer.
        adapters: of the lossless mode, or a calibration, if there are any.
        tasks: by name.
        compared: methods, and what they keep.
        lossless: what the lossless mode's drafts keep, each a row; none to leave it out.
        attached: attaches a method.
        folder: of the run, where prompts are left for methods that run elsewhere.
    """

    model: Any
    tokenizer: Any
    adapters: ChunkAdapters | ChunkCalibration | None
    tasks: Mapping[str, Task]
    compared: list[TextCell]
    lossless: list[float]
    attached: Callable[[TextCell], Attachment]
    folder: Path

    def answered(self, cell: AnswerCell) -> dict[str, Any]:
        """What is written, and its scores, by method; what was right; how long prompts are and what was read."""
        task, window = self.tasks[cell.task], Window(self.tokenizer, cell.length)
        example = task.example(cell.number, window)
        ids = window.ids(example).to(self.model.device)
        ends = ends_of_sequence(self.model, self.tokenizer)
        self._leave(cell, ids, example, ends)
        prompt, _ = read(self.model, ids)
        written, retention = {}, {}
        for compared in self.compared:
            with self.attached(compared) as chunks:
                options = example.new_tokens, ends, example.ends_line
                (written[compared.name],) = write(self.model, chunks, prompt, self.tokenizer, *options)
                retention[compared.name] = chunks.stats["kv_retention"]
        lossless = {f"{kept:g}": self._losslessly(prompt, example, ends, kept) for kept in self.lossless}
        for each in lossless.values():
            each["same"] = each["written"] == written[TextCell(FULL, 1.0).name]
        return {
            "tokens": ids.shape[1],
            "answers": example.answers,
            "choices": example.choices,
            "written": written,
            "scores": {name: task.score(text, example) for name, text in written.items()},
            "kv_retention": retention,
            "lossless": lossless,
        }

    def _leave(self, cell: AnswerCell, ids: torch.Tensor, example: Example, ends: list[int]) -> None:
        told = {"ids": ids[0].tolist(), "new_tokens": example.new_tokens, "ends": ends, "ends_line": example.ends_line}
        (self.folder / PROMPTS).mkdir(exist_ok=True)
        write_atomically(self.folder / PROMPTS / f"{cell.key}.json", json.dumps(told).encode())

    def _losslessly(self, prompt: Read, example: Example, ends: list[int], kept: float) -> dict[str, Any]:
        """What the lossless mode writes if it always drafts, and what share of its drafts was right."""
        selection = ChunkSelection(self.adapters, verify=True, **limit_of(kept))
        with selection.attach(self.model, self.tokenizer) as chunks, always_drafting():
            cache = chunks.new_cache()
            cache.load(prompt.states, chunks.boundaries(prompt.ids[:, :-LAST], prompt.bottom))
            held = {cache_argument(self.model): cache, "attention_mask": torch.ones_like(prompt.ids)}
            how = {"do_sample": False, "max_new_tokens": example.new_tokens, "eos_token_id": ends, "pad_token_id": 0}
            sequences = self.model.generate(prompt.ids, **held, **how)
            (written,) = continuations(sequences, prompt.ids.shape[1], self.tokenizer)
            return {"written": written, "acceptance": chunks.stats["acceptance"]}


def add_others(folder: Path, records: Mapping[Any, dict[str, Any]], tasks: Mapping[str, Task]) -> list[TextCell]:
    """Takes in what methods answered that ran elsewhere.

    Args:
        folder: of the run; each file of its folder "others" holds what one method wrote, by the keys of cells.
        records: of cells, to which scores are added.
        tasks: by name.

    Returns:
        Those methods that answered all that was asked.
    """
    found = []
    for path in sorted((folder / OTHERS).glob("*.json")):
        held = json.loads(path.read_bytes())
        other = TextCell(held["method"], held["kept"])
        cells = [cell for cell in records if isinstance(cell, AnswerCell)]
        if not all(cell.key in held["written"] for cell in cells):
            continue
        for cell in cells:
            record, written = records[cell], held["written"][cell.key]
            example = Example("", "", tuple(record["answers"]), 0, tuple(record["choices"]))
            record["written"][other.name] = written
            record["scores"][other.name] = tasks[cell.task].score(written, example)
        found.append(other)
    return found
