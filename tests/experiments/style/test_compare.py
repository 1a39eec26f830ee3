import json
import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from decoding.cli import cli
from experiments.style import compare as compare
from experiments.style import compare_report as report
from tests.conftest import WORDS

pytest.importorskip("sklearn")
pytest.importorskip("peft")


@pytest.fixture
def corpora(tmp_path):
    """Three authors, each with a habit of order and length."""
    rng = np.random.default_rng(0)
    specs = []
    for i, name in enumerate(("one", "two", "three")):
        words = WORDS[i * 8 : i * 8 + 20]
        sentences = [" ".join(rng.choice(words, 6 + 3 * i)) + "." for _ in range(4500)]
        paragraphs = [" ".join(sentences[j : j + 5]) for j in range(0, len(sentences), 5)]
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join(paragraphs), encoding="utf-8")
        specs.append(f"{name}={path}")
    return specs


@pytest.fixture
def few_cells(monkeypatch):
    kept = ("paper", "ratio", "ratio to another corpus, no contexts", "three passages", "LoRA", "half LoRA + ratio")
    methods = tuple(m._replace(lambdas=m.lambdas[-1:]) for m in compare.METHODS if m.name in kept)
    monkeypatch.setattr(compare, "METHODS", methods)
    monkeypatch.setattr(compare, "TEMPERATURES", (0.5, 1.0))
    monkeypatch.setattr("decoding.style.background.openings", lambda: ("the captain", "rain"))
    monkeypatch.setattr("decoding.style.background._TOKENS_PER_OPENING", 8)


def test_a_comparison_from_the_command_line(model_folder, corpora, few_cells, tmp_path):
    (tmp_path / "prompts.txt").write_text("the captain\nrain\nhis ship\n")
    out = tmp_path / "out"
    arguments = [
        *("style", "compare", "--style", corpora[0], "--style", corpora[1], "--other", corpora[2]),
        *("--model", model_folder, "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--max-new-tokens", 6),
        *("--lora-steps", 1, "--out", out),
    ]
    run = lambda *more: CliRunner().invoke(cli, [str(argument) for argument in (*arguments, *more)])  # noqa: E731
    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((out / "results.json").read_text())
    assert len(found["rows"]) == 2 * (2 + 6)
    for row in found["rows"]:
        assert 0 <= row["judge"] <= 1 and row["base_ppl"] > 0 and row["copied"] == 0
        assert row["judge_low"] <= row["judge"] <= row["judge_high"]
    plain = [row for row in found["rows"] if row["method"] == "unsteered"]
    assert all(math.isclose(row["fluency"], 1) for row in plain)
    assert {row["ppl_ratio"] for row in plain if row["temperature"] == 1} == {1}
    assert found["judges"]["one"]["accuracy"] > 0.9
    ceiling, floor = (found["judges"]["one"][end] for end in ("ceiling", "floor"))
    assert ceiling["judge"] > floor["judge"] and ceiling["likeness"] > floor["likeness"]
    assert ceiling["delta"] < floor["delta"]
    assert found["cpu_hours"] > 0 and found["settings"]["encoder"] == "character n-grams"
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "half LoRA + ratio" in (out / "samples.md").read_text()
    assert "holds a run already" in run().output
    cells = sorted(out.glob("cells/*.json"))
    times = [path.stat().st_mtime_ns for path in cells]
    cells[0].unlink()
    assert run("--resume").exit_code == 0
    assert [path.stat().st_mtime_ns for path in cells[1:]] == times[1:] and cells[0].exists()
    more = [part for method in compare.TRIED for part in ("--method", method.name)]
    grown = run("--resume", "--method", "ratio", *more)
    assert grown.exit_code == 0, (grown.output, grown.exception)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"unsteered", "ratio", *(method.name for method in compare.TRIED)}
    assert [path.stat().st_mtime_ns for path in cells[1:]] == times[1:]


def test_no_such_method(corpora):
    arguments = ["style", "compare", "--style", corpora[0], "--other", corpora[1], "--method", "ratios"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and "no way to a style is called 'ratios': choose from paper, ratio" in result.output


def test_what_is_missing_is_said_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = CliRunner().invoke(cli, ["style", "compare", "--style", "nowhere.txt", "--other", "nowhere.txt"])
    assert result.exit_code == 2 and "decoding-middleware[compare]" in result.output


def test_who_dominates_whom():
    def row(method, lambda_, judge, fluency):
        return {"style": "s", "method": method, "lambda": lambda_, "judge": judge, "fluency": fluency}

    rows = [
        row("ratio", 0.5, 0.4, 1.0),
        row("ratio", 1.0, 0.6, 1.2),
        row("paper", 0.1, 0.3, 1.0),
        row("paper", 1.0, 0.5, 1.5),
        row("three passages", 0.0, 0.7, 2.0),
        row("zero-shot prompt", 0.0, 0.3, 0.9),
    ]
    found = {verdict.worse: verdict for verdict in report.verdicts(rows) if verdict.better == "ratio"}
    assert found["paper"].dominates
    assert not found["three passages"].dominates
    assert found["zero-shot prompt"].but_for == (0.0,)
    rows.append(row("paper", 0.2, 0.45, 1.0))
    assert report.verdicts(rows)[0].but_for == (0.2,)


def beside(*cells):
    """Rows of one style: each cell is a method, a temperature, a mean entropy, a perplexity and a judge's probability.

    Of two prompts, one is a tenth below the means and one above.
    """
    rows, values = [], []
    spread = np.array([0.9, 1.1])
    for method, t, entropy, ppl, judge in cells:
        row = {"method": method, "temperature": t, "lambda": 0.0, "base_ppl": ppl, "distinct_2": 0.9, "copied": 0.0}
        rows.append(row)
        values.append(report.Values(judge * spread, math.log(ppl) * spread, entropy * spread))
    report.set_side_by_side(rows, values)
    return rows


def test_fluency_is_compared_at_equal_entropy():
    rows = beside(("unsteered", 0.5, 1, 4, 0.1), ("unsteered", 1, 3, 16, 0.1), ("paper", 1, 2, 16, 0.1))
    assert math.isclose(rows[2]["fluency"], 2)  # log 8 lies in the middle
    assert (rows[2]["ppl_ratio"], rows[2]["distinct_ratio"], rows[2]["copied_more"]) == (1, 1, False)
    assert all(math.isclose(row[key], 1) for row in rows[:2] for key in ("fluency", "fluency_low", "fluency_high"))


def test_an_interval_of_fluency_holds_the_baselines_error():
    """Prompts that are harder for all methods alike move both, and so the ratio little."""
    rows = beside(("unsteered", 0.5, 1, 4, 0.1), ("unsteered", 1, 3, 16, 0.1), ("paper", 1, 3, 16, 0.1))
    assert math.isclose(rows[2]["fluency_low"], 1) and math.isclose(rows[2]["fluency_high"], 1)
    other = beside(("unsteered", 0.5, 1, 4, 0.1), ("unsteered", 1, 3, 16, 0.1), ("paper", 1, 3, 32, 0.1))
    nlls = np.log(2) * np.array([0.9, 1.1])  # of the difference: log 32 − log 16, prompt by prompt
    assert math.isclose(other[2]["fluency_low"], math.exp(nlls[0])), "both draws the easier prompt"
    assert math.isclose(other[2]["fluency_high"], math.exp(nlls[1]))


def test_style_gained_over_the_ratio_at_equal_fluency():
    line = ("unsteered", 0.5, 1, 4, 0.1), ("unsteered", 1, 3, 16, 0.1), ("ratio", 1, 3, 32, 0.5)
    rows = beside(*line, ("paper", 1, 3, 16 * math.sqrt(2), 0.4), ("LoRA", 1, 3, 64, 0.9))
    assert math.isclose(rows[3]["gain"], 0.4 - 0.3)  # half the way from 0.1 to 0.5
    assert rows[3]["gain_low"] <= rows[3]["gain"] <= rows[3]["gain_high"]
    assert [rows[i]["gain"] for i in (0, 1, 2, 4)] == [None] * 4, "no comparison with itself, nor beyond its points"


def test_the_picture_knows_every_method_that_it_draws():
    methods = (*compare.METHODS, *compare.TRIED)
    assert {*report.CLASSES, *report.ON_TOP} <= {method.name for method in methods}
    assert len({compare.CompareCell("s", method.name).key for method in methods}) == len(methods)


def test_prompts_that_ask_for_a_style(tokenizer, corpora):
    from decoding.style.source import load_corpus

    style = compare.Style(load_corpus(corpora[0]), tokenizer)
    (zero_shot,) = style.prompted("zero-shot", ["rain"])
    assert zero_shot.endswith("rain") and "in the style of one" in zero_shot
    (shown,) = style.prompted("passages", ["rain"])
    *passages, prompt = shown.split("\n\n")
    assert prompt == "rain" and len(passages) == 3
    text = " ".join(style.split.steering.documents[0].split())
    assert all(passage in text for passage in passages)
    assert style.prompted(None, ["rain"]) == ["rain"]
