"""The last steps: the n-grams that begin with some tokens as a model has them, and the model's file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from ngram.distributed.contexts import context_dtype
from ngram.distributed.interpolating import delta_dtype, unigram
from ngram.distributed.packing import places_of
from ngram.distributed.runs import Passing, Run, RunWriter, merged, runs_in
from ngram.distributed.settings import ASSEMBLE, CONTEXT, INTERPOLATE, PLAN, Place, load, save
from ngram.encoding import NEVER, RUN_BITS, SMALL_BIAS, SMALL_VOCAB
from ngram.layout import are_small, fits_int32
from ngram.storage import Stream, save_streams

_NODE = np.dtype([("count", "<i8"), ("backoff", "<f4")])
_NGRAM = np.dtype([("word", "<i4"), ("delta", "<f4")])
_AT_A_TIME = 1 << 18
_RUN = 1 << RUN_BITS


def assemble(place: Place, part: int, folder: Path) -> None:
    """Writes n-grams in a model's order, and what is seen behind each.

    Args:
        place: what is told.
        part: whose first tokens.
        folder: to write to.
    """
    highest = place.settings.order
    for length in range(1, highest + 1):
        packing = place.packing(length)
        nodes = RunWriter(folder / f"nodes{length}.run", _NODE)
        ngrams = RunWriter(folder / f"ngrams{length}.run", _NGRAM)
        contexts = None
        if length < highest:
            run = Run(place.folder(CONTEXT, part) / f"contexts{length}.run", context_dtype(place, length))
            contexts = Passing(run, place.rows(context_dtype(place, length), 2))
        for keys, deltas in _in_order(place, part, length):
            if contexts is not None:
                nodes.add(_nodes(contexts, keys))
            if deltas is not None:
                some = np.empty(len(keys), _NGRAM)
                some["word"], some["delta"] = packing.column(keys, length - 1) - 1, deltas
                ngrams.add(some)
        nodes.close()
        ngrams.close()
    _write_values(folder, highest)


def _in_order(place: Place, part: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Keys of n-grams and their deltas; of single tokens, all."""
    packing, tokens = place.packing(length), place.ranges[part]
    if length == 1:
        if len(tokens):
            yield packing.pack([np.array(tokens) + 1]), None
        return
    dtype = delta_dtype(place, length)
    for some in merged(runs_in(place.folders(INTERPOLATE, str(length)), dtype), packing, tokens, place.rows(dtype, 2)):
        yield some["key"], some["delta"]


def _nodes(contexts: Passing, keys: np.ndarray) -> np.ndarray:
    """What is known of n-grams as contexts: nothing is seen behind most."""
    nodes = np.zeros(len(keys), _NODE)
    known = contexts.between(keys[0], keys[-1])
    places = places_of(known["key"], keys)
    nodes["count"][places], nodes["backoff"][places] = known["count"], known["backoff"]
    return nodes


def _write_values(folder: Path, order: int) -> None:
    """The different back-offs, and of each length the most continuations and how many n-grams."""
    values, widest, lengths = np.zeros(1, np.float32), [], []
    for length in range(1, order + 1):
        nodes = Run(folder / f"nodes{length}.run", _NODE)
        most = 0
        for some in nodes.blocks(0, len(nodes), _AT_A_TIME):
            values = np.union1d(values, some["backoff"])
            most = max(most, int(some["count"].max()))
        widest.append(most)
        lengths.append(len(Run(folder / f"ngrams{length}.run", _NGRAM)))
    save(folder / "values.safetensors", backoffs=values, widest=np.array(widest), lengths=np.array(lengths))


def write(place: Place, path: Path, metadata: dict[str, str]) -> None:
    """Writes the model's file, some of it at a time.

    Raises:
        NGramError: a file that cannot be written.
    """
    settings, folders = place.settings, place.folders(ASSEMBLE)
    told = [load(folder / "values.safetensors") for folder in folders]
    values = np.unique(np.concatenate([each["backoffs"] for each in told]))
    lengths = np.sum([each["lengths"] for each in told], axis=0)
    lengths[0] = settings.vocab_size
    ngrams, nodes = int(lengths[1:].sum()), 2 + int(lengths[:-1].sum()) + len(lengths) - 1
    small_words = settings.vocab_size <= SMALL_VOCAB
    with np.errstate(divide="ignore"):
        single = np.maximum(np.log(unigram(place)), NEVER).astype(np.float32)
    tokens = load(place.folder(PLAN) / f"{PLAN}.safetensors")["tokens"]
    longest = max(int(distances.max()) for distances, _, _ in _spaced(place, values))
    small = are_small(longest, len(values) - 1)
    bias = SMALL_BIAS if small else 0
    streams = {
        "unigram": _whole(single),
        "seen": _whole(tokens > 0),
        "backoff_values": _whole(values),
        "nodes": Stream(np.dtype(np.int16 if small else np.int32), (nodes, 2), _nodes_of(place, values, bias)),
        "runs": Stream(
            np.dtype(np.int32 if fits_int32(ngrams) else np.int64),
            (-(-nodes // _RUN),),
            (runs + bias for _, _, runs in _spaced(place, values)),
        ),
        "words": Stream(
            np.dtype(np.int16 if small_words else np.int32), (ngrams,), _words(place, SMALL_BIAS if small_words else 0)
        ),
        "deltas": Stream(np.dtype(np.float32), (ngrams,), _of_ngrams(place, "delta")),
    }
    header = {
        "lengths": lengths[:-1].tolist(),
        "widest": np.max([each["widest"] for each in told], axis=0)[:-1].tolist(),
        "smoothing": settings.smoothing,
        "bos_id": settings.bos_id,
        "eos_id": settings.eos_id,
        "metadata": metadata,
    }
    save_streams(path, streams, header)


def _whole(array: np.ndarray) -> Stream:
    return Stream(array.dtype, array.shape, [array])


def _nodes_of(place: Place, values: np.ndarray, bias: int) -> Iterator[np.ndarray]:
    """The rows of `Tables.nodes`. The last one ends the others, and has no back-off."""
    held: np.ndarray | None = None
    for distances, codes, _ in _spaced(place, values):
        if held is not None:
            yield held
        held = np.stack((distances, codes), 1) - bias
    assert held is not None
    held[-1, 1] = 0
    yield held


def _spaced(place: Place, values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of whole runs of nodes: distances from their run's first continuation, codes of back-offs, and runs' positions.

    Args:
        place: what is told.
        values: the different back-offs.
    """
    at, held = 0, np.zeros(0, _NODE)
    for some in chain(_all_nodes(place), [None]):
        held = np.concatenate((held, np.zeros(1, _NODE) if some is None else some))
        count = len(held) if some is None else len(held) // _RUN * _RUN
        if not count:
            continue
        ready, held = held[:count], held[count:]
        starts = at + np.cumsum(ready["count"]) - ready["count"]
        at = int(starts[-1] + ready["count"][-1])
        runs = starts[::_RUN]
        yield starts - np.repeat(runs, _RUN)[: len(starts)], np.searchsorted(values, ready["backoff"]), runs


def _all_nodes(place: Place) -> Iterator[np.ndarray]:
    """That of no token, and of all lengths, each length with an empty node behind."""
    empty = np.zeros(1, _NODE)
    yield empty
    for length in range(1, place.settings.order):
        yield from _records(place, f"nodes{length}.run", _NODE)
        yield empty


def _words(place: Place, bias: int) -> Iterator[np.ndarray]:
    for some in _of_ngrams(place, "word"):
        yield some - bias


def _of_ngrams(place: Place, name: str) -> Iterator[np.ndarray]:
    """A value of every n-gram of two tokens and more."""
    for length in range(2, place.settings.order + 1):
        for some in _records(place, f"ngrams{length}.run", _NGRAM):
            yield some[name]


def _records(place: Place, file: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    for folder in place.folders(ASSEMBLE):
        run = Run(folder / file, dtype)
        yield from run.blocks(0, len(run), _AT_A_TIME)
