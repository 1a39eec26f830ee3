"""The pages' tables and numbers are those of the committed data."""

import importlib
import json
import re

import pytest

pytest.importorskip("cogapp", reason="cogapp is not installed")

from figures import data, front, vllm
from figures.__main__ import PAGES, run
from figures.data import DOCS

CLAIM = re.compile(r"<!-- (\w+)\.(\w+)\((.*?)\) -->")


def claims():
    """What stands before each comment that names a function, that function, and its arguments."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for claim in CLAIM.finditer(text):
            module, function, arguments = claim.groups()
            answer = getattr(importlib.import_module(f"figures.{module}"), function)
            yield pytest.param(text[: claim.start()], answer, arguments, id=f"{page.stem}: {claim[0][5:-4]}")


def ends_in(text, number):
    """Whether a text, whatever its line breaks, ends in just that number."""
    return re.search(rf"(?<![\d.,−-]){re.escape(number)}$", re.sub(r"\s+", " ", text)) is not None


@pytest.mark.parametrize(("before", "answer", "arguments"), claims())
def test_a_number_in_a_sentence_is_that_of_the_data(before, answer, arguments):
    number = answer(*(each.strip() for each in arguments.split(";") if each))
    assert ends_in(before, number), f"{number}, not …{before[-40:]}"


def test_what_a_text_ends_in():
    assert ends_in("it takes 1.2\n[1.1, 1.3]", "1.2 [1.1, 1.3]")
    assert not any(ends_in(text, "1.2") for text in ("it takes 11.2", "−1.2", "1.2 ", "0,1.2", "1.21"))


def test_tables_are_those_of_the_data(capsys):
    assert run("--check") == 0, f"make figures\n{capsys.readouterr().out}"


def test_the_check_sees_a_changed_table(tmp_path, capsys):
    page = tmp_path / "page.md"
    block = "<!-- [[[cog print(cost.temperature()) ]]] -->\n\n| 0.97 % |\n\n<!-- [[[end]]] -->\n"
    page.write_text(block, encoding="utf-8")
    assert run("--check", pages=[page]) == 5
    assert run("-r", pages=[page]) == 0
    shown = json.loads((DOCS / "bench_temperature.json").read_text(encoding="utf-8"))["figures"][0]["shown"]
    assert f"against writing 64 | {shown} |" in page.read_text(encoding="utf-8")
    assert run("--check", pages=[page]) == 0


def test_speeds_of_rounds_are_those_that_the_benchmark_printed():
    for each in data.read(vllm.BENCH)["figures"]:
        context, batch = re.match(r"([\d,]+) tokens, batch (\d)", each["what"]).groups()
        which = (batch, context.replace(",", ""))
        assert f"{vllm.faster(*which)} of at most {vllm.at_most(*which)}" == each["shown"]


@pytest.mark.parametrize("table", [front.table, vllm.kept, vllm.speed])
def test_tables_for_other_pages(table):
    blank, heads, _, *lines = table().splitlines()
    assert blank == "" and len(lines) >= 1
    assert {line.count(" | ") for line in lines} == {heads.count(" | ")}


def test_what_is_missing_is_an_error():
    with pytest.raises(LookupError, match="0 rows"):
        data.figure("bench_temperature.json", "choosing for nothing")
    with pytest.raises(LookupError, match="2 rows"):
        data.row([{"a": 1}, {"a": 1}], a=1)
    with pytest.raises(KeyError):
        data.quoted("what nobody said")
