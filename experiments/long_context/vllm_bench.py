"""``decoding bench vllm-long-context``: how fast vLLM writes behind long contexts, with chunk selection and without.

One engine in this process, real text, and batches whose requests have different texts. vLLM without selection is the
same engine with the selection taken out, but for a look at the bottom layer's output. Beside it, vLLM behind next to
nothing: no selection can be faster, since all of a step but attention is left. Where contexts are longer than
the model's positions, these are declared to be more: what it writes there is worthless, how fast it writes is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoding.errors import DecodingError
from decoding.models import load_tokenizer, resolve_model
from decoding.style.source import load_corpus
from decoding.tokens import tokenize
from decoding.vllm.declaration import BLOCK_SIZE
from decoding.vllm.engine import engine_args
from experiments.lab.figures import Figure, interleaved, report, seconds_of
from experiments.lab.pictures import plt, save
from experiments.lab.vllm_runner import CHUNKS, require_vllm, without

TEXT = "king-james"
BUDGET = 2048
STEPS = 32
_SHORT = 64
_TARGETS = {(4, 8192): 1.3, (4, 32768): 3.0, (1, 8192): 1.1, (1, 32768): 2.0}  # by batch and context

_KINDS = ("stock", "selected", "short")

Times = dict[tuple[int, int], np.ndarray]  # batch, context -> seconds [kinds; rounds]


def main(
    model: str,
    adapters: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Measures, prints the table, writes it as JSON and draws it if asked.

    Args:
        model: a folder, a hub id, or the default's name.
        adapters: likewise.
        contexts: tokens cached, ascending, each longer than the budget.
        batches: numbers of requests.
        rounds: how often each is measured.
        out: file for the figures.
        picture: file for the picture.

    Raises:
        DecodingError: vLLM is not installed, or the text is too short.
    """
    require_vllm()
    texts = texts_of(model, max(contexts), max(batches))
    declared = engine_args(chunk_adapters=adapters, kv_budget=BUDGET)
    llm = engine(model, max(contexts) + STEPS + 2 * BLOCK_SIZE, max(batches), declared)
    times = {
        (batch, context): _measured(llm, [text[:context] for text in texts[:batch]], rounds)
        for context in contexts  # each text's beginning is in the cache when the next context wants it
        for batch in sorted(batches, reverse=True)
    }
    figures = [_figure(*key, *seconds) for key, seconds in sorted(times.items())]
    speeds = {
        f"batch {batch}, {context}": dict(zip(_KINDS, seconds.tolist(), strict=True))
        for (batch, context), seconds in times.items()
    }
    about = {"model": model, "budget": BUDGET, "block_size": BLOCK_SIZE, "steps": STEPS, "seconds_of_steps": speeds}
    report(figures, f"long contexts in vLLM, {BUDGET:,} tokens read", about, out)
    if picture is not None:
        _draw(times, picture)


def texts_of(model: str, length: int, count: int) -> list[list[int]]:
    """So many pieces of real text of so many tokens, none twice.

    Raises:
        DecodingError: the text is too short.
    """
    ids = np.concatenate(tokenize(load_corpus(TEXT).documents, load_tokenizer(model)))
    if len(ids) < length * count:
        raise DecodingError(f"{TEXT} has {len(ids):,} tokens: choose shorter contexts or smaller batches")
    return [ids[i * length : (i + 1) * length].tolist() for i in range(count)]


def engine(model: str, length: int, batch: int, declared: Mapping[str, Any], **more: Any) -> Any:
    """vLLM in this process.

    Args:
        model: a folder, a hub id, or the default's name.
        length: of the longest request, in tokens: more positions than the model has are declared.
        batch: requests of that length which the cache holds on a CPU; on a GPU it has what memory is left.
        declared: from `decoding.vllm.engine_args`; nothing for vLLM as it is.
        more: arguments of ``vllm.LLM``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoConfig
    from vllm import LLM

    path = resolve_model(model)
    config = AutoConfig.from_pretrained(path).get_text_config()
    longer = {"max_position_embeddings": length} if length > config.max_position_embeddings else {}
    on_gpu = torch.cuda.is_available()
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = int(1.2 * batch * length * width * 2 * 2 * config.num_hidden_layers)  # keys and values of two bytes
    return LLM(
        path,
        dtype="bfloat16",
        max_model_len=length,
        max_num_batched_tokens=4096,
        hf_overrides=longer,
        **({} if on_gpu else {"kv_cache_memory_bytes": cache}),
        **declared,
        **more,
    )


def _measured(llm: Any, texts: Sequence[list[int]], rounds: int) -> np.ndarray:
    """Seconds of `STEPS` steps, [kinds; rounds]."""
    write(llm, texts)  # the prompts into the prefix cache, with their summaries
    seconds = np.zeros((len(_KINDS), rounds))

    def stock(turn: int) -> None:
        with without(llm, [CHUNKS]):
            seconds[0, turn] = write(llm, texts)

    def selecting(turn: int) -> None:
        seconds[1, turn] = write(llm, texts)

    def short(turn: int) -> None:
        with without(llm, [CHUNKS]):
            seconds[2, turn] = write(llm, [text[:_SHORT] for text in texts])

    interleaved([stock, selecting, short], rounds, f"{len(texts[0]):,} tokens, batch {len(texts)}")
    return seconds


def write(llm: Any, texts: Sequence[list[int]], asked: Sequence[Mapping[str, Any] | None] | None = None) -> float:
    """Seconds of `STEPS` steps in which all requests write greedily; prompts are read before.

    Args:
        llm: from `engine`.
        texts: the requests' prompts.
        asked: what each asks of us, as ``extra_args``.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    of_all: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 10 * STEPS, "detokenize": False}
    names = [
        engine.add_request(
            f"{i}-{os.urandom(4).hex()}", {"prompt_token_ids": text}, SamplingParams(**of_all, extra_args=arguments)
        )
        for i, (text, arguments) in enumerate(zip(texts, asked or [None] * len(texts), strict=True))
    ]
    writing: set[str] = set()
    while len(writing) < len(texts):
        writing |= {output.request_id for output in engine.step()}
    for _ in range(2):  # the first selection is the prompt's
        engine.step()
    seconds = seconds_of(lambda: [engine.step() for _ in range(STEPS)])
    engine.abort_request(names, internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    return seconds


def _figure(batch: int, context: int, stock: np.ndarray, selected: np.ndarray, short: np.ndarray) -> Figure:
    low, ratio, high = _ratios(stock, selected)
    shown = f"{ratio:.2f}× [{low:.2f}, {high:.2f}] of at most {_ratios(stock, short)[1]:.2f}×"
    target = _TARGETS.get((batch, context))
    what = f"{context:,} tokens, batch {batch}: tokens per second with selection, against vLLM without"
    met = None if target is None else ratio >= target
    return Figure(what, ratio, shown, "" if target is None else f"≥ {target}×", met)


def _ratios(stock: np.ndarray, other: np.ndarray) -> list[float]:
    """Median of the rounds' ratios between its quartiles: a round is short against the drift of a machine."""
    return np.quantile(stock / other, (0.25, 0.5, 0.75)).tolist()


def _draw(times: Times, picture: Path) -> None:
    """The ratios over the context: of speeds in turns, since between contexts a machine drifts."""
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    contexts = sorted({context for _, context in times})
    for batch in sorted({batch for batch, _ in times}):
        low, middle, high = np.array([_ratios(*times[batch, context][:2]) for context in contexts]).T
        axis.errorbar(contexts, middle, (middle - low, high - middle), fmt="D-", capsize=3, label=f"batch {batch}")
    axis.axhline(1, color="0.4", linestyle="--", label="vLLM without")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    axis.set_yticks([1, 2, 4], ["1×", "2×", "4×"])
    axis.set_xlabel("tokens in the cache")
    axis.set_ylabel("tokens per second, against vLLM without")
    axis.set_title(f"chunk selection in vLLM, {BUDGET:,} tokens read", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    save(figure, picture)
