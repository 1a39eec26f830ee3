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
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "half LoRA + ratio" in (out / "samples.md").read_text()
    assert "holds a run already" in run().output
    cells = sorted(out.glob("cells/*.json"))
    times = [path.stat().st_mtime_ns for path in cells]
    cells[0].unlink()
    assert run("--resume").exit_code == 0
    assert [path.stat().st_mtime_ns for path in cells[1:]] == times[1:] and cells[0].exists()


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


def test_fluency_is_compared_at_equal_entropy():
    rows = [
        {"method": "unsteered", "temperature": t, "entropy": h, "base_ppl": ppl, "distinct_2": 0.9, "copied": 0.0}
        for t, h, ppl in ((0.5, 1.0, 4.0), (1.0, 3.0, 16.0))
    ]
    rows.append(
        {"method": "ratio", "temperature": 1.0, "entropy": 2.0, "base_ppl": 16.0, "distinct_2": 0.45, "copied": 0.5}
    )
    report._set_beside_unsteered(rows)
    assert math.isclose(rows[2]["fluency"], 2)  # log 8 lies in the middle
    assert (rows[2]["ppl_ratio"], rows[2]["distinct_ratio"], rows[2]["copied_more"]) == (1.0, 0.5, True)


def test_the_picture_knows_every_method_that_it_draws():
    assert {*report.CLASSES, *report.ON_TOP} <= {method.name for method in compare.METHODS}
    assert len({compare.CompareCell("s", method.name).key for method in compare.METHODS}) == len(compare.METHODS)


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
