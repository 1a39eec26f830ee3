"""A text while it is written, in pieces that together are the text that it has become at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from decoding.tokens import continuations

_UNFINISHED = "\ufffd"


class TextStreamer(BaseStreamer):
    """Shows a text as far as later tokens cannot change it: whole characters, whatever tokens they are spread over.

    transformers' own waits for the end of words, and decodes line by line, which is not always the whole text.

    Args:
        tokenizer: the model's.
        show: takes each piece, a text that is not empty.
        has_prompt: whether the text stands behind its prompt, as in a model that is no encoder and decoder.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], Any], has_prompt: bool = True):
        self._tokenizer = tokenizer
        self._show = show
        self._has_prompt = has_prompt
        self._ids: Tensor | None = None
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Takes what ``model.generate`` gives: the prompt first, then tokens. int64 [1, L] or [L]."""
        ids = value.reshape(-1)
        if self._ids is None:
            self._ids = ids[-1:] if self._has_prompt else ids
            return
        self._ids = torch.cat((self._ids, ids))
        self._show_up_to(self._text().rstrip(_UNFINISHED + " "))

    def end(self) -> None:
        """Shows the rest."""
        if self._ids is not None:
            self._show_up_to(self._text())
        self._ids, self._shown = None, 0

    def _text(self) -> str:
        assert self._ids is not None
        return continuations(self._ids[None], int(self._has_prompt), self._tokenizer)[0]

    def _show_up_to(self, text: str) -> None:
        if len(text) > self._shown:
            self._show(text[self._shown :])
            self._shown = len(text)
