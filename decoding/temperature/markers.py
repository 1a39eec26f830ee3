"""The markers of thinking: what they are for a tokenizer, and which texts are within thinking, by token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from chunkllm.late import send
from decoding.errors import DecodingError
from decoding.tokens import added_tokens

Spelling = Sequence[Sequence[int]]  # the ids that may stand at each place of a marker
_MOST_PLACES = 62  # of all spellings together: a bit for each in an int64
_SPACES = "\u2581\u0120"  # how vocabularies write the space before a word


class Markers:
    """Tells which texts are within thinking: those whose last marker is one that begins it.

    Args:
        begin: the spellings of the marker that begins thinking, one of which must be there.
        end: likewise of the one that ends it.

    Attributes:
        length: the most tokens that a marker has.

    Raises:
        DecodingError: spellings with more than 62 tokens in all.
    """

    def __init__(self, begin: Sequence[Spelling], end: Sequence[Spelling]):
        spellings = [*begin, *end]
        self.length = max(map(len, spellings))
        if sum(map(len, spellings)) > _MOST_PLACES:
            raise DecodingError(f"markers of thinking can have {_MOST_PLACES} tokens in all: give shorter ones")
        self._first = self._begin = self._end = 0
        known = max(id_ for spelling in spellings for place in spelling for id_ in place) + 1
        self._places = torch.zeros(known + 1, dtype=torch.int64)  # the last row is for all other ids
        bit = 1
        for number, spelling in enumerate(spellings):
            self._first |= bit
            for place in spelling:
                self._places[torch.tensor(place)] |= bit
                last, bit = bit, bit << 1
            if number < len(begin):
                self._begin |= last
            else:
                self._end |= last

    def thinking(self, ids: Tensor, before: Tensor | bool = False) -> Tensor:
        """Whether each text is within thinking. Waits for no device, but to get there itself at the first call.

        A marker counts once its last token is there. All spellings are searched for at once by Shift-And (Baeza-Yates
        and Gonnet 1992): a token's bits say at which places it may stand, those of a run of tokens which places it
        has come to.

        Args:
            ids: int32 or int64 [B, L]; −1 stands for no token.
            before: bool [B] or one, for texts without a marker.

        Returns:
            bool [B].
        """
        if self._places.device != ids.device:
            self._places = send(self._places, ids.device)
        allowed = pad(self._places[ids.clamp(-1, len(self._places) - 1)], (1, 0))  # a place 0 before the text
        come_to = allowed & self._first
        for _ in range(self.length - 1):
            come_to = allowed & (pad(come_to[:, :-1] << 1, (1, 0)) | self._first)
        places = torch.arange(allowed.shape[1], device=ids.device)
        begun, ended = (((come_to & last) != 0).mul(places).amax(-1) for last in (self._begin, self._end))
        return torch.where((begun > 0) | (ended > 0), begun > ended, before)


class _Known(NamedTuple):
    begin: str
    end: str
    tokens: tuple[str, ...] = ()  # that a vocabulary must have: by default the two


_KNOWN = (
    _Known("<think>", "</think>"),
    _Known("<|START_THINKING|>", "<|END_THINKING|>"),
    _Known("[THINK]", "[/THINK]"),
    _Known("<seed:think>", "</seed:think>"),
    _Known("<mm:think>", "</mm:think>"),
    _Known("◁think▷", "◁/think▷"),
    _Known("<thought>", "</thought>"),
    _Known("<|begin_of_thought|>", "<|end_of_thought|>"),
    _Known("<|channel>", "<channel|>"),
    _Known("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", ("<|channel|>", "<|message|>")),
)


def markers_of(tokenizer: Any, begin: str | None = None, end: str | None = None) -> Markers:
    """The markers of thinking in a tokenizer's ids.

    Args:
        tokenizer: the generating model's.
        begin: the text that begins thinking. By default both are those that the chat template knows of, or else those
            that are tokens of the vocabulary.
        end: the text that ends it.

    Raises:
        DecodingError: none given and none found; or as `checked_markers`; or a text that the tokenizer cannot spell.
    """
    begin, end = checked_markers(begin, end) or known_markers(tokenizer)
    return Markers(list(_spellings(tokenizer, begin)), list(_spellings(tokenizer, end)))


def checked_markers(begin: Any, end: Any) -> tuple[str, str] | None:
    """Markers from outside; None where there are none.

    Raises:
        DecodingError: one without the other, no texts, or the one that ends thinking a part of the one that begins it.
    """
    if begin is None and end is None:
        return None
    if not all(isinstance(marker, str) and marker for marker in (begin, end)):
        raise DecodingError(f"thinking needs two markers, begin and end, both of them texts: not {begin!r} and {end!r}")
    if end in begin:
        raise DecodingError(f"what ends thinking cannot be a part of what begins it: {end!r} stands in {begin!r}")
    return begin, end


def known_markers(tokenizer: Any) -> tuple[str, str]:
    """The texts that begin and end thinking, of those that are known: the chat template's, or the vocabulary's.

    Raises:
        DecodingError: there are none.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for known in _KNOWN:  # templates that leave earlier thinking out name its end alone
        if known.end in template:
            return known.begin, known.end
    for known in _KNOWN:
        if all(_is_token(tokenizer, token) for token in known.tokens or (known.begin, known.end)):
            return known.begin, known.end
    raise DecodingError(
        "neither the chat template nor the vocabulary of this model has markers of thinking that are known, such as "
        f"{_KNOWN[0].begin} and {_KNOWN[0].end}: give the model's own as begin and end, or use one temperature for all"
    )


def _is_token(tokenizer: Any, text: str) -> bool:
    id_ = tokenizer.convert_tokens_to_ids(text)
    return id_ is not None and tokenizer.convert_ids_to_tokens(id_) == text


def _spellings(tokenizer: Any, marker: str) -> Iterator[Spelling]:
    """How the ids of texts with a marker may spell it: tokenizers split some letters in another way behind a stop."""
    alone = _read(tokenizer, marker)
    if not alone or tokenizer.unk_token_id in [id_ for id_, _ in alone]:
        raise DecodingError(f"this tokenizer cannot spell {marker!r}, which should be a marker of thinking")
    yield _places(tokenizer, alone)
    behind = _read(tokenizer, marker, before=".")
    texts = [[text for _, text in each] for each in (alone, behind)]
    if texts[0] != texts[1] and "".join(texts[0]) == "".join(texts[1]):
        yield _places(tokenizer, behind)


def _read(tokenizer: Any, marker: str, before: str = "") -> list[tuple[int, str]]:
    """Ids, with what the vocabulary writes for each, less the space and what stands before."""
    ids = tokenizer(before + marker, add_special_tokens=False)["input_ids"]
    texts = tokenizer.convert_ids_to_tokens(ids)
    first = [text.lstrip(_SPACES).removeprefix(before) for text in texts[:1]]
    return [(id_, text) for id_, text in zip(ids, first + texts[1:], strict=True) if text]


def _places(tokenizer: Any, read: list[tuple[int, str]]) -> Spelling:
    """The ids that may stand at each place.

    A token of plain text may have the space before it. Punctuation at a marker's edges may have grown together with its
    neighbours, as in ``.</`` and ``>\\n``.
    """
    places = [[id_] for id_, _ in read]
    added = added_tokens(tokenizer)
    (first_id, first), (last_id, last) = read[0], read[-1]
    if first_id in added and last_id in added:
        return places
    plain = [(text, id_) for text, id_ in tokenizer.get_vocab().items() if id_ not in added]
    is_longer = len(read) > 1
    if first_id not in added:
        grows = is_longer and not first[0].isalnum()
        places[0] = [id_ for text, id_ in plain if text.lstrip(_SPACES) == first or (grows and text.endswith(first))]
    if is_longer and last_id not in added and not last[-1].isalnum():
        places[-1] = [id_ for text, id_ in plain if text.startswith(last)]
    return places
