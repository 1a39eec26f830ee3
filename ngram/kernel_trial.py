"""Whether the kernel computes on a device what it should: tried once on each, before it takes PyTorch's place there.

An error of a compiler or of a card would else show in texts alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngram import prior_kernel
from ngram.encoding import RUN_BITS
from ngram.errors import NGramError

_VOCAB = 9000  # more than two tiles, and so many words behind one context that each has some
_STEPS = 5


class _Bigrams(NamedTuple):
    """As much of `ngram.tables.Tables` as the kernel reads: one context, token 0, with continuations."""

    unigram: Tensor
    nodes: Tensor
    runs: Tensor
    backoff_book: Tensor
    book_starts: Tensor
    words: Tensor
    deltas: Tensor
    order: int
    vocab_size: int
    widest: tuple[int, ...]


def try_on(device: torch.device) -> None:
    """Adds a prior to rows of scores that several programs share, in place and not, and looks at the sums.

    Raises:
        NGramError: they are wrong.
        Exception: whatever keeps Triton from compiling and launching kernels there.
    """
    draw = torch.Generator().manual_seed(0)
    tables, scores = _bigrams(draw), torch.randn(4, _VOCAB, generator=draw)
    history, strength = torch.tensor([[0], [0], [1], [0]]), torch.tensor([1.0, -0.5, 1.0, 0.0])
    wanted = scores + strength[:, None] * (tables.unigram + (history == 0) * tables.backoff_book[1])
    wanted.index_add_(1, tables.words.long(), strength[:, None] * (history == 0) * tables.deltas)
    moved: dict[str, Any] = {
        name: each.to(device) for name, each in tables._asdict().items() if isinstance(each, Tensor)
    }
    there = tables._replace(**moved)
    own, arguments = scores.to(device), (history.to(device), strength.to(device))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        sums = [prior_kernel.add_log_prior(there, own, *arguments) for _ in range(_STEPS)]
        sums.append(prior_kernel.add_log_prior(there, own, *arguments, out=own))
    if not all(torch.allclose(each.cpu(), wanted, rtol=1e-5, atol=1e-5) for each in sums):
        raise NGramError("their sums are wrong")


def _bigrams(draw: torch.Generator) -> _Bigrams:
    words = torch.arange(0, _VOCAB, 3, dtype=torch.int32)
    # Node 0 is empty, then come the tokens and one more empty one. What is behind token 0 begins where its words end.
    starts = torch.full((_VOCAB + 3,), len(words), dtype=torch.int32)
    starts[:2] = 0
    runs = starts[:: 1 << RUN_BITS].clone()
    nodes = torch.zeros(len(starts), 2, dtype=torch.int32)
    nodes[:, 0] = starts - runs.repeat_interleave(1 << RUN_BITS)[: len(starts)]
    nodes[1, 1] = 1
    return _Bigrams(
        unigram=-torch.rand(1, _VOCAB, generator=draw),
        nodes=nodes,
        runs=runs,
        backoff_book=torch.tensor([0.0, -0.7]),
        book_starts=torch.zeros(1, dtype=torch.int32),
        words=words,
        deltas=torch.randn(len(words), generator=draw),
        order=2,
        vocab_size=_VOCAB,
        widest=(len(words),),
    )
