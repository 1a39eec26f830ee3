"""`NGramModel`: a smoothed n-gram language model over token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ngram import arpa, storage
from ngram.checks import check_markers, check_size, check_whole
from ngram.counts import count_ngrams, documents_as_arrays
from ngram.encoding import NEVER
from ngram.errors import NGramError
from ngram.layout import SortedNGrams, tables_from_estimates
from ngram.pruning import pruned
from ngram.smoothing import Smoothing, estimate
from ngram.tables import Tables, add_log_prior

Oov = Literal["spread", "unk", "exclude"]
_POSITIONS_AT_A_TIME = 1 << 17


class NGramModel:
    """An n-gram language model over the token ids 0 … V−1, for whole-vocabulary rows on any device.

    Made by `train`, `from_arpa` or `load`.

    Attributes:
        tables: the probabilities as tensors; `ngram.tables.add_log_prior` adds them to a batch of scores.
        smoothing: "kneser-ney", "witten-bell", "additive", or "arpa" for a model read from such a file.
        bos_id: the marker before every document, or None.
        eos_id: the marker behind every document, or None.
        metadata: free text by key, saved with the model.
    """

    def __init__(
        self,
        tables: Tables,
        *,
        smoothing: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.tables = tables
        self.smoothing = smoothing
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.metadata = dict(metadata or {})

    @classmethod
    def train(
        cls,
        documents: Any,
        vocab_size: int,
        order: int = 3,
        smoothing: Smoothing = "kneser-ney",
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_vocab: bool = False,
        delta: float = 0.1,
        interpolation: Sequence[float] | None = None,
        prune: int | Sequence[int] = 0,
        metadata: Mapping[str, str] | None = None,
    ) -> NGramModel:
        """Trains a model on token ids.

        Args:
            documents: a 1-D integer array, or an iterable of them. No n-gram spans two documents.
            vocab_size: number of token ids, V.
            order: length of the longest n-gram, 1 to 6.
            smoothing:
                "kneser-ney": interpolated modified Kneser-Ney (Chen & Goodman 1998), as KenLM's ``lmplz`` has it.
                "witten-bell": interpolated Witten-Bell.
                "additive": p_1(w) = (c(w) + δ) / (N + δV); above it the relative frequencies c(h w) / c(h) are mixed
                in with fixed weights, taken among the orders whose context was seen. δ is added to order 1 alone:
                with V near 50,000, δV would drown the counts of any longer context.
            bos_id: a marker before every document: a context, never predicted. Not to be in the documents.
            eos_id: a marker after every document. Not to be in the documents.
            pad_vocab: what Kneser-Ney's uniform distribution ranges over. False: the types seen and one <unk>, as
                ``lmplz`` does; the ids that were never seen share <unk>'s probability evenly. True: all ids, as
                ``lmplz --vocab_pad V`` does, which gives unseen ids more, and rows that fit new text better.
            delta: δ of additive smoothing.
            interpolation: its weights, one per order, shortest first; equal ones by default.
            prune: n-grams that occur this often or less are left out, as by ``lmplz --prune``: one number for each
                order, of which the last holds for the rest, or one for all orders but the first, whose must be 0. What
                smoothing learns from counts it learns before.
            metadata: free text by key, saved with the model.

        Raises:
            NGramError: unusable documents or parameters.
        """
        check_size(vocab_size, order)
        check_markers(vocab_size, bos_id, eos_id)
        levels = count_ngrams(documents, vocab_size, order, bos_id, eos_id)
        seen, ngrams, estimates = estimate(
            levels,
            order,
            smoothing,
            bos_id=bos_id,
            pad_vocab=pad_vocab,
            delta=delta,
            interpolation=interpolation,
            prune=prune,
        )
        tables = tables_from_estimates(seen, [SortedNGrams(*each) for each in ngrams], estimates)
        return cls(tables, smoothing=smoothing, bos_id=bos_id, eos_id=eos_id, metadata=metadata)

    @property
    def order(self) -> int:
        """Length of the longest n-gram."""
        return self.tables.order

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.tables.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.tables.unigram.device

    @property
    def seen(self) -> Tensor:
        """Ids that the corpus or the ARPA file holds, bool [V]."""
        return self.tables.seen[0]

    def __len__(self) -> int:
        """Number of n-grams, all orders together."""
        return int(self.seen.sum()) + self.tables.words.numel()

    def __repr__(self) -> str:
        return (
            f"NGramModel(order={self.order}, smoothing={self.smoothing!r}, vocab_size={self.vocab_size}, "
            f"ngrams={len(self)})"
        )

    def to(self, device: torch.device | str) -> NGramModel:
        """The same model on another device."""
        return NGramModel(
            self.tables.to(device),
            smoothing=self.smoothing,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            metadata=self.metadata,
        )

    def pruned(self, ngrams: int, histories: NGramModel | None = None) -> NGramModel:
        """The model with its ``ngrams`` most useful n-grams of two tokens and more (see `ngram.pruning`).

        Single tokens all stay. Takes some 100 bytes of memory for each n-gram.

        Args:
            ngrams: how many stay.
            histories: says how often contexts come: this model by default. For one of Kneser-Ney give another of the
                same text, such as Witten-Bell's, whose order may be lower by one.

        Raises:
            NGramError: a number that is none, or histories of another vocabulary.
        """
        check_whole(ngrams=ngrams)
        if histories is not None and histories.vocab_size != self.vocab_size:
            raise NGramError(f"histories have {histories.vocab_size} token ids, and the model {self.vocab_size}")
        if ngrams < 0:
            raise NGramError(f"ngrams must be at least 0, not {ngrams}")
        tables = self.to("cpu").tables
        ends = float(np.log(1 / self.vocab_size)) if self.eos_id is None else float(tables.unigram[0, self.eos_id])
        return NGramModel(
            pruned(tables, ngrams, tables if histories is None else histories.to("cpu").tables, beginning=ends),
            smoothing=self.smoothing,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            metadata=self.metadata,
        )

    def log_probs(self, context: Tensor) -> Tensor:
        """log p(· | context) over the whole vocabulary.

        Args:
            context: token ids, int64 [B, H ≥ order − 1], latest last; −1 where there is no token.

        Returns:
            float32 [B, V], natural logarithm; every row sums to 1 in probability.

        Raises:
            NGramError: a context of another shape or dtype.
        """
        if context.ndim != 2 or context.dtype != torch.int64 or context.shape[1] < self.order - 1:
            raise NGramError(
                f"context must be int64 of shape [B, at least {self.order - 1}], "
                f"not {context.dtype} of shape {list(context.shape)}"
            )
        batch = context.shape[0]
        zeros = torch.zeros(batch, self.vocab_size, device=self.device)
        rows = add_log_prior(self.tables, zeros, context.to(self.device), torch.ones(batch, device=self.device))
        return rows.masked_fill_(rows <= NEVER / 2, -torch.inf)

    def token_log_probs(self, document: Any) -> Tensor:
        """log p of each token of a document given the tokens before it (and bos_id before those, if there is one).

        Args:
            document: 1-D token ids, T of them.

        Returns:
            float32 [T], natural logarithm, on the CPU.
        """
        (ids,) = documents_as_arrays(document, self.vocab_size)
        return self._score(ids)

    def perplexity(self, documents: Any, oov: Oov = "spread") -> float:
        """exp of the mean negative log-probability per token, eos_id after each document included if there is one.

        Args:
            documents: as for `train`.
            oov: tokens that the model has never seen. "spread": an unseen id has its share of <unk>'s probability,
                as in `log_probs`. "unk": it counts as <unk> itself, KenLM's "perplexity including OOVs". "exclude":
                it is not scored, KenLM's "perplexity excluding OOVs".

        Raises:
            NGramError: nothing to score, or ids outside [0, V).
        """
        if oov not in get_args(Oov):
            raise NGramError(f"unknown oov {oov!r}: choose from {', '.join(get_args(Oov))}")
        seen = self.seen.cpu()
        classes = float(np.log(max(int((~seen).sum()), 1)))
        total, count = 0.0, 0
        for ids in documents_as_arrays(documents, self.vocab_size):
            if self.eos_id is not None:
                ids = np.append(ids, self.eos_id)
            scores = self._score(ids).double()
            unknown = ~seen[torch.from_numpy(ids)]
            if oov == "unk":
                scores = scores + classes * unknown
            elif oov == "exclude":
                scores = scores[~unknown]
            total -= float(scores.sum())
            count += scores.numel()
        if not count:
            raise NGramError("no token to score: all of them are unknown to the model")
        return float(np.exp(total / count))

    def _score(self, ids: np.ndarray) -> Tensor:
        longest = max(self.order - 1, 1)
        before = np.full(longest, -1)
        if self.bos_id is not None:
            before[-1] = self.bos_id
        stream = torch.from_numpy(np.concatenate((before, ids))).to(self.device)
        history = stream[:-1].unfold(0, longest, 1)
        tokens = stream[longest:]
        pieces = [
            self.tables.score(h, t)
            for h, t in zip(history.split(_POSITIONS_AT_A_TIME), tokens.split(_POSITIONS_AT_A_TIME), strict=True)
        ]
        return torch.cat(pieces).cpu()

    def save(self, path: str | PathLike) -> None:
        """Writes one safetensors file, atomically: an old file stays whole until the new one is."""
        header = {
            "smoothing": self.smoothing,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "metadata": self.metadata,
        }
        storage.save(path, self.tables, header)

    @classmethod
    def load(cls, path: str | PathLike, mmap: bool = False) -> NGramModel:
        """Opens a file that `save` wrote.

        Args:
            path: of the file.
            mmap: whether to leave n-grams in the file. Opening then takes no time and no memory, look-ups read what
                they need, and processes of one machine share it. What is damaged among n-grams is not noticed.

        Raises:
            NGramError: no file, or not a whole and consistent one.
        """
        tables, header = storage.load(path, mmap)
        return cls(tables, **header)

    @classmethod
    def from_arpa(
        cls, path: str | PathLike, vocab_size: int, bos_id: int | None = None, eos_id: int | None = None
    ) -> NGramModel:
        """Reads an ARPA file, plain or gzip, whose words are decimal token ids.

        Ids that it does not list share the probability of <unk> evenly; if it lists every id, <unk>'s probability is
        nobody's, and rows sum to 1 without it.

        A marker without an id is left out, with a warning, and so is its probability.

        Args:
            path: the file.
            vocab_size: number of token ids, V.
            bos_id: the id that the file writes <s>.
            eos_id: the id that the file writes </s>.

        Raises:
            NGramError: a malformed file, or ids outside [0, V).
        """
        check_size(vocab_size)
        check_markers(vocab_size, bos_id, eos_id)
        grams = arpa.read(path, vocab_size, bos_id, eos_id)
        return cls(arpa.to_tables(grams, vocab_size, bos_id), smoothing="arpa", bos_id=bos_id, eos_id=eos_id)

    def to_arpa(self, path: str | PathLike) -> None:
        """Writes an ARPA file (gzip if the name ends in .gz): ids as decimal words, the markers as <s> and </s>."""
        arpa.write(path, self.to("cpu").tables, self.bos_id, self.eos_id)
