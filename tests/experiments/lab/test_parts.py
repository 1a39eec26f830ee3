"""Commands whose cells are measured by workers give the cells that they give alone."""

import json

import pytest
from click.testing import CliRunner
from filelock import FileLock

from decoding import DecodingError
from decoding.cli import cli
from experiments.lab.runs import RunFolder, finish
from experiments.style.cells import SweepCell

TIMES = ("tokens_per_second", "speed", "cpu_seconds")


def cells_in(folder):
    return {path.name: json.loads(path.read_text()) for path in (folder / "cells").iterdir()}


def assert_alike(found, wanted):
    """Texts are the same; their measures follow the number of threads in the last digits."""
    assert found.keys() == wanted.keys()
    for name, record in wanted.items():
        for mine, text in zip(found[name]["texts"], record["texts"], strict=True):
            assert mine.keys() == text.keys()
            for measure in ("tokens", "overlap_unsteered", "distinct_2"):
                assert mine[measure] == text[measure]
            for measure in ("base_nll", "entropy"):
                assert mine[measure] == pytest.approx(text[measure], abs=1e-4)
        others = record.keys() - {"texts", *TIMES}
        assert {key: found[name][key] for key in others} == {key: record[key] for key in others}


@pytest.fixture
def sweep(model_folder, style_file, tmp_path):
    def run(out, *more):
        arguments = ["sweep", "--model", str(model_folder), "--style", str(style_file), "--lambda", "0,0.1,0.4"]
        arguments += ["--seed", "0", "--seed", "1", "--max-new-tokens", "4", "--order", "2", "--json"]
        arguments += ["--out", str(tmp_path / out), *more]
        return CliRunner().invoke(cli, arguments)

    return run


def rows_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_workers_give_the_cells_of_one(sweep, tmp_path, executor):
    if executor == "ray":
        pytest.importorskip("ray")
    rows, spread = rows_of(sweep("alone")), rows_of(sweep("spread", "--executor", executor, "--workers", "2"))
    wanted = cells_in(tmp_path / "alone")
    assert len(wanted) == 6
    assert_alike(cells_in(tmp_path / "spread"), wanted)
    assert [row["style_ppl"] for row in spread] == pytest.approx([row["style_ppl"] for row in rows], rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "spread" / "logs").iterdir()) == ["worker-0.txt", "worker-1.txt"]
    for path in sorted((tmp_path / "spread" / "cells").iterdir())[:2]:
        path.unlink()
    rows_of(sweep("spread", "--resume"))
    assert_alike(cells_in(tmp_path / "spread"), wanted)


def test_two_runs_on_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run", {}, False)
    with FileLock(folder.path / ".lock"), pytest.raises(DecodingError, match="another run works in"):
        finish(folder, [SweepCell(None, 0.0, 1.0, 0)], lambda cell: {})


def test_options_of_workers_go_with_an_executor(sweep):
    result = sweep("out", "--workers", "2")
    assert result.exit_code == 2 and "--workers goes with --executor" in result.stderr
