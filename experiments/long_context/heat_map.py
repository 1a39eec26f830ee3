"""``decoding chunk picture``: which places of a long context are read while an answer is written."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.ticker import MaxNLocator

from chunkllm import ChunkAdapters, ChunkCalibration, ChunkSelection, Reading
from decoding.errors import DecodingError
from decoding.tokens import pad_id, token_texts
from experiments.lab.pictures import literal, plt, save

_BINS = 500  # columns at most
_AROUND = 40  # tokens beside what is shown from nearby
_MARK = "#0072b2"
_MOST_LABELS, _LABEL = 24, 40  # lines with their text, of so many characters


@dataclass(frozen=True)
class PictureOptions:
    """What a user chooses.

    Attributes:
        context: tokens of the text.
        budget: tokens that are read of it.
        tokens: to write; the end of the text is ruled out.
        fact: a sentence that is put into the text.
        depth: where, as a share of the text.
        question: what stands behind the text.
    """

    context: int
    budget: int
    tokens: int
    fact: str
    depth: float
    question: str


def picture(
    model: Any,
    tokenizer: Any,
    adapters: ChunkAdapters | ChunkCalibration | None,
    text: np.ndarray,
    options: PictureOptions,
    path: Path,
) -> str:
    """Hides a fact in a text, asks for it behind the text, and draws what is read for the answer, which is returned.

    Args:
        model, tokenizer: that answer.
        adapters: the model's, or its calibration, or None for the selection without.
        text: int64 token ids.
        options: what to hide, ask and read.
        path: of the PNG file.

    Raises:
        DecodingError: the text or the model's positions do not reach, or nothing would have to be left out.
    """
    ids, spans = _prompt(tokenizer, text, options)
    longest = model.config.get_text_config(decoder=True).max_position_embeddings
    if len(ids) + options.tokens > longest:
        raise DecodingError(f"the model has {longest} positions: choose a shorter --context or fewer --tokens")
    if len(ids) <= options.budget:
        raise DecodingError(f"a budget of {options.budget} tokens holds all {len(ids)}: choose a smaller --budget")
    prompt = torch.tensor([ids], device=model.device)
    with ChunkSelection(adapters, budget=options.budget).attach(model, tokenizer, record=True) as chunks:
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.tokens,
            do_sample=False,
            min_new_tokens=options.tokens,
            pad_token_id=pad_id(tokenizer),
        )[0].tolist()
    figure = heat_map(chunks.readings, tokenizer, found, len(ids), spans)
    figure.suptitle(_title(chunks.stats, options), fontsize=10)
    save(figure, path)
    return tokenizer.decode(found[len(ids) :], skip_special_tokens=True)


def _prompt(tokenizer: Any, text: np.ndarray, options: PictureOptions) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Token ids, and where fact and question stand in them."""
    if len(text) < options.context:
        raise DecodingError(f"the text has {len(text)} tokens, not {options.context}: choose a shorter --context")
    if not 0 <= options.depth <= 1:
        raise DecodingError(f"--depth must lie in [0, 1], not {options.depth:g}")
    fact, question = (
        tokenizer(f"\n\n{part}", add_special_tokens=False)["input_ids"] for part in (options.fact, options.question)
    )
    at = round(options.depth * options.context)
    ids = [*text[:at].tolist(), *fact, *text[at : options.context].tolist(), *question]
    return ids, {"the fact": (at, at + len(fact)), "the question": (len(ids) - len(question), len(ids))}


def _title(stats: Mapping[str, Any], options: PictureOptions) -> str:
    share = f"{100 * stats['kv_retention']:.0f} %"
    return f"What is read while an answer is written: {share} of the tokens, a budget of {options.budget:,}"


def heat_map(
    readings: Sequence[Reading],
    tokenizer: Any,
    ids: Sequence[int],
    prompt: int,
    spans: Mapping[str, tuple[int, int]],
) -> Any:
    """A matplotlib figure: places of the context across, what is written down the side, the share of layers in colour.

    Args:
        readings: of one row, from `Attachment.readings`; at least one.
        tokenizer: of ``ids``.
        ids: all tokens, T.
        prompt: how many of them were read at once, before anything was written.
        spans: parts of the context to mark, by name: first place, and the one behind the last. The first of them is
            shown from nearby too.
    """
    end = len(ids)
    figure, (whole, near) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=(4, 1), sharey=True, layout="constrained"
    )
    steps = np.array([*(reading.length for reading in readings), end]) - prompt
    shares = _shares(readings, end)
    columns = np.unique(np.linspace(0, end, min(_BINS, end) + 1).round().astype(int))
    name, (first, stop) = next(iter(spans.items()))
    _paint(whole, shares, columns, steps)
    image = _paint(near, shares, np.arange(max(first - _AROUND, 0), min(stop + _AROUND, end) + 1), steps)
    for each, (begin, behind) in spans.items():
        whole.plot((begin + behind) / 2, 0, "v", color=_MARK, ms=7, clip_on=False)
        look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": _MARK}
        whole.annotate(each, ((begin + behind) / 2, 0), (0, 6), **look)
    for edge in (first, stop):
        near.axvline(edge, color="w", lw=1, ls=":")
    near.set_xlabel(f"{name}, from nearby", color=_MARK)
    whole.set(ylim=(end - prompt, 0), xlabel="place in the context, tokens", ylabel="tokens written")
    _label_lines(near, token_texts(list(ids[prompt:]), tokenizer.decode), steps)
    figure.colorbar(image, ax=near, label="layers that read it", format=lambda x, _: f"{100 * x:.0f} %", pad=0.02)
    return figure


def _shares(readings: Sequence[Reading], end: int) -> np.ndarray:
    """Share of the layers that read a place, float [readings, end]; NaN where nothing is yet."""
    stops = [*(reading.length for reading in readings[1:]), end]
    rows = np.full((len(readings), end), np.nan)
    for row, reading, stop in zip(rows, readings, stops, strict=True):
        row[: reading.length] = reading.kept.mean(0)
        row[reading.length : stop] = 1  # what is written is read
    return rows


def _paint(axis: Any, shares: np.ndarray, columns: np.ndarray, steps: np.ndarray) -> Any:
    """Means over columns, given by their edges."""
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_major_locator(MaxNLocator(7 if columns[0] == 0 else 2))
    means = _means(shares, columns)
    return axis.pcolormesh(columns, steps, means, cmap="magma", norm=PowerNorm(0.5, 0, 1), rasterized=True)


def _means(shares: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of what there is between the edges of each column, float [readings, columns]; NaN where nothing is."""
    part = shares[:, columns[0] : columns[-1]]
    starts = columns[:-1] - columns[0]
    total = np.add.reduceat(np.nan_to_num(part), starts, axis=1)
    known = np.add.reduceat(~np.isnan(part), starts, axis=1, dtype=float)
    return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)


def _label_lines(axis: Any, written: Sequence[str], steps: np.ndarray) -> None:
    """The text that is written under each selection, at the right of its line.

    A step reads a token and writes the one behind it.
    """
    if len(steps) > _MOST_LABELS + 1:
        return
    beside = axis.secondary_yaxis("right")
    lines = [" ".join("".join(written[a + 1 : b + 1]).split()) for a, b in zip(steps, steps[1:], strict=False)]
    most = 1 if len(lines) > _MOST_LABELS // 2 else 3
    shown = [literal(textwrap.fill(line, _LABEL, max_lines=most, placeholder=" …")) for line in lines]
    beside.set_yticks((steps[:-1] + steps[1:]) / 2, shown, fontsize=7)
    beside.tick_params(length=0)
