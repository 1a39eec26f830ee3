"""``decoding chunk calibrate``: what each layer gets of a budget, for a model without adapters, measured in minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chunkllm import CalibrationConfig, ChunkCalibration, ChunkSelection, PooledScorer
from chunkllm.models import model_shape
from chunkllm.selection import layer_weights
from chunkllm.training.calibration import last_tokens, layer_sensitivity
from chunkllm.training.lessons import ReadingOptions
from chunkllm.training.loop import require_positions
from decoding.style.source import Corpus
from experiments.lab.cells import Cell
from experiments.lab.progress import progress_of_cells
from experiments.lab.runs import RunFolder, settings_of
from experiments.lab.tables import markdown
from experiments.long_context.evaluate import pieces_of
from experiments.long_context.train import CHECKPOINT


@dataclass(frozen=True)
class PieceCell(Cell):
    """What was measured on a piece of text."""

    number: int


def calibrate(
    model: Any,
    tokenizer: Any,
    name: str,
    corpora: Sequence[Corpus],
    options: ReadingOptions,
    count: int,
    out: Path,
    resume: bool,
    command: str,
) -> str:
    """Measures and writes a calibration; what each layer gets of a budget, as a table.

    Args:
        model: a causal language model in float32.
        tokenizer: its tokenizer, by whose punctuation chunks end.
        name: of the model.
        corpora: texts to measure on.
        options: length of a piece, queries, longest chunk, local window and sinks.
        count: pieces in all.
        out: the folder. Its ``checkpoint`` holds what a resumed run goes on from.
        resume: whether the folder may hold a run already.
        command: that made it.

    Raises:
        ChunkError: chunks cannot be selected in the model, or it has too few positions.
        DecodingError: texts too short, or a folder that holds a run with other settings.
    """
    require_positions(model, options.context)
    shape = model_shape(model)
    model.set_attn_implementation("sdpa")  # others may not take masks
    pieces = pieces_of(corpora, tokenizer, options.context, count)
    about = {
        **settings_of(name, model, tokenizer),
        "texts": {corpus.name: corpus.sha256 for corpus in corpora},
        "pieces": count,
        "options": asdict(options),
    }
    folder = RunFolder(out / CHECKPOINT, about, resume)
    with ChunkSelection(max_chunk=options.max_chunk).attach(model, tokenizer) as chunks:
        pass  # detached again: it is to tell where chunks end, and no more
    scorer = PooledScorer(shape.head_dim, options.queries, shape.scaling)
    measure = partial(
        layer_sensitivity,
        model,
        scorer,
        chunks.boundaries,
        last=last_tokens(options.context),
        options=options,
    )
    found = _measured(folder, pieces, measure, len(shape.full_layers))
    sensitivity = tuple(np.mean(found, 0).tolist())
    calibration = ChunkCalibration(CalibrationConfig(shape, sensitivity, {"command": command, **about}))
    calibration.save_pretrained(out)
    return _table(calibration)


def _measured(
    folder: RunFolder, pieces: Sequence[np.ndarray], measure: Callable[..., list[float]], layers: int
) -> list[list[float]]:
    """Nats of each layer for each piece; those that the folder holds are not measured again."""
    found = []
    with progress_of_cells() as progress:
        task = progress.add_task("calibrating layers", total=len(pieces) * layers)
        for i, ids in enumerate(pieces):
            record = folder.read(PieceCell(i))
            if record is None:
                record = {"sensitivity": measure(ids=ids, on_layer=partial(progress.advance, task))}
                folder.write(PieceCell(i), record)
            progress.update(task, completed=(i + 1) * layers)
            found.append(record["sensitivity"])
    return found


def _table(calibration: ChunkCalibration) -> str:
    config = calibration.config
    weights = layer_weights(config.sensitivity)
    lines = [["layer", "KL when it alone selects, 10⁻³ nats", "of the average budget, %"]]
    for layer, nats, share in zip(
        config.shape.full_layers, config.sensitivity, (weights / weights.mean()).tolist(), strict=True
    ):
        lines.append([str(layer), f"{1e3 * nats:.3f}", f"{100 * share:.0f}"])
    return markdown(lines)
