"""Models that chunk selection works with in transformers, and those it refuses."""

from __future__ import annotations

from figures import data

MATRIX = "chunk_models.json"
_COMPARED, _UNREAD = "chunk selection does not work with it: ", "without a selection"
_FOUND = "found when it is attached: it computes something else, or works with caches and masks of its own"
_NO_TEXT = "found when it is attached: it does not read a text alone, or returns no cache"


def version() -> str:
    """Of transformers, whose types were tried."""
    return data.read(MATRIX)["transformers"]


def working() -> str:
    """How many types."""
    return str(len(_working()))


def refused() -> str:
    """How many types."""
    return str(len(data.read(MATRIX)["types"]) - len(_working()))


def names() -> str:
    """Those that work, by name."""
    return "\n" + _listed(_working()) + "\n"


def untried() -> str:
    """Those of which no small model could be made, by name."""
    return "\n" + _listed(data.read(MATRIX)["not_built"]) + "\n"


def reasons() -> str:
    """What is refused, by reason."""
    found: dict[str, list[str]] = {}
    for kind, why in data.read(MATRIX)["types"].items():
        if why is not None:
            found.setdefault(_reason(why), []).append(kind)
    lines = sorted(found.items(), key=lambda line: (-len(line[1]), line[0]))
    return data.table([["why", "types", ""], *([why, str(len(kinds)), _listed(kinds)] for why, kinds in lines)])


def _working() -> list[str]:
    return [kind for kind, why in data.read(MATRIX)["types"].items() if why is None]


def _listed(kinds: list[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in kinds)


def _reason(why: str) -> str:
    """A refusal's sentence without what it says of one type alone."""
    _, compared, found = why.partition(_COMPARED)
    if compared:
        return _NO_TEXT if found.startswith(_UNREAD) else _FOUND
    return why.partition(" ")[2].partition(":")[0]
