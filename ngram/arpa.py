"""The ARPA format of back-off models, with decimal token ids for words."""

from __future__ import annotations

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ngram.counts import Ints
from ngram.errors import NGramError
from ngram.layout import SortedNGrams, tables_from_estimates
from ngram.smoothing import Estimates, Floats
from ngram.storage import writing_atomically
from ngram.tables import MAX_ORDER, Tables

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
LN10 = float(np.log(10))
NO_IDS = {UNK: -1, BOS: -2, EOS: -3}
IMPOSSIBLE = -99.0
UNK_IF_MISSING = -100.0  # as KenLM assumes
_LONGEST_LINE = 1 << 12
_AT_A_TIME = 1 << 17


class Grams(NamedTuple):
    """The k-grams of one section, in file order."""

    ids: Ints  # [N, k]; from `NO_IDS` for <unk>, and for a marker whose id was not given
    log10_probs: Floats  # [N]
    log10_backoffs: Floats  # [N]; 0 where the file gives none


def read(path: str | PathLike, vocab_size: int, bos_id: int | None, eos_id: int | None) -> list[Grams]:
    """Parses a file: one `Grams` for each order.

    What stands before the line \\data\\ is skipped, and <UNK> is <unk>, as in KenLM.

    Raises:
        NGramError: no file, a malformed line (with its number), ids outside [0, V), or another number of n-grams than
            the file promises.
    """
    path = Path(path)
    markers = NO_IDS | {name: marker for name, marker in ((BOS, bos_id), (EOS, eos_id)) if marker is not None}
    markers[UNK.upper()] = NO_IDS[UNK]
    reader = _Reader(markers, vocab_size)
    for number, line in enumerate(_lines(path), start=1):
        try:
            reader.take(line)
        except (ValueError, IndexError) as error:
            raise NGramError(f"{path}, line {number}: {error}") from error
    held = [len(section) for section in reader.sections]
    if not reader.ended or not held or held != reader.promised:
        raise NGramError(f"{path} is not a whole ARPA file: it promises {reader.promised} n-grams and has {held}")
    grams = [_grams(section, k) for k, section in enumerate(reader.sections, start=1)]
    for name, parameter in ((BOS, "bos_id"), (EOS, "eos_id")):
        if (grams[0].log10_probs[grams[0].ids[:, 0] == NO_IDS[name]] > IMPOSSIBLE).any():
            warnings.warn(
                f"{path} uses {name}: n-grams with it are left out, give {parameter} to keep them", stacklevel=3
            )
    return grams


class _Reader:
    """Takes a file line by line, and refuses it at the first line that cannot be."""

    def __init__(self, markers: dict[str, int], vocab_size: int):
        self.markers, self.vocab_size = markers, vocab_size
        self.promised: list[int] = []
        self.sections: list[list[tuple[list[int], float, float]]] = []
        self.begun = self.ended = False

    def take(self, line: str) -> None:
        if not self.begun or self.ended or not line:
            self.begun = self.begun or line == "\\data\\"
        elif header := re.fullmatch(r"ngram (\d+)\s*=\s*(\d+)", line):
            self.promised.append(int(header[2]))
            if len(self.promised) > MAX_ORDER:
                raise ValueError(f"its order is above {MAX_ORDER}")
        elif re.fullmatch(r"\\\d+-grams:", line):
            self.sections.append([])
        elif line == "\\end\\":
            self.ended = True
        else:
            self._take_gram(line)

    def _take_gram(self, line: str) -> None:
        order = len(self.sections)
        if not 0 < order <= len(self.promised):
            raise ValueError(f"no section of the file that it promises, found {line!r}")
        if len(self.sections[-1]) == self.promised[order - 1]:
            raise ValueError(f"more {order}-grams than the {self.promised[order - 1]} that the file promises")
        gram = _parse(line, order, self.markers, self.vocab_size)
        if order == len(self.promised) and gram[2]:
            raise ValueError(f"a back-off on an n-gram of the highest order, found {line!r}: is the file cut off?")
        self.sections[-1].append(gram)


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if is_gzip else open(path, encoding="utf-8") as text:
            while line := text.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise NGramError(f"{path} is no ARPA file: it has a line of {_LONGEST_LINE:,} characters and more")
                yield line.strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise NGramError(f"cannot read {path} as an ARPA file: {error}") from error


def _parse(line: str, order: int, markers: dict[str, int], vocab_size: int) -> tuple[list[int], float, float]:
    fields = line.split()
    if len(fields) not in (order + 1, order + 2):
        raise ValueError(f"expected a probability, {order} words and perhaps a back-off, found {line!r}")
    log10_prob, words = float(fields[0]), fields[1 : order + 1]
    log10_backoff = float(fields[order + 1]) if len(fields) == order + 2 else 0.0
    ids = []
    for word in words:
        if word in markers:
            ids.append(markers[word])
        elif not word.isascii() or not word.isdecimal():
            raise ValueError(f"words must be decimal token ids, found {word!r}")
        elif int(word) >= vocab_size:
            raise ValueError(f"token id {word} is beyond the vocabulary size {vocab_size}")
        else:
            ids.append(int(word))
    if not (np.isfinite(log10_prob) and np.isfinite(log10_backoff)):
        raise ValueError(f"numbers must be finite, found {line!r}")
    if log10_prob > 0:
        raise ValueError(f"a probability above 1, found {line!r}: the first number is its logarithm, at most 0")
    return ids, log10_prob, log10_backoff


def _grams(section: list[tuple[list[int], float, float]], k: int) -> Grams:
    ids = np.array([gram[0] for gram in section], np.int64).reshape(-1, k)
    return Grams(ids, np.array([gram[1] for gram in section]), np.array([gram[2] for gram in section]))


def to_tables(grams: list[Grams], vocab_size: int, bos_id: int | None) -> Tables:
    """A parsed file as tables, built up order by order.

    N-grams of words without an id are left out. The estimate that a delta refers to is asked of the tables of the
    orders below, which back off as a decoder would, since pruned files lack some suffixes.

    Raises:
        NGramError: an n-gram listed twice, or one whose context the file does not list.
    """
    seen, unigram = _unigrams(grams[0], vocab_size, bos_id)
    gammas = _by_id(grams[0], grams[0].log10_backoffs * LN10, vocab_size)
    ngrams: list[SortedNGrams] = []
    estimates = Estimates(unigram, [], [])
    tables = tables_from_estimates(seen, ngrams, estimates)
    for k, section in enumerate(grams[1:], start=2):
        used = section.ids.min(1, initial=0) >= 0
        ids, log_probs = section.ids[used], section.log10_probs[used] * LN10
        _require_listed(ids, seen[ids].all(1), k, "1-grams")
        parents = _index(tables, torch.from_numpy(ids[:, :-1])).numpy()
        _require_listed(ids, parents >= 0, k, "context")
        order = np.lexsort((ids[:, -1], parents))
        ids, parents, log_probs = ids[order], parents[order], log_probs[order]
        if (np.diff(parents * vocab_size + ids[:, -1]) == 0).any():
            raise NGramError(f"the file lists a {k}-gram twice")
        lower = tables.score(torch.from_numpy(ids[:, 1:-1]), torch.from_numpy(ids[:, -1])).double().numpy()
        ngrams.append(SortedNGrams(parents, ids[:, -1]))
        estimates.backoffs.append(gammas)
        estimates.deltas.append(log_probs - gammas[parents] - lower)
        tables = tables_from_estimates(seen, ngrams, estimates)
        gammas = section.log10_backoffs[used][order] * LN10
    return tables


def _index(tables: Tables, ids: torch.Tensor) -> torch.Tensor:
    """Which k-gram each row of int64 [N, k] is, counted within order k, or −1 if the tables lack it: int64 [N]."""
    index = ids[:, 0]
    for k in range(2, ids.shape[1] + 1):
        keys = tables.ngram_keys(k)
        wanted = index * tables.stride + ids[:, k - 1]
        at = torch.searchsorted(keys, wanted)
        index = at.masked_fill((keys[at] != wanted) | (at == len(keys) - 1), -1)
    return index


def _require_listed(ids: Ints, listed: np.ndarray, k: int, what: str) -> None:
    if not listed.all():
        gram = " ".join(map(str, ids[np.argmin(listed)]))
        raise NGramError(f"the file lists the {k}-gram {gram!r} but not its {what}")


def _unigrams(section: Grams, vocab_size: int, bos_id: int | None) -> tuple[np.ndarray, Floats]:
    """Which ids the file lists, bool [V], and log p_1 of every id, float64 [V]."""
    known = section.ids[:, 0] >= 0
    ids = section.ids[known, 0]
    if len(np.unique(ids)) < len(ids):
        raise NGramError("the file lists a 1-gram twice")
    counts = np.bincount(ids, minlength=vocab_size)
    unknown = np.append(UNK_IF_MISSING, section.log10_probs[section.ids[:, 0] == NO_IDS[UNK]])[-1]
    unseen = max(int((counts == 0).sum()), 1)
    unigram = np.full(vocab_size, unknown * LN10 - np.log(unseen))
    unigram[ids] = section.log10_probs[known] * LN10
    if bos_id is not None:
        unigram[bos_id] = -np.inf
    return counts > 0, unigram


def _by_id(section: Grams, values: Floats, vocab_size: int) -> Floats:
    known = section.ids[:, 0] >= 0
    dense = np.zeros(vocab_size)
    dense[section.ids[known, 0]] = values[known]
    return dense


def write(path: str | PathLike, tables: Tables, bos_id: int | None, eos_id: int | None) -> None:
    """Writes ``tables`` as an ARPA file, atomically and piece by piece; gzip if the name ends in .gz."""
    with writing_atomically(path) as file:
        if not str(path).endswith(".gz"):
            file.writelines(text.encode() for text in _texts(tables, bos_id, eos_id))
            return
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, filename="", mtime=0) as packed:
            packed.writelines(text.encode() for text in _texts(tables, bos_id, eos_id))


def _texts(tables: Tables, bos_id: int | None, eos_id: int | None) -> Iterator[str]:
    """An ARPA file, in pieces."""
    names = np.arange(tables.vocab_size).astype(str).astype(object)
    for marker, name in ((bos_id, BOS), (eos_id, EOS)):
        if marker is not None:
            names[marker] = name
    first = _first_section(tables, names, bos_id, eos_id)
    sizes = [len(first), *np.diff(tables.first_ngrams).tolist()]
    yield "\\data\\\n" + "".join(f"ngram {k}={size}\n" for k, size in enumerate(sizes, start=1))
    yield "\n\\1-grams:\n" + "".join(first)
    for k in range(2, tables.order + 1):
        yield f"\n\\{k}-grams:\n"
        for section in _sections(tables, k):
            words = names[section.ids[:, 0]]
            for column in section.ids.T[1:]:
                words = words + " " + names[column]
            ends: Iterator[str] = (f"\t{b:.7g}\n" for b in section.log10_backoffs.tolist())
            if k == tables.order:
                ends = repeat("\n")
            lines = zip(section.log10_probs.tolist(), words, ends, strict=False)
            yield "".join(f"{p:.7g}\t{w}{end}" for p, w, end in lines)
    yield "\n\\end\\\n"


def _first_section(tables: Tables, names: np.ndarray, bos_id: int | None, eos_id: int | None) -> list[str]:
    seen = tables.seen[0].numpy().copy()
    if bos_id is not None:
        seen[bos_id] = True
    unseen = np.flatnonzero(~seen)
    probs = tables.unigram[0].double().numpy() / LN10
    backoffs = _backoffs(tables, 1, 0, tables.vocab_size)
    lines = []
    if len(unseen):
        total = probs[unseen[0]] + np.log10(len(unseen))
        lines.append(f"{total:.7g}\t{UNK}\t0\n")
    # Other tools refuse a file without the markers.
    lines += [f"{IMPOSSIBLE:g}\t{name}\t0\n" for marker, name in ((bos_id, BOS), (eos_id, EOS)) if marker is None]
    for index in np.flatnonzero(seen).tolist():
        prob = 0.0 if index == bos_id else probs[index]
        lines.append(f"{prob:.7g}\t{names[index]}\t{backoffs[index]:.7g}\n")
    return lines


def _sections(tables: Tables, k: int) -> Iterator[Grams]:
    """The k-grams of ``tables``, some at a time, with their absolute probabilities and their back-offs."""
    keys_of = {order: tables.ngram_keys(order)[:-1] for order in range(2, k + 1)}
    count = tables.first_ngrams[k - 1] - tables.first_ngrams[k - 2]
    for begin in range(0, count, _AT_A_TIME):
        stop = min(begin + _AT_A_TIME, count)
        index = torch.arange(begin, stop)
        columns: list[torch.Tensor] = []
        for order in range(k, 1, -1):  # from the last word to the second
            keys = keys_of[order][index]
            columns.append(keys % tables.stride)
            index = keys // tables.stride
        ids = torch.stack([index, *reversed(columns)], 1)
        probs = tables.score(ids[:, :-1], ids[:, -1]).double() / LN10
        yield Grams(ids.numpy(), probs.numpy(), _backoffs(tables, k, begin, stop))


def _backoffs(tables: Tables, k: int, begin: int, stop: int) -> Floats:
    """log10 γ of some of the k-grams as contexts; 0 for those of the highest order."""
    if k >= tables.order:
        return np.zeros(stop - begin)
    first = tables.first_nodes[k - 1]
    codes = tables.nodes[first + begin : first + stop, 1] + tables.book_starts
    return (tables.backoff_book[codes].double() / LN10).numpy()
