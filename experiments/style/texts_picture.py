"""Texts at several λ side by side, each token coloured by how far the prior moved it: a picture to show to others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from matplotlib.textpath import text_to_path

from experiments.lab.pictures import plt, png

MOST = 5  # texts beside each other
_WIDTH, _MARGIN, _GAP = 720.0, 16.0, 14.0  # points, as all lengths here
_LINE, _SIZE = 14.5, 9.2
_SERIF, _SANS = "DejaVu Serif", "DejaVu Sans"
_INK, _PALE, _RULE = "#1f2328", "#6a737d", "#d8dee4"
_UP, _DOWN = (67 / 255, 147 / 255, 195 / 255), (214 / 255, 96 / 255, 77 / 255)
_STRONGEST, _FULL = 0.7, 3.0  # opacity, at so many nats

Piece = tuple[str, float]
"""What a token adds to a text, and the shift of its log-probability in nats."""


def draw(texts: Mapping[str, Mapping[str, Sequence[Piece]]], prompt: str, about: str) -> bytes:
    """A PNG file, 2000 pixels wide and legible at half of that, on a ground of its own.

    Characters that matplotlib's own fonts lack, such as Chinese ones, are boxes.

    Args:
        texts: of one prompt by style and λ, with λ ascending. Of more than `MOST` λ as many are taken, evenly.
        prompt: what the texts go on from.
        about: how they were written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # one for each character
        return _drawn(texts, prompt, about)


def _drawn(texts: Mapping[str, Mapping[str, Sequence[Piece]]], prompt: str, about: str) -> bytes:
    figure = plt.figure()
    axis = figure.add_axes((0, 0, 1, 1))
    pen = _Pen(axis)
    pen.heading(prompt, about)
    for style, by_lambda in texts.items():
        pen.row(style if len(texts) > 1 else None, {name: by_lambda[name] for name in evenly(list(by_lambda))})
    pen.key()
    axis.set(xlim=(0, _WIDTH), ylim=(pen.y, 0))
    axis.axis("off")
    figure.set_size_inches(_WIDTH / 72, pen.y / 72)
    return png(figure, dpi=200)


def evenly(names: Sequence[str]) -> list[str]:
    """At most `MOST` of them, the first and the last included."""
    places = np.linspace(0, len(names) - 1, min(MOST, len(names)))
    return [names[int(place)] for place in places]


class _Pen:
    """Writes down a page; ``y`` is how far it has come, from the top."""

    def __init__(self, axis: Any):
        self.axis = axis
        self.y = _MARGIN

    def heading(self, prompt: str, about: str) -> None:
        self._write(_MARGIN, self.y + 14, f"“{prompt[:70]} …”", 14, family=_SERIF)
        self._write(_MARGIN, self.y + 30, about, 8, color=_PALE)
        self.y += 42

    def row(self, title: str | None, texts: Mapping[str, Sequence[Piece]]) -> None:
        if title is not None:
            self._write(_MARGIN, self.y + 10, title, 10, weight="bold")
            self.y += 18
        step = (_WIDTH - 2 * _MARGIN + _GAP) / len(texts)
        ends = []
        for i, (lambda_, pieces) in enumerate(texts.items()):
            x = _MARGIN + i * step
            self.axis.plot((x, x + step - _GAP), (self.y, self.y), color=_RULE, lw=1)
            self._write(x, self.y + 15, f"λ = {lambda_}", 10.5, weight="bold")
            if lambda_ == "0":
                self._write(x + step - _GAP, self.y + 15, "the model alone", 7.5, color=_PALE, ha="right")
            ends.append(self._column(pieces, x, self.y + 34, step - _GAP))
        self.y = max(ends) + 12

    def _column(self, pieces: Sequence[Piece], left: float, y: float, width: float) -> float:
        """Breaks a text into lines; returns where it ends."""
        space = _width("a b") - _width("ab")
        x = left
        for word in _words(pieces):
            if word == _BREAK:
                x, y = left, y + (_LINE if x > left else 0)
                continue
            needed = sum(_width(text) for text, _ in word)
            if x > left and x + space + needed > left + width:
                x, y = left, y + _LINE
            x += space if x > left else 0
            for text, shift in word if needed <= width else _letters(word):
                across = _width(text)
                if x > left and x + across > left + width + 1:
                    x, y = left, y + _LINE
                self._mark(x, y, across, shift)
                self._write(x, y, text, _SIZE, family=_SERIF)
                x += across
        return y

    def _mark(self, x: float, y: float, width: float, shift: float) -> None:
        color, strength = (_UP if shift > 0 else _DOWN), min(abs(shift) / _FULL, 1) * _STRONGEST
        style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=2", "fc": (*color, strength), "lw": 0}
        self.axis.add_patch(FancyBboxPatch((x - 0.6, y - 8.6), width + 1.2, 11.4, **style))

    def key(self) -> None:
        """What the colours mean."""
        y = self.y + 8
        said = "how far the prior moved the log-probability of the token that was drawn, nats:"
        self._write(_MARGIN, y, said, 8, color=_PALE)
        x = _MARGIN + _width(said, 8, _SANS) + 10
        for shift in (-3, -1.5, 1.5, 3):
            text = f"{shift:+g}".replace("-", "−")
            self._mark(x, y, 24, shift)
            self._write(x + 12, y, text, 8, ha="center")
            x += 30
        self.y = y + _MARGIN

    def _write(self, x: float, y: float, text: str, size: float, **look: Any) -> None:
        look = {"family": _SANS, "color": _INK} | look
        self.axis.text(x, y, text, fontsize=size, va="baseline", parse_math=False, **look)


_BREAK: list[Piece] = []


def _words(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """A text's words, each the parts that its tokens have in it; `_BREAK` where a line ends."""
    word: list[Piece] = []
    for piece, shift in pieces:
        for part in re.findall(r"\n+|[^\S\n]+|\S+", piece):
            if not part.isspace():
                word.append((part, shift))
                continue
            if word:
                yield word
            word = []
            if "\n" in part:
                yield _BREAK
    if word:
        yield word


def _letters(word: Sequence[Piece]) -> list[Piece]:
    """For words that are longer than a line."""
    return [(letter, shift) for text, shift in word for letter in text]


def _width(text: str, size: float = _SIZE, family: str = _SERIF) -> float:
    return text_to_path.get_text_width_height_descent(text, FontProperties(family=family, size=size), False)[0]
