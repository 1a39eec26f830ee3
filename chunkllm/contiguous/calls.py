"""What runs in a thread: calls of ``generate``, and the forward passes in them. Belongs to no model and no cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from chunkllm.contiguous.cache import ChunkCache
from chunkllm.models import CACHE_NAMES

_PROMPTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask")


def wrap_generate(model: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Lets ``around`` make the calls of ``model.generate``.

    Args:
        model: a model of transformers.
        around: called as ``around(generate, *args, **options)``, with what the caller gave; its result is the caller's.

    Returns:
        What undoes it: ``model.generate`` is what it was. If somebody wrapped it once more, theirs stays, and calls go
        through to the model's own.
    """
    own, is_of_instance = model.generate, "generate" in vars(model)
    is_on = True

    @wraps(own)
    def generate(*args: Any, **options: Any) -> Any:
        return around(own, *args, **options) if is_on else own(*args, **options)

    def undo() -> None:
        nonlocal is_on
        is_on = False
        if vars(model).get("generate") is not generate:
            return
        del model.generate
        if is_of_instance:
            model.generate = own

    model.generate = generate
    return undo


@dataclass
class Call:
    """A call of ``generate``.

    Attributes:
        prompt: places of the cache that its prompt takes; 0 if none of it is left to read.
        cache: that the prompt is read into, once that is known. The call may use others: guidance has its own.
    """

    prompt: int
    cache: ChunkCache | None = None

    def prompt_in(self, cache: ChunkCache) -> int:
        """Places of this cache that the prompt takes."""
        if self.cache is None:
            self.cache = cache
        return self.prompt if self.cache is cache else 0

    def finish(self, output: Any) -> None:
        """Lets the cache remember what was written: a call may go on with it."""
        written = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if self.cache is not None and written is not None:
            self.cache.note_written(written)


def call_of(args: tuple, options: dict[str, Any]) -> Call:
    """The call that arguments of ``generate`` ask for."""
    given = {**{name: options.get(name) for name in _PROMPTS}, **({"inputs": args[0]} if args else {})}
    tensors = [x for x in given.values() if isinstance(x, Tensor) and x.dim() > 1]
    prompt = max((x.shape[1] for x in tensors), default=0)
    cache = next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)
    if isinstance(cache, ChunkCache):
        ids = given["input_ids"] if given["inputs"] is None else given["inputs"]
        is_draft = getattr(options.get("generation_config"), "is_assistant", False)
        if (is_draft and cache.get_seq_length()) or (ids is not None and cache.was_written(ids)):
            return Call(0)
    return Call(prompt)


class Running(threading.local):
    """What runs in this thread, the innermost last.

    Attributes:
        calls: of ``generate``.
        passes: forward passes, each by its cache, or None where that is none of ours.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.passes: list[ChunkCache | None] = []

    @property
    def cache(self) -> ChunkCache | None:
        """Of the forward pass that runs."""
        return self.passes[-1] if self.passes else None

    def prompt_in(self, cache: ChunkCache) -> int:
        """Places of a cache that hold the prompt of the call that runs."""
        return self.calls[-1].prompt_in(cache) if self.calls else 0
