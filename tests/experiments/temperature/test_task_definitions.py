"""A task's definition that will not do is one error, before anything is sampled."""

import json

import pytest

from decoding import DecodingError
from experiments.temperature.tasks import load_tasks, task_names

WHOLE = {
    "name": "t",
    "suites": ["abilities"],
    "ability": "CR",
    "records": [{"question": "Who", "reply": "The Duke"}],
    "templates": ["{question}?"],
    "answer": "{reply}",
    "parser": "line",
    "metric": "exact_match",
}


def load(tmp_path, changes):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({key: value for key, value in (WHOLE | changes).items() if value is not ...}))
    return load_tasks([str(path)])[0]


def test_our_own_are_whole(tmp_path):
    assert load(tmp_path, {}).items(tmp_path)[0].prompt == "Who?"
    assert len(load_tasks(task_names())) >= 29


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("name", 3, "a text"),
        ("name", " ", "a text"),
        ("suites", "abilities", "a list of names"),
        ("suites", [1], "a list of names"),
        ("templates", "{question}", "a list of texts"),
        ("templates", [], "a list of texts"),
        ("templates", [""], "a list of texts"),
        ("templates", [None], "a list of texts"),
        ("source", 1, "a file's name"),
        ("records", [1], "a list of objects"),
        ("records", {"a": {}}, "a list of objects"),
        ("chat", "yes", "true or false"),
        ("max_new_tokens", 0, "a whole number above 0"),
        ("max_new_tokens", 2.5, "a whole number above 0"),
        ("max_new_tokens", True, "a whole number above 0"),
        ("where", [], "an object"),
        ("clip", {"question": "3"}, "numbers of characters by field"),
        ("variants", [{"a": 1}], "a list of objects of texts"),
        ("variants", {"a": "b"}, "a list of objects of texts"),
        ("shots", {"source": "a.jsonl", "count": 2}, "an object of source, count and template"),
        ("shots", {"source": "a.jsonl", "count": 0, "template": "x"}, "an object of source, count and template"),
        ("labels", ["A"], "an object of texts"),
        ("labels", {"0": 1}, "an object of texts"),
        ("answer", ["x"], "a text"),
        ("answers", 1, "a field's name"),
    ],
)
def test_a_field_of_the_wrong_kind(tmp_path, field, value, must):
    with pytest.raises(DecodingError) as caught:
        load(tmp_path, {field: value})
    assert str(caught.value) == f"{tmp_path / 't.json'}: {field} must be {must}, not {value!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ...}, "missing .*'name'.*; its fields: name, "),
        ({"templates": ...}, "missing .*'templates'.*; its fields: name, "),
        ({"parser": []}, r"unknown parser \[\]: choose from label"),
        ({"records": ...}, "give source, the records' file, or records themselves"),
        ({"records": []}, "give source, the records' file, or records themselves"),
        ({"source": "a.jsonl"}, "give source, the records' file, or records themselves"),
        ({"answer": ...}, "metric exact_match compares with what is right: give answer, or answers"),
        ({"answers": "replies"}, "give answer, or answers, not both"),
        ({"parser": "label"}, 'parser "label" looks for labels: give them'),
        ({"templates": ["{question"]}, "is no template .*: write {{ and }} for braces"),
        ({"templates": ["{}?"]}, "is no template: between braces stands the name of a field"),
        ({"answer": "{0}"}, "is no template: between braces stands the name of a field"),
    ],
)
def test_fields_that_do_not_fit_each_other(tmp_path, changes, message):
    with pytest.raises(DecodingError, match=message):
        load(tmp_path, changes)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"task"'])
def test_what_is_no_object(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DecodingError, match="is no task"):
        load_tasks([str(tmp_path / "t.json")])


def test_too_few_examples_for_the_shots(tmp_path):
    shots = {"source": "shots.jsonl", "count": 3, "template": "{question}? {answer}\n"}
    task = load(tmp_path, {"shots": shots, "templates": ["{shots}{question}?"]})
    lines = [json.dumps({"question": f"Which {i}", "reply": str(i)}) for i in range(40)]
    (tmp_path / "shots.jsonl").write_text("\n".join(lines))
    assert task.items(tmp_path)[0].prompt.count("?") == 4
    (tmp_path / "shots.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(DecodingError, match=r"task t: 3 shots need as many .* in shots\.jsonl for this prompt"):
        task.items(tmp_path)
