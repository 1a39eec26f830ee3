"""Who is at the page, told apart: what each runs, and the texts that they brought."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from decoding.errors import DecodingError
from decoding.style.source import StyleSource


@dataclass
class Visit:
    """One open page.

    Attributes:
        styles: that it can choose from: as `Policy` takes them, by the names shown.
        run: set to stop what it runs last.
        moves: how often its slider was moved.
    """

    styles: dict[str, str]
    run: threading.Event = field(default_factory=threading.Event)
    moves: int = 0

    def begins(self) -> threading.Event:
        """Stops what it runs, for something new, and gives what will stop that."""
        self.run.set()
        self.run = threading.Event()
        return self.run

    def brings(self, path: str) -> str:
        """Makes a file that was dropped in a style, and gives its name.

        Raises:
            DecodingError: there is no text in it.
        """
        source = StyleSource.parse(path)
        if not source.is_text:
            raise DecodingError(f"{Path(path).name} is no text: drop in a text file")
        try:
            source.corpus()
        except DecodingError as error:
            raise DecodingError(str(error).replace(path, Path(path).name)) from error
        name = f"{Path(path).name} (yours)"
        self.styles[name] = path
        return name


class Visits:
    """All open pages.

    Args:
        styles: what each can choose from at first.
    """

    def __init__(self, styles: dict[str, str]):
        self._styles = styles
        self._open: dict[str, Visit] = {}
        self._lock = threading.Lock()

    def of(self, page: str) -> Visit:
        """That of a page, by the id that its requests have."""
        with self._lock:
            return self._open.setdefault(page, Visit(dict(self._styles)))

    def leaves(self, page: str) -> None:
        """Stops what a page that was closed runs, and forgets it."""
        with self._lock:
            visit = self._open.pop(page, None)
        if visit is not None:
            visit.run.set()

    def close(self) -> None:
        """Stops everything."""
        for page in list(self._open):
            self.leaves(page)
