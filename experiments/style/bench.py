"""``decoding bench style``: what the style prior costs, as ratios against a baseline in the same process.

Each is the median of the rounds' ratios, with their quartiles in the bracket. Let the machine be idle.
``decoding bench gpu`` measures GPUs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.models import load_model, load_tokenizer
from decoding.style.prior import StylePrior
from decoding.style.source import Corpus
from decoding.style.training import prior_of_tokens
from decoding.tokens import tokenize
from experiments.lab.figures import Figure, interleaved, not_measured, ratio_of, report, seconds_of
from experiments.lab.runs import dtype_of
from experiments.lab.timing import TimedProcessor
from ngram import NGramModel
from ngram.tables import add_log_prior, mixture_of_orders

BATCH = 8
RECOMMENDED = "ratio"


def main(corpus: Corpus, model_name: str, out: Path | None, lmplz: Path | None) -> None:
    """Measures, prints the table, and writes it as JSON if asked.

    Args:
        corpus: the style.
        model_name: whose tokenizer and decode step are measured.
        out: file for the figures.
        lmplz: KenLM's trainer.
    """
    tokenizer = load_tokenizer(model_name)
    documents = tokenize(corpus.documents, tokenizer)
    ids = np.concatenate(documents)
    priors = {k: prior_of_tokens(documents, corpus, tokenizer, k, "kneser-ney") for k in (3, 5)}
    # First, so that the rest is measured beside a model too, as in use: memory is then kept between steps.
    share = _decode_share(model_name, tokenizer, priors[3], corpus.documents)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        figures = [
            *_adding(priors, ids, len(tokenizer)),
            *_modes(priors[3], ids, len(tokenizer)),
            *_against_kenlm(priors[3], ids),
            *_training(ids, len(tokenizer), lmplz),
            *(figure for prior in priors.values() for figure in _file(prior)),
        ]
    torch.set_num_threads(threads)
    figures.append(share)
    title = f"style prior of {corpus.name} ({len(ids):,} tokens)"
    report(figures, title, {"corpus": corpus.name, "tokens": len(ids)}, out)


def _histories(ids: np.ndarray, batch: int, count: int) -> list[Tensor]:
    """Batches of contexts from random places of the corpus itself, where they have the most continuations."""
    rng = np.random.default_rng(0)
    return [
        torch.from_numpy(np.stack([ids[i - 5 : i] for i in rng.integers(5, len(ids), batch)])) for _ in range(count)
    ]


def _adding(priors: dict[int, NGramModel], ids: np.ndarray, vocab: int) -> list[Figure]:
    scores, row, strength = torch.randn(BATCH, vocab), torch.randn(vocab), torch.full((BATCH,), 0.1)
    histories = _histories(ids, BATCH, 600)
    mixtures = {k: mixture_of_orders([1 / k] * k) for k in priors}

    def add(order: int, i: int) -> Tensor:
        return add_log_prior(priors[order].tables, scores, histories[i], strength, mixtures[order])

    base, third, fifth = interleaved([lambda i: scores + row, lambda i: add(3, i), lambda i: add(5, i)], 600)
    dense, shown = ratio_of(third, base)
    deeper, shown_deeper = ratio_of(fifth, third)
    where = f"batch {BATCH}, V={vocab}, one thread, against scores + row"
    return [
        Figure(f"adding the prior, {where}", dense, shown, "≤ 4×", dense <= 4),
        *_calls(priors[3], ids, scores, row, where),
        Figure("order 5 against order 3", deeper, shown_deeper, "≤ 1.5×", deeper <= 1.5),
    ]


def _calls(prior: NGramModel, ids: np.ndarray, scores: Tensor, row: Tensor, where: str) -> list[Figure]:
    """`StylePrior` as ``generate`` calls it, behind texts of 300 tokens."""
    texts = [
        torch.cat((torch.from_numpy(ids[:295]).expand(BATCH, -1), each), 1) for each in _histories(ids, BATCH, 300)
    ]
    figures = []
    for what, steer_stop in (("", False), (" that steers ends of texts too", True)):
        style = StylePrior(prior, λ=0.3, steer_stop=steer_stop)
        base, call = interleaved(
            [lambda i: scores + row, partial(lambda style, i: style(texts[i], scores), style)], 300
        )
        ratio, shown = ratio_of(call, base)
        figures.append(Figure(f"a call of StylePrior{what}, {where}", ratio, shown, "≤ 5×", ratio <= 5))
    return figures


def _modes(prior: NGramModel, ids: np.ndarray, vocab: int) -> list[Figure]:
    """A whole step of `StylePrior`, in each mode and with each guard."""
    scores, histories = torch.randn(BATCH, vocab), _histories(ids, BATCH, 200)
    modes = _stylings(prior, vocab)
    works = [partial(lambda style, i: style(histories[i], scores), style) for style in modes.values()]
    _, base, *others = interleaved([works[0], *works], 200)  # the first brings the tables into the caches, for all
    figures = []
    for what, times in zip(list(modes)[1:], others, strict=True):
        ratio, shown = ratio_of(times, base)
        most = _MOST_STEPS.get(what)
        target, met = ("", None) if most is None else (f"≤ {most}×", ratio <= most)
        figures.append(Figure(f"a step in mode {what}, against mode paper, batch {BATCH}", ratio, shown, target, met))
    return figures


_MOST_STEPS = {RECOMMENDED: 2, "ratio, JS within 0.05": 8, "ratio, entropy gate": 3, "ratio, plausible tokens": 3}


def _stylings(prior: NGramModel, vocab: int) -> dict[str, StylePrior]:
    """The plain mode, then the others."""
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(0)).clamp_(-2, 2)
    ratio: dict[str, Any] = {"mode": "ratio", "log_ratio": row}
    return {
        "paper": StylePrior(prior, λ=0.5),
        RECOMMENDED: StylePrior(prior, λ=0.5, **ratio),
        "ratio, no contexts": StylePrior(prior, λ=0.5, orders=(1,), **ratio),
        "ratio, JS within 0.05": StylePrior(prior, λ=0.5, max_js=0.05, **ratio),
        "ratio, entropy gate": StylePrior(prior, λ=0.5, entropy_gate=4.0, **ratio),
        "ratio, plausible tokens": StylePrior(prior, λ=0.5, plausibility=0.1, **ratio),
    }


def _against_kenlm(prior: NGramModel, ids: np.ndarray) -> list[Figure]:
    what, target = f"the kenlm package's loop over the vocabulary against a row, in a batch of {BATCH}", "≥ 100×"
    if importlib.util.find_spec("kenlm") is None:
        return [not_measured(what, target, "pip install kenlm")]
    import kenlm

    with tempfile.TemporaryDirectory() as folder:
        prior.to_arpa(Path(folder) / "prior.arpa")
        config = kenlm.Config()
        config.show_progress = False
        theirs = kenlm.Model(str(Path(folder) / "prior.arpa"), config)
    words = [str(i) for i in range(prior.vocab_size)]
    histories = _histories(ids, BATCH, 20)
    scores, strength = torch.randn(BATCH, prior.vocab_size), torch.ones(BATCH)

    def rows(count: int, i: int) -> Tensor:
        return add_log_prior(prior.tables, scores[:count], histories[i][:count], strength[:count])

    def loop(i: int) -> list[float]:
        state, after = kenlm.State(), kenlm.State()
        theirs.NullContextWrite(state)
        for token in histories[i][0].tolist():
            theirs.BaseScore(state, str(token), after)
            state, after = after, state
        return [theirs.BaseScore(state, word, after) for word in words]

    slow, batch, alone = interleaved([loop, partial(rows, BATCH), partial(rows, 1)], 20)
    ratio, shown = ratio_of(slow, batch / BATCH)
    single, shown_single = ratio_of(slow, alone)
    return [
        Figure(what, ratio, shown, target, ratio >= 100),
        Figure("the same against a row on its own", single, shown_single),
    ]


def _training(ids: np.ndarray, vocab: int, lmplz: Path | None) -> list[Figure]:
    seconds = [seconds_of(lambda: NGramModel.train(ids, vocab, order=3)) for _ in range(5)]
    rate = len(ids) / float(np.median(seconds))
    figures = [
        Figure("training, order 3, tokens per second and core", rate, f"{rate / 1e6:.1f} M", "≥ 1 M", rate >= 1e6),
        _training_memory(ids, vocab),
    ]
    what, target = "training end to end (ids as text to a saved model) against lmplz", "< 1×"
    if lmplz is None:
        return [*figures, not_measured(what, target, "give --lmplz PATH")]
    with tempfile.TemporaryDirectory() as folder:
        text, saved = Path(folder) / "ids", Path(folder) / "m.safetensors"
        lines = (" ".join(map(str, ids[i : i + 256])) for i in range(0, len(ids), 256))
        text.write_text("\n".join(lines) + "\n")

        def ours(_: int) -> None:
            read = [np.fromstring(line, np.int64, sep=" ") for line in text.read_text().splitlines()]
            NGramModel.train(read, vocab, order=3).save(saved)

        def theirs(_: int) -> None:
            run_lmplz(lmplz, text, Path(folder), 1 << 30)

        own, other = interleaved([ours, theirs], 5)
    ratio, shown = ratio_of(own, other)
    return [*figures, Figure(what, ratio, shown, target, ratio < 1)]


def run_lmplz(lmplz: Path, text: Path, folder: Path, memory: int) -> None:
    """Has KenLM train a model of order 3 on ids as text, with so many bytes to sort in; it stays in the folder."""
    with text.open() as source, (folder / "m.arpa").open("w") as target:
        # Fixed discounts only where the corpus gives none: every token of a large drawn one is frequent.
        command: list[str | Path] = [lmplz, "-o", "3", "-S", f"{memory >> 20}M", "-T", folder, "--discount_fallback"]
        done = subprocess.run(command, stdin=source, stdout=target, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DecodingError(f"{lmplz} failed: {done.stderr.strip()[-500:]}")


def _training_memory(ids: np.ndarray, vocab: int) -> Figure:
    tracemalloc.start()
    NGramModel.train(ids, vocab, order=5, pad_vocab=True)
    peak = tracemalloc.get_traced_memory()[1] / len(ids)
    tracemalloc.stop()
    what, target = "training, order 5, peak of memory beside the corpus", "≤ 120 bytes a token"
    return Figure(what, peak, f"{peak:.0f} bytes a token", target, peak <= 120)


def _file(prior: NGramModel) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        prior.save(path)
        size = path.stat().st_size / len(prior)
        opening = float(np.median([seconds_of(lambda: NGramModel.load(path)) for _ in range(9)])) * 1e3
    return [
        Figure(f"bytes per n-gram on disk, order {prior.order}", size, f"{size:.2f}", "≤ 9.2", size <= 9.2),
        Figure(f"opening a saved model of order {prior.order}", opening, f"{opening:.0f} ms", "< 50 ms", opening < 50),
    ]


def _decode_share(model_name: str, tokenizer: Any, prior: NGramModel, documents: Sequence[str]) -> Figure:
    model = load_model(model_name)
    dtype = dtype_of(model)
    what, target = f"share of a decode step, {model_name} in {dtype}, batch {BATCH}", "≤ 2 %"
    prompts = [document[:60] for document in documents[:BATCH]] * BATCH
    inputs = tokenizer(prompts[:BATCH], return_tensors="pt", padding=True).to(model.device)

    def generate(_: int) -> float:
        processor = TimedProcessor(StylePrior(prior, λ=0.1, tokenizer=tokenizer))
        began = time.perf_counter()
        model.generate(
            **inputs,
            logits_processor=[processor],
            do_sample=True,
            min_new_tokens=32,
            max_new_tokens=32,
            pad_token_id=tokenizer.pad_token_id,
        )
        seconds = processor.seconds
        return seconds / (time.perf_counter() - began)

    generate(0)
    shares = [100 * generate(i) for i in range(5)]
    share = float(np.median(shares))
    return Figure(what, share, f"{share:.2f} % [{min(shares):.2f}, {max(shares):.2f}]", target, share <= 2)
