"""Trains adapters: a frozen model reads texts (`lessons`), then the adapters learn from what was read.

Both halves can be interrupted at any time and go on where they stopped: every reading is a file, and the state of
learning is one file too, replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from chunkllm.adapters import DEFAULT_WIDTH, AdapterConfig, ChunkAdapters, write_file
from chunkllm.boundaries import agreement
from chunkllm.errors import ChunkError
from chunkllm.models import ModelShape, model_shape
from chunkllm.scorers import PooledScorer, Scorer
from chunkllm.training.calibration import exact, last_tokens, layer_sensitivity
from chunkllm.training.distillation import distillation_loss, lesson_scores, missing_by_score
from chunkllm.training.lessons import Piece, Reading, ReadingOptions, cut, load_reading, read_piece, save_reading

STATE_FILE = "state.safetensors"
SENSITIVITY_FILE = "sensitivity.json"
_RETENTIONS = (0.25, 0.5)
_THRESHOLDS = tuple(i / 20 for i in range(2, 19))

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingOptions:
    """How adapters are trained.

    Attributes:
        tokens: to read, in pieces of ``reading.context``.
        held_out: pieces of held-out text to judge by.
        width: w, features of the query and key adapters per head; 0 trains the gains alone.
        detector_width: of the boundary detector's hidden layer.
        epochs: how often each reading is learnt from.
        learning_rate: AdamW's, at its highest: it rises over the first twentieth of the steps and falls as a cosine.
        weight_decay: AdamW's.
        save_every: steps between states on disk.
        calibration: pieces that layers' sensitivities are measured on.
        reading: how texts are read.

    Raises:
        ChunkError: numbers that cannot be.
    """

    tokens: int = 288_000
    held_out: int = 3
    width: int = DEFAULT_WIDTH
    detector_width: int = 64
    epochs: int = 5
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    save_every: int = 20
    calibration: int = 2
    reading: ReadingOptions = ReadingOptions()

    def __post_init__(self) -> None:
        counts = (self.tokens, self.held_out, self.detector_width, self.epochs, self.save_every, self.calibration)
        if min(counts) < 1 or self.width < 0:
            raise ChunkError(
                "tokens, held_out, detector_width, epochs, save_every and calibration must be at least 1, width at "
                "least 0"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ChunkError(f"the learning rate must be above 0, not {self.learning_rate:g}")
        if not 0 <= self.weight_decay < math.inf:
            raise ChunkError(f"the weight decay must be at least 0, not {self.weight_decay:g}")


def learn(
    adapters: ChunkAdapters, optimizer: torch.optim.Optimizer, reading: Reading, options: ReadingOptions
) -> tuple[float, float]:
    """One step of learning from one reading. Waits for the device.

    Args:
        adapters: of the model that read; they change.
        optimizer: of their parameters.
        reading: on their device.
        options: how it was read.

    Returns:
        The losses before the step: of distillation, the mean over layers, and of boundaries.
    """
    optimizer.zero_grad()
    boundary = binary_cross_entropy_with_logits(adapters.boundary(reading.bottom), reading.labels.float())
    boundary.backward()
    distilled, scorer, layers = 0.0, adapters.scorer(), adapters.config.shape.full_layers
    free = reading.boundaries.free(options.sinks, options.local)
    for layer in layers:
        lesson = reading.lessons[layer]
        loss = distillation_loss(lesson_scores(scorer, layer, lesson, reading.boundaries), lesson.target, free)
        loss.backward()  # layer by layer, so that one layer's activations are held at a time
        distilled += float(loss.detach()) / len(layers)
    torch.nn.utils.clip_grad_norm_(adapters.parameters(), 1.0)
    optimizer.step()
    return distilled, float(boundary.detach())


class Readings:
    """Readings of pieces in a folder, made when first asked for.

    Args:
        model: the frozen model.
        pieces: what it reads.
        options: how.
        folder: where readings are kept.
    """

    def __init__(self, model: Any, pieces: Sequence[Piece], options: ReadingOptions, folder: Path):
        self._model, self._pieces, self._options, self._folder = model, pieces, options, folder

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, number: int) -> Reading:
        path = self._folder / f"{number:05d}.safetensors"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_reading(read_piece(self._model, self._pieces[number], self._options, number), path)
        return load_reading(path, self._model.device)


class Training:
    """A training run in a folder.

    Args:
        model: a causal language model, which stays as it is.
        tokenizer: its tokenizer.
        texts: to learn from.
        held_out: to judge by.
        options: how.
        folder: for readings and the state.
        resume: whether the folder may hold a run already.
        about: what else must be the same when it goes on, as the model's fingerprint.

    Attributes:
        adapters: as they are now, in float32.
        history: of every step, its losses; at the end of an epoch also what held-out text says, under "held_out".

    Raises:
        ChunkError: texts too short or without sentences, a model that chunks cannot be selected in or with too few
            positions, or a folder that holds a run with other settings or texts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[str],
        held_out: Sequence[str],
        options: TrainingOptions,
        folder: Path,
        resume: bool = False,
        about: Mapping[str, Any] | None = None,
    ):
        self.options, self.folder = options, folder
        self.shape: ModelShape = model_shape(model)
        reading = options.reading
        require_positions(model, reading.context)
        count = max(options.tokens // reading.context, 1)
        pieces, judged = cut(texts, tokenizer, count, reading), cut(held_out, tokenizer, options.held_out, reading)
        self.identity = {
            "options": asdict(options),
            "shape": json.loads(json.dumps(asdict(self.shape))),
            "texts": _fingerprint(pieces + judged),
            "about": dict(about or {}),
        }
        self.readings = Readings(model, pieces, reading, folder / "readings")
        self.judged = Readings(model, judged, reading, folder / "held_out")
        self._model, self._pieces, self._device = model, pieces, model.device
        self._begin(resume)

    def of_width(self, width: int) -> Training:
        """Another training on the same readings, its state in the subfolder ``width-N``; goes on with one held there.

        Args:
            width: as in `TrainingOptions`.

        Raises:
            ChunkError: the subfolder holds a training with other settings or texts.
        """
        other = copy(self)
        other.options = replace(self.options, width=width)
        other.identity = {**self.identity, "options": asdict(other.options)}
        other.folder = self.folder / f"width-{width}"
        other._begin(resume=True)
        return other

    def _begin(self, resume: bool) -> None:
        options, folder = self.options, self.folder
        held = self._held()
        if held is not None and not resume:
            raise ChunkError(
                f"{folder} holds a training already: add --resume to go on with it, or choose another --out"
            )
        if held is not None:
            self._require_same(held["identity"])
        torch.manual_seed(options.reading.seed)
        config = AdapterConfig(self.shape, options.width, options.detector_width, options.reading.queries)
        self.adapters = ChunkAdapters(config).to(self._device)
        self.optimizer = torch.optim.AdamW(
            self.adapters.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        if held is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._save()
        else:
            self._restore(held)

    @property
    def steps(self) -> int:
        """Optimizer steps in all: one reading each."""
        return self.options.epochs * len(self.readings)

    def run(self, on_progress: Progress = lambda what, done, total: None) -> ChunkAdapters:
        """Reads what was not read yet, learns what was not learnt yet, and returns the adapters, thresholds set."""
        for what, readings in (("reading", self.readings), ("reading held-out text", self.judged)):
            for i in range(len(readings)):
                on_progress(what, i, len(readings))
                readings[i]
            on_progress(what, len(readings), len(readings))
        while self.step < self.steps:
            record: dict[str, Any] = self._learn(self.readings[self._next()])
            self.step += 1
            if self.step % len(self.readings) == 0:
                self._choose_threshold()
                judged = self.judge()
                record["held_out"] = {part: judged[part] for part in ("detector", "mean")}
            self.history.append(record)
            if self.step % self.options.save_every == 0 or self.step == self.steps:
                self._save()
            on_progress("learning", self.step, self.steps)
        self._choose_threshold()
        return self.adapters

    def measure_sensitivity(self, on_progress: Progress = lambda what, done, total: None) -> list[float]:
        """Of every layer, as `layer_sensitivity` measures it, with the adapters as they are; sets it in their config.

        The mean of some pieces that were learnt from, by an `exact` copy of the model. What was measured is kept in
        the folder.
        """
        path = self.folder / SENSITIVITY_FILE
        found: list[list[float]] = json.loads(path.read_bytes()) if path.is_file() else []
        pieces = self._pieces[: self.options.calibration]
        if len(found) < len(pieces):
            model, scorer = exact(self._model), self.adapters.scorer()
            for i, piece in enumerate(pieces[len(found) :], len(found)):
                on_progress("calibrating", i, len(pieces))
                last = last_tokens(len(piece.ids))
                found.append(
                    layer_sensitivity(model, scorer, self._find_boundaries, piece.ids, last, self.options.reading)
                )
                write_file(path, lambda beside: beside.write_text(json.dumps(found)))
        on_progress("calibrating", len(pieces), len(pieces))
        means = np.mean(found, 0).tolist()
        self.adapters.config = replace(self.adapters.config, sensitivity=tuple(means))
        return means

    def _find_boundaries(self, ids: Tensor, bottom_states: Tensor) -> Tensor:
        return self.adapters.is_boundary(bottom_states)

    def _next(self) -> int:
        """Every epoch has an order of its own."""
        epoch, place = divmod(self.step, len(self.readings))
        rng = np.random.default_rng((self.options.reading.seed, 1, epoch))
        return int(rng.permutation(len(self.readings))[place])

    def _learn(self, reading: Reading) -> dict[str, float]:
        warm = max(self.steps // 20, 1)
        rate = min((self.step + 1) / warm, 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rate
        distilled, boundary = learn(self.adapters, self.optimizer, reading, self.options.reading)
        return {"step": self.step, "distillation": distilled, "boundary": boundary}

    @torch.no_grad()
    def judge(self) -> dict[str, Any]:
        """On held-out text: the detector's precision, recall and F1, and what scorers lose, by layer and on average."""
        pooled = PooledScorer(self.shape.head_dim, self.options.reading.queries, self.shape.scaling)
        scorers: dict[str, Scorer] = {"adapter": self.adapters.scorer(), "pooled": pooled}
        lost: dict[str, dict[str, list[float]]] = {}
        for i in range(len(self.judged)):
            reading = self.judged[i]
            for layer, lesson in reading.lessons.items():
                candidates = {
                    name: lesson_scores(scorer, layer, lesson, reading.boundaries) for name, scorer in scorers.items()
                }
                candidates["true attention"] = lesson.target
                # Worth falls with distance: whatever the lengths, the last chunks are kept.
                candidates["recent"] = reading.boundaries.chunks().lengths / reading.boundaries.distances()
                for name, scores in candidates.items():
                    into = lost.setdefault(name, {})
                    for key, value in self._figures(scores, layer, reading):
                        into.setdefault(key, []).append(value)
        layers = len(self.shape.full_layers)
        by_layer = {
            name: {key: np.reshape(values, (-1, layers)).mean(0).tolist() for key, values in figures.items()}
            for name, figures in lost.items()
        }
        means = {
            name: {key: float(np.mean(values)) for key, values in figures.items()} for name, figures in by_layer.items()
        }
        detector = agreement(*self._predictions(self.judged))._asdict()
        return {"detector": detector, "mean": means, "by_layer": by_layer}

    def _figures(self, scores: Tensor, layer: int, reading: Reading) -> Iterator[tuple[str, float]]:
        options, target, boundaries = self.options.reading, reading.lessons[layer].target, reading.boundaries
        yield "divergence", float(distillation_loss(scores, target, boundaries.free(options.sinks, options.local)))
        for keep in _RETENTIONS:
            lost = missing_by_score(scores, target, boundaries, options.sinks, options.local, keep)
            yield f"missing_at_{keep:g}", lost

    def _predictions(self, readings: Readings) -> tuple[Tensor, Tensor]:
        opened = (readings[i] for i in range(len(readings)))
        pairs = [(self.adapters.is_boundary(reading.bottom), reading.labels) for reading in opened]
        predicted, labels = zip(*pairs, strict=True)
        return torch.cat(predicted), torch.cat(labels)

    @torch.no_grad()
    def _choose_threshold(self) -> None:
        """By F1 on texts that were learnt from."""
        some = [self.readings[i] for i in range(min(len(self.readings), 5))]
        chances = torch.cat([self.adapters.boundary(reading.bottom).sigmoid() for reading in some])
        labels = torch.cat([reading.labels for reading in some])
        best = max(_THRESHOLDS, key=lambda threshold: agreement(chances >= threshold, labels).f1)
        self.adapters.config = replace(self.adapters.config, threshold=best)

    def _save(self) -> None:
        tensors = {f"adapters.{name}": value for name, value in self.adapters.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        progress = {"identity": self.identity, "step": self.step, "history": self.history}
        content = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
        metadata = {"progress": json.dumps(progress)}
        write_file(self.folder / STATE_FILE, lambda beside: save_file(content, beside, metadata))

    def _held(self) -> dict[str, Any] | None:
        path = self.folder / STATE_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return json.loads((file.metadata() or {})["progress"])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ChunkError(f"{path} is damaged: choose another --out") from error

    def _require_same(self, held: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(self.identity))
        for part, name in (("shape", "model"), ("about", "model"), ("texts", "text")):
            if held.get(part, {}) != ours[part]:
                raise ChunkError(f"the training in {self.folder} has another {name}: choose another --out")
        before = _flat(held["options"])
        for name, value in _flat(ours["options"]).items():
            if before.get(name) != value:
                raise ChunkError(
                    f"the training in {self.folder} has another {name} ({before.get(name)}, not {value}): "
                    "choose another --out"
                )

    def _restore(self, held: dict[str, Any]) -> None:
        try:
            self.step, self.history = held["step"], held["history"]
            self._load_tensors()
        except (OSError, LookupError, ValueError, RuntimeError, SafetensorError) as error:
            raise ChunkError(f"{self.folder / STATE_FILE} is damaged: choose another --out") from error

    def _load_tensors(self) -> None:
        with safe_open(self.folder / STATE_FILE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        prefix = "adapters."
        self.adapters.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of reading beside the others."""
    return {**{name: value for name, value in options.items() if name != "reading"}, **options.get("reading", {})}


def require_positions(model: Any, context: int) -> None:
    """Refuses pieces that are longer than a model can read.

    Raises:
        ChunkError: as said.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", context)
    if context > positions:
        raise ChunkError(f"the model has {positions} positions: --context {context} is too long")


def _fingerprint(pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.ids.tobytes() + piece.labels.tobytes())
    return digest.hexdigest()
