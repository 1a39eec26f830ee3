"""What adapters learn from: a frozen model reads texts once, and what matters of its attention is kept on disk.

Reading costs a forward pass and the distillation targets; learning from what was read is cheap, so it can be repeated,
with other widths for instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chunkllm.adapters import write_file
from chunkllm.boundaries import boundary_labels
from chunkllm.contiguous.attention import intercept
from chunkllm.contiguous.table import ChunkTable
from chunkllm.errors import ChunkError
from chunkllm.models import bottom_states, decoder_of, model_shape
from chunkllm.scorers import ChunkStatistics
from chunkllm.training.distillation import Boundaries, Lesson, make_lesson

_CHARACTERS_PER_TOKEN = 5  # A piece of text is cut generously, then to the number of tokens; else twice as long.


@dataclass(frozen=True)
class ReadingOptions:
    """How texts are read.

    Attributes:
        context: tokens of a piece of text. Adapters work at the lengths that they have seen.
        boundaries: M, boundaries of a piece at which something is learnt.
        queries: m, queries kept for each.
        max_chunk: a chunk ends after so many tokens at the latest.
        local: last tokens that always stay.
        sinks: first tokens that always stay.
        language: of the texts, for pysbd.
        seed: of the choice of pieces and boundaries.

    Raises:
        ChunkError: numbers that are too small, or a context that leaves nothing to choose.
    """

    context: int = 8000
    boundaries: int = 48
    queries: int = 4
    max_chunk: int = 32
    local: int = 64
    sinks: int = 4
    language: str = "en"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.boundaries, self.queries, self.max_chunk) < 1:
            raise ChunkError("boundaries, queries and max_chunk must be at least 1")
        if min(self.local, self.sinks, self.seed) < 0:
            raise ChunkError("local, sinks and seed must be at least 0")
        # At least two chunks must end in the last three quarters, behind tokens that may be dropped.
        shortest = 3 * max(self.sinks + self.local, self.max_chunk)
        if self.context < shortest:
            raise ChunkError(f"pieces of {self.context} tokens are too short to learn from: at least {shortest}")


@dataclass(frozen=True)
class Piece:
    """A piece of text: token ids int64 [T], and bool [T], where sentences end."""

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What was kept of one piece.

    Attributes:
        boundaries: where something is learnt.
        labels: bool [T], where sentences end.
        bottom: [T, hidden_size], the bottommost layer's output.
        lessons: of every layer with full attention, by its place in the model.
    """

    boundaries: Boundaries
    labels: Tensor
    bottom: Tensor
    lessons: dict[int, Lesson]


def cut(texts: Sequence[str], tokenizer: Any, count: int, options: ReadingOptions) -> list[Piece]:
    """``count`` pieces of texts, in an order drawn by the seed.

    Raises:
        ChunkError: the texts are too short, or no sentence ends in them.
    """
    size = options.context * _CHARACTERS_PER_TOKEN
    places = [(text, i) for text in texts for i in range(0, len(text), size)]
    order = np.random.default_rng(options.seed).permutation(len(places))
    pieces: list[Piece] = []
    without = 0
    for text, start in (places[i] for i in order):
        if len(pieces) == count:
            break
        piece = _piece_at(start, text, tokenizer, options)
        if piece is not None and piece.labels.sum() < 2:
            without += 1
        elif piece is not None:
            pieces.append(piece)
    if without and not pieces:
        raise ChunkError(f"no sentence ends in the texts ({without} pieces): give prose, or another --language")
    if len(pieces) < count:
        raise ChunkError(
            f"the texts have {len(pieces)} pieces of {options.context} tokens with sentences, not {count}: give more "
            "text, or less --tokens or --context"
        )
    return pieces


def _piece_at(start: int, text: str, tokenizer: Any, options: ReadingOptions) -> Piece | None:
    size = options.context * _CHARACTERS_PER_TOKEN
    for stop in (start + size, start + 2 * size):
        ids, labels = boundary_labels(text[start:stop], tokenizer, options.language)
        if len(ids) >= options.context:
            return Piece(ids[: options.context], labels[: options.context])
        if stop >= len(text):
            break
    return None


def read_piece(model: Any, piece: Piece, options: ReadingOptions, seed: int) -> Reading:
    """Lets the frozen model read a piece with full attention, and keeps what is learnt from."""
    device = model.device
    boundaries = _boundaries(piece, options, seed)
    boundaries = Boundaries(*(part.to(device) for part in boundaries))
    shape = model_shape(model)
    lessons: dict[int, Lesson] = {}
    bottom: list[Tensor] = []

    def attend(attention: Any, module: Any, query: Tensor, key: Tensor, *rest: Any, **others: Any) -> Any:
        if module.layer_idx in shape.full_layers:
            lessons[module.layer_idx] = make_lesson(query[0], key[0], boundaries, options.queries, shape.scaling)
        return attention(module, query, key, *rest, **others)

    undo = intercept(model, attend)
    decoder_layer = decoder_of(model).layers[0]
    hook = decoder_layer.register_forward_hook(lambda module, args, output: bottom.append(bottom_states(output)[0]))
    try:
        with torch.no_grad():
            model(torch.from_numpy(piece.ids)[None].to(device), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
        undo()
    return Reading(boundaries, torch.from_numpy(piece.labels).to(device), bottom[0], lessons)


def chunk_ends(flags: np.ndarray, options: ReadingOptions) -> np.ndarray:
    """int64 [C], the last token of each chunk of a text, as decoding ends them; bool [T] tells the boundaries."""
    table = ChunkTable(np.zeros(1, np.int64), options.max_chunk, options.sinks)
    table.extend(flags[None])
    starts, lengths = table.spans()
    return (starts + lengths - 1)[0]


def _boundaries(piece: Piece, options: ReadingOptions, seed: int) -> Boundaries:
    """Boundaries in the last three quarters of the piece, where there is something to choose among."""
    ends = chunk_ends(piece.labels, options)
    late = np.flatnonzero(ends[:-1] > len(piece.ids) // 4)
    rng = np.random.default_rng((options.seed, seed))
    chosen = np.sort(rng.choice(late, min(options.boundaries, len(late)), replace=False))
    return Boundaries(torch.from_numpy(ends), torch.from_numpy(chosen))


def save_reading(reading: Reading, path: Path) -> None:
    """Writes a reading as one safetensors file, its large tensors in bfloat16."""
    lessons = reading.lessons
    tensors = {
        "ends": reading.boundaries.ends,
        "chosen": reading.boundaries.chosen,
        "labels": reading.labels,
        "bottom": reading.bottom.bfloat16(),
        "layers": torch.tensor(list(lessons)),
        "queries": torch.stack([lesson.queries for lesson in lessons.values()]).bfloat16(),
        "target": torch.stack([lesson.target for lesson in lessons.values()]),
    }
    for name in ChunkStatistics._fields:
        tensors[name] = torch.stack([getattr(lesson.statistics, name) for lesson in lessons.values()]).bfloat16()
    content = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_file(path, lambda beside: save_file(content, beside))


def load_reading(path: Path, device: torch.device | str) -> Reading:
    """Reads it back.

    Raises:
        ChunkError: the file is damaged.
    """
    try:
        held = load_file(path, device=str(device))
        statistics = zip(*(held[name].float() for name in ChunkStatistics._fields), strict=True)
        parts = zip(held["layers"].tolist(), held["queries"].float(), statistics, held["target"], strict=True)
        lessons = {layer: Lesson(queries, ChunkStatistics(*kept), target) for layer, queries, kept, target in parts}
        return Reading(Boundaries(held["ends"], held["chosen"]), held["labels"], held["bottom"], lessons)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ChunkError(f"{path} is damaged: remove it, and it is made again ({error})") from error
