"""Natural requests by ability and wording: what a classifier of abilities learns phrasings from, and is judged by.

One file for each ability: ``{"ability": …, "wordings": {name: …}}``. A wording has

    kept_out: whether nothing is learnt from it, so that it can judge,

and one of

    prompts: as they are;
    templates with fills: from a template's fields to pools (``pools.json``; "a+b" takes turns) or lists. A field
        in capitalized spelling ({Event}) takes its text with a capital letter;
    requests with fills: what is asked of a {text}; it stands before, behind or around it, as the "frames" of
        ``pools.json`` have it;
    layouts: solved examples. Each is a pair of templates: of a solved example of {a} and {b}, and of the open one.
        With shots (how many are solved, up to two more) and, if need be, intros and names of pairs (``pairs.json``,
        other ones for wordings that are kept out).

Wordings that are kept out take every second text of a pool, the others the rest, so that a classifier is judged by
texts as well as wordings that it never saw. All texts here were written for this purpose; pools with a ``source`` are
fields of records in the data folder, of its training half (`experiments.temperature.halves`), and wordings that are
kept out need none of those.

``apart.json`` has requests by somebody who had read nothing of all this, and system prompts:
``{ability: [{"wording": …, "prompts": […]}], "systems": […]}``. Nothing is learnt from them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from decoding.errors import DecodingError
from decoding.temperature.abilities import ABILITIES
from experiments.temperature.halves import is_for_training

_FOLDER = Path(__file__).parent
_FIELDS = {
    "prompts": {"kept_out", "prompts"},
    "templates": {"kept_out", "templates", "fills"},
    "requests": {"kept_out", "requests", "fills"},
    "layouts": {"kept_out", "layouts", "shots", "intros", "pairs"},
}
# As many at least; and each template, request, and text that a wording lists itself, as often as that at least.
PROMPTS_OF_A_WORDING = 36
_TURNS = 2
_RECORDS = 150  # of a data file, as many at most


class Wording(NamedTuple):
    """Prompts of one phrasing."""

    ability: str
    name: str
    kept_out: bool
    prompts: list[str]


def load_wordings(data: Path | None = None, kept_out: bool = False, folder: Path = _FOLDER) -> list[Wording]:
    """The wordings that are kept out, or those that are not, of all abilities in order.

    Args:
        data: the folder that sources of pools are relative to.
        kept_out: which.
        folder: of the files.

    Raises:
        DecodingError: a damaged file, or a pool's data that are missing.
    """
    pools = _Pools(data, kept_out, folder)
    found = []
    for ability in ABILITIES:
        definition = _read(folder / f"{ability}.json")
        if not isinstance(definition, dict) or definition.get("ability") != ability:
            raise DecodingError(f'{folder / ability}.json must say "ability": "{ability}"')
        for name, wording in definition["wordings"].items():
            where = f"{ability}.json, wording {name!r}"
            _check(where, wording)
            if wording["kept_out"] == kept_out:
                found.append(Wording(ability, name, kept_out, _prompts(where, wording, pools)))
    return found


def load_apart(folder: Path = _FOLDER) -> list[Wording]:
    """Requests that were written apart from all others."""
    held = _read(folder / "apart.json")
    return [Wording(a, each["wording"], True, each["prompts"]) for a in ABILITIES for each in held[a]]


def load_apart_systems(folder: Path = _FOLDER) -> list[str]:
    """The system prompts among them."""
    return list(_read(folder / "apart.json")["systems"])


def load_systems(kept_out: bool = False, folder: Path = _FOLDER) -> list[str]:
    """System prompts, as they stand before a user's text where no frame tells them apart: to learn from, or others."""
    return list(_read(folder / "pools.json")["systems"][int(kept_out) :: 2])


def load_manners(folder: Path = _FOLDER) -> list[list[str]]:
    """What people write before and behind a request: [[before, behind], …]."""
    return list(_read(folder / "pools.json")["manners"])


class _Pools:
    """Texts to fill templates with: every second one of those that stand here."""

    def __init__(self, data: Path | None, kept_out: bool, folder: Path):
        self._data, self._offset = data, int(kept_out)
        self._pools = _read(folder / "pools.json")
        self.pairs = _read(folder / "pairs.json")["kept_out" if kept_out else "learnt"]

    @property
    def frames(self) -> list[str]:
        """How a request and its text stand together."""
        return list(self._pools["frames"])

    def texts(self, pool: str | Sequence[str]) -> Sequence[str]:
        if not isinstance(pool, str):
            return pool
        parts = [self._part(self._pools[name]) for name in pool.split("+")]
        return [text for texts in zip_longest(*parts) for text in texts if text is not None]

    def _part(self, pool: Any) -> Sequence[str]:
        return self._records(pool) if isinstance(pool, dict) else pool[self._offset :: 2]

    def _records(self, pool: Mapping[str, Any]) -> list[str]:
        if self._data is None:
            raise DecodingError(f"these wordings are filled from {pool['source']}: give the data folder")
        texts = _field(self._data / pool["source"], pool["field"])
        chosen = [text for i, text in enumerate(texts) if is_for_training(pool["source"], i)]
        return [_clipped(text, pool["clip"]) for text in chosen[:: max(len(chosen) // _RECORDS, 1)]]


def _clipped(text: str, length: int) -> str:
    """Its begin, up to the end of a sentence if there is one in the second half."""
    if len(text) <= length:
        return text
    end = text.rfind(". ", length // 2, length)
    return text[: end + 1] if end > 0 else text[:length]


@cache
def _field(path: Path, name: str) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return tuple(json.loads(line)[name] for line in lines if line.strip())
    except (OSError, ValueError, KeyError) as error:
        raise DecodingError(f"cannot read {path} ({error!r}): give its folder with --data") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DecodingError(f"{path} is no file of wordings ({error})") from error


def _check(where: str, wording: Any) -> None:
    kinds = [kind for kind in _FIELDS if isinstance(wording, dict) and kind in wording]
    if len(kinds) != 1 or not isinstance(wording.get("kept_out"), bool):
        raise DecodingError(f"{where}: needs kept_out (true or false) and one of {', '.join(_FIELDS)}")
    if unknown := wording.keys() - _FIELDS[kinds[0]]:
        raise DecodingError(f"{where}: unknown field {min(unknown)!r}: choose from {', '.join(_FIELDS[kinds[0]])}")
    if not wording[kinds[0]] or not isinstance(wording[kinds[0]], list):
        raise DecodingError(f"{where}: {kinds[0]} must be a list that is not empty")


def _prompts(where: str, wording: Mapping[str, Any], pools: _Pools) -> list[str]:
    try:
        if "layouts" in wording:
            return _solved(wording, pools.pairs)
        if "fills" in wording:
            return _filled(where, wording, pools)
    except (KeyError, IndexError, ValueError, AttributeError, StopIteration) as error:
        raise DecodingError(f"{where}: no such field, pool or pair: {error}") from error
    return list(wording["prompts"])


def _filled(where: str, wording: Mapping[str, Any], pools: _Pools) -> list[str]:
    """Templates, or requests in frames, in turn, each with the next texts of the shuffled pools."""
    listed = wording.get("templates") or wording["requests"]
    lengths = [len(fill) for fill in wording["fills"].values() if not isinstance(fill, str)]
    generator = random.Random(where)
    requests = _shuffled(listed, generator)
    frames = _shuffled(pools.frames, generator)
    fills = {name: _shuffled(pools.texts(pool), generator) for name, pool in wording["fills"].items()}
    prompts = []
    for _ in range(max(PROMPTS_OF_A_WORDING, _TURNS * max(len(listed), *lengths, 1))):
        values: dict[str, str] = {}
        for name, texts in fills.items():
            most = len(values) + 1  # texts of the same pool that stand there already
            text = next(text for text in islice(texts, most) if text not in values.values())
            values |= {name: text, name.capitalize(): text[:1].upper() + text[1:]}
        if "templates" in wording:
            prompts.append(next(requests).format_map(values))
        else:
            prompts.append(next(frames).format_map(values | {"request": next(requests).format_map(values)}))
    return list(dict.fromkeys(prompts))


def _shuffled(texts: Sequence[str], generator: random.Random) -> Iterator[str]:
    """All of them again and again, each time in another order."""
    while texts:
        yield from generator.sample(list(texts), len(texts))


def _solved(wording: Mapping[str, Any], sets: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """The layouts in turn, each with the next set of pairs, from another pair on."""
    names, intros, layouts = wording.get("pairs") or list(sets), wording.get("intros") or [""], wording["layouts"]
    prompts = []
    for i in range(PROMPTS_OF_A_WORDING):
        pairs = sets[names[i % len(names)]]
        start, count = i * 3 + i // len(names), min(wording["shots"] + i % 3, len(pairs) - 1)
        shown = [pairs[(start + j) % len(pairs)] for j in range(count + 1)]
        solved, last = layouts[(i + i // len(layouts)) % len(layouts)]
        parts = [solved.format(a=a, b=b) for a, b in shown[:-1]]
        prompts.append(intros[i // 2 % len(intros)] + "".join(parts) + last.format(a=shown[-1][0], b=""))
    return list(dict.fromkeys(prompts))
