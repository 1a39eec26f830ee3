"""ChunkLLM's adapters (arXiv 2510.02361): a boundary detector, and a query and a key adapter for every layer.

The paper leaves their shapes open. Here the query and key adapters learn a residual on the pooled score
(`chunkllm.scorers.PooledScorer`), which they equal before training.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chunkllm.errors import ChunkError
from chunkllm.models import ModelShape, model_shape
from chunkllm.scorers import ChunkStatistics, Layers, Scorer

EMBEDDED = Path(__file__).with_name("smollm2-135m")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_FORMAT = "chunkllm-adapters/1"
DEFAULT_WIDTH = 32
DEFAULT_QUERIES = 4


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters are made for.

    Attributes:
        shape: of the model.
        width: w, features that the query and key adapters add per head.
        detector_width: of the boundary detector's hidden layer.
        queries: how many of the last tokens' queries are averaged over.
        threshold: the boundary probability from which a token ends a chunk.
        sensitivity: of each layer with full attention, in nats: how far the next token's distribution moves (KL) when
            this layer alone selects, as `chunkllm.training.calibration` measures it. None if that was not measured.
        about: how they were trained: the command, the data, the figures.
    """

    shape: ModelShape
    width: int = DEFAULT_WIDTH
    detector_width: int = 64
    queries: int = DEFAULT_QUERIES
    threshold: float = 0.5
    sensitivity: tuple[float, ...] | None = None
    about: dict[str, Any] = field(default_factory=dict)


class BoundaryDetector(nn.Module):
    """The Chunk Adapter: does a chunk end at this token? Reads the bottommost layer's output.

    Args:
        hidden_size: of the model.
        width: of the one hidden layer.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.hidden = nn.Linear(hidden_size, width)
        self.out = nn.Linear(width, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, hidden_size] -> float32 [B, T], logits of the boundary probability."""
        normed = self.norm(hidden_states.to(self.out.weight.dtype))
        return self.out(nn.functional.gelu(self.hidden(normed)))[..., 0].float()


class ChunkAdapters(nn.Module, ModelHubMixin):
    """Adapters of one model. The model itself stays as it is.

    For head h of a layer with queries q and a chunk's keys (mean μ, variance σ², boundary key κ; s = 1/√D):

        logit = g₁ (s q·μ) + g₂ (s² q²·σ²/2) + g₃ log n + g₄ log(distance) + (A_q [q, 1]) · (A_k [μ, √σ², κ, 1])

    with n tokens in the chunk. The Q-Adapter A_q [H, D+1, w] and the K-Adapter A_k [Hkv, 3D+1, w] read the frozen
    projections' outputs after RoPE; the gains g start at 1, 1, 1, 0 and A_k at 0. The chunk attention is the softmax
    over chunks, averaged over heads.

    Attributes:
        config: what they are for.
        boundary: the Chunk Adapter.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        shape, width = config.shape, config.width
        layers, heads, groups, inputs = len(shape.full_layers), shape.heads, shape.kv_heads, shape.head_dim
        if width < 0 or config.queries < 1 or config.detector_width < 1:
            raise ChunkError("queries and detector_width of adapters must be at least 1, width at least 0")
        if config.sensitivity is not None and not are_sensitivities(config.sensitivity, layers):
            raise ChunkError(f"sensitivity must be {layers} numbers of at least 0, one for each layer")
        self.boundary = BoundaryDetector(shape.hidden_size, config.detector_width)
        self.query = nn.Parameter(
            torch.randn(layers, heads, inputs + 1, width) * inputs**-0.5
        )  # as LoRA: one of two starts at 0
        self.key = nn.Parameter(torch.zeros(layers, groups, 3 * inputs + 1, width))
        self.gains = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(layers, heads, 1))

    @classmethod
    def for_model(cls, model: Any, width: int = DEFAULT_WIDTH, **config: Any) -> ChunkAdapters:
        """Untrained adapters with the shapes of a model, on its device, in float32.

        Args:
            model: a causal language model of transformers.
            width: see `AdapterConfig`, as are the others.
            config: ``detector_width``, ``queries``, ``threshold``.

        Raises:
            ChunkError: the model cannot have any; the message names what is missing.
        """
        return cls(AdapterConfig(model_shape(model), width, **config)).to(model.device)

    def scorer(self) -> AdapterScorer:
        """The scorer that reads these adapters."""
        return AdapterScorer(self)

    def of_heads(self, query: slice, kv: slice) -> ChunkAdapters:
        """The adapters of some heads, for an engine that divides a model's heads among processes.

        They hold the same numbers, not copies, and are not for training.

        Args:
            query: which of the H query heads.
            kv: the key-value heads that those read, of the Hkv.
        """
        tensors = self.state_dict()
        parts = {
            "query": tensors["query"][:, query],
            "gains": tensors["gains"][:, query],
            "key": tensors["key"][:, kv],
        }
        shape = replace(self.config.shape, heads=parts["query"].shape[1], kv_heads=parts["key"].shape[1])
        with torch.device("meta"):  # nothing is drawn at random, since everything is replaced
            adapters = ChunkAdapters(replace(self.config, shape=shape))
        adapters.load_state_dict({**tensors, **parts}, assign=True)
        return adapters.requires_grad_(False)

    def is_boundary(self, hidden_states: Tensor) -> Tensor:
        """The bottommost layer's output [B, T, hidden_size] -> bool [B, T]."""
        return self.boundary(hidden_states).sigmoid() >= self.config.threshold

    def _save_pretrained(self, save_directory: Path) -> None:
        """Config and weights; each file appears whole or not at all."""
        tensors = {name: value.detach().contiguous().cpu() for name, value in self.state_dict().items()}
        write_file(save_directory / WEIGHTS_FILE, lambda path: save_file(tensors, path))
        config = {"format": _FORMAT, **asdict(self.config)}
        write_file(save_directory / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=1)))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # has a default
        cls, name_or_path: str | os.PathLike | None = None, *, device: str | torch.device = "cpu", **hub: Any
    ) -> ChunkAdapters:
        """Opens what ``save_pretrained`` or ``push_to_hub`` wrote; by default the embedded ones, for SmolLM2-135M.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            device: where to.
            hub: options of ``hf_hub_download``, as ``revision`` and ``token``.

        Raises:
            ChunkError: nothing there, or damaged.
        """
        where = EMBEDDED if name_or_path is None else name_or_path
        config_path, weights_path = (find_file(where, file, hub) for file in (CONFIG_FILE, WEIGHTS_FILE))
        try:
            held = json.loads(config_path.read_bytes())
            if held.pop("format") != _FORMAT:
                raise ValueError("another version of this package wrote it")
            shape = saved_shape(held.pop("shape"))
            if (sensitivity := held.pop("sensitivity", None)) is not None:
                held["sensitivity"] = tuple(sensitivity)
            config = AdapterConfig(shape, **held)
            with torch.random.fork_rng(devices=[]):  # The seed of a text is not for weights that are replaced.
                adapters = cls(config)
            tensors = load_file(weights_path)
            if not all(bool(value.isfinite().all()) for value in tensors.values()):
                raise ValueError("a number is not finite")
            adapters.load_state_dict(tensors)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ChunkError(f"the adapters at {where} are damaged: {error}") from error
        return adapters.to(device)


class AdapterScorer(Scorer):
    """Scores by trained adapters: the pooled score's features, scaled by gains, and the adapters' beside them."""

    name = "adapter"
    takes_layers = True

    def __init__(self, adapters: ChunkAdapters):
        self.adapters = adapters
        self.queries = adapters.config.queries
        self._scaling = adapters.config.shape.scaling
        self._place = {layer: i for i, layer in enumerate(adapters.config.shape.full_layers)}

    def _of(self, values: Tensor, layer: Layers) -> Tensor:
        """A layer's part of the adapters, float32 [1, ...], or of several layers, [L, 1, ...]: the 1 is for rows."""
        places = self._place[layer] if isinstance(layer, int) else [self._place[each] for each in layer]
        return values[places].float().unsqueeze(-values.dim())

    def chunk_features(self, layer: Layers, statistics: ChunkStatistics) -> Tensor:
        """F = 2 D + w: mean, variance, and the K-Adapter's output."""
        mean, variance, last = statistics
        weight = self._of(self.adapters.key, layer)
        inputs = torch.cat((mean, variance.sqrt(), last), -1)
        learned = inputs @ weight[..., :-1, :] + weight[..., -1:, :]
        return torch.cat((mean, variance, learned), -1)

    def query_features(self, layer: Layers, queries: Tensor) -> Tensor:
        """See `chunk_features`."""
        weight, gains = self._of(self.adapters.query, layer), self._of(self.adapters.gains, layer)
        scaled = queries * self._scaling
        mean, variance = gains[..., None, None, :2].unbind(-1)
        learned = queries @ weight[..., :-1, :] + weight[..., -1:, :]
        return torch.cat((mean * scaled, variance * scaled.square() / 2, learned), -1)

    def reduce(self, layer: Layers, logits: Tensor, lengths: Tensor, distances: Tensor) -> Tensor:
        """As every scorer, with the gains of length and distance."""
        gains = self._of(self.adapters.gains, layer)
        by_length = gains[..., 2, None] * lengths.clamp(min=1).log()[:, None]
        by_distance = gains[..., 3, None] * distances.log()[:, None]
        bias = (by_length + by_distance).masked_fill(lengths[:, None] == 0, -torch.inf)
        return (logits + bias[..., None, :]).softmax(-1).mean((-3, -2))


def are_sensitivities(values: tuple[float, ...], layers: int) -> bool:
    """Whether there is a number of at least 0 for each layer."""
    return len(values) == layers and all(0 <= value < math.inf for value in values)


def saved_shape(held: dict[str, Any]) -> ModelShape:
    """A model's shape as JSON has it."""
    return ModelShape(**held | {"full_layers": tuple(held["full_layers"])})


def find_file(where: str | os.PathLike, file: str, hub: dict[str, Any], what: str = "adapters") -> Path:
    """A file of a folder, or of a repository on the hub.

    Raises:
        ChunkError: neither; it says that there are no adapters, or whatever else was looked for.
    """
    if Path(where).is_dir():
        return Path(where) / file
    try:
        return Path(hf_hub_download(str(where), file, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ChunkError(f"no {what} at {where}, neither a folder nor on the hub: {error}") from error


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place, then moves it there."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = Path(folder) / path.name
        write(beside)
        beside.chmod(0o644)  # safetensors leaves it to its owner alone
        os.replace(beside, path)
