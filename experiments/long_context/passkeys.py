"""Passkeys: a number that is hidden in filler, and asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from chunkllm.contiguous.attach import Attachment
from experiments.long_context.asked import EvalOptions, PasskeyCell, TextCell
from experiments.long_context.reading import read, write

ANSWER = 8
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"


def passkey_prompt(tokenizer: Any, length: int, depth: float, key: str) -> str:
    """The usual template (Mohtashami and Jaggi 2023, arXiv 2305.16300), of at most ``length`` tokens."""
    sizes = [len(tokenizer(text)["input_ids"]) for text in (TASK + KEY.format(key=key) + QUESTION, FILLER)]
    lines = max((length - sizes[0]) // sizes[1], 0)
    before = round(depth * lines)
    return TASK + FILLER * before + KEY.format(key=key) + FILLER * (lines - before) + QUESTION


def find(
    model: Any,
    tokenizer: Any,
    cell: PasskeyCell,
    options: EvalOptions,
    attached: Callable[[TextCell], Attachment],
) -> dict[str, Any]:
    """What every method answers to prompts with the key at one depth.

    Args:
        model: without anything attached.
        tokenizer: its tokenizer.
        cell: which prompts.
        options: how many keys and depths.
        attached: attaches a method.
    """
    depth = cell.place / max(options.passkey_depths - 1, 1)
    rng = random.Random(f"{cell.length} {cell.place}")
    keys = [str(rng.randint(10_000, 99_999)) for _ in range(options.passkey_keys)]
    batches = [
        read(model, _ids(passkey_prompt(tokenizer, cell.length, depth, key), tokenizer, model))[0] for key in keys
    ]
    answers: dict[str, list[str]] = {}
    for compared in options.compared:
        found = answers.setdefault(compared.name, [])
        for batch in batches:
            with attached(compared) as chunks:
                found += write(model, chunks, batch, tokenizer, ANSWER)
    return {"length": cell.length, "depth": depth, "keys": keys, "answers": answers, "hits": _hits(keys, answers)}


def _ids(prompt: str, tokenizer: Any, model: Any) -> Tensor:
    ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids.to(model.device)


def _hits(keys: list[str], answers: Mapping[str, list[str]]) -> dict[str, list[bool]]:
    return {name: [key in text for key, text in zip(keys, texts, strict=True)] for name, texts in answers.items()}
