"""Chunk selection in vLLM: what an engine asks for, what it cannot have, and the layers that select together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from chunkllm import ChunkAdapters, ChunkCalibration, ChunkError, PooledScorer, Scorer
from chunkllm.calibration import open_saved
from chunkllm.paged.replayed import ReplayedSelection
from chunkllm.paged.selection import PagedSelection, Step
from chunkllm.paged.tables import Reading
from chunkllm.selection import DEFAULT_LOCAL, DEFAULT_SINKS, layer_weights
from decoding.errors import DecodingError
from decoding.policy.values import EMBEDDED
from decoding.vllm.bottom import refuse_unseen_ends
from decoding.vllm.budgets import budget_slots
from decoding.vllm.counters import ChunkCounts
from decoding.vllm.counts import counts_of_rank
from decoding.vllm.declaration import asked_for, checked_room
from decoding.vllm.ranks import adapters_of_rank, kv_heads, query_heads
from decoding.vllm.v1 import budget_rows
from ngram.kernels import asks_for_triton

_NO_WINDOW = (-1, (-1, -1))  # as vLLM's backends say it
# Plain ones, and those that an attention backend quantizes itself, once it has handed on keys and queries as they were.
_CACHES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def refuse_what_is_missing(vllm_config: VllmConfig) -> None:
    """Refuses engines in which chunks cannot be selected.

    Raises:
        DecodingError: says what stands in the way.
    """
    parallel, kept = vllm_config.parallel_config, vllm_config.cache_config.cache_dtype
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism (boundaries are found in the bottom layer's output, which only the first stage has)": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        f"a key-value cache of type {kept} (its blocks hold more than keys and values)": kept not in _CACHES,
        "a key-value connector": vllm_config.kv_transfer_config is not None,
        "micro-batches": parallel.use_ubatching,  # of one step there are several metadata, built side by side
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        raise DecodingError(f"chunk selection does not go with {' and '.join(found)}: leave out one or the other")


def refuse_full_graphs(vllm_config: VllmConfig) -> None:
    """Refuses engines that cannot have full CUDA graphs of steps with chunk selection.

    Raises:
        DecodingError: says what stands in the way.
    """
    reasons = {
        "vLLM's V2 model runner": not vllm_config.use_v2_model_runner,
        "a GPU, and a cudagraph_mode with full graphs": (
            not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        ),
    }
    missing = [reason for reason, is_missing in reasons.items() if is_missing]
    if missing:
        raise DecodingError(f"full graphs of chunk selection want {' and '.join(missing)}: leave them out")


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
        if declared.full_graphs:
            refuse_full_graphs(vllm_config)
        self.has_full_graphs = declared.full_graphs
        context = vllm_config.compilation_config.static_forward_context
        names = sorted(layer_names, key=extract_layer_index)
        impls = [context[name].impl for name in names]
        for number, impl in enumerate(impls):
            impl.number = number
        self.budget = checked_room(declared.kv_budget, spec.block_size)
        self.tokens = 0  # of the step under way
        saved = opened_adapters(declared.adapters, device)
        self.adapters = adapters_of_rank(saved, vllm_config, impls[0]) if isinstance(saved, ChunkAdapters) else None
        if self.adapters is not None:
            refuse_unseen_ends(vllm_config)
        self._config, self._block_size, self._device, self._first = vllm_config, spec.block_size, device, impls[0]
        self._attention = [context[name] for name in names]
        self._layers = [extract_layer_index(name) for name in names]
        weights = torch.ones(len(names))
        self._weights = weights if saved is None else _weights(saved, self._layers, vllm_config, self._first)
        rows, engine = vllm_config.scheduler_config.max_num_seqs, vllm_config.instance_id
        self._slots = rows if vllm_config.use_v2_model_runner else None
        self._budgets = budget_rows(engine) if self._slots is None else budget_slots(engine, rows)
        self._counts = ChunkCounts(len(names), counts_of_rank(vllm_config.parallel_config), device)
        self._kernels = asks_for_triton(device)  # refused, if at all, at an engine's start and not in a step
        self.selection: PagedSelection | None = None
        self._blocks = 0
        self._has_missed = False  # whether a step could not even begin
        self.has_failed = False  # the step under way, and is counted
        self.has_room()  # if that can be: what does not fit should be known at the start

    def has_room(self) -> bool:
        """Allocates the selection once the size of the cache is known, or known to be another. Whether it is there.

        Before vLLM knows the size it makes groups to measure the memory that CUDA graphs take, with a small cache.
        """
        blocks = _blocks(self._config, self._block_size)
        if blocks not in (0, self._blocks):
            self._blocks = blocks
            self._allocate()
        return self.selection is not None

    def _allocate(self) -> None:
        """Makes a selection that knows nothing."""
        selections = None if self.selection is None else self.selection.selections
        self.selection = None  # gone before the next one comes
        first = self._first
        pooled: Scorer = PooledScorer(first.head_size, scaling=first.scale)
        made: type[PagedSelection] = ReplayedSelection if self.has_full_graphs else PagedSelection
        self.selection = made(
            pooled if self.adapters is None else self.adapters.scorer(),
            self._layers,
            self._weights,
            heads=first.num_heads,
            kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            blocks=self._blocks,
            block_size=self._block_size,
            rows=self._config.scheduler_config.max_num_seqs,
            row_blocks=-(-self._config.model_config.max_model_len // self._block_size),
            sinks=DEFAULT_SINKS,
            local=DEFAULT_LOCAL,
            dtype=self._config.model_config.dtype,
            device=self._device,
            slots=self._slots,
            kernels=self._kernels,
            read_keys=self._read_keys if self._can_read_keys() else None,
        )
        if selections is not None:
            self.selection.selections = selections  # counted on

    def _can_read_keys(self) -> bool:
        """Whether the cache gives keys back as they were written."""
        return all(each.impl.can_read_keys(each, self._block_size) for each in self._attention)

    def _read_keys(self, layer: int, blocks: Tensor) -> Tensor:
        """Keys [n, block size, Hkv, D] of int64 [n] blocks, from the cache of a layer of the group."""
        attention = self._attention[layer]
        return attention.impl.read_keys(attention, blocks)

    def begin(self, common: CommonAttentionMetadata) -> Reading | None:
        """What the layers read in a step; None for everything.

        Raises:
            GapError: the step before was not taken in as a whole.
            DecodingError: vLLM does not say which rows are prompts, or whose they are.
        """
        assert self.selection is not None
        has_missed, self._has_missed = self._has_missed, True
        step = self._step_of(common)
        if has_missed:  # what was written meanwhile has no summaries, or what others had written there before
            self.selection.forget()
        self._has_missed = False
        reading = self.selection.begin(step)
        self._counts.add(step, reading, self.selection.selections)
        if self.adapters is None:
            self.selection.note_ends(None)
        return reading

    def capture(self, common: CommonAttentionMetadata) -> Reading:
        """What the layers read in every step of so many single tokens, before one is captured in a CUDA graph.

        Raises:
            DecodingError: the size of the cache is not known yet.
        """
        if not self.has_room() or not isinstance(self.selection, ReplayedSelection):
            raise DecodingError("a CUDA graph of chunk selection wants to know the size of the cache")
        self.tokens = common.num_reqs
        return self.selection.capture(common.num_reqs)

    def read_all(self, common: CommonAttentionMetadata) -> None:
        """Has a step that could not begin read everything, also if it is replayed."""
        if isinstance(self.selection, ReplayedSelection):
            rows = common.num_reqs
            self.selection.read_all(common.block_table_tensor[:rows], common.seq_lens[:rows])

    @property
    def wants_keys(self) -> bool:
        """Whether the step under way wants keys and queries; else it wants the bottom layer's output alone."""
        return self.selection is not None and self.selection.wants_keys

    def _step_of(self, common: CommonAttentionMetadata) -> Step:
        places = self._places(common)
        if common.is_prefilling is None or places is None:
            raise DecodingError("vLLM does not say whose the rows of a step are, or which are prompts")
        rows = len(places)
        self.tokens = int(common.query_start_loc_cpu[rows])  # without those that only pad a CUDA graph's batch
        most = common.seq_lens_cpu_upper_bound
        return Step(
            block_table=common.block_table_tensor[:rows],
            lengths=common.seq_lens[:rows],
            query_start=common.query_start_loc[: rows + 1],
            places=common.slot_mapping[: self.tokens],
            sizes=np.diff(common.query_start_loc_cpu[: rows + 1].numpy()),
            is_prompt=common.is_prefilling[:rows].numpy(),
            budgets=self._budgets.of(places, self.budget),
            most=np.full(rows, common.max_seq_len) if most is None else most[:rows].numpy().astype(np.int64),
            slots=None if self._slots is None else places,
        )

    def _places(self, common: CommonAttentionMetadata) -> np.ndarray | None:
        """Where the requests of the rows stand, int64 [R]: in the runner's table of requests, or on V1 in the batch.

        Rows that only pad a CUDA graph's batch have no place.
        """
        if self._slots is None:
            return np.arange(common.num_reqs)
        return None if common.req_idx is None else common.req_idx[: common.num_reqs].astype(np.int64)

    def note_bottom_states(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Takes in the bottom layer's output [T, hidden_size], and what is to be added to it, if anything is."""
        if self.adapters is not None and self.selection is not None:
            states = hidden_states if residual is None else hidden_states + residual
            self.selection.note_ends(self.adapters.is_boundary(states[None, : self.tokens])[0])

    def take_in(self, layer: int, keys: Tensor, queries: Tensor) -> None:
        """Takes in the keys [T, Hkv, D] and queries [T, H, D] of the layer with this number in the group."""
        assert self.selection is not None
        if len(keys) > self.tokens:  # those behind them only pad
            keys, queries = keys[: self.tokens], queries[: self.tokens]
        self.selection.add(layer, keys, queries)


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
        "heads": query_heads(vllm_config, impl).total,
        "kv_heads": kv_heads(vllm_config, impl).total,
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
        "has its queries quantized for its fp8 cache": (
            impl.kv_cache_dtype.startswith("fp8") and impl.supports_quant_query_input
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise DecodingError(f"chunk selection does not know this model's attention: it {reason}")


def without_windows(vllm_config: VllmConfig, layer_names: Sequence[str]) -> list[str]:
    """The layers of a group that select: it can hold some with sliding windows too, which are left alone."""
    context = vllm_config.compilation_config.static_forward_context
    return [name for name in layer_names if context[name].impl.sliding_window in _NO_WINDOW]


def _blocks(vllm_config: VllmConfig, block_size: int) -> int:
    """Of the cache, in the size that the kernel reads: vLLM may hand out larger ones. 0 while it is not known."""
    cache = vllm_config.cache_config
    return (cache.num_gpu_blocks or 0) * max(cache.block_size // block_size, 1)
