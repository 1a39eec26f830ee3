import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

from decoding.cli import cli
from experiments.lab.figures import interleaved
from experiments.lab.timing import TimedProcessor
from experiments.style.bench import Figure


def test_the_bench_measures_every_line_and_says_what_it_could_not(model_folder, style_file, tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["bench", "style", "--style", style_file, "--model", model_folder, "--json", out]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    figures = [Figure(**figure) for figure in content["figures"]]
    missing = [figure.shown for figure in figures if figure.value is None]
    expected = {"not measured: give --lmplz PATH", "not measured: pip install kenlm"}
    if importlib.util.find_spec("kenlm"):
        expected.remove("not measured: pip install kenlm")
        assert len(figures) == 19
    assert set(missing) <= expected
    assert all(figure.value > 0 for figure in figures if figure.value is not None)
    assert content["versions"]["torch"]
    assert result.output.count("│") > 30


def test_a_timed_processor_changes_nothing_and_counts():
    timed = TimedProcessor(lambda ids, scores: scores)
    scores = torch.randn(1, 3)
    assert timed.seconds == 0
    assert timed(None, scores) is scores
    assert timed.seconds > 0


@pytest.mark.parametrize("title", [None, "long work"])
def test_works_take_turns_after_one_that_is_not_timed(title, capsys):
    seen = []
    seconds = interleaved([lambda turn: seen.append(("a", turn)), lambda turn: seen.append(("b", turn))], 3, title)
    assert seconds.shape == (2, 3) and (seconds >= 0).all()
    assert seen == [(name, turn) for turn in (0, 0, 1, 2) for name in "ab"]
    assert capsys.readouterr().out == ""
