import csv
import importlib.util
import subprocess
import sys

import pytest
from click.testing import CliRunner

from decoding.cli import cli

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
@pytest.mark.parametrize("command", [["sweep", "--engine", "vllm"], ["serve"]])
def test_without_vllm_the_error_says_what_to_install(command, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [*command, "--model", str(model_folder)])
    assert result.exit_code == 2
    assert "pip install vllm" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.real
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed; `make test` runs these in .venv-vllm")
def test_a_sweep_with_vllm_gives_the_same_table(tmp_path):
    """The texts differ, being sampled with other random numbers; the columns, and the measures' scale, do not."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The captain said\nIn the beginning\nMy fellow citizens,\nOnce upon a time\n")
    tables = {}
    for engine in ("vllm", "transformers"):
        out = tmp_path / engine
        command = [sys.executable, "-m", "decoding", "sweep", "--engine", engine, "--lambda", "0,0.8", "--out", out]
        command += ["--style", "king-james", "--prompts", prompts, "--max-new-tokens", "24", "--dtype", "float32"]
        subprocess.run(command, check=True, capture_output=True)
        with (out / "results.csv").open() as file:
            tables[engine] = list(csv.DictReader(file))
    ours, theirs = tables["vllm"], tables["transformers"]
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row in ours:
        assert (float(row["js"]) > 0.01) == (float(row["lambda"]) > 0)
    for mine, other in zip(ours, theirs, strict=True):
        assert float(mine["entropy"]) == pytest.approx(float(other["entropy"]), rel=0.35)
    unsteered, steered = (float(row["style_ppl"]) for row in ours)
    assert steered < unsteered / 4
