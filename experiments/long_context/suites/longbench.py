"""LongBench's data sets (Bai et al. 2024, arXiv 2308.14508), and LongBench v2 (arXiv 2412.15204), from a folder.

The folder is that of a release: ``config/dataset2prompt.json`` and ``dataset2maxlen.json`` with ``data/*.jsonl``. Of v2
it is ``prompts/0shot.txt`` with ``data.json`` or ``data.jsonl``. What does not fit is cut in its middle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoding.errors import DecodingError
from decoding.style.opening import read_lines, read_text
from experiments.long_context.suites import scores
from experiments.long_context.suites.scores import Score
from experiments.long_context.suites.tasks import Example, Task, Window

SUITE = "longbench"
_SCORES: Mapping[str, Score] = {
    "narrativeqa": scores.f1,
    "qasper": scores.f1,
    "multifieldqa_en": scores.f1,
    "multifieldqa_zh": scores.chinese_f1,
    "hotpotqa": scores.f1,
    "2wikimqa": scores.f1,
    "musique": scores.f1,
    "dureader": scores.chinese_rouge,
    "gov_report": scores.rouge,
    "qmsum": scores.rouge,
    "multi_news": scores.rouge,
    "vcsum": scores.chinese_rouge,
    "trec": scores.classified,
    "triviaqa": scores.f1,
    "samsum": scores.rouge,
    "lsht": scores.classified,
    "passage_count": scores.counted,
    "passage_retrieval_en": scores.retrieved,
    "passage_retrieval_zh": scores.retrieved,
    "lcc": scores.similar_code,
    "repobench-p": scores.similar_code,
}
_V2 = "longbench_v2"
_V2_FIELDS = {
    "$DOC$": "context", "$Q$": "question", "$C_A$": "choice_A", "$C_B$": "choice_B", "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}  # fmt: skip
_V2_TOKENS = 128
# Prompts that are shots already: no chat template goes around them.
_SHOTS = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
_OF_ONE_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
_ENDING_A_LINE = frozenset({"samsum"})


@dataclass(frozen=True, eq=False)
class DataSet:
    """One of LongBench's.

    Attributes:
        rows: its examples.
        template: of a prompt, with a row's fields in braces; of v2 with its own marks.
        new_tokens: of an answer.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    template: str
    new_tokens: int

    def example(self, number: int, window: Window) -> Example:
        """See `Task`."""
        if number >= len(self.rows):
            raise DecodingError(f"{self.name} has {len(self.rows)} examples: choose fewer --examples")
        return window.cut(self._made(self.rows[number]))

    def _made(self, row: Mapping[str, Any]) -> Example:
        try:
            if self.name == _V2:
                prompt = self.template
                for mark, field in _V2_FIELDS.items():
                    prompt = prompt.replace(mark, row[field].strip())
                return Example(prompt, "", (row["answer"],), self.new_tokens)
            return Example(
                self.template.format(**row),
                "",
                tuple(row["answers"]),
                self.new_tokens,
                tuple(row["all_classes"] or ()),
                self.name not in _SHOTS,
                self.name in _ENDING_A_LINE,
            )
        except (KeyError, TypeError) as error:
            raise DecodingError(f"a row of {self.name} lacks {error}: is it LongBench's?") from error

    def score(self, written: str, example: Example) -> float:
        """See `Task`."""
        if self.name in _OF_ONE_LINE:
            written = written.lstrip("\n").split("\n")[0]
        score = scores.letter_chosen if self.name == _V2 else _SCORES[self.name]
        return max(score(written, answer, example.choices) for answer in example.answers)


def tasks(folder: Path) -> Iterator[Task]:
    """The data sets that a folder holds.

    Raises:
        DecodingError: none, or a file is missing or damaged.
    """
    if (folder / "prompts" / "0shot.txt").is_file():
        found = [folder / name for name in ("data.json", "data.jsonl") if (folder / name).is_file()]
        if not found:
            raise DecodingError(f"{folder} has LongBench v2's prompts, but no data.json and no data.jsonl")
        template = read_text(folder / "prompts" / "0shot.txt")
        yield DataSet(_V2, _rows(found[0]), template, _V2_TOKENS)
        return
    templates, lengths = (_json(folder / "config" / f"dataset2{name}.json") for name in ("prompt", "maxlen"))
    names = [name for name in _SCORES if (folder / "data" / f"{name}.jsonl").is_file()]
    if not names:
        raise DecodingError(f"{folder / 'data'} holds none of LongBench's files, such as qasper.jsonl")
    for name in names:
        yield DataSet(name, _rows(folder / "data" / f"{name}.jsonl"), templates[name], lengths[name])


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return _json(path)
    return [_parsed(path, line) for line in read_lines(path) if line.strip()]


def _json(path: Path) -> Any:
    return _parsed(path, read_text(path))


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DecodingError(f"{path} is no JSON: {error}") from error
