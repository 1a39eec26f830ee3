"""What users call a style, told apart once: a registered name, a text, a saved prior, a saved style, a hub id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from decoding.errors import DecodingError
from decoding.files import exists
from decoding.hub import may_be_hub_id
from decoding.style.files import SavedStyle, load_prior, read_folder, saved_kind
from decoding.style.opening import is_address, unpacked_name
from decoding.style.readers import has_known_suffix, read_documents
from decoding.style.registered import registered_documents, registered_styles
from decoding.tokens import text_fingerprint
from ngram import NGramModel

Kind = Literal["registered", "text", "prior", "style", "hub"]
_SHOWN = 80  # characters of what is no path


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
        return text_fingerprint(self.documents)


@dataclass(frozen=True)
class StyleSource:
    """Where a style comes from.

    Attributes:
        name: how tables and pictures call it.
        kind: "registered" or "text", which become a prior for a tokenizer; "prior", a file of ``decoding style train``;
            "style", a folder of `StylePrior.save_pretrained`, whose settings apply; "hub", such a folder there.
        where: the registered name, the path, or the hub id.
        field: the field that holds the text, in a file that has fields.
        unwrap: whether hard-wrapped lines are to be joined; of "text". None as for `decoding.style.text.prose`.
        is_named: whether the user named it, so that a saved prior's own name does not count.
    """

    name: str
    kind: Kind
    where: str
    field: str | None = None
    unwrap: bool | None = None
    is_named: bool = False

    @classmethod
    def parse(
        cls, spec: str | PathLike | StyleSource, field: str | None = None, *, unwrap: bool | None = None
    ) -> StyleSource:
        """Tells what a user means.

        Args:
            spec: a registered name, a text file, a folder of texts, a file with fields, the address of a file
                (``s3://…``, ``https://…``), a saved prior, a folder of `StylePrior.save_pretrained`, or a hub id.
                ``NAME=SPEC`` names it; ``FILE.jsonl#FIELD`` has the field. What was told already stays as it is.
            field: of texts in files, where ``spec`` gives none.
            unwrap: as the attribute.

        Raises:
            DecodingError: none of these, or a field of what has none.
        """
        if isinstance(spec, StyleSource):
            return spec
        if not isinstance(unwrap, bool | None):
            raise DecodingError(f"unwrap must be True, False or None, not {unwrap!r}")
        name, where = _split_name(str(spec))
        own = None
        if not exists(where) and "#" in where:
            where, _, own = where.rpartition("#")
        kind = _kind_of(where)
        if own is not None and kind != "text":
            raise DecodingError(f"style {where} is {_WHAT[kind]} and has no field {own!r}")
        field = own or (field if kind == "text" else None)
        own_name = Path(where).name if kind == "hub" else Path(unpacked_name(where)).stem
        return cls(name or own_name, kind, where, field, unwrap, bool(name))

    def name_of(self, model: NGramModel) -> str:
        """The name that counts, given the saved prior's own."""
        return self.name if self.is_named else model.metadata.get("style", self.name)

    @property
    def served_name(self) -> str:
        """How a server calls it that is not told a name: as what was saved calls itself, else `name`."""
        return self.name_of(self.saved().model) if self.kind in ("prior", "style") else self.name

    @property
    def is_text(self) -> bool:
        """Whether there are texts, from which a prior can be trained for any tokenizer."""
        return self.kind in ("registered", "text")

    def require_text(self) -> None:
        """Refuses a saved prior or style.

        Raises:
            DecodingError: it is one.
        """
        if not self.is_text:
            raise DecodingError(f"style {self.where} is {_WHAT[self.kind]}: what is wanted here is its text")

    def texts(self) -> Iterator[str]:
        """One after the other, without blank ones.

        Raises:
            DecodingError: a saved prior or style, or texts that cannot be read.
        """
        self.require_text()
        if self.kind == "registered":
            found: Iterable[str] = registered_documents(self.where) or []
        else:
            found = read_documents(self.where, self.field, self.unwrap)
        return (text for text in found if text.strip())

    def corpus(self) -> Corpus:
        """The texts together.

        Raises:
            DecodingError: a saved prior or style, or texts that cannot be read, or none that is not blank.
        """
        documents = tuple(self.texts())
        if not documents:
            raise DecodingError(f"style corpus {self.where} holds no text")
        return Corpus(self.name, documents)

    def saved(self, tokenizer: Any | None = None, hub: dict[str, Any] | None = None) -> SavedStyle:
        """What was saved.

        Args:
            tokenizer: checked against the prior's fingerprint, if given.
            hub: options of ``hf_hub_download``.

        Raises:
            DecodingError: texts, nothing there, something damaged, or a prior of another tokenizer.
        """
        if self.is_text:
            raise DecodingError(f"style {self.where} is {_WHAT[self.kind]}, not a saved prior")
        if self.kind == "prior":
            return SavedStyle(load_prior(self.where, tokenizer))
        return read_folder(self.where, tokenizer, hub or {})


_WHAT: dict[Kind, str] = {
    "registered": "a registered text",
    "text": "a text",
    "prior": "a saved prior",
    "style": "a saved style",
    "hub": "a saved style on the hub",
}


def load_corpus(spec: str | PathLike | StyleSource, field: str | None = None, *, unwrap: bool | None = None) -> Corpus:
    """Reads a text, as `StyleSource.parse` and `StyleSource.corpus` have it."""
    return StyleSource.parse(spec, field, unwrap=unwrap).corpus()


def _split_name(spec: str) -> tuple[str, str]:
    """``NAME=SPEC`` as its two parts; without a name, or if a file is called that, "" and the whole."""
    name, equals, source = spec.partition("=")
    is_named = equals and "/" not in name and not exists(spec)  # a folder may be called run=3
    return (name, source) if is_named else ("", spec)


def _kind_of(where: str) -> Kind:
    if where in registered_styles():
        return "registered"
    if (saved := saved_kind(where)) is not None:
        return saved
    if exists(where) or is_address(where):
        return "text"
    if may_be_hub_id(where) and not has_known_suffix(where):
        return "hub"
    shown = where if len(where) <= _SHOWN else f"{where[:_SHOWN]}…"
    raise DecodingError(
        f"no style {shown!r}: give a registered name ({', '.join(registered_styles())}), a text file, a folder of "
        "text files, a file with its field (FILE.jsonl#FIELD), a saved prior, or a hub id; a text itself goes into a "
        "file"
    )


def require_distinct(names: Sequence[str]) -> None:
    """Refuses styles of one name.

    Raises:
        DecodingError: as said.
    """
    if len(set(names)) < len(names):
        raise DecodingError(f"two styles have one name ({', '.join(names)}): name them with NAME=SPEC")
