"""Throughput in vLLM, where it is installed: with styles, with budgets, with all of it off, and on two cards.

The engine with everything declared is compared with vLLM as it is, in another process. Within one engine the kinds of
requests take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoding.models import DEFAULT_MODEL, load_tokenizer
from decoding.style.training import name_and_file
from decoding.vllm.declaration import BLOCK_SIZE
from decoding.vllm.engine import engine_args
from experiments.gpu.record import Record
from experiments.lab.figures import Figure, interleaved, ratio_of
from experiments.lab.vllm_runner import model_runner, require_vllm
from experiments.long_context.vllm_bench import BUDGET, STEPS, engine, texts_of, write
from experiments.style.cells import DEFAULT_STYLES
from experiments.style.vllm_bench import LAMBDA, copies

SHORT, LONG = "short requests", "long requests"
_OFF, _STYLE, _STYLES, _KEPT = "all off", "a style on each", "a style of its own on each", f"{BUDGET:,} tokens kept"
_SAME = 0.9  # of the tokens: rounding may decide a few in bfloat16
_SHORT_TOKENS = 64


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        requests: at a time, of some tokens.
        long: requests at a time, of many.
        context: tokens of those.
        rounds: in which kinds take turns.
        eager: without compiling and without CUDA graphs.
    """

    requests: int = 16
    long: int = 4
    context: int = 32_768
    rounds: int = 7
    eager: bool = False


CARD, TOY = Sizes(), Sizes(2, 1, 2400, 1, eager=True)


@dataclass(frozen=True)
class _Engine:
    """Which engine is started."""

    is_ours: bool
    cards: int


@dataclass(frozen=True)
class _Found:
    """Seconds of `STEPS` steps [rounds] by kind, tokens that were written with all off, and what computes steps."""

    seconds: dict[tuple[str, str], np.ndarray]
    tokens: list[list[int]]
    runner: str


def measure(sizes: Sizes, device: torch.device, record: Record) -> None:
    """Adds throughputs as shares of those with all off, engine by engine.

    Raises:
        DecodingError: vLLM is not installed.
    """
    require_vllm()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(DEFAULT_MODEL)
        files = [name_and_file(name, tokenizer, order=3, smoothing="kneser-ney")[1] for name in DEFAULT_STYLES]
        styles = copies(files, sizes.requests, Path(folder))
        first: list[list[int]] = []
        for cards in (1, 2):
            if cards > max(torch.cuda.device_count(), 1):
                record.absent(f"tensor parallelism, {_cards(cards)}", "one card here")
                continue
            ours, stock = (_in_a_process(_Engine(is_ours, cards), sizes, styles) for is_ours in (True, False))
            record.note(**{f"runner, {_cards(cards)}": ours.runner})
            first = first or stock.tokens
            needs = f"{_cards(cards)}: all off, the tokens that vLLM writes as it is"
            record.check(needs, partial(_same, ours.tokens, stock.tokens))
            again = f"{_cards(cards)}: the tokens that one card writes"
            record.check(again, partial(_same, ours.tokens, first))
            _add(record, cards, ours, stock, needs, again)


def _cards(count: int) -> str:
    return f"{count} card{'s' * (count > 1)}"


def _in_a_process(which: _Engine, sizes: Sizes, styles: Mapping[str, Path]) -> _Found:
    """A process can have but one engine."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_written, which, sizes, styles).result()


def _written(which: _Engine, sizes: Sizes, styles: Mapping[str, Path]) -> _Found:
    long = texts_of(DEFAULT_MODEL, sizes.context, sizes.long)
    short = texts_of(DEFAULT_MODEL, _SHORT_TOKENS, sizes.requests)
    declared = (
        engine_args(styles, temperature=True, chunk_adapters="default", kv_budget=BUDGET) if which.is_ours else {}
    )
    length = sizes.context + 10 * STEPS + 2 * BLOCK_SIZE
    started = {"tensor_parallel_size": which.cards, "enforce_eager": sizes.eager}
    llm = engine(DEFAULT_MODEL, length, sizes.long, declared, **started)
    kinds = {(SHORT, _OFF): (short, None), (LONG, _OFF): (long, _asked([{"kv_budget": "full"}] * sizes.long, which))}
    if which.is_ours:
        of_each = [{"style": name, "lambda": LAMBDA} for name in styles]
        kinds |= {
            (SHORT, _STYLE): (short, of_each[:1] * sizes.requests),
            (SHORT, _STYLES): (short, of_each),
            (LONG, _KEPT): (long, [{"kv_budget": BUDGET}] * sizes.long),
        }
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}

    def work(kind: tuple[str, str], _: int) -> None:
        seconds[kind].append(write(llm, *kinds[kind]))

    interleaved([partial(work, kind) for kind in kinds], sizes.rounds)
    timed = {kind: np.array(each[1:]) for kind, each in seconds.items()}  # the first was for warming up
    return _Found(timed, _greedy(llm, short), _runner(llm))


def _asked(arguments: list[dict[str, Any]], which: _Engine) -> list[dict[str, Any]] | None:
    return arguments if which.is_ours else None


def _greedy(llm: Any, texts: Sequence[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=STEPS, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _runner(llm: Any) -> str:
    try:
        return type(model_runner(llm)).__module__
    except AttributeError:
        return "in other processes"


def _same(found: list[list[int]], wanted: list[list[int]]) -> tuple[bool, str]:
    pairs = [a == b for mine, its in zip(found, wanted, strict=True) for a, b in zip(mine, its, strict=True)]
    share = sum(pairs) / len(pairs)
    return share >= _SAME, f"{sum(pairs)} of {len(pairs)} tokens"


def _add(record: Record, cards: int, ours: _Found, stock: _Found, *needs: str) -> None:
    for (what, kind), seconds in ours.seconds.items():
        where = f"{_cards(cards)}, {what}"
        if kind == _OFF:
            ratio, shown = ratio_of(stock.seconds[what, kind], seconds)
            line = f"{where}: throughput with all declared and off, against vLLM as it is (another process)"
            record.figure(Figure(line, ratio, shown), *needs)
        else:
            least = 1.3 if kind == _KEPT else 0.97
            ratio, shown = ratio_of(ours.seconds[what, _OFF], seconds)
            line = f"{where}: throughput with {kind}, against all off"
            record.figure(Figure(line, ratio, shown, f"≥ {least:g}×", ratio >= least), *needs)
