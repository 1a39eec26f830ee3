"""λ against style, fluency and divergence: generates with every style, λ and seed, and measures what came out.

Every text is sampled at temperature 1 from the whole distribution, and has exactly ``max_new_tokens`` tokens: the
end-of-sequence token is ruled out, in the unsteered distribution that is measured against too. Texts of one prompt
and seed use the same random numbers at every λ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding import metrics
from experiments.lab.runs import RunFolder, finish, settings_of
from experiments.style.cells import Style, SweepCell, SweepOptions
from experiments.style.engines import Batch, Engine, TransformersEngine
from experiments.style.report import Point, write_report


class Sweep:
    """Generates and measures cells, keeping each in a run folder.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        model_name: how the user called it.
        styles: from `load_styles`.
        options: the user's choices.
        out: the run folder's path.
        resume: go on with a run that is there.
        engine: "transformers" or "vllm".
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        model_name: str,
        styles: Sequence[Style],
        options: SweepOptions,
        out: Path,
        resume: bool,
        engine: str = "transformers",
    ):
        self.model = model
        self.model_name = model_name
        self.engine_name = engine
        self.tokenizer = tokenizer
        self.styles = {style.name: style for style in styles}
        self.options = options
        self.folder = RunFolder(out, self._settings(), resume)
        self.records: dict[SweepCell, dict[str, Any]] = {}

    @cached_property
    def engine(self) -> Engine:
        """Made when the first cell wants it."""
        if self.engine_name == "transformers":
            return TransformersEngine(self.model, self.tokenizer, self.styles, self.options)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its messages would break the progress bar
        from experiments.style.vllm_engine import VllmEngine

        return VllmEngine(self.model, self.tokenizer, self.model_name, self.styles, self.options)

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "engine": self.engine_name,
            **settings_of(self.model_name, self.model, self.tokenizer),
            "styles": {
                name: {
                    "order": style.prior.order,
                    "smoothing": style.prior.smoothing,
                    "corpus_sha256": style.prior.metadata.get("corpus_sha256"),
                    "ngrams": len(style.prior),
                    **({} if style.settings is None else {"settings": style.settings.as_dict()}),
                }
                for name, style in self.styles.items()
            },
            "combine": options.combine,
            "mode": options.mode,
            "prompts": list(options.prompts),
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
        }

    def steering_cells(self) -> list[SweepCell]:
        """The unsteered cell of every seed first, since others are measured against it; then every style and λ."""
        unsteered = [SweepCell(None, 0.0, 1.0, seed) for seed in self.options.seeds]
        steered = [
            SweepCell(style, lambda_, 1.0, seed)
            for style in self.styles
            for lambda_ in self.options.lambdas
            if lambda_ != 0
            for seed in self.options.seeds
        ]
        return unsteered + steered

    def run(self, cells: Sequence[SweepCell]) -> None:
        """Finishes the cells that are not on disk yet, with progress. ``self.records`` then holds all of them."""
        finish(self.folder, cells, self._measured, self.records, _summary)

    def _measured(self, cell: SweepCell) -> dict[str, Any]:
        unsteered = self._unsteered_tokens(cell)
        texts: list[dict[str, Any]] = []
        seconds = prior_seconds = 0.0
        for start, prompts in self._batches():
            batch = self.engine.generate(cell, start, prompts)
            seconds += batch.seconds
            prior_seconds += batch.prior_seconds
            texts += self._measure_batch(cell, start, batch, unsteered)
        count = sum(len(text["tokens"]) for text in texts)
        speed = {"tokens_per_second": count / seconds, "speed": 1 - prior_seconds / seconds}
        return {**asdict(cell), **speed, "texts": texts}

    def _batches(self) -> Iterator[tuple[int, list[str]]]:
        size = self.options.batch_size
        for start in range(0, len(self.options.prompts), size):
            yield start, list(self.options.prompts[start : start + size])

    def _measure_batch(
        self, cell: SweepCell, start: int, batch: Batch, unsteered: Tensor | None
    ) -> list[dict[str, Any]]:
        steps: dict[str, list[Tensor]] = {"base_log_prob": [], "log_prob": [], "js": [], "entropy": []}
        for step, (raw, processed) in enumerate(batch.steps):
            base = raw.float().masked_fill(torch.isneginf(processed), -torch.inf)  # the ruled-out end of sequence
            chosen = batch.tokens[:, step]
            steps["base_log_prob"].append(metrics.token_log_probs(base, chosen))
            steps["log_prob"].append(metrics.token_log_probs(processed, chosen))
            steps["js"].append(metrics.jensen_shannon(base, processed))
            steps["entropy"].append(metrics.entropy(processed))
        rows = {name: torch.stack(values, 1).cpu() for name, values in steps.items()}
        judges = [cell.style] if cell.style is not None else list(self.styles)
        texts = []
        shifts = rows["log_prob"] - rows["base_log_prob"]
        for row, ids in enumerate(batch.tokens.cpu()):
            text = {
                "tokens": ids.tolist(),
                "base_nll": float(metrics.mean_nll(rows["base_log_prob"][row])),
                "js": float(rows["js"][row].mean()),
                "entropy": float(rows["entropy"][row].mean()),
                "shift": [round(x, 3) for x in shifts[row].tolist()],
                "overlap_unsteered": metrics.token_overlap(ids, ids if unsteered is None else unsteered[start + row]),
                **{f"distinct_{n}": metrics.distinct_n(ids, n) for n in (1, 2, 3)},
                "by_style": {
                    name: self._against_style(self.styles[name], batch.prompt_ids[row], ids) for name in judges
                },
            }
            texts.append(text)
        return texts

    def _unsteered_tokens(self, cell: SweepCell) -> Tensor | None:
        """What the unsteered cell of a cell's seed wrote, of every prompt, int64 [prompts, T]; of that itself None."""
        unsteered = SweepCell(None, 0.0, 1.0, cell.seed)
        if cell == unsteered:
            return None
        if unsteered not in self.records:  # another process has it to do, and may not have come to it
            self.records[unsteered] = self.folder.read(unsteered) or self._measured(unsteered)
        return torch.tensor([text["tokens"] for text in self.records[unsteered]["texts"]])

    @staticmethod
    def _against_style(style: Style, prompt: Tensor, tokens: Tensor) -> dict[str, float | None]:
        log_probs = style.prior.token_log_probs(torch.cat((prompt, tokens)))[len(prompt) :]
        return {
            "style_nll": float(metrics.mean_nll(log_probs)),
            "overlap_corpus": style.index.overlap(tokens) if style.index else None,
            "copied_run": style.index.longest_copied_run(tokens) if style.index else None,
        }


def _summary(cell: SweepCell, record: dict[str, Any]) -> str:
    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return float(np.mean([value(text) for text in record["texts"]]))

    what = f"unsteered T={cell.temperature:g}"
    if cell.style is not None:
        style_nll = mean(lambda text: text["by_style"][cell.style]["style_nll"])
        what = f"{cell.style} λ={cell.lambda_:g}: style ppl {np.exp(style_nll):.1f}, JS {mean(lambda t: t['js']):.3f}"
    base = np.exp(mean(lambda text: text["base_nll"]))
    return f"{what}, base ppl {base:.1f}, seed {cell.seed}, {record['tokens_per_second']:.0f} tokens/s"


def run(sweep: Sweep) -> list[Point]:
    """Finishes the cells of a plain sweep."""
    sweep.run(sweep.steering_cells())
    return points_of(sweep)


def points_of(sweep: Sweep) -> list[Point]:
    """The finished cells as lines over λ, every style's from the shared unsteered cells on."""
    seeds = sweep.options.seeds
    points = []
    for style in sweep.styles:
        for lambda_ in sorted({0.0, *sweep.options.lambdas}):
            name = None if lambda_ == 0 else style
            records = [sweep.records[SweepCell(name, lambda_, 1.0, seed)] for seed in seeds]
            points.append(Point(style, lambda_, "steered", 1.0, records))
    return points


def report(sweep: Sweep, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Writes the reports of a finished sweep into its folder; the rows of its table."""
    return write_report(sweep.folder.path, sweep.folder.settings, points, sweep.tokenizer.decode)
