"""The text that a user wrote, out of the tokens that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decoding.tokens import pad_id

_MARK = "\u2603PROMPT\u2603"


class PromptFrame:
    """Takes a chat template's frame, padding and special tokens off a prompt.

    The frame is what the tokenizer's template puts around the one message of a user. A conversation, or a message with
    another system prompt, keeps all of its text.

    Args:
        tokenizer: of the generating model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before, self._after = "", ""
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": _MARK}]
            framed = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if framed.count(_MARK) == 1:
                self._before, self._after = framed.split(_MARK)

    def text_of(self, ids: Sequence[int]) -> str:
        """The prompt's text. ``ids`` may begin with padding."""
        pad = pad_id(self._tokenizer)
        start = next((i for i, token in enumerate(ids) if token != pad), len(ids))
        if self._before or self._after:
            text = self._tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
            if text.startswith(self._before) and text.endswith(self._after):
                return text[len(self._before) : len(text) - len(self._after)]
        return self._tokenizer.decode(ids[start:], skip_special_tokens=True)
