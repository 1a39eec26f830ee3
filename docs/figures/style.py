"""Style priors: the paper's experiment (style_paper), and the comparison with other ways (style_control)."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from experiments.lab.tables import number
from figures.data import Row, change, figure, quoted, read, row, span, table

PAPER, COMPARED = "style_paper/results.json", "style_control/results.json"
STYLES = tuple(read(COMPARED)["settings"]["styles"])
SHOWN = (
    ("unsteered", "unsteered", 0.0),
    ("paper, λ=0.3", "paper", 0.3),
    ("paper, λ=0.5", "paper", 0.5),
    ("paper, λ=1", "paper", 1.0),
    ("**ratio, λ=0.6**", "ratio", 0.6),
    ("**ratio, λ=1**", "ratio", 1.0),
    ("zero-shot prompt", "zero-shot prompt", 0.0),
    ("three passages in the prompt", "three passages", 0.0),
    ("three passages + ratio, λ=0.5", "three passages + ratio", 0.5),
    ("LoRA, rank 8, 300 steps", "LoRA", 0.0),
    ("LoRA + ratio, λ=0.5", "LoRA + ratio", 0.5),
    ("half LoRA (scaled by ½)", "half LoRA", 0.0),
    ("**half LoRA + ratio, λ=0.5**", "half LoRA + ratio", 0.5),
    ("half LoRA + ratio, λ=1", "half LoRA + ratio", 1.0),
)


def paper() -> str:
    """The paper's sweep: style perplexity, base perplexity and distinct-2 of each corpus at each λ."""
    rows = read(PAPER)["rows"]
    styles = list(dict.fromkeys(each["style"] for each in rows))
    heads = [(f"{style}: style ppl", "base ppl", "distinct-2") for style in styles]
    strengths = dict.fromkeys(each["lambda"] for each in rows)
    lines = [[f"{λ:g}", *chain.from_iterable(_measures(style, λ) for style in styles)] for λ in strengths]
    return table([["λ", *chain.from_iterable(heads)], *lines])


def _measures(style: str, λ: float) -> list[str]:
    """Each with the entropy-matched one in brackets; at λ=0 they are the same."""
    steered = _paper_row(style, λ, "steered")
    matched = _paper_row(style, λ, "entropy-matched") if λ else None
    writers = {"style_ppl": _perplexity, "base_ppl": number, "distinct_2": "{:.2f}".format}
    return [
        write(steered[key]) + ("" if matched is None else f" ({write(matched[key])})") for key, write in writers.items()
    ]


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else number(value)


def _paper_row(style: str, λ: float, kind: str) -> Row:
    return row(read(PAPER)["rows"], style=style, kind=kind, **{"lambda": λ})


def beside_the_paper() -> str:
    """What Don Quixote at λ=0.1 does to both perplexities, there and here."""
    theirs = quoted("style paper, Don Quixote at λ=0.1")
    plain, steered, matched = (
        _paper_row("don-quixote", *which) for which in ((0.0, "steered"), (0.1, "steered"), (0.1, "entropy-matched"))
    )
    lines = [["Don Quixote, λ=0.1", "style perplexity", "base perplexity"]]
    lines.append(["the paper, TinyLlama-1.1B", theirs["style perplexity"], theirs["base perplexity"]])
    for label, now in (
        ("here, SmolLM2-135M-Instruct", steered),
        (f"here, no steering, T={matched['temperature']:g} (the same entropy)", matched),
    ):
        lines.append([label, *(change(now[key], plain[key]) for key in ("style_ppl", "base_ppl"))])
    return table(lines)


def compared() -> str:
    """The judge's probability and the fluency of each method on each corpus."""
    lines = [["", *STYLES]]
    for label, method, λ in SHOWN:
        lines.append([label, *(f"{judge(style, method, λ)} at {fluency(style, method, λ)}" for style in STYLES)])
    return table(lines)


def _row(style: str, method: str, λ: float | str) -> Row:
    return row(read(COMPARED)["rows"], style=style, method=method, temperature=1.0, **{"lambda": float(λ)})


def judge(style: str, method: str, λ: float) -> str:
    """The probability that the judge gives to a method's texts."""
    return f"{_row(style, method, λ)['judge']:.2f}"


def fluency(style: str, method: str, λ: float) -> str:
    """Base perplexity as a multiple of the unsteered model's at the same entropy."""
    return f"{_row(style, method, λ)['fluency']:.2f}×"


def perplexity(style: str, method: str, λ: str) -> str:
    """Base perplexity as a multiple of the unsteered model's, whatever the entropy."""
    return f"{_row(style, method, λ)['ppl_ratio']:.2f}×"


def distinct(style: str, method: str, λ: str) -> str:
    """Distinct-2 as a multiple of the unsteered model's."""
    return f"{_row(style, method, λ)['distinct_ratio']:.2f}×"


def accuracies() -> str:
    """Of the judges of all corpora, balanced, in per cent."""
    *first, last = (f"{100 * each['accuracy']:.1f}" for each in read(COMPARED)["judges"].values())
    return f"{', '.join(first)} and {last} %"


def targets() -> str:
    """What was aimed at, and whether it was reached."""
    ratio = read(COMPARED)["limits"]["ratio"]
    by_perplexity = sorted(ratio, key=lambda each: -each["ppl_ratio"])
    worst, next_worst = by_perplexity[:2]
    step = figure("bench_style.json", "a step in mode ratio, against mode paper, batch 8")
    alone = figure("bench_style.json", "a step in mode ratio, no contexts, against mode paper, batch 8")
    copies = sum(each["copies_more"] for each in ratio)
    lines = [
        ["", "measured", "target"],
        [
            "ratio, every corpus and λ ∈ {0.2, 0.4, 0.6, 0.8, 1}: base perplexity against unsteered",
            f"at most {worst['ppl_ratio']:.2f}× ({worst['style']}; the others at most {next_worst['ppl_ratio']:.2f}×)",
            "≤ 1.25×",
        ],
        [
            "the same: distinct-2 against unsteered",
            f"at least {min(each['distinct_ratio'] for each in ratio):.2f}×",
            "≥ 0.9×",
        ],
        [
            "the same: texts with a run of more than 12 tokens from the corpus",
            f"more often than unsteered on {copies} of {len(ratio)}",
            "not more often",
        ],
        ["ratio dominates the paper's mode", _dominates("ratio", "paper"), "every corpus"],
        ["ratio dominates zero-shot prompting", _dominates("ratio", "zero-shot prompt"), "3 of 5"],
        ["ratio dominates three passages in the prompt", _dominates("ratio", "three passages"), "3 of 5"],
        ["ratio dominates LoRA", _dominates("ratio", "LoRA"), ""],
        ["three passages + ratio dominates three passages", _dominates("three passages + ratio", "three passages"), ""],
        ["half LoRA + ratio dominates LoRA", _dominates("half LoRA + ratio", "LoRA"), "every corpus"],
        ["half LoRA + ratio dominates half LoRA", _dominates("half LoRA + ratio", "half LoRA"), ""],
        ["LoRA + ratio dominates LoRA", _dominates("LoRA + ratio", "LoRA"), "every corpus"],
        ["a step in mode ratio, against mode paper (`decoding bench style`)", step["shown"], step["target"]],
        ["the same with order 1 alone", alone["shown"], ""],
    ]
    return table(lines)


def _dominates(better: str, worse: str) -> str:
    """On how many corpora, and which λ of the other are not dominated on how many of the rest."""
    verdicts = [each for each in read(COMPARED)["verdicts"] if (each["better"], each["worse"]) == (better, worse)]
    wins = sum(each["dominates"] for each in verdicts)
    left = Counter(λ for each in verdicts for λ in each["but_for"] if λ)
    but_for = ", ".join(f"λ={λ:g} on {count}" for λ, count in sorted(left.items()))
    return f"{wins} of {len(verdicts)}" + (f"; elsewhere but for {but_for}" if but_for else "")


def typical(method: str, λ: float) -> str:
    """The judge's probability, mean of the corpora."""
    return f"{sum(_row(style, method, λ)['judge'] for style in STYLES) / len(STYLES):.2f}"


def fluencies(method: str, λ: float) -> str:
    """From the most fluent corpus to the least."""
    return span(_row(style, method, λ)["fluency"] for style in STYLES) + "×"


def paper_distinct() -> str:
    """Distinct-2 of the paper's mode at its worst λ, as multiples of the unsteered model's."""
    return span(each["distinct_ratio"] for each in read(COMPARED)["limits"]["paper"]) + "×"


def guard(what: str) -> str:
    """A step in mode ratio with a guard, as a multiple of one in the paper's mode."""
    return f"{figure('bench_style.json', f'a step in mode ratio, {what}, against mode paper, batch 8')['value']:.1f}"
