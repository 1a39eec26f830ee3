"""Author verification: how near texts are to what an author wrote, as cosines of embeddings.

A cosine means nothing by itself. So it stands between a ceiling, the author's own text that nobody has seen, and a
floor, that of other authors, as in arXiv 2604.26460.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.tokens import padded

Embed = Callable[[Sequence[str]], Any]
"""Unit vectors of texts, float [N, F], as an array or a sparse matrix."""
CHARACTERS = "character n-grams"
_AT_ONCE = 32
_MOST_TOKENS = 512


class Likeness:
    """Cosines between texts and an author.

    Args:
        embed: makes unit vectors.
        own: texts of the author.
    """

    def __init__(self, embed: Embed, own: Sequence[str]):
        self._embed = embed
        mean = np.asarray(embed(own).mean(0)).ravel()
        self._author = mean / max(np.linalg.norm(mean), np.finfo(float).tiny)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Of each text, float64 [N]."""
        return np.asarray(self._embed(texts) @ self._author)


class StyleEncoder:
    """Embeds by a model of the Hugging Face hub, such as LUAR (``rrivera1849/LUAR-MUD``) or a sentence encoder.

    A model that gives one vector for a text is taken at its word; of one that gives a vector for each token, the mean
    counts.

    Args:
        name: a hub id or a folder.
        trust_remote_code: whether to run code that comes with the model, as LUAR's does.

    Raises:
        DecodingError: it cannot be loaded, or does not encode texts.
    """

    def __init__(self, name: str, trust_remote_code: bool = False):
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            self._model = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code).eval()
        except (OSError, ValueError, ImportError) as error:
            raise DecodingError(f"cannot load the style encoder {name}: {error}") from error
        self._reads_episodes = config.model_type.upper() == "LUAR"
        try:
            self(["A text.", "And another one."])
        except Exception as error:  # known now, and not when all texts are written
            raise DecodingError(f"{name} does not encode texts ({type(error).__name__}: {error})") from error

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [N, F]."""
        parts = [self._embedded(list(texts[i : i + _AT_ONCE])) for i in range(0, len(texts), _AT_ONCE)]
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).numpy()

    def _embedded(self, texts: list[str]) -> Tensor:
        inputs = padded(texts, self._tokenizer, "cpu", on_the_left=False)  # positions count from a text's beginning
        ids, mask = (inputs[name][:, : self._most_tokens()] for name in ("input_ids", "attention_mask"))
        if self._reads_episodes:  # [authors, texts, tokens]
            return self._model(input_ids=ids[:, None], attention_mask=mask[:, None])
        output: Any = self._model(input_ids=ids, attention_mask=mask)
        states, weight = output.last_hidden_state, mask[:, :, None].to(output.last_hidden_state)
        return (states * weight).sum(1) / weight.sum(1)

    def _most_tokens(self) -> int:
        return min(self._tokenizer.model_max_length, _MOST_TOKENS)
