"""What the methods cost: the benchmarks' own figures."""

from __future__ import annotations

import numpy as np

from figures.data import bench_table, figure, quoted, read, table

HEADS = ["", "measured", "target"]
STYLE = {
    "adding the prior, batch 8, V=49152, one thread, against scores + row": (
        "adding the prior, batch 8, V=49152, one thread, against one dense `scores + row`"
    ),
    "a call of StylePrior, batch 8, V=49152, one thread, against scores + row": (
        "a call of `StylePrior`, behind 300 tokens, against the same"
    ),
    "a call of StylePrior that steers ends of texts too, batch 8, V=49152, one thread, against scores + row": (
        "the same with `steer_stop=True`"
    ),
    "order 5 against order 3": "order 5 against order 3",
    "a step in mode ratio, against mode paper, batch 8": "a call in mode ratio, against mode paper",
    "a step in mode ratio, no contexts, against mode paper, batch 8": "the same with `orders=(1,)`",
    "a step in mode ratio, JS within 0.05, against mode paper, batch 8": "the same with `max_js=0.05`",
    "a step in mode ratio, entropy gate, against mode paper, batch 8": "the same with `entropy_gate=4`",
    "a step in mode ratio, plausible tokens, against mode paper, batch 8": "the same with `plausibility=0.1`",
    "the kenlm package's loop over the vocabulary against a row, in a batch of 8": (
        "the `kenlm` package's loop over the vocabulary against a row, in a batch of 8"
    ),
    "the same against a row on its own": "the same against a row on its own",
    "training, order 3, tokens per second and core": "training, order 3, tokens per second and core",
    "training, order 5, peak of memory beside the corpus": "training, order 5, peak of memory beside the corpus",
    "bytes per n-gram on disk, order 3": "bytes per n-gram on disk, order 3",
    "bytes per n-gram on disk, order 5": "the same, order 5",
    "opening a saved model of order 3": "opening a saved model, order 3",
    "opening a saved model of order 5": "the same, order 5",
    "share of a decode step, smollm2-135m-instruct in bfloat16, batch 8": (
        "share of a SmolLM2 decode step, bfloat16, batch 8 (bracket: the least and the most of five runs)"
    ),
}
_GPU = "on a GPU, in a CUDA graph, batch 64, V=151936, mode"
_CARD = "(NVIDIA H100 80GB HBM3)"
GPU = {
    f"{_GPU} paper {_CARD}": "mode paper",
    f"{_GPU} ratio, no contexts {_CARD}": "mode ratio with `orders=(1,)`",
    f"{_GPU} ratio, no contexts, entropy gate {_CARD}": "the same with an entropy gate",
    f"{_GPU} ratio, no contexts, plausible tokens {_CARD}": "the same with plausible tokens alone",
}


def style() -> str:
    """Of a prior, on a CPU."""
    lmplz, trie = quoted("training against lmplz"), quoted("bytes per n-gram of KenLM's trie")
    rest = [
        ["training end to end (ids as text to a saved model) against `lmplz` (in 0.1)", lmplz["shown"], "< 1×"],
        ["bytes per n-gram of KenLM's `trie -q 8 -b 8`, order 3, for comparison (in 0.1)", trie["shown"], ""],
    ]
    return table([HEADS, *bench_table("bench_style.json", STYLE), *rest])


def style_gpu() -> str:
    """Of a prior, on a GPU."""
    return table([["a step", "measured", "target"], *bench_table("bench_style_gpu.json", GPU)])


def vllm() -> str:
    """Of styles in vLLM."""
    return table([HEADS, *bench_table("bench_vllm.json", _as_they_are("bench_vllm.json"))])


def temperature() -> str:
    """Of choosing temperatures."""
    return table([HEADS, *bench_table("bench_temperature.json", _as_they_are("bench_temperature.json"))])


def training() -> str:
    """Of training on disk."""
    return table([HEADS, *bench_table("bench_training.json", _as_they_are("bench_training.json"))])


def trained(name: str) -> str:
    """What was trained on: "tokens", in millions; "text_bytes", in GB."""
    amount = read("bench_training.json")[name]
    return f"{amount / 1e9:.2f} GB" if name == "text_bytes" else f"{amount / 1e6:.0f} million"


def on_paper(what: str) -> str:
    """Of training on 100 GB of text by 32 workers, from what the steps of one worker took: see `_on_paper`."""
    found = _on_paper(100e9, 32)[what]
    return f"{found:.1f}" if what in ("micros", "rest_micros", "write_micros") else f"{found:.2g}"


def _on_paper(text_bytes: float, workers: int) -> dict[str, float]:
    """Counting goes by tokens, the other steps by n-grams, whose number grows as it did between two sizes."""
    data = read("bench_training.json")
    steps, tokens, ngrams = data["seconds_of_steps"]["1"], data["tokens"], data["ngrams"]
    smaller = quoted("n-grams of fewer drawn tokens")
    growth = np.log(ngrams / smaller["ngrams"]) / np.log(tokens / smaller["tokens"])
    all_tokens = text_bytes / data["text_bytes"] * tokens
    all_ngrams = ngrams * (all_tokens / tokens) ** growth
    rest = sum(steps[name] for name in ("adjust", "context", "interpolate", "assemble"))
    return {
        "micros": 1e6 * steps["count"] / tokens,
        "rest_micros": 1e6 * rest / ngrams,
        "write_micros": 1e6 * steps["write"] / ngrams,
        "growth": growth,
        "tokens": all_tokens / 1e9,
        "ngrams": all_ngrams / 1e9,
        "count_minutes": steps["count"] / tokens * all_tokens / workers / 60,
        "rest_minutes": rest / ngrams * all_ngrams / workers / 60,
        "write_minutes": steps["write"] / ngrams * all_ngrams / 60,
    }


def pruning() -> str:
    """Perplexity against size."""
    lines = [["text", "", "n-grams", "file", "perplexity of held-out text"]]
    for each in read("bench_pruning.json")["models"]:
        size = [f"{each['ngrams']:,}", f"{each['bytes'] / 1e6:.1f} MB"]
        lines.append([each["corpus"], each["what"], *size, f"{each['perplexity']:.1f}"])
    return table(lines)


def _as_they_are(file: str) -> dict[str, str]:
    return {each["what"]: each["what"] for each in read(file)["figures"]}


def share_of_a_step() -> str:
    """That a style takes, in per cent."""
    return _first("bench_style.json", "share of a decode step, smollm2-135m-instruct in bfloat16, batch 8", 2)


def share_of_writing() -> str:
    """That choosing a temperature takes of writing 64 tokens."""
    return _first("bench_temperature.json", "choosing for a prompt of 128 tokens, against writing 64", 2)


def throughput() -> str:
    """Of vLLM with a style on every request, against none."""
    return _first("bench_vllm.json", "throughput with a style on every request, against none", 1)


def _first(file: str, what: str, words: int) -> str:
    """A figure as it is shown, without its bracket."""
    return " ".join(figure(file, what)["shown"].split()[:words])
