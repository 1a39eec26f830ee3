"""``decoding bench pruning``: perplexity against size, of models that are pruned by counts and by entropy."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from decoding.models import load_tokenizer
from decoding.style.source import Corpus
from decoding.style.training import options_of
from decoding.tokens import tokenize
from experiments.lab.figures import Figure, report
from ngram import NGramModel

_HELD_OUT = 10  # each so-manieth piece of text
_PIECE = 512  # tokens
CUT_OFFS = ((0, 0, 1), (0, 1, 1), (0, 1, 2), (0, 2, 4))
SHARES = (0.5, 0.2, 0.05)


class _Judged(NamedTuple):
    what: str
    model: NGramModel


def main(corpora: Sequence[Corpus], model: str, out: Path | None) -> None:
    """Measures, prints the table, and writes it as JSON if asked.

    Args:
        corpora: texts, of which nine pieces of ten are learnt from, and the tenth judges.
        model: whose tokenizer.
        out: file for the figures.
    """
    tokenizer = load_tokenizer(model)
    figures, about = [], []
    for corpus in corpora:
        ids = np.concatenate(tokenize(corpus.documents, tokenizer))
        pieces = np.split(ids, range(_PIECE, len(ids), _PIECE))
        learnt = [piece for number, piece in enumerate(pieces) if number % _HELD_OUT]
        held = pieces[::_HELD_OUT]
        for judged in _models(learnt, options_of(corpus.name, tokenizer)):
            perplexity = judged.model.perplexity(held)
            size = _bytes(judged.model)
            figures.append(Figure(f"{corpus.name}, {judged.what}", perplexity, f"{perplexity:.1f}"))
            row = {"corpus": corpus.name, "what": judged.what, "ngrams": len(judged.model), "bytes": size}
            about.append({**row, "perplexity": perplexity})
    report(figures, "perplexity of held-out text", {"order": 3, "models": about}, out)


def _models(learnt: Sequence[np.ndarray], options: dict[str, Any]) -> list[_Judged]:
    whole = NGramModel.train(learnt, order=3, **options)
    histories = NGramModel.train(learnt, order=2, smoothing="witten-bell", **options)
    judged = [_Judged("all n-grams", whole)]
    for prune in CUT_OFFS:
        smaller = NGramModel.train(learnt, order=3, prune=prune, **options)
        count = smaller.tables.words.numel()
        judged += [
            _Judged(f"cut off at {', '.join(map(str, prune))}", smaller),
            _Judged("by entropy, as many n-grams", whole.pruned(count)),
            _Judged("by entropy, histories by Witten-Bell, as many n-grams", whole.pruned(count, histories)),
        ]
    total = whole.tables.words.numel()
    for share in SHARES:
        what = f"by entropy, histories by Witten-Bell, {share:.0%} of them"
        judged.append(_Judged(what, whole.pruned(round(share * total), histories)))
    return judged


def _bytes(model: NGramModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "m.safetensors")
        return (Path(folder) / "m.safetensors").stat().st_size
