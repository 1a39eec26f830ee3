"""The token ids of a forward pass, for decoders that are given embeddings alone, as those of models that see."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_told: ContextVar[Tensor | None] = ContextVar("chunkllm_ids", default=None)


def tell_ids(model: nn.Module) -> Callable[[], None]:
    """Keeps the ids that a model is called with, for its thread and the time of the call. Returns what undoes that."""

    def before(module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        _told.set(args[0] if args else options.get("input_ids"))

    def after(*_: Any) -> None:
        _told.set(None)

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def told_ids(embeddings: Tensor) -> Tensor | None:
    """int64 [B, T], the ids of embeddings [B, T, hidden_size], if the model was told them."""
    ids = _told.get()
    return ids if ids is not None and ids.shape == embeddings.shape[:2] else None
