"""The fourth step: probabilities, order by order, of the n-grams that end with some tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ngram.distributed.contexts import mass_dtype
from ngram.distributed.packing import begins, places_of
from ngram.distributed.runs import Passing, Run, RunWriter, Sorter, merged, record, records_of, runs_in
from ngram.distributed.settings import CONTEXT, DISCOUNT, Place, load
from ngram.smoothing import unigram_of


def unigram(place: Place) -> np.ndarray:
    """p_1 of every id, float64 [V]."""
    settings = place.settings
    return unigram_of(
        load(place.folder(DISCOUNT) / f"{DISCOUNT}.safetensors")["unigrams"],
        settings.smoothing,
        place.weights,
        bos_id=settings.bos_id,
        pad_vocab=settings.pad_vocab,
        delta=settings.delta,
    )


def delta_dtype(place: Place, length: int) -> np.dtype:
    """Of n-grams of a length: log p_k − (log γ + log p_{k−1})."""
    return record(place.packing(length), delta=np.float32)


def interpolate(place: Place, part: int, folder: Path) -> None:
    """Writes the deltas of n-grams, sorted from their first tokens on.

    Args:
        place: what is told.
        part: whose last tokens.
        folder: to write to.
    """
    single = unigram(place)
    below: Path | None = None
    for length in range(2, place.settings.order + 1):
        packing, dtype = place.packing(length), mass_dtype(place, length)
        rows = place.rows(dtype, 3)
        known = _probability(place, length)
        lower = None if below is None else Passing(Run(below, _probability(place, length - 1)), rows)
        sorter = Sorter(folder / str(length), delta_dtype(place, length), rows)
        below = folder / f"probability{length}.run"
        writer = RunWriter(below, known)
        for some in merged(runs_in(place.folders(CONTEXT, str(length)), dtype), packing, place.ranges[part], rows):
            keys = some["key"]
            if lower is None:
                shorter = single[packing.column(keys, 0) - 1]
            else:
                shorter = _looked_up(lower, packing.prefix(keys, length - 1))
            rest = some["gamma"] * shorter
            probability = some["mass"] + rest
            writer.add(records_of(known, keys, probability=probability))
            deltas = np.log(probability / rest)
            sorter.add(records_of(delta_dtype(place, length), packing.reversed(keys), delta=deltas))
        writer.close()
        sorter.flush()
    for path in folder.glob("probability*"):  # only the next order reads it
        path.unlink()


def _probability(place: Place, length: int) -> np.dtype:
    return record(place.packing(length), probability=np.float64)


def _looked_up(lower: Passing, keys: np.ndarray) -> np.ndarray:
    """p of the n-grams without their first token, float64 [N]; ``keys`` are sorted."""
    new = begins(keys)
    wanted = keys[new]
    held = lower.between(wanted[0], wanted[-1])  # it is there: what ends an n-gram is one
    return held["probability"][places_of(wanted, held["key"])][np.cumsum(new) - 1]
