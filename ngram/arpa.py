"""The ARPA format of back-off models, with decimal token ids for words."""

from __future__ import annotations

import gzip
import io
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
from ngram.storage import write_atomically
from ngram.tables import Tables

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
LN10 = float(np.log(10))
NO_IDS = {UNK: -1, BOS: -2, EOS: -3}
IMPOSSIBLE = -99.0
UNK_IF_MISSING = -100.0  # as KenLM assumes


class Grams(NamedTuple):
    """The k-grams of one section, in file order."""

    ids: Ints  # [N, k]; from `NO_IDS` for <unk>, and for a marker whose id was not given
    log10_probs: Floats  # [N]
    log10_backoffs: Floats  # [N]; 0 where the file gives none


def read(path: str | PathLike, vocab_size: int, bos_id: int | None, eos_id: int | None) -> tuple[int, list[Grams]]:
    """Parses a file: its order, and one `Grams` per order.

    Raises:
        NGramError: no file, a malformed line (with its number), or ids outside [0, V).
    """
    path = Path(path)
    markers = NO_IDS | {name: marker for name, marker in ((BOS, bos_id), (EOS, eos_id)) if marker is not None}
    sections: list[list[tuple[list[int], float, float]]] = []
    promised: list[int] = []
    ended = False
    for number, line in enumerate(_lines(path), start=1):
        try:
            if not line or line == "\\data\\" or ended:
                continue
            if header := re.fullmatch(r"ngram (\d+)\s*=\s*(\d+)", line):
                promised.append(int(header[2]))
            elif re.fullmatch(r"\\\d+-grams:", line):
                sections.append([])
            elif line == "\\end\\":
                ended = True
            else:
                sections[-1].append(_parse(line, len(sections), markers, vocab_size))
        except (ValueError, IndexError) as error:
            raise NGramError(f"{path}, line {number}: {error}") from error
    if not ended or not promised or [len(section) for section in sections] != promised:
        raise NGramError(
            f"{path} is not a whole ARPA file: it promises {promised} n-grams and has {[len(s) for s in sections]}"
        )
    grams = [_grams(section, k) for k, section in enumerate(sections, start=1)]
    for name, parameter in ((BOS, "bos_id"), (EOS, "eos_id")):
        if (grams[0].log10_probs[grams[0].ids[:, 0] == NO_IDS[name]] > IMPOSSIBLE).any():
            warnings.warn(
                f"{path} uses {name}: n-grams with it are left out, give {parameter} to keep them", stacklevel=3
            )
    return len(sections), grams


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if is_gzip else open(path, encoding="utf-8") as text:
            for line in text:
                yield line.strip()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise NGramError(f"cannot read {path} as an ARPA file: {error}") from error


def _parse(line: str, order: int, markers: dict[str, int], vocab_size: int) -> tuple[list[int], float, float]:
    fields = line.split()
    if not order or len(fields) not in (order + 1, order + 2):
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
        parents = tables.ngram_index(torch.from_numpy(ids[:, :-1])).numpy()
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
    """Writes ``tables`` as an ARPA file, atomically; gzip if the name ends in .gz."""
    sections = _sections(tables)
    names = np.arange(tables.vocab_size).astype(str).astype(object)
    for marker, name in ((bos_id, BOS), (eos_id, EOS)):
        if marker is not None:
            names[marker] = name
    first = _first_section(tables, names, sections[0], bos_id, eos_id)
    out = io.StringIO()
    sizes = [len(first), *(len(section.ids) for section in sections[1:])]
    out.write("\\data\\\n" + "".join(f"ngram {k}={size}\n" for k, size in enumerate(sizes, start=1)))
    out.write("\n\\1-grams:\n" + "".join(first))
    for k, section in enumerate(sections[1:], start=2):
        words = names[section.ids[:, 0]]
        for column in section.ids.T[1:]:
            words = words + " " + names[column]
        ends: Iterator[str] = (f"\t{b:.7g}\n" for b in section.log10_backoffs.tolist())
        if k == tables.order:
            ends = repeat("\n")
        lines = zip(section.log10_probs.tolist(), words, ends, strict=False)
        out.write(f"\n\\{k}-grams:\n" + "".join(f"{p:.7g}\t{w}{end}" for p, w, end in lines))
    out.write("\n\\end\\\n")
    content = out.getvalue().encode()
    write_atomically(path, gzip.compress(content, 6) if str(path).endswith(".gz") else content)


def _first_section(
    tables: Tables, names: np.ndarray, unigrams: Grams, bos_id: int | None, eos_id: int | None
) -> list[str]:
    seen = tables.seen[0].numpy().copy()
    if bos_id is not None:
        seen[bos_id] = True
    unseen = np.flatnonzero(~seen)
    lines = []
    if len(unseen):
        total = unigrams.log10_probs[unseen[0]] + np.log10(len(unseen))
        lines.append(f"{total:.7g}\t{UNK}\t0\n")
    # Other tools refuse a file without the markers.
    lines += [f"{IMPOSSIBLE:g}\t{name}\t0\n" for marker, name in ((bos_id, BOS), (eos_id, EOS)) if marker is None]
    for index in np.flatnonzero(seen).tolist():
        prob = 0.0 if index == bos_id else unigrams.log10_probs[index]
        lines.append(f"{prob:.7g}\t{names[index]}\t{unigrams.log10_backoffs[index]:.7g}\n")
    return lines


def _sections(tables: Tables) -> list[Grams]:
    """Every n-gram of ``tables`` with its absolute probability and its back-off."""
    backoff = tables.backoffs().double() / LN10
    ids = torch.arange(tables.vocab_size)[:, None]
    gammas = [backoff[f : f + n] for f, n in zip(tables.first_nodes, tables.lengths, strict=True)]
    gammas.append(torch.zeros(0, dtype=torch.float64))
    sections = [Grams(ids.numpy(), tables.unigram[0].double().numpy() / LN10, _or_zeros(gammas[0], len(ids)))]
    for k in range(2, tables.order + 1):
        keys = tables.ngram_keys(k)[:-1]
        last = (keys % tables.stride)[:, None]
        ids = torch.cat((ids[keys // tables.stride], last), 1)
        probs = tables.score(ids[:, :-1], ids[:, -1]).double() / LN10
        sections.append(Grams(ids.numpy(), probs.numpy(), _or_zeros(gammas[k - 1], len(ids))))
    return sections


def _or_zeros(values: torch.Tensor, size: int) -> Floats:
    return values.numpy() if len(values) else np.zeros(size)
