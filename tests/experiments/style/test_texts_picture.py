import warnings

import matplotlib.image
import pytest

from experiments.style import texts_picture
from experiments.style.texts_picture import _BREAK, _words, draw, evenly


@pytest.mark.parametrize(
    "names, shown",
    [
        (["0"], ["0"]),
        (["0", "0.5", "1"], ["0", "0.5", "1"]),
        ([f"{i / 10:g}" for i in range(11)], ["0", "0.2", "0.5", "0.7", "1"]),
    ],
)
def test_the_first_and_the_last_are_shown(names, shown):
    assert evenly(names) == shown


def test_words_keep_the_parts_that_tokens_have_in_them():
    pieces = [(" un", 1.0), ("fathom", -2.0), ("able. And", 0.5), ("\n\n", 3.0), ("", 0.0), ("he", 0.25)]
    assert list(_words(pieces)) == [
        [("un", 1.0), ("fathom", -2.0), ("able.", 0.5)],
        [("And", 0.5)],
        _BREAK,
        [("he", 0.25)],
    ]


def test_all_of_a_text_stands_within_its_column(monkeypatch, tmp_path):
    """Words longer than a line, mathematics that is none, and characters that no font has, without a warning."""
    marks, written = [], []
    mark, write = texts_picture._Pen._mark, texts_picture._Pen._write
    monkeypatch.setattr(texts_picture._Pen, "_mark", lambda *a: marks.append(a[1:]) or mark(*a))
    monkeypatch.setattr(texts_picture._Pen, "_write", lambda *a, **o: written.append(a[3]) or write(*a, **o))
    pieces = [(" word", 0.0), (" wo", 1.0), ("rd", -1.0), (" $\\frac$", 3.0), (" 日本", 9.0), ("x" * 30, -9.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw({"mine": {"0": pieces, "1": pieces}}, "The captain said " * 9, "how")
    assert "".join(written).count("".join(text for piece, _ in pieces for text in piece.split())) == 2
    middle = texts_picture._WIDTH / 2
    for x, _, width, _ in marks[:-4]:  # the last are the key's
        assert x + width < middle or x > middle
        assert x + width < texts_picture._WIDTH - texts_picture._MARGIN + 2
    path = tmp_path / "texts.png"
    path.write_bytes(picture)
    assert matplotlib.image.imread(path).shape[1] == 2000
