"""The lossless mode: how many drafted tokens are right on real text, and how fast it is where so many are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from chunkllm.calibration import open_saved
from decoding.errors import DecodingError
from decoding.models import DEFAULT_MODEL, load_model, load_tokenizer
from decoding.style.source import load_corpus
from experiments.gpu.correctness import LOSSLESS as SAME_TEXT
from experiments.gpu.correctness import lossless_text, random_weights
from experiments.gpu.record import Record
from experiments.lab.device import free
from experiments.lab.figures import Figure, ratio_of
from experiments.long_context.bench import BenchOptions
from experiments.long_context.lossless import DENSE, DRAFTING, LOSSLESS, SAMPLED, Setting, on_random, on_text
from experiments.long_context.lossless import Record as Written

_TEXT = "king-james"
_CHARACTERS = 8  # of a token, at the most
_FAR = 0.2  # a share of right tokens may be from what was asked for: there are few


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: of the model with random weights.
        dtype: likewise.
        context: random tokens in its cache.
        batches: rows, and the goal for each against the best dense attention.
        acceptance: shares of drafted tokens that are right.
        tokens: written.
        budget: tokens that a selection keeps.
        rounds: in which ways take turns.
        text: tokens of real text, for the embedded model.
        of_text: tokens that it keeps of them.
    """

    shape: str = "llama-3.1-8b"
    dtype: str = "bfloat16"
    context: int = 120_000
    batches: tuple[tuple[int, float], ...] = ((1, 1.3), (6, 2.5))
    acceptance: tuple[float, ...] = (0.9, 0.7)
    tokens: int = 64
    budget: int = 2048
    rounds: int = 2
    text: int = 8192
    of_text: int = 1024


CARD = Sizes()
TOY = Sizes("toy", "float32", 300, ((1, 1.3), (2, 2.5)), (1.0,), 12, 128, 2, 240, 128)


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds speeds against the best dense attention, both called, and shares of right tokens."""
    small = random_weights("toy", 600)
    record.check(SAME_TEXT, partial(lossless_text, small, 500, 160, 32, device))
    for acceptance in sizes.acceptance:
        for batch, least in sizes.batches:
            try:
                _behind_random(sizes, batch, acceptance, least, record)
            except torch.OutOfMemoryError:
                record.absent(_where(sizes, batch, acceptance), "does not fit into memory")
            free()
        if acceptance == sizes.acceptance[0]:
            try:
                _behind_text(sizes, record)
            except DecodingError as error:
                record.absent(f"{_TEXT}: drafted tokens that are right", str(error))


def _where(sizes: Sizes, batch: int, acceptance: float) -> str:
    return f"{sizes.shape}, {sizes.context:,} tokens, batch {batch}, {100 * acceptance:g} % of drafted tokens right"


def _behind_random(sizes: Sizes, batch: int, acceptance: float, least: float, record: Record) -> None:
    where = _where(sizes, batch, acceptance)
    options = BenchOptions(sizes.shape, getattr(torch, sizes.dtype), (sizes.context,), (batch,))
    setting = Setting(sizes.tokens, sizes.budget, sizes.rounds)
    written = {each.way: each for each in on_random(options, acceptance, setting, lambda _: None, (DENSE, LOSSLESS))}
    needs = f"{where}: all tokens were written, and drafts were right as often as that"
    record.check(needs, partial(_as_told, written, acceptance, sizes.tokens))
    ours, dense = (np.array(written[way].seconds) for way in (LOSSLESS, DENSE))
    ratio, shown = ratio_of(dense, ours)
    what = f"{where}: tokens per second, against {DENSE}, both called"
    # The goal is for text as the model writes it, of which the first share is nearest.
    is_goal = acceptance == sizes.acceptance[0]
    target, met = (f"≥ {least:g}×", ratio >= least) if is_goal else ("", None)
    record.figure(Figure(what, ratio, shown, target, met), needs, SAME_TEXT)
    for way, seconds in ((LOSSLESS, ours), (DENSE, dense)):
        speed = batch / float(np.median(seconds))
        record.figure(Figure(f"{where}: tokens per second, {way}, called", speed, f"{speed:.0f}"), needs, SAME_TEXT)


def _as_told(written: dict[str, Written], acceptance: float, tokens: int) -> tuple[bool, str]:
    share = written[LOSSLESS].acceptance
    least = min(each.tokens for each in written.values())
    if share is None:  # drafts never paid
        return least == tokens, f"{least} of {tokens} tokens, nothing was drafted"
    is_near = abs(share - acceptance) <= _FAR
    return least == tokens and is_near, f"{least} of {tokens} tokens, {100 * share:.0f} % right"


def _behind_text(sizes: Sizes, record: Record) -> None:
    """The embedded model, in float32."""
    tokenizer, model = load_tokenizer(DEFAULT_MODEL), load_model(DEFAULT_MODEL, "float32")
    text = "\n".join(load_corpus(_TEXT).documents)[: sizes.text * _CHARACTERS]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : sizes.text].to(model.device)
    setting = Setting(sizes.tokens, sizes.of_text, 1)
    with torch.inference_mode():
        written = {each.way: each for each in on_text(_TEXT, ids, model, tokenizer, open_saved(None), setting)}
    needs = f"{_TEXT}, {ids.shape[1]:,} tokens: the lossless mode writes what full attention writes"
    record.check(needs, partial(_same, written[LOSSLESS]))
    for way in (DRAFTING, SAMPLED):
        found = written[way]
        assert found.acceptance is not None
        shown = f"{100 * found.acceptance:.1f} %, {found.tokens / (found.passes or 1):.1f} tokens a pass"
        what = f"{_TEXT}, {ids.shape[1]:,} tokens, {way}: drafted tokens that are right"
        record.figure(Figure(what, found.acceptance, shown), needs)


def _same(written: Written) -> tuple[bool, str]:
    return written.same == written.tokens, f"{written.same} of {written.tokens} tokens"
