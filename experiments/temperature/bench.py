"""``decoding bench temperature``: what choosing a temperature costs, as ratios in one process, on an idle machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decoding.models import load_model, load_tokenizer
from decoding.temperature.selector import TemperatureSelector
from experiments.lab.figures import Figure, interleaved, ratio_of, report
from experiments.lab.prompts import DEFAULT_PROMPTS, read_prompts
from experiments.lab.runs import dtype_of

PROMPT_TOKENS, NEW_TOKENS, BATCH = 128, 64, 16
WORDS = (
    "Summarize what the travellers saw: the captain said that the sea was black with rain, and the men who had come "
    "down from the hills were still waiting at the harbour when the lamps were lit and the last boat put out. "
)


def main(model_name: str, rounds: int, out: Path | None) -> None:
    """Measures, prints the table, and writes it as JSON if asked.

    Args:
        model_name: a folder, a hub id, or the default's name.
        rounds: how often everything runs.
        out: file for the figures.
    """
    tokenizer, model = load_tokenizer(model_name), load_model(model_name)
    selector = TemperatureSelector.from_pretrained(device=str(model.device))
    figures = [_choosing(model, tokenizer, selector, rounds), _batching(selector, rounds)]
    about = {"model": model_name, "dtype": dtype_of(model), "rounds": rounds}
    report(figures, f"choosing temperatures, {model_name} in {about['dtype']}", about, out)


def _choosing(model: Any, tokenizer: Any, selector: TemperatureSelector, rounds: int) -> Figure:
    ids = tokenizer(WORDS * 8, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS].to(model.device)
    prompt = tokenizer.decode(ids[0])
    sampling = {"do_sample": True, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "top_k": 0}

    def choose(_: int) -> list[float]:
        return selector.select([prompt])

    def write(_: int) -> Any:
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **sampling)

    choosing, writing = interleaved([choose, write], rounds)
    share, shown = ratio_of(100 * choosing, writing)
    what = f"choosing for a prompt of {PROMPT_TOKENS} tokens, against writing {NEW_TOKENS}"
    return Figure(what, share, shown.replace("×", " %"), "≤ 2 %", share <= 2)


def _batching(selector: TemperatureSelector, rounds: int) -> Figure:
    prompts = [f"{line} {WORDS}" for line in read_prompts(DEFAULT_PROMPTS)[:BATCH]]
    works = [lambda _: selector.select(prompts), lambda _: [selector.select([prompt]) for prompt in prompts]]
    together, alone = interleaved(works, rounds)
    ratio, shown = ratio_of(together, alone)
    return Figure(
        f"choosing for {BATCH} prompts together, against one after the other", ratio, shown, "< 1×", ratio < 1
    )
