"""Chunk selection in vLLM: what an engine asks for, what it cannot have, and what its attention backends share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from chunkllm import ChunkAdapters, ChunkCalibration, ChunkError, PooledScorer, Scorer
from chunkllm.calibration import open_saved
from chunkllm.late import send
from chunkllm.paged.selection import PagedSelection, Reading, Step, local_blocks
from chunkllm.selection import DEFAULT_LOCAL, DEFAULT_SINKS, layer_weights
from decoding.errors import DecodingError
from decoding.policy.values import EMBEDDED
from decoding.vllm.declaration import CHUNKS_KEY, DeclaredChunks, checked_chunks
from decoding.vllm.fallbacks import fell_back
from decoding.vllm.v1 import budget_rows

_NO_WINDOW = (-1, (-1, -1))  # as vLLM's backends say it


def asked_for(vllm_config: VllmConfig | None) -> DeclaredChunks | None:
    """What an engine's ``additional_config={"chunkllm": {…}}`` asks for, if it does.

    Raises:
        DecodingError: unknown or impossible settings.
    """
    additional = None if vllm_config is None else vllm_config.additional_config
    asked = additional.get(CHUNKS_KEY) if isinstance(additional, dict) else None
    return None if asked is None else checked_chunks(asked)


def refuse_what_is_missing(vllm_config: VllmConfig) -> None:
    """Refuses engines in which chunks cannot be selected.

    Raises:
        DecodingError: says what stands in the way.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "a quantized key-value cache": cache.cache_dtype.startswith(("fp8", "int8", "nvfp4", "turboquant")),
        "a key-value connector": vllm_config.kv_transfer_config is not None,
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        raise DecodingError(f"chunk selection does not go with {' and '.join(found)}: leave out one or the other")


@dataclass
class ChunkStep:
    """A step in which chunks may be selected: who selects, and each layer's metadata, or none if all is read."""

    group: LayerGroup
    of_layers: list[Any]


class LayerGroup:
    """The layers with full attention that share a block table, and the selection in them.

    Args:
        vllm_config: the engine's.
        layer_names: theirs.
        spec: of its key-value cache.
        device: where it lies.

    Raises:
        DecodingError: chunks cannot be selected in this model or engine, or the adapters are not there.
    """

    def __init__(self, vllm_config: VllmConfig, layer_names: list[str], spec: FullAttentionSpec, device: torch.device):
        declared = asked_for(vllm_config)
        assert declared is not None
        refuse_what_is_missing(vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        names = sorted(layer_names, key=extract_layer_index)
        impls = [context[name].impl for name in names]
        for number, impl in enumerate(impls):
            refuse_unusual_attention(impl)
            impl.number = number
        first = impls[0]
        self.budget = declared.kv_budget
        self.tokens = 0  # of the step under way
        self._budgets = budget_rows(vllm_config.instance_id)
        saved = opened_adapters(declared.adapters, device)
        self.adapters = saved if isinstance(saved, ChunkAdapters) else None
        layers = [extract_layer_index(name) for name in names]
        scorer: Scorer = PooledScorer(first.head_size, scaling=first.scale)
        weights = torch.ones(len(layers))
        if saved is not None:
            weights = _weights(saved, layers, vllm_config, first)
        if self.adapters is not None:
            scorer = self.adapters.scorer()
        _require_room(self.budget, spec.block_size)
        self.selection = PagedSelection(
            scorer,
            layers,
            weights,
            heads=first.num_heads,
            kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            blocks=_blocks(vllm_config, spec.block_size),
            block_size=spec.block_size,
            rows=vllm_config.scheduler_config.max_num_seqs,
            row_blocks=-(-vllm_config.model_config.max_model_len // spec.block_size),
            sinks=DEFAULT_SINKS,
            local=DEFAULT_LOCAL,
            dtype=vllm_config.model_config.dtype,
            device=device,
        )

    def begin(self, common: CommonAttentionMetadata) -> Reading | None:
        """What the layers read in a step."""
        if common.is_prefilling is None:
            raise DecodingError("chunk selection needs vLLM's V1 model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        rows, device = common.num_reqs, common.block_table_tensor.device
        self.tokens = int(common.query_start_loc_cpu[rows])  # without those that only pad a CUDA graph's batch
        least, most = self._budgets.least(self.budget), common.seq_lens_cpu_upper_bound
        step = Step(
            block_table=common.block_table_tensor[:rows],
            lengths=common.seq_lens[:rows],
            query_start=common.query_start_loc[: rows + 1],
            tokens=self.tokens,
            is_prompt=send(common.is_prefilling[:rows], device),
            budgets=self._budgets.tensor(rows, self.budget, device),
            longest=common.max_seq_len,
            may_select=common.max_seq_len > least,
            most_long=None if most is None else int((most[:rows] > least).sum()),
        )
        try:
            reading = self.selection.begin(step)
        except ChunkError:  # the step before had a gap, so all is read in this one
            fell_back("chunk selection")
            return None
        if self.adapters is None:
            self.selection.note_ends(None)
        return reading

    def note_bottom_states(self, hidden_states: Tensor) -> None:
        """Takes in the bottom layer's output, [T, hidden_size]."""
        if self.adapters is not None:
            self.selection.note_ends(self.adapters.is_boundary(hidden_states[None, : self.tokens])[0])

    def take_in(self, layer: int, keys: Tensor, queries: Tensor) -> None:
        """Takes in the keys [T, Hkv, D] and queries [T, H, D] of the layer with this number in the group."""
        self.selection.add_keys(layer, keys[: self.tokens])
        self.selection.add_queries(layer, queries[: self.tokens])


def opened_adapters(source: str | None, device: torch.device) -> ChunkAdapters | ChunkCalibration | None:
    """The adapters that settings name, frozen, or the calibration; None for none."""
    if source is None:
        return None
    try:
        saved = open_saved(None if source == EMBEDDED else source, device=device)
    except ChunkError as error:
        raise DecodingError(str(error)) from error
    return saved.requires_grad_(False) if isinstance(saved, ChunkAdapters) else saved


def _weights(
    adapters: ChunkAdapters | ChunkCalibration, layers: list[int], vllm_config: VllmConfig, impl: Any
) -> Tensor:
    """In what proportion the layers share a budget, float [L].

    Raises:
        DecodingError: adapters or calibration are another model's.
    """
    shape, config = adapters.config.shape, vllm_config.model_config.hf_text_config
    ours = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "heads": impl.num_heads,
        "kv_heads": impl.num_kv_heads,
        "head_dim": impl.head_size,
        "scaling": impl.scale,
    }
    for name, value in ours.items():
        if (theirs := getattr(shape, name)) != value:
            raise DecodingError(
                f"the adapters or the calibration are another model's: its {name} is {theirs}, this one's {value}"
            )
    if not set(layers) <= set(shape.full_layers):
        raise DecodingError(
            "the adapters or the calibration are another model's: they do not have the layers of this one"
        )
    if adapters.config.sensitivity is None:
        return torch.ones(len(layers))
    of_layer = dict(zip(shape.full_layers, layer_weights(adapters.config.sensitivity).tolist(), strict=True))
    return torch.tensor([of_layer[layer] for layer in layers])


def refuse_unusual_attention(impl: Any) -> None:
    """Refuses a layer's attention that chunk selection does not know.

    Raises:
        DecodingError: says what stands in the way.
    """
    reasons = {
        "caps its attention logits": bool(impl.logits_soft_cap),
        "has attention sinks of its own": impl.sinks is not None,
        "has ALiBi": impl.alibi_slopes is not None,
        "shares keys and values between layers": impl.kv_sharing_target_layer_name is not None,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise DecodingError(f"chunk selection does not know this model's attention: it {reason}")


def without_windows(vllm_config: VllmConfig, layer_names: Sequence[str]) -> list[str]:
    """The layers of a group that select: it can hold some with sliding windows too, which are left alone."""
    context = vllm_config.compilation_config.static_forward_context
    return [name for name in layer_names if context[name].impl.sliding_window in _NO_WINDOW]


def _require_room(budget: int, block_size: int) -> None:
    always = (local_blocks(DEFAULT_LOCAL, block_size) + 2) * block_size
    if budget < always + block_size:
        raise DecodingError(
            f"a kv_budget of {budget} tokens leaves nothing to choose: the first and the last blocks of {block_size} "
            f"tokens take {always}"
        )


def _blocks(vllm_config: VllmConfig, block_size: int) -> int:
    """Of the cache, in the size that the kernel reads: vLLM may hand out larger ones."""
    cache = vllm_config.cache_config
    assert cache.num_gpu_blocks is not None  # known by the time that a cache is made
    return cache.num_gpu_blocks * max(cache.block_size // block_size, 1)


class SelectingBuilder:
    """What a metadata builder does besides, when chunks are to be selected. Goes before vLLM's class."""

    group: LayerGroup | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        if asked_for(vllm_config) is None or type(kv_cache_spec) is not FullAttentionSpec:
            return
        names = without_windows(vllm_config, layer_names)
        if names:
            self.group = LayerGroup(vllm_config, names, kv_cache_spec, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """vLLM's metadata, with a `ChunkStep` in ``chunks``."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.group is None:
            return metadata
        reading = self.group.begin(common_attn_metadata)
        layers = [] if reading is None else self.of_layers(metadata, reading)
        metadata.chunks = ChunkStep(self.group, layers)
        return metadata

    def of_layers(self, metadata: Any, reading: Reading) -> list[Any]:
        """The metadata of each layer."""
        layers = []
        for table, lengths in zip(reading.block_table, reading.lengths, strict=True):
            layer = copy(metadata)
            layer.block_table, layer.seq_lens = table, lengths
            layer.scheduler_metadata = self.plan_of(layer)
            layers.append(layer)
        return layers

    def plan_of(self, metadata: Any) -> Tensor | None:
        """What a kernel plans its work by, for a layer's lengths."""
        raise NotImplementedError


class SelectingImpl:
    """What an attention does besides, when chunks are to be selected. Goes before vLLM's class."""

    number = -1  # of the layer, among those of its group that select

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        watch_bottom_layer()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """vLLM's, over the blocks that were selected."""
        step: ChunkStep | None = getattr(attn_metadata, "chunks", None)
        if step is not None and self.number >= 0:
            step.group.take_in(self.number, key, query)
            if step.of_layers:
                attn_metadata = step.of_layers[self.number]
        return super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **options
        )


def is_selecting() -> bool:
    """Whether the engine that is being built asks for chunk selection."""
    return asked_for(get_current_vllm_config_or_none()) is not None


_watching: list[Any] = []


def watch_bottom_layer() -> None:
    """Sees to it that boundaries are looked for in the output of the layers' first, of the model that is being built.

    Attention is made before the list of layers that it belongs to becomes the model's, and PyTorch tells of that.
    """
    if not _watching:
        _watching.append(register_module_module_registration_hook(_registered))


def _registered(module: nn.Module, name: str, submodule: Any) -> None:
    if name == "layers" and isinstance(submodule, nn.ModuleList):
        submodule[0].register_buffer("chunk_anchor", torch.zeros(1), persistent=False)
        submodule[0].register_forward_hook(_detect)
        _watching.pop().remove()


def _detect(layer: nn.Module, args: Any, output: Tensor | tuple[Tensor, Tensor]) -> None:
    hidden_states, residual = output if isinstance(output, tuple) else (output, None)
    torch.ops.decoding.note_bottom_states(hidden_states, residual, layer.chunk_anchor)


@torch.library.custom_op("decoding::note_bottom_states", mutates_args=("anchor",))
def note_bottom_states(hidden_states: Tensor, residual: Tensor | None, anchor: Tensor) -> None:
    """Hands the bottom layer's output to the selection. An operator of its own, since compiled models call it too.

    Args:
        hidden_states: [T, hidden_size].
        residual: what is to be added to it, if the model has not yet.
        anchor: nothing; said to be written to, lest the call be taken for one without effect.
    """
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    if not isinstance(metadata, dict):
        return
    steps = {id(each.chunks): each.chunks for each in metadata.values() if hasattr(each, "chunks")}
    if steps:
        states = hidden_states if residual is None else hidden_states + residual
        for step in steps.values():
            step.group.note_bottom_states(states)


@note_bottom_states.register_fake
def _(hidden_states: Tensor, residual: Tensor | None, anchor: Tensor) -> None: ...
