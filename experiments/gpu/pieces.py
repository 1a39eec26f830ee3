"""The pieces, in order of worth, with their shares of eight minutes."""

from __future__ import annotations

from collections.abc import Sequence

from decoding.errors import DecodingError
from experiments.gpu import adapters, correctness, long_context, lossless, style, tables, temperature, vllm
from experiments.gpu.run import Piece

PIECES = (
    Piece(
        "correctness",
        "what a card computes is what the host computes",
        60,
        correctness.measure,
        correctness.CARD,
        correctness.TOY,
    ),
    Piece("style", "a step of a style", 90, style.measure, style.CARD, style.TOY),
    Piece(
        "long-context", "a step behind long contexts", 150, long_context.measure, long_context.CARD, long_context.TOY
    ),
    Piece("tables", "the block tables of a step in vLLM", 10, tables.measure, tables.CARD, tables.TOY),
    Piece("temperature", "choosing temperatures", 20, temperature.measure, temperature.CARD, temperature.TOY),
    Piece("adapters", "training adapters", 40, adapters.measure, adapters.CARD, adapters.TOY),
    Piece("lossless", "the lossless mode", 50, lossless.measure, lossless.CARD, lossless.TOY),
    Piece("vllm", "throughput in vLLM", 60, vllm.measure, vllm.CARD, vllm.TOY, needs="vllm"),
)


def chosen(names: Sequence[str]) -> tuple[Piece, ...]:
    """The pieces of these names, in order of worth; all where none is named.

    Raises:
        DecodingError: there is no such piece.
    """
    known = {piece.name: piece for piece in PIECES}
    if unknown := sorted(set(names) - set(known)):
        raise DecodingError(f"no piece {unknown[0]!r}: choose from {', '.join(known)}")
    return tuple(piece for piece in PIECES if not names or piece.name in names)
