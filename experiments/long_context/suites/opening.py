"""The tasks of the suites that a user asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from decoding.errors import DecodingError
from decoding.style.source import Corpus
from experiments.long_context.suites import completion, longbench, ruler
from experiments.long_context.suites.questions import Questions
from experiments.long_context.suites.tasks import Task

SUITES = (ruler.SUITE, longbench.SUITE, completion.SUITE)


def open_tasks(
    suites: Sequence[str],
    texts: Sequence[Corpus],
    code: Sequence[Corpus],
    questions: Mapping[str, Path],
    folder: Path | None,
    chosen: Sequence[str] = (),
) -> dict[str, Task]:
    """Tasks by name, in the order of their suites.

    Args:
        suites: of `SUITES`; others are left out.
        texts: that RULER hides things in.
        code: to be completed.
        questions: files with questions for RULER, by what its tasks are called after "qa_".
        folder: LongBench's.
        chosen: names of the tasks to keep; all, if there are none.

    Raises:
        DecodingError: something is missing, or superfluous.
    """
    if folder is None and longbench.SUITE in suites:
        raise DecodingError("--suite longbench wants --longbench FOLDER")
    found = {task.name: task for task in _all(suites, texts, code, questions, folder)}
    if unknown := [name for name in chosen if name not in found]:
        raise DecodingError(f"no task {unknown[0]!r}: choose from {'; '.join(found) or 'none, without a --suite'}")
    return {name: task for name, task in found.items() if not chosen or name in chosen}


def _all(
    suites: Sequence[str],
    texts: Sequence[Corpus],
    code: Sequence[Corpus],
    questions: Mapping[str, Path],
    folder: Path | None,
) -> Iterator[Task]:
    if ruler.SUITE in suites:
        asked = {name: Questions.read(path) for name, path in questions.items()}
        yield from ruler.tasks(ruler.Haystack(_documents(texts)), asked)
    if folder is not None:
        yield from longbench.tasks(folder)
    if completion.SUITE in suites:
        yield completion.NextLine(_documents(code))


def _documents(corpora: Sequence[Corpus]) -> list[str]:
    return [document for corpus in corpora for document in corpus.documents]


def digests(questions: Mapping[str, Path], folder: Path | None) -> dict[str, str]:
    """SHA-256 of what tasks are made of, by name."""
    paths = {f"qa_{name}": path for name, path in questions.items()}
    if folder is not None:
        found = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".txt"))
        paths |= {str(path.relative_to(folder)): path for path in found}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
