"""Tasks whose answers can be scored: each a small JSON file in ``tasks/``, over records of a JSON-lines file.

Other packages add more (`decoding.hooks.TASKS`).

A definition's fields:
    name, suites: of "abilities", "superglue", "prompts" (for classification alone); ability: one of the six.
    source: the records' file, relative to the data folder, or records: themselves.
    where: fields that a record must have. expand: see `_EXPANDED`.
    clip: longest text of a field, in characters. variants: additional fields, one set for each record in turn.
    shots: solved examples (source, count, template) that stand in a template as {shots}, of the record's half.
    swapped: two fields, proposals whose values change places in half of the prompts, as do the two labels.
    templates: prompts; the first is for scores, all of them teach the classifier what the task may look like.
    chat: whether the model's chat template goes around the prompt.
    answer: what is right, or answers: a field with several; labels: from values of the answer to what is written.
    parser: how an output is read, metric: how it is scored, max_new_tokens: how long it may be.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from decoding import hooks
from decoding.errors import DecodingError
from decoding.temperature.abilities import ABILITIES
from experiments.temperature import task_metrics
from experiments.temperature.halves import is_for_training

_FOLDER = Path(__file__).with_name("tasks")


class Item(NamedTuple):
    """One prompt of a task."""

    position: int  # among all of the task
    prompt: str
    answers: list[str]
    record: dict[str, Any]
    training: bool  # which half of the data the record belongs to


@dataclass(frozen=True, eq=False)
class Task:
    """A task's definition, as its file has it."""

    name: str
    suites: list[str]
    templates: list[str]
    source: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    ability: str | None = None
    chat: bool = False
    parser: str = "text"
    metric: str | None = None
    max_new_tokens: int = 64
    where: dict[str, Any] = field(default_factory=dict)
    expand: str | None = None
    clip: dict[str, int] = field(default_factory=dict)
    variants: list[dict[str, str]] = field(default_factory=list)
    shots: dict[str, Any] | None = None
    swapped: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    answer: str | None = None
    answers: str | None = None

    def items(self, data: Path, limit: int | None = None, *, all_templates: bool = False) -> list[Item]:
        """The task's prompts.

        Args:
            data: the folder that ``source`` is relative to.
            limit: how many at most, evenly spread over the file.
            all_templates: use the templates in turn, and not the first alone.

        Raises:
            DecodingError: the file or one of its fields is missing.
        """
        records = [(i, each) for i, each in self._records(data) if all(each.get(k) == v for k, v in self.where.items())]
        shots = list(enumerate(_read(data / self.shots["source"]))) if self.shots else []
        count = len(records) if limit is None else min(limit, len(records))
        chosen = [i * len(records) // count for i in range(count)]
        try:
            return [self._item(at, *records[at], shots, at if all_templates else 0) for at in chosen]
        except (KeyError, IndexError) as error:
            raise DecodingError(f"task {self.name}: its records have no {error}") from error

    def _records(self, data: Path) -> list[tuple[int, dict[str, Any]]]:
        """What prompts are made of, each with the number of its record in the file."""
        records = enumerate(self.records if self.source is None else _read(data / self.source))
        expand = _EXPANDED[self.expand] if self.expand else lambda record: iter([record])
        return [(number, part) for number, record in records for part in expand(record)]

    def _item(
        self, position: int, number: int, record: dict[str, Any], shots: list[tuple[int, dict[str, Any]]], turn: int
    ) -> Item:
        training = is_for_training(self.source or self.name, number)
        values = record | {name: record[name][:length] for name, length in self.clip.items()}
        if self.variants:
            variant = self.variants[position % len(self.variants)]
            values |= {name: text.format_map(record) for name, text in variant.items()}
        answers = self._answers(values)
        if self.swapped and random.Random(f"{self.name} {position}").random() < 0.5:
            first, second = self.swapped
            values |= {first: values[second], second: values[first]}
            one, other = self.labels.values()
            answers = [other if answer == one else one for answer in answers]
        if self.shots:
            held = [each for at, each in shots if is_for_training(self.shots["source"], at) == training]
            values["shots"] = self._shots(position, record, held)
        prompt = self.templates[turn % len(self.templates)].format_map(values)
        return Item(position, prompt, answers, record, training)

    def _shots(self, index: int, record: dict[str, Any], held: list[dict[str, Any]]) -> str:
        assert self.shots is not None
        if len(held) <= self.shots["count"]:
            raise DecodingError(
                f"task {self.name}: {self.shots['count']} shots need as many examples and one more, "
                f"and there are {len(held)} in {self.shots['source']} for this prompt: ask for fewer"
            )
        drawn = random.Random(f"{self.name} {index}").sample(held, self.shots["count"] + 1)
        others = [shot for shot in drawn if shot != record][: self.shots["count"]]
        template = self.shots["template"]
        return "".join(template.format_map({**shot, "answer": self._answers(shot)[0]}) for shot in others)

    def _answers(self, values: Mapping[str, Any]) -> list[str]:
        if self.answers is not None:
            return list(values[self.answers])
        if self.answer is None:
            return []
        answer = self.answer.format_map(values)
        return [self.labels.get(answer, answer)]

    def parse(self, output: str) -> str:
        """What an output answers; empty if it says nothing."""
        return _PARSERS[self.parser](output, list(self.labels.values()))

    def scores(self, items: Sequence[Item], outputs: Sequence[str]) -> list[float]:
        """Each output's score, in [0, 1]: of ``outputs[i]`` for ``items[i]``."""
        assert self.metric is not None  # `load_tasks` leaves prompts without a metric out unless they are named
        return task_metrics.METRICS[self.metric](items, [self.parse(output) for output in outputs])


def load_tasks(names: Sequence[str] = (), suite: str = "abilities") -> list[Task]:
    """Tasks by name, or by the path of a definition; all of a suite if none is named.

    Raises:
        DecodingError: no such task, a damaged definition, or two of one name.
    """
    tasks = [_load(name) for name in names or task_names()]
    if not names:
        tasks = [task for task in tasks if suite in task.suites]
    if len({task.name for task in tasks}) < len(tasks):
        raise DecodingError("two tasks have the same name: name each once")
    return tasks


def task_names() -> list[str]:
    """Of all tasks, those of other packages too."""
    return sorted({path.stem for path in _FOLDER.glob("*.json")} | set(hooks.TASKS.names))


def _load(name: str) -> Task:
    if name in hooks.TASKS.names:
        return _task(name, hooks.TASKS.load(name)())
    path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(task_names())
        raise DecodingError(f"unknown task {name!r}: choose from {known}, or give the .json file of your own")
    try:
        definition = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DecodingError(f"{path} is no task ({error}); its fields: {_fields()}") from error
    return _task(str(path), definition)


def _task(where: str, definition: Any) -> Task:
    try:
        task = Task(**definition)
    except TypeError as error:
        raise DecodingError(f"{where} is no task ({error}); its fields: {_fields()}") from error
    for what, value, known in (
        ("parser", task.parser, list(_PARSERS)),
        ("metric", task.metric, [*task_metrics.METRICS, None]),
        ("ability", task.ability, [*ABILITIES, None]),
        ("expand", task.expand, [*_EXPANDED, None]),
    ):
        if value not in known:
            raise DecodingError(f"{where}: unknown {what} {value!r}: choose from {', '.join(filter(None, known))}")
    for what, (form, holds) in _FORMS.items():
        if not holds(value := getattr(task, what)):
            raise DecodingError(f"{where}: {what} must be {form}, not {value!r}")
    if wrong := _unfit(task):
        raise DecodingError(f"{where}: {wrong}")
    return task


def _unfit(task: Task) -> str | None:
    """What of a definition does not fit the rest of it."""
    if (task.source is None) == (not task.records):
        return "give source, the records' file, or records themselves: one of the two"
    if task.answer is not None and task.answers is not None:
        return "give answer, or answers, not both"
    if task.metric not in (None, *_WITHOUT_ANSWERS) and task.answer is None and task.answers is None:
        return f"metric {task.metric} compares with what is right: give answer, or answers"
    if task.parser == "label" and not task.labels:
        return 'parser "label" looks for labels: give them'
    variants = [text for variant in task.variants for text in variant.values()]
    shots = [task.shots["template"]] if task.shots else []
    for text in (*task.templates, *variants, *shots, task.answer or ""):
        try:
            names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        except ValueError as error:
            return f"{text!r} is no template ({error}): write {{{{ and }}}} for braces"
        if not all(re.match(r"[^\W\d]", name) for name in names):
            return f"{text!r} is no template: between braces stands the name of a field"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _has(kind: type, holds: Callable[[Any], bool] = lambda _: True) -> Callable[[Any], bool]:
    """A check of lists of a kind, or of objects whose values are of it."""

    def check(value: Any) -> bool:
        values = list(value.values()) if isinstance(value, dict) else value
        return isinstance(values, list) and all(type(each) is kind and holds(each) for each in values)

    return check


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_shots(value: Any) -> bool:
    is_whole = isinstance(value, dict) and value.keys() == {"source", "count", "template"}
    return is_whole and _is_text(value["source"]) and _is_text(value["template"]) and _is_count(value["count"])


# What each field must be.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", _is_text),
    "suites": ("a list of names", lambda value: isinstance(value, list) and _has(str)(value)),
    "templates": (
        "a list of texts",
        lambda value: isinstance(value, list) and value != [] and _has(str, _is_text)(value),
    ),
    "source": ("a file's name", lambda value: value is None or _is_text(value)),
    "records": ("a list of objects", lambda value: isinstance(value, list) and _has(dict)(value)),
    "chat": ("true or false", lambda value: isinstance(value, bool)),
    "max_new_tokens": ("a whole number above 0", _is_count),
    "where": ("an object", lambda value: isinstance(value, dict)),
    "clip": ("numbers of characters by field", lambda value: isinstance(value, dict) and _has(int, _is_count)(value)),
    "variants": ("a list of objects of texts", lambda value: isinstance(value, list) and _has(dict, _has(str))(value)),
    "shots": ("an object of source, count and template", lambda value: value is None or _is_shots(value)),
    "labels": ("an object of texts", lambda value: isinstance(value, dict) and _has(str, _is_text)(value)),
    "answer": ("a text", lambda value: value is None or _is_text(value)),
    "answers": ("a field's name", lambda value: value is None or _is_text(value)),
}
_WITHOUT_ANSWERS = ("ifeval", "diversity_coherence")


def _fields() -> str:
    return ", ".join(each.name for each in fields(Task))


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, or the paragraphs of a .txt file as {"text": …}."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return [{"text": " ".join(part.split())} for part in re.split(r"\n\s*\n", text) if part.strip()]
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DecodingError(f"cannot read the task's data {path} ({error}): give their folder with --data") from error
    for record in records:
        if not isinstance(record, dict):
            raise DecodingError(f"cannot read the task's data {path}: {str(record)[:80]!r} is no object with fields")
    return records


_NEGATION = re.compile(r"\b(?:not|never|nor|\w+n['’]t|rather than|instead of)\s+(?:\w+\s+){0,2}\W*$", re.IGNORECASE)
_NO_LABEL = re.compile(
    r"no\s+(?:doubt|question|problem|wonder|matter|worries|idea|one|way|sooner|longer|more)\b", re.IGNORECASE
)
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice|choose|pick)(?:\s+is|\s*:)?\W*$", re.IGNORECASE)
_SET_APART = re.compile(r"\s*(?:$|[^\w\s]|\n)|\s+(?:is|was|because|since|as|would|seems)\b")


def _label(output: str, labels: Sequence[str]) -> str:
    """The first label that an output gives as its answer, in any case: "A.", "(b)", "The answer is yes", "option A".

    Negated labels do not count ("not A"), nor does a letter that may be a word ("A cat"), nor "no" in phrases that say
    something else ("no doubt").
    """
    names = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    found = (each for each in re.finditer(rf"(?<!\w)(?i:{names})(?!\w)", output) if _is_answer(output, each))
    first = next(found, None)
    return "" if first is None else next(label for label in labels if label.lower() == first[0].lower())


def _is_answer(output: str, found: re.Match[str]) -> bool:
    before, behind = output[: found.start()], output[found.end() :]
    if _NEGATION.search(before) or _NO_LABEL.match(output, found.start()):
        return False
    if len(found[0]) > 1:
        return True
    stands = _SET_APART.match(behind) or _ANNOUNCED.search(before)
    return bool(stands) and (found[0].isupper() or not re.search(r"\w", before))


def _line(output: str, labels: Sequence[str]) -> str:
    return next((line.strip() for line in output.splitlines() if line.strip()), "")


def _text(output: str, labels: Sequence[str]) -> str:
    return output.strip()


_PARSERS = {"label": _label, "line": _line, "text": _text}


def _multirc(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every proposed answer to every question about a passage, each right or wrong."""
    for question in record["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "passage": record["passage"]["text"],
                "question": question["question"],
                "proposed": answer["text"],
                "label": answer["label"],
            }


def _record(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every query about a passage, with the entities that may be its answer."""
    text = record["passage"]["text"]
    entities = dict.fromkeys(text[each["start"] : each["end"] + 1] for each in record["passage"]["entities"])
    for query in record["qas"]:
        answers = [answer["text"] for answer in query["answers"]]
        yield {"passage": text, "query": query["query"], "entities": ", ".join(entities), "answers": answers}


_EXPANDED = {"multirc": _multirc, "record": _record}
