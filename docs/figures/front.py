"""One table for the first pages: what each method gives, on which models that was measured, and when it hurts."""

from __future__ import annotations

from figures import cost, data, gpu, long_context, lossless, style, temperature, vllm

MODEL, OTHER = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
SMALL = MODEL.lower()


def table(docs: str = "") -> str:
    """A line for each method.

    Args:
        docs: where the pages of docs lie from the page that the table stands on, such as ``"docs/"``.
    """
    lines = {
        f"[Style]({docs}style_measured.md)": _style(),
        f"[Temperature]({docs}temperature_measured.md)": _temperature(),
        f"[Long contexts]({docs}long_context_measured.md)": _long(),
        f"[In vLLM]({docs}vllm_measured.md)": _vllm(),
        f"[On a GPU]({docs}gpu.md)": gpu.front(),
    }
    heads = ["", "gives", "measured on", "costs", "hurts when"]
    return data.table([heads, *([label, *cells] for label, cells in lines.items())])


def _style() -> list[str]:
    before, after = style.typical("unsteered", 0.0), style.typical("ratio", 0.6)
    return [
        f"style by a judge of its own: {after}, unsteered {before} (mode ratio, λ=0.6)",
        f"{MODEL}, {len(style.STYLES)} corpora",
        f"{cost.share_of_a_step()} of a step; perplexity {style.fluencies('ratio', 0.6)} at equal diversity",
        f"λ is high: perplexity {style.fluencies('ratio', 1.0)} at λ=1; mode paper repeats itself there",
    ]


def _temperature() -> list[str]:
    small, other = (temperature.gain_of(model, "selector, curve") for model in (SMALL, OTHER))
    return [
        f"{temperature.gain('selector, curve')} points over the best fixed temperature, "
        "once the model's scores are collected",
        f"{MODEL}: {small}; {OTHER}: {other}",
        f"{cost.share_of_writing()} of the time to write 64 tokens",
        f"the scores are not the model's: {temperature.gain('selector, ability (small)')} with the paper's, "
        f"{temperature.gain_of(SMALL, f'selector, curve of {OTHER}')} with another model's",
    ]


def _long() -> list[str]:
    short, long = (long_context.faster("best dense", n).split()[0] for n in (8192, 120_000))
    half, quarter = (long_context.more_perplexity(long_context.BEST, kept) for kept in (0.5, 0.25))
    return [
        f"tokens come {short} as fast behind 8,192 tokens and {long} behind 120,000, against the best dense attention; "
        f"lossless, with the model's own text, {lossless.faster(32_768)} behind 32,768",
        f"quality: {MODEL}; speed: its shape with random weights, on a CPU",
        f"perplexity: {half} more with half of the keys and values, {quarter} with a quarter",
        "texts are short: then nothing is dropped, and nothing gained",
    ]


def _vllm() -> list[str]:
    return [
        "each request chooses all three for itself; four requests behind 32,768 tokens write "
        f"{vllm.faster(4, 32_768).split()[0]} as fast",
        f"{MODEL}, on a CPU",
        f"throughput {cost.throughput()} with a style on every request",
        f"a lone request gains little from chunks behind 4,096 tokens: {vllm.faster(1, 4096).split()[0]}",
    ]
