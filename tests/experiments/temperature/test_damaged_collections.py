"""A damaged file of a collection is one error, which names it and says how to go on."""

import json
import shutil
from pathlib import Path

import pytest

from decoding import DecodingError
from experiments.temperature.collect import prompts_in, read_collection

SAVED = Path(__file__).parents[2] / "saved_by_0_1_0" / "collection"
CELL = "mine-00004.json"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SAVED, tmp_path / "scores")


def refusal(folder):
    with pytest.raises(DecodingError) as caught:
        read_collection(folder)
    return str(caught.value)


def changed(record, keys, value):
    """A record with another value at some place; `...` removes it."""
    *way, last = keys
    for key in way:
        record = record[key]
    if value is ...:
        del record[last]
    else:
        record[last] = value


NAN = float("nan")


@pytest.mark.parametrize(
    ("keys", "value", "wrong"),
    [
        (["task"], ..., "task must be a name"),
        (["task"], 3, "task must be a name"),
        (["ability"], 3, "ability must be a name, or null"),
        (["prompts"], [], "prompts must be a list with some"),
        (["prompts"], "x", "prompts must be a list with some"),
        (["prompts", 1], None, "prompts[1].position must be of type int"),
        (["prompts", 0, "position"], "4", "prompts[0].position must be of type int"),
        (["prompts", 1, "prompt"], ..., "prompts[1].prompt must be of type str"),
        (["prompts", 1, "answers"], "wind", "prompts[1].answers must be of type list"),
        (["prompts", 0, "scores"], [], "prompts[0].scores must be of type dict"),
        (["prompts", 0, "scores", "T=1"], ..., "prompts[0].scores['T=1'] must be finite numbers"),
        (["prompts", 0, "scores", "T=1"], [0.5, NAN], "prompts[0].scores['T=1'] must be finite numbers"),
        (["prompts", 0, "scores", "T=1"], [0.5, "1"], "prompts[0].scores['T=1'] must be finite numbers"),
        (["prompts", 0, "scores", "T=1"], [], "prompts[0].scores['T=1'] must be finite numbers"),
        (["prompts", 0, "scores", "T=1"], 0.5, "prompts[0].scores['T=1'] must be finite numbers"),
        (["prompts", 1, "texts", "EDT 0.4"], ["a"], "prompts[1].texts['EDT 0.4'] must be texts, one for each score"),
        (["prompts", 1, "texts", "EDT 0.4"], [1, 2], "prompts[1].texts['EDT 0.4'] must be texts, one for each score"),
    ],
)
def test_a_field_of_the_wrong_kind(folder, keys, value, wrong):
    path = folder / "cells" / CELL
    record = json.loads(path.read_text())
    changed(record, keys, value)
    path.write_text(json.dumps(record))
    resume = f"remove it, and go on with `decoding temperature collect --resume --out {folder}`"
    assert refusal(folder) == f"{path} is damaged: {wrong}: {resume}"
    with pytest.raises(DecodingError, match="is damaged"):
        prompts_in(folder, "mine")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 10**5, None])
def test_a_cell_cut_short(folder, content):
    path = folder / "cells" / CELL
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    said = refusal(folder)
    assert said.startswith(f"{path} is damaged: ") and "remove it" in said
    path.unlink()
    assert "has 4 of 6 prompts of mine: finish it" in refusal(folder)
    (folder / "cells" / "mine-00000.json").unlink()
    assert "has 0 of 6 prompts of mine: finish it" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tasks", []),
        ("tasks", {"mine": "6"}),
        ("tasks", ...),
        ("temperatures", 1),
        ("temperatures", [0.1, "1"]),
        ("temperatures", [0, NAN]),
        ("samplers", None),
    ],
)
def test_a_header_of_the_wrong_kind(folder, name, value):
    path = folder / "run.json"
    settings = json.loads(path.read_text())
    changed(settings, [name], value)
    path.write_text(json.dumps(settings))
    assert refusal(folder).startswith(
        f"{folder} holds no collection of `decoding temperature collect`: {name} in run.json"
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"[" * 10**5])
def test_a_header_cut_short(folder, content):
    (folder / "run.json").write_bytes(content)
    assert "holds no collection" in refusal(folder)
