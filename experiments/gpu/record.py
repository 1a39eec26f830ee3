"""What one piece found: a JSON file that is whole at any time, and written anew whenever something is added."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from decoding.environment import engines, environment
from experiments.lab.figures import Figure
from ngram.storage import write_atomically

RUNNING, DONE, FAILED = "running", "done", "failed"
TIMED_OUT, NOT_RUN, INTERRUPTED = "timed out", "not run", "interrupted"
CARD, TOY = "card", "toy: nothing here is a speed"


class Record:
    """Checks and figures of one piece.

    A figure names the checks that it rests on, and is written only where all of them have passed.

    Args:
        path: the file.
        piece: the piece's name.
        card: what `experiments.lab.device.card` says.
        settings: the piece's.
        is_toy: whether sizes are so small that nothing is a speed. Figures have no targets then.
    """

    def __init__(self, path: Path, piece: str, card: dict[str, Any], settings: dict[str, Any], is_toy: bool):
        self._path, self._is_toy = path, is_toy
        here = environment()
        self._content: dict[str, Any] = {
            "piece": piece,
            "status": RUNNING,
            "why": None,
            "seconds": None,
            "sizes": TOY if is_toy else CARD,
            **here | {"versions": here["versions"] | engines()},
            "card": card,
            "settings": settings,
            "checks": [],
            "figures": [],
        }
        self._write()

    def _write(self) -> None:
        write(self._path, self._content)

    def note(self, **about: Any) -> None:
        """Adds to the settings what was found out on the way."""
        self._content["settings"] |= about
        self._write()

    def end(self, status: str, why: str | None = None) -> None:
        """Says how the piece has ended, and why."""
        self._content |= {"status": status, "why": why}
        self._write()

    def check(self, name: str, work: Callable[[], tuple[bool, str]]) -> bool:
        """Makes a check.

        Args:
            name: what holds if it passes.
            work: says whether it passed, and what was seen. Where it raises something, it has not passed.

        Returns:
            Whether it passed.
        """
        try:
            passed, seen = work()
        except Exception as error:  # whatever is wrong with it, the piece goes on
            passed, seen = False, said(error)
        self._content["checks"].append({"name": name, "passed": bool(passed), "seen": seen})
        self._write()
        return bool(passed)

    def passed(self, *names: str) -> bool:
        """Whether all of these checks were made, and passed each time."""
        return self._missing(names) is None

    def _missing(self, names: Sequence[str]) -> str | None:
        verdicts = {
            name: [each["passed"] for each in self._content["checks"] if each["name"] == name] for name in names
        }
        return next((name for name, seen in verdicts.items() if not seen or not all(seen)), None)

    def figure(self, figure: Figure, *needs: str) -> None:
        """Adds a figure; without its value, where a check that it needs has not passed.

        Args:
            figure: what was measured.
            needs: names of checks, one at least.
        """
        if not needs:
            raise ValueError(f"{figure.what}: which check does it rest on?")
        if self._is_toy:
            figure = replace(figure, target="", met=None)
        if (missing := self._missing(needs)) is not None:
            figure = replace(figure, value=None, shown=f"not written: not passed: {missing}", met=None)
        self._content["figures"].append(asdict(figure) | {"needs": list(needs)})
        self._write()

    def absent(self, what: str, why: str, target: str = "") -> None:
        """Adds a line that has no figure here."""
        target = "" if self._is_toy else target
        self._content["figures"].append(asdict(Figure(what, None, f"not measured: {why}", target)) | {"needs": []})
        self._write()


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a record."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none, or a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def close(path: Path, piece: str, status: str, why: str | None, seconds: float) -> dict[str, Any]:
    """Says how a piece ended; what it had found stays. Returns the record."""
    content = read(path) or {"piece": piece, "checks": [], "figures": []}
    content |= {"status": status, "why": why, "seconds": round(seconds, 1)}
    write(path, content)
    return content
