"""What a user asks for, out of the tokens that a model reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product, starmap
from os.path import commonprefix
from typing import Any

from decoding.tokens import control_ids, pad_id

# Texts that no template contains or changes, by which its renderings are taken apart.
_SYSTEM, _FIRST, _ANSWER, _SECOND, _RESULT = (f"☃{name}☃" for name in ("system", "first", "answer", "second", "result"))
_Turns = list[dict[str, Any]]
_PROMPTED: _Turns = [{"role": "system", "content": _SYSTEM}]
_ASKED: _Turns = [{"role": "user", "content": _FIRST}]
_ASKED_AGAIN: _Turns = [*_ASKED, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _SECOND}]
_CONVERSATIONS = (_ASKED, _PROMPTED + _ASKED, _ASKED_AGAIN, _PROMPTED + _ASKED_AGAIN)
_TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
_CALL = {"id": "000000001", "type": "function", "function": {"name": "look", "arguments": {}}}
_CALLED: _Turns = [
    *_ASKED,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": _RESULT, "name": "look", "tool_call_id": "000000001"},
]

# Control tokens stand between these: a text that spells one is not mistaken for it.
_BEGIN, _END = "\x02", "\x03"
_CONTROL = re.compile(f"{_BEGIN}.*?{_END}")
_UNIT = re.compile(f"{_CONTROL.pattern}|.", re.DOTALL)
_WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")  # in Chinese and Japanese a character
_FEW_WORDS = 4
# How system prompts begin; and a paragraph, if another follows.
_ADDRESS = (
    r"you(?:['’]re| are| work| will be| answer for)|your (?:name|role|task|job) is|as an (?:ai|assistant)|the assistant"
    r"|a chat between|system(?: prompt)?:|(?:your )?role"
)
_ADDRESSED = re.compile(rf"\A\W*(?:{_ADDRESS})(?!\w).*?\n\s*\n(?=\s*\S)", re.DOTALL | re.IGNORECASE)


class PromptFrame:
    """Takes what the user asks for out of a prompt, whatever a chat template puts around it.

    That is the text of the last user turn: what stands between the marker of users and that of the turn's end, or of an
    answer, both found by rendering the template. System prompts, earlier turns, tools and their results, dates,
    thinking, answers that have begun and padding are left out. A turn of at most four words ("shorter", "and now in
    German") says too little by itself: the user's turn before stands above it, on a line of its own, and so on back to
    one of more words.

    Without a template, or in a prompt without its markers, all text counts, special tokens left out. Where a template
    joins a system prompt to the user's text by a blank line alone, as some of Mistral's do, nothing says where it ends:
    a first paragraph that speaks to the assistant about itself ("You are …", "Your role is …") is taken for one.

    Args:
        tokenizer: of the generating model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._controls = {i: name for i in control_ids(tokenizer) if (name := tokenizer.convert_ids_to_tokens(i))}
        self._markers = _markers_of(self._rendered) or _markers_of(partial(self._rendered, in_parts=True))

    def text_of(self, ids: Sequence[int]) -> str:
        """The prompt's text, "" if it has none. ``ids`` may begin and end with padding."""
        pad = pad_id(self._tokenizer)
        kept = [i for i, token in enumerate(ids) if token != pad]
        ids = list(ids[kept[0] : kept[-1] + 1]) if kept else []
        turns = self._markers.turns(self._marked(ids)) if self._markers else []
        return _request(turns) if turns else self._tokenizer.decode(ids, skip_special_tokens=True)

    def _marked(self, ids: list[int]) -> str:
        decode = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        runs = ((name, list(run)) for name, run in groupby(ids, self._controls.get))
        return "".join(f"{_BEGIN}{name}{_END}" * len(run) if name else decode(run) for name, run in runs)

    def _rendered(self, turns: _Turns, in_parts: bool = False, **options: Any) -> str | None:
        """What the template makes of turns, control tokens marked; None if that is an error."""
        if in_parts:  # Some templates take parts, texts or images, alone.
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, **options)
        except Exception:  # Templates are programs, and raise what they like. There may be none.
            return None
        names = [re.escape(name) for name in sorted(self._controls.values(), key=len, reverse=True) if name in text]
        return re.sub("|".join(names), lambda found: f"{_BEGIN}{found[0]}{_END}", text) if names else text


def _request(turns: list[str]) -> str:
    says_enough = [i for i, turn in enumerate(turns) if len(_WORD.findall(turn)) > _FEW_WORDS]
    return "\n".join(filter(None, turns[max(says_enough, default=0) :]))


@dataclass(frozen=True)
class _Markers:
    """Where user turns begin and end, and what a template adds within them."""

    opening: re.Pattern[str]
    closing: re.Pattern[str] | None  # a turn as its group, and its end
    system: re.Pattern[str] | None = None  # a system prompt in the first turn
    tools: re.Pattern[str] | None = None  # what introduces tools in the first turn; JSON follows
    result: re.Pattern[str] | None = None  # how a turn begins that is a tool's result, and no user's

    def turns(self, text: str) -> list[str]:
        """What the user said, turn by turn."""
        found = list(self.opening.finditer(text))
        stops = [each.start() for each in found[1:]] + [len(text)]
        turns = (self._said(text[each.end() : stop]) for each, stop in zip(found, stops, strict=False))
        return [turn for turn in turns if not (self.result and self.result.match(turn))]

    def _said(self, text: str) -> str:
        closed = self.closing and self.closing.match(text)
        text = _CONTROL.sub("", closed[1] if closed else text).strip()
        text = self.system.sub("", text).strip() if self.system else text
        introduced = self.tools and self.tools.match(text)
        return text[_end_of_json(text, introduced.end()) :].strip() if introduced else text


def _markers_of(render: Callable[..., str | None]) -> _Markers | None:
    """The markers that find the user's turns in all that a template renders; None if there are none."""
    pairs = [(turns, render(turns, add_generation_prompt=end)) for turns in _CONVERSATIONS for end in (True, False)]
    renderings = [(turns, text) for turns, text in pairs if text]
    around = [each for turns, text in renderings for each in _around_users(turns, text)]
    around.sort(key=lambda each: (each[0] != "assistant", each[0] == "system"))  # what says most comes first
    openings = _openings(_shared([before for _, before, _ in around], from_end=True))
    closings = _closings(_shared([behind for _, _, behind in around]))
    for markers in starmap(_Markers, product(openings, closings)):
        if all(_finds(markers, turns, text) for turns, text in renderings):
            return _with_additions(markers, render)
    return None


def _around_users(turns: _Turns, text: str) -> Iterator[tuple[str, str, str]]:
    """For each user turn the role before it, and what stands before and behind its text; nothing if texts moved."""
    parts, roles = re.split("(☃[a-z]+☃)", text), [turn["role"] for turn in turns]
    if parts[1::2] == [turn["content"] for turn in turns]:
        pairs = zip(["", *roles], roles, parts[::2], parts[2::2], strict=False)
        yield from ((last, before, behind) for last, role, before, behind in pairs if role == "user")


def _finds(markers: _Markers, turns: _Turns, text: str) -> bool:
    said, found = [turn["content"] for turn in turns if turn["role"] == "user"], markers.turns(text)
    return len(found) == len(said) and all(map(str.endswith, found, said))


def _shared(texts: list[str], from_end: bool = False) -> list[str]:
    """The characters and control tokens that texts begin or end with, but for those that share none."""
    step = -1 if from_end else 1
    found, *others = [_UNIT.findall(text)[::step] for text in texts if text.strip()] or [[]]
    for common in (commonprefix([found, other]) for other in others):
        found = found[: len(common)] if "".join(common).strip() else found
    return found[::step]


def _openings(units: list[str]) -> Iterator[re.Pattern[str]]:
    """What can be the marker of users, the shortest first: a model may end its turn otherwise than the template."""
    controls = [i for i, unit in enumerate(units) if unit.startswith(_BEGIN)]
    for place in [*reversed(controls), 0] if units else []:
        if not controls:  # Plain text, which a user may spell too: best at the start, or behind a control token.
            yield re.compile(rf"(?:\A|(?<={_END}))\s*{_pattern(units)}")
        yield re.compile(_pattern(units[place:]))


def _closings(units: list[str]) -> list[re.Pattern[str] | None]:
    """What can match a turn up to its end: a control token, or plain text, best its last place: a user may spell it."""
    ends = [i + 1 for i, unit in enumerate(units) if unit.startswith(_BEGIN)]
    pattern = _pattern(units[: ends[0]] if ends else units)
    texts = [".*?"] if ends else [".*", ".*?"]
    return [re.compile(f"({text}){pattern}", re.DOTALL) for text in texts] if units else [None]


def _pattern(units: Sequence[str]) -> str:
    """A pattern of a marker with any space or none, which tokenizers change, between its words."""
    text = "".join(units)
    words = re.findall(f"{_CONTROL.pattern}|[^{_BEGIN}\\s]+", text)
    return r"\s*".join(map(re.escape, words)) + (r"\b" if re.search(r"\w\s+$", text) else "")


def _with_additions(markers: _Markers, render: Callable[..., str | None]) -> _Markers:
    def last(turns: _Turns, **options: Any) -> str:
        return "".join(markers.turns(render(turns, add_generation_prompt=True, **options) or "")[-1:])

    before, _, behind = last(_PROMPTED + _ASKED).removesuffix(_FIRST).partition(_SYSTEM)
    if before.strip() and behind.strip():
        markers = replace(markers, system=re.compile(rf"\A{_pattern(before)}.*?{_pattern(behind)}", re.DOTALL))
    elif behind.count("\n") > 1:
        markers = replace(markers, system=_ADDRESSED)
    before = last(_ASKED, tools=[{"type": "function", "function": _TOOL}]).removesuffix(_FIRST)
    place = next((i for i in range(len(before)) if before[i] in "[{" and _end_of_json(before, i)), 0)
    markers = replace(markers, tools=re.compile(_pattern(before[:place]))) if place else markers
    before, found, _ = last(_CALLED).partition(_RESULT)
    return replace(markers, result=re.compile(_pattern(before))) if found and before.strip() else markers


def _end_of_json(text: str, place: int) -> int:
    """Where JSON that names tools ends, one behind the other from a place on; 0 if there is none."""
    beginning, end = re.compile(r"[\s,]*(?=[{\[])"), 0
    with suppress(ValueError):
        while begin := beginning.match(text, end or place):
            stop = json.JSONDecoder().raw_decode(text, begin.end())[1]
            if '"name"' not in text[begin.end() : stop]:
                break
            end = stop
    return end
