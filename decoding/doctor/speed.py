"""How long the methods' own work takes here: a few seconds of measuring each, on random numbers of a model's shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from chunkllm import ChunkSelection
from decoding.errors import DecodingError
from decoding.models import default_device
from decoding.style.prior import StylePrior
from decoding.temperature.selector import TemperatureSelector
from ngram import NGramModel

_SECONDS = 2.0
_UNTIMED, _LEAST_TIMES, _MOST_TIMES = 2, 3, 200
_IDS = 49_152  # that the default model scores
_TRAINED_ON, _WRITTEN = 20_000, 300
_PROMPT = 128
_WORDS = "Summarize what the travellers saw: the captain said that the sea was black with rain, and the men waited. "
_CACHED, _BUDGET, _LAYERS = 4096, 1024, 4


@dataclass(frozen=True)
class Timing:
    """What was measured.

    Attributes:
        what: is timed.
        on: what it ran on: the device, its threads, and the shapes.
        milliseconds: the median, or None if it could not be measured.
        quartiles: in milliseconds.
        times: how often it ran.
        why: it could not be measured.
    """

    what: str
    on: str
    milliseconds: float | None
    quartiles: tuple[float, float] | None = None
    times: int = 0
    why: str | None = None


def timings(ids: int | None = None) -> list[Timing]:
    """Measures all three methods.

    Args:
        ids: that the model scores; by default as many as the default model.
    """
    torch.manual_seed(0)
    with torch.inference_mode():
        return [_style(ids or _IDS), _temperature(), _chunks()]


def _style(ids: int) -> Timing:
    device = default_device()
    tokens = np.random.default_rng(0).zipf(1.3, _TRAINED_ON) % ids
    prior = NGramModel.train(tokens, ids, order=3, pad_vocab=True)
    style = StylePrior(prior, λ=0.6, mode="ratio", log_ratio=torch.randn(ids).clamp_(-2, 2))
    scores, text = torch.randn(1, ids, device=device), torch.from_numpy(tokens[None, :_WRITTEN]).to(device)
    on = f"{_place(device)}; one row of {ids:,} ids, mode ratio, a prior of {_TRAINED_ON:,} random tokens"
    return _timed("a step of StylePrior", on, lambda: style(text, scores), device)


def _temperature() -> Timing:
    what, device = f"a choice of temperature for a prompt of {_PROMPT} tokens", "cpu"
    try:
        selector = TemperatureSelector.from_pretrained(device=device)
    except DecodingError as error:
        return Timing(what, _place(device), None, why=str(error))
    tokenizer = selector.encoder.tokenizer
    prompt = tokenizer.decode(tokenizer(_WORDS * 9, add_special_tokens=False)["input_ids"][:_PROMPT])
    return _timed(what, f"{_place(device)}; the embedded selector", lambda: selector.select([prompt]), device)


def _chunks() -> Timing:
    device = default_device()
    model = _small_model(device)
    shape = (1, model.config.num_key_value_heads, _CACHED, model.config.head_dim)
    with ChunkSelection(budget=_BUDGET, every_step=True).attach(model) as attached:
        cache = attached.new_cache()
        states = ((torch.randn(shape, device=device), torch.randn(shape, device=device)) for _ in range(_LAYERS))
        cache.load(states, torch.zeros(1, _CACHED, dtype=torch.bool))
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        model(token, **{attached.cache_name: cache})  # leaves the queries that chunks are scored for
        on = (
            f"{_place(device)}; {_LAYERS} layers of {model.config.num_attention_heads} query heads and "
            f"{shape[1]} of {shape[3]} for {_CACHED:,} random keys, {_BUDGET:,} kept"
        )
        return _timed("a selection of chunks", on, lambda: cache.begin(1, 1, None, token.device), device)


def _small_model(device: str) -> Any:
    """Heads like those of the default model, and next to nothing else."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2 * _CACHED,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def _place(device: str) -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}" if device == "cpu" else torch.cuda.get_device_name()


def _timed(what: str, on: str, work: Callable[[], Any], device: str) -> Timing:
    milliseconds: list[float] = []
    stop = time.perf_counter() + _SECONDS
    for turn in range(_UNTIMED + _MOST_TIMES):
        _finish(device)
        begin = time.perf_counter()
        work()
        _finish(device)
        if turn >= _UNTIMED:
            milliseconds.append(1000 * (time.perf_counter() - begin))
        if len(milliseconds) >= _LEAST_TIMES and time.perf_counter() > stop:
            break
    low, median, high = np.percentile(milliseconds, [25, 50, 75]).round(3).tolist()
    return Timing(what, on, median, (low, high), len(milliseconds))


def _finish(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
