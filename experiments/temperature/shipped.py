"""Scores of held-out prompts as users get them: through `decoding.generate`, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from decoding.generation import generate
from decoding.models import load_model, load_tokenizer
from decoding.temperature.processors import AutoTemperature
from decoding.temperature.selector import TemperatureSelector
from experiments.temperature.collect import Scores
from experiments.temperature.tasks import Task

_BATCH = 8


class Shipped:
    """One model with one selector, as ``generate(model, prompts, logits_processor=[AutoTemperature(selector)])``.

    Args:
        selector: chooses.
        settings: of the collections: model, dtype and seeds.
        data: the folder that tasks' sources are relative to.
    """

    def __init__(self, selector: TemperatureSelector, settings: Mapping[str, Any], data: Path):
        self._selector = selector
        self._data = data
        self._seeds = settings["seeds"]
        self._tokenizer = load_tokenizer(settings["model"])
        self._model = load_model(settings["model"], settings["dtype"])

    def scores(self, task: Task, collected: Scores) -> tuple[np.ndarray, np.ndarray]:
        """The held-out prompts' mean scores and chosen temperatures, [prompts]; NaN for those of the training half."""
        by_position = {item.position: item for item in task.items(self._data)}
        held_out = [row for row, is_for_training in enumerate(collected.training) if not is_for_training]
        found, chosen = np.full((2, len(collected.prompts)), np.nan)
        for start in track(range(0, len(held_out), _BATCH), f"{task.name}, as shipped", console=Console(stderr=True)):
            rows = held_out[start : start + _BATCH]
            items = [by_position[collected.positions[row]] for row in rows]
            auto = AutoTemperature(self._selector)
            torch.manual_seed(start)
            texts = generate(
                self._model,
                [item.prompt for item in items],
                tokenizer=self._tokenizer,
                logits_processor=[auto],
                max_new_tokens=task.max_new_tokens,
                chat=task.chat and self._tokenizer.chat_template is not None,
                num_return_sequences=self._seeds,
            )
            repeated = [item for item in items for _ in range(self._seeds)]
            found[rows] = np.array(task.scores(repeated, texts)).reshape(len(rows), -1).mean(1)
            assert auto.chosen is not None
            chosen[rows] = auto.chosen.view(len(rows), -1)[:, 0].double().cpu().numpy().round(4)
        return found, chosen
