"""What attention backends do besides, when chunks are to be selected. Whatever goes wrong, a step is plain vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from chunkllm.paged.calls import GapError
from chunkllm.paged.tables import Reading
from decoding.errors import DecodingError
from decoding.vllm.bottom import stop_watching, watch_bottom_layer
from decoding.vllm.chunks import LayerGroup, refuse_unusual_attention, without_windows
from decoding.vllm.declaration import asked_for
from decoding.vllm.fallbacks import fell_back

_PART = "chunk selection"


@dataclass
class ChunkStep:
    """A step in which chunks may be selected.

    vLLM can run a model several times with one step's metadata, before it captures CUDA graphs: the first time counts.

    Attributes:
        group: who selects.
        of_layers: each layer's metadata, or none if all is read.
        wants_keys: whether keys and queries are to be taken in.
        is_captured: whether it is of no step, but to be captured in a CUDA graph. Then every time counts.
    """

    group: LayerGroup
    of_layers: Sequence[Any] = ()
    wants_keys: bool = True
    is_captured: bool = False
    _taken: set[int] = field(default_factory=set)  # layers
    _has_states: bool = False
    _has_failed: bool = False

    def note_bottom_states(self, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Takes in the bottom layer's output [T, hidden_size], and what is to be added to it, if anything is."""
        if (self._has_states and not self.is_captured) or self._has_failed:
            return
        self._has_states = True
        try:
            self.group.note_bottom_states(hidden_states, residual)
        except Exception as error:
            self._fail(error)

    def take_in(self, layer: int, keys: Tensor, queries: Tensor) -> None:
        """Takes in the keys [T, Hkv, D] and queries [T, H, D] of the layer with this number in the group."""
        if (layer in self._taken and not self.is_captured) or self._has_failed:
            return
        self._taken.add(layer)
        try:
            self.group.take_in(layer, keys, queries)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """While that is handled. The rest of the step reads everything, and the selection will see the gap."""
        if self.is_captured:  # at an engine's start
            raise error
        self._has_failed, self.of_layers = True, ()
        _count_failure(self.group)


class SelectingBuilder:
    """What a metadata builder does besides. Goes before vLLM's class."""

    group: LayerGroup | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        stop_watching()
        if asked_for(vllm_config) is None:
            return
        refuse_other_layers(vllm_config)
        if type(kv_cache_spec) is FullAttentionSpec and (names := without_windows(vllm_config, layer_names)):
            self.group = LayerGroup(vllm_config, names, kv_cache_spec, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """vLLM's metadata, with a `ChunkStep` in ``chunks``; None there if the selection has nothing of the step."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.group is not None:
            metadata.chunks = self._step(self.group, metadata, common_attn_metadata)
            if metadata.chunks is None:
                self.group.read_all(common_attn_metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Likewise, for steps that will be replayed."""
        if self.group is None or not self.group.has_full_graphs or common_attn_metadata.max_query_len > 1:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        metadata = super().build(0, common_attn_metadata)  # type: ignore[misc]
        of_layers = self.of_layers(metadata, self.group.capture(common_attn_metadata))
        metadata.chunks = ChunkStep(self.group, of_layers, is_captured=True)
        return metadata

    def _step(self, group: LayerGroup, metadata: Any, common: CommonAttentionMetadata) -> ChunkStep | None:
        is_counted, group.has_failed = group.has_failed, False
        try:
            if not group.has_room():
                return None
            reading = group.begin(common)
            of_layers = () if reading is None else self.of_layers(metadata, reading)
            return ChunkStep(group, of_layers, group.wants_keys)
        except GapError:
            if not is_counted:  # when it came to be
                _count_failure(group)
        except Exception:
            _count_failure(group)
        return None

    def of_layers(self, metadata: Any, reading: Reading) -> list[Any]:
        """The metadata of each layer: those of all, but for what it reads."""
        layers, plans = [], self.plans_of(metadata, reading.lengths)
        for table, lengths, plan in zip(reading.block_table, reading.lengths, plans, strict=True):
            layer: Any = object.__new__(type(metadata))  # what `copy` does, in a fifth of its time
            vars(layer).update(vars(metadata), block_table=table, seq_lens=lengths, scheduler_metadata=plan)
            layers.append(layer)
        return layers

    def plans_of(self, metadata: Any, lengths: Tensor) -> Sequence[Tensor | None]:
        """What a kernel plans its work by, of each layer, for its lengths: int [L, R]."""
        raise NotImplementedError


class SelectingImpl:
    """What an attention does besides. Goes before vLLM's class."""

    number = -1  # of the layer, among those of its group that select
    is_bottom = False  # whether its layer's output is looked at

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        config = get_current_vllm_config_or_none()
        declared = asked_for(config)
        if config is not None and declared is not None and declared.adapters is not None:
            watch_bottom_layer(config, self)

    def can_read_keys(self, attention: Any, block_size: int) -> bool:
        """Whether `read_keys` gives what was written, in a cache with blocks of so many tokens."""
        raise NotImplementedError

    def read_keys(self, attention: Any, blocks: Tensor) -> Tensor:
        """Keys [n, block size, Hkv, D] of int64 [n] blocks of the cache of this attention's layer."""
        raise NotImplementedError

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
        if step is not None and step.wants_keys and self.number >= 0:
            step.take_in(self.number, key, query)
            if step.of_layers:
                attn_metadata = step.of_layers[self.number]
        return super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **options
        )


def _count_failure(group: LayerGroup) -> None:
    """While an exception is handled."""
    group.has_failed = True
    fell_back(_PART)


def is_selecting() -> bool:
    """Whether the engine that is being built asks for chunk selection."""
    return asked_for(get_current_vllm_config_or_none()) is not None


def refuse_other_layers(vllm_config: VllmConfig) -> None:
    """Refuses a model none of whose layers would select, or one with an attention that is not the plugin's.

    Raises:
        DecodingError: says which.
    """
    layers = vllm_config.compilation_config.static_forward_context
    full = [
        name
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayerBase) and type(layer.get_kv_cache_spec(vllm_config)) is FullAttentionSpec
    ]
    for name in full:
        impl = layers[name].impl
        if not isinstance(impl, SelectingImpl):
            raise DecodingError(
                f"vLLM gave the model an attention of its own ({type(impl).__name__}), not the plugin's"
            )
    selecting = without_windows(vllm_config, full)
    if not selecting:
        raise DecodingError("no layer of this model keeps plain keys and values of all tokens: none would select")
    for name in selecting:
        refuse_unusual_attention(layers[name].impl)
