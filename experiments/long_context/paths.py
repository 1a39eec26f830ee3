"""Ways to write behind a long context, each with a cache into which the context's keys and values are put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from chunkllm import Attachment, ChunkSelection
from chunkllm.contiguous.attention import intercept
from chunkllm.contiguous.grouped import grouped_attention
from chunkllm.contiguous.layer import ChunkLayer

DEFAULT, DENSE, SELECTED = "default", "best dense", "selected"


@contextmanager
def filled(
    name: str,
    model: Any,
    states: Iterable[tuple[Tensor, Tensor]],
    selection: ChunkSelection,
    boundaries: Callable[[Attachment], Tensor],
    tokenizer: Any | None = None,
) -> Iterator[tuple[Cache, Attachment | None]]:
    """A model, for a while, and a cache.

    Args:
        name: `DEFAULT`, what users have: `DynamicCache` and the model's own attention. `DENSE`: a cache that grows in
            place, and attention that reads each key once for all query heads of its group. Else the selection.
        model: a causal language model.
        states: keys and values of every layer, each [B, Hkv, T, D].
        selection: is attached, unless the name is one of the two.
        boundaries: where chunks end, bool [B, T].
        tokenizer: of the model.
    """
    if name == DEFAULT:
        yield _put(DynamicCache(config=model.config), states), None
    elif name == DENSE:
        layers: list[Any] = [ChunkLayer(i, offload=False) for i in range(model.config.num_hidden_layers)]
        undo = intercept(model, _dense)
        try:
            yield _put(Cache(layers=layers), states), None
        finally:
            undo()
    else:
        with selection.attach(model, tokenizer) as chunks:
            made = chunks.new_cache()
            made.load(states, boundaries(chunks))
            yield made, chunks


def _put(cache: Cache, states: Iterable[tuple[Tensor, Tensor]]) -> Cache:
    for i, (keys, values) in enumerate(states):
        cache.update(keys, values, i)
    return cache


def _dense(attention: Any, module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Any, **options: Any) -> Any:
    if query.shape[2] > 1:
        return attention(module, query, keys, values, mask, **options)
    # No row is padded: a token alone reads everything. A mask would keep FlashAttention out.
    return grouped_attention(query, keys, values, None, options["scaling"]), None
