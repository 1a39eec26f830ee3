"""How sensitive a model is to selection in each layer, for models without adapters: a file of JSON, no training.

`decoding chunk calibrate` measures it (`chunkllm.training.calibration`).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin

from chunkllm.adapters import CONFIG_FILE, ChunkAdapters, are_sensitivities, find_file, saved_shape, write_file
from chunkllm.errors import ChunkError
from chunkllm.models import ModelShape

_FORMAT = "chunkllm-calibration/1"
_KIND = _FORMAT.rpartition("/")[0]


@dataclass(frozen=True)
class CalibrationConfig:
    """What was measured of a model.

    Attributes:
        shape: of the model.
        sensitivity: of each layer with full attention, in nats, as in `AdapterConfig`.
        about: how it was measured: the command, the texts, the model.

    Raises:
        ChunkError: not one number of at least 0 for each layer.
    """

    shape: ModelShape
    sensitivity: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = len(self.shape.full_layers)
        if not are_sensitivities(self.sensitivity, layers):
            raise ChunkError(f"sensitivity must be {layers} numbers of at least 0, one for each layer")


class ChunkCalibration(ModelHubMixin):
    """Layers' sensitivities of one model, by which `ChunkSelection` divides a budget where there are no adapters.

    Attributes:
        config: what was measured.
    """

    def __init__(self, config: CalibrationConfig):
        self.config = config

    def _save_pretrained(self, save_directory: Path) -> None:
        """One file, which appears whole or not at all."""
        content = json.dumps({"format": _FORMAT, **asdict(self.config)}, indent=1)
        write_file(save_directory / CONFIG_FILE, lambda path: path.write_text(content))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # has no other options
        cls, name_or_path: str | os.PathLike, **hub: Any
    ) -> ChunkCalibration:
        """Opens what ``save_pretrained`` or ``push_to_hub`` wrote.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            hub: options of ``hf_hub_download``, as ``revision`` and ``token``.

        Raises:
            ChunkError: nothing there, or damaged.
        """
        path = find_file(name_or_path, CONFIG_FILE, hub, "calibration")
        try:
            held = json.loads(path.read_bytes())
            if (kind := held.pop("format")) != _FORMAT:
                raise ValueError(f"its format is {kind!r}, not {_FORMAT!r}")
            shape, sensitivity = saved_shape(held.pop("shape")), tuple(held.pop("sensitivity"))
            return cls(CalibrationConfig(shape, sensitivity, **held))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ChunkError(f"the calibration at {name_or_path} is damaged: {error}") from error


def open_saved(
    name_or_path: str | os.PathLike | None = None, *, device: str | torch.device = "cpu", **hub: Any
) -> ChunkAdapters | ChunkCalibration:
    """Opens adapters or a calibration, whichever is there; by default the embedded adapters, for SmolLM2-135M.

    Args:
        name_or_path: a folder, or a repository on the Hugging Face hub.
        device: where adapters go.
        hub: options of ``hf_hub_download``.

    Raises:
        ChunkError: nothing there, or damaged.
    """
    if name_or_path is not None and is_calibration(find_file(name_or_path, CONFIG_FILE, hub)):
        return ChunkCalibration.from_pretrained(name_or_path, **hub)
    return ChunkAdapters.from_pretrained(name_or_path, device=device, **hub)


def is_calibration(path: Path) -> bool:
    """Whether this is a calibration's file. What is damaged is none: that is for adapters to refuse."""
    try:
        return str(json.loads(path.read_bytes())["format"]).startswith(f"{_KIND}/")
    except (OSError, ValueError, LookupError, TypeError):
        return False
