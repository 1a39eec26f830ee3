"""The third step: what the tokens behind a context share, and what is left for those that were not seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ngram.distributed.packing import Packing, begins
from ngram.distributed.runs import Records, RunWriter, Sorter, merged, record, records_of, runs_in
from ngram.distributed.settings import ADJUST, DISCOUNT, Place, load
from ngram.smoothing import Formula, cut, formula_of


def context_dtype(place: Place, length: int) -> np.dtype:
    """Of contexts of a length: how many tokens were seen behind each, and log γ."""
    return record(place.packing(length), count=np.int64, backoff=np.float32)


def mass_dtype(place: Place, length: int) -> np.dtype:
    """Of n-grams of a length: mass(h w), and γ(h)."""
    return record(place.packing(length), mass=np.float64, gamma=np.float64)


def formulas(place: Place) -> list[Formula]:
    """Of the orders 2 … n."""
    settings, weights = place.settings, place.weights
    counts = load(place.folder(DISCOUNT) / f"{DISCOUNT}.safetensors")["counts"]
    return [formula_of(settings.smoothing, counts[k - 1].tolist(), weights[:k]) for k in range(2, settings.order + 1)]


def share(place: Place, part: int, folder: Path) -> None:
    """Writes contexts in their order, and n-grams with their terms, sorted from their last tokens on.

    Args:
        place: what is told.
        part: whose first tokens.
        folder: to write to.
    """
    for length, formula in enumerate(formulas(place), start=2):
        packing = place.packing(length)
        dtype, of_contexts = mass_dtype(place, length), context_dtype(place, length - 1)
        rows = place.rows(dtype, 2)
        sorter = Sorter(folder / str(length), dtype, rows)
        writer = RunWriter(folder / f"contexts{length - 1}.run", of_contexts)
        counted = runs_in(place.folders(ADJUST, str(length)), place.adjusted(length))
        ngrams = merged(counted, packing, place.ranges[part], rows)
        for some in _whole_contexts(ngrams, packing):
            contexts = packing.prefix(some["key"], length - 1)
            new = begins(contexts)
            parents = np.cumsum(new) - 1
            mass, gamma = formula(parents, some["count"], int(parents[-1]) + 1)
            kept = some["kept"]
            if place.settings.cutoffs[length - 1]:
                mass, gamma = cut(mass, gamma, parents, kept)
            seen = np.bincount(parents, weights=kept).astype(np.int64)
            known = records_of(of_contexts, contexts[new], count=seen, backoff=np.log(gamma))
            writer.add(known[seen > 0])
            terms = records_of(dtype, packing.reversed(some["key"]), mass=mass, gamma=gamma[parents])
            sorter.add(terms[kept])
        writer.close()
        sorter.flush()


def _whole_contexts(ngrams: Iterator[Records], packing: Packing) -> Iterator[Records]:
    """So that all n-grams of a context come together: there are no more than tokens."""
    held: Records | None = None
    for some in ngrams:
        if held is not None:
            some = np.concatenate((held, some))
        last = int(np.flatnonzero(begins(packing.prefix(some["key"], packing.length - 1)))[-1])
        held = some[last:]
        if last:
            yield some[:last]
    if held is not None:
        yield held
