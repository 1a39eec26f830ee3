"""``decoding bench vllm``: what styles cost in vLLM, as ratios of throughput in one run, and in memory.

One engine in this process, since two processes differ by more than what is measured, with vLLM's own limits. Every
request writes as many tokens, greedily: the cheapest sampling, so that the prior weighs most. Let the machine be idle.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkllm.selection import DEFAULT_BUDGET
from decoding.models import load_tokenizer, resolve_model
from decoding.style.training import name_and_file
from decoding.vllm.declaration import DeclaredStyle
from decoding.vllm.engine import engine_args
from decoding.vllm.styles import load_styles
from experiments.lab.figures import Figure, interleaved, not_measured, report
from experiments.lab.prompts import DEFAULT_PROMPTS, read_prompts
from experiments.lab.vllm_runner import CHUNKS, STYLES, TEMPERATURES, require_vllm, without
from experiments.style.cells import DEFAULT_STYLES

BATCH = 16
MANY = 200
LAMBDA = 0.1


def main(model_name: str, tokens: int, rounds: int, out: Path | None) -> None:
    """Measures, prints the table, and writes it as JSON if asked.

    Args:
        model_name: a folder, a hub id, or the default's name.
        tokens: how many each request writes.
        rounds: how often each kind of batch runs.
        out: file for the figures.
    """
    require_vllm()
    tokenizer = load_tokenizer(model_name)
    files = [name_and_file(name, tokenizer, order=3, smoothing="kneser-ney")[1] for name in DEFAULT_STYLES]
    figures = [
        *_throughput(resolve_model(model_name), files, tokens, rounds),
        _memory(files, MANY, len(tokenizer)),
    ]
    title = f"styles in vLLM, batch {BATCH}, {tokens} tokens a request"
    report(figures, title, {"model": model_name, "batch": BATCH, "tokens": tokens, "rounds": rounds}, out)


def _throughput(model: str, files: Sequence[str], tokens: int, rounds: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        names = copies(files, BATCH, Path(folder))
        engine = _Engine(model, names, tokens)
        nobody, different = [None] * BATCH, list(names)
        works = [
            partial(engine.write, styles, left_out=engine.others)
            for styles in (nobody, [different[0]] * BATCH, different)
        ]
        none, one, sixteen = interleaved(works, rounds, "styles")
        unused = [_unused(part, engine, 3 * rounds) for part in (STYLES, TEMPERATURES, CHUNKS)]
    return [
        _share("a style on every request, against none", none, one, 0.97),
        _share(f"{BATCH} different styles, against none", none, sixteen, 0.97),
        *unused,
    ]


class _Engine:
    """vLLM in this process: with all parts where they can be left out again, which is in V1's runner; else with styles.

    Args:
        model: a folder or a hub id.
        styles: that it serves.
        tokens: that each request writes.

    Attributes:
        others: parts that are there beside styles.
    """

    def __init__(self, model: str, styles: Mapping[str, Path], tokens: int):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        others: dict[str, Any] = {} if on_gpu else {"temperature": True, "kv_budget": DEFAULT_BUDGET}
        self.others = () if on_gpu else (TEMPERATURES, CHUNKS)
        self._tokens = tokens
        self._prompts = read_prompts(DEFAULT_PROMPTS)[:BATCH]
        self._llm = LLM(
            model,
            max_model_len=64 + tokens,
            enforce_eager=not on_gpu,
            **({} if on_gpu else {"kv_cache_memory_bytes": 1 << 29}),
            **engine_args(styles, **others),
        )

    def write(
        self, styles: Sequence[str | None], turn: int, temperature: float = 0, left_out: Sequence[str] = ()
    ) -> None:
        """A batch of requests, each with a style or none, as if some parts were not there."""
        from vllm import SamplingParams

        of_all = {"temperature": temperature, "ignore_eos": True, "max_tokens": self._tokens, "detokenize": False}
        arguments = [None if style is None else {"style": style, "lambda": LAMBDA} for style in styles]
        sampling = [SamplingParams(**of_all, extra_args=each) for each in arguments]
        with without(self._llm, left_out):
            self._llm.generate(list(self._prompts), sampling, use_tqdm=False)


def _unused(part: str, engine: _Engine, rounds: int) -> Figure:
    """What a part costs of which nobody asks anything. Sampled: in greedy batches no temperature is set."""
    what, target = f"{part} there and not asked for, against left out", 0.995
    if torch.cuda.is_available():
        return not_measured(f"throughput with {what}", f"≥ {target}×", "for V1's runner only")
    nobody = partial(engine.write, [None] * BATCH, temperature=1)
    without_it, with_it = interleaved([partial(nobody, left_out=[part]), nobody], rounds, f"{part}, unused")
    return _share(what, without_it, with_it, target)


def copies(files: Sequence[str], count: int, folder: Path) -> dict[str, Path]:
    """``count`` priors in files of their own: of full size, and nothing shared in memory."""
    copies = {f"style-{i}": folder / f"{i}.safetensors" for i in range(count)}
    for i, path in enumerate(copies.values()):
        shutil.copy(files[i % len(files)], path)
    return copies


def _share(what: str, baseline: np.ndarray, times: np.ndarray, target: float) -> Figure:
    """Throughput as a share of the baseline's: the median of the rounds' ratios, with their quartiles."""
    low, share, high = (float(x) for x in np.quantile(baseline / times, (0.25, 0.5, 0.75)))
    shown = f"{share:.3f}× [{low:.3f}, {high:.3f}]"
    return Figure(f"throughput with {what}", share, shown, f"≥ {target}×", share >= target)


def _memory(files: Sequence[str], count: int, width: int) -> Figure:
    what, target = f"memory that {count} loaded priors take, against their files", "≤ 1.05×"
    if not Path("/proc/self/statm").exists():
        return not_measured(what, target, "wants /proc")
    sources = [files[i % len(files)] for i in range(count)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(_growth, (sources, width))
    size = sum(Path(source).stat().st_size for source in sources)
    share = grown / size
    return Figure(what, share, f"{share:.3f}× of {size / 1e6:,.0f} MB", target, share <= 1.05)


def _growth(sources: Sequence[str], width: int) -> int:
    """By how many bytes this process grows."""
    first = load_styles({"warm-up": DeclaredStyle(sources[0])}, None, width, "cpu")
    before = _resident()
    styles = load_styles({str(i): DeclaredStyle(source) for i, source in enumerate(sources)}, None, width, "cpu")
    grown = _resident() - before
    del first, styles
    return grown


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
