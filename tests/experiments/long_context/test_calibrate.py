import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from chunkllm import ChunkCalibration, ChunkSelection
from chunkllm.models import model_shape
from decoding.cli import cli
from tests.conftest import WORDS, make_model, make_tokenizer


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `decoding chunk calibrate` on two texts and a tiny model, whose layer 1 says nothing."""
    monkeypatch.chdir(tmp_path)
    stops = [f"{word}." for word in WORDS]
    for seed, name in enumerate(("first.txt", "second.txt")):
        (tmp_path / name).write_text(" ".join(np.random.default_rng(seed).choice([*WORDS, *stops], 700)))
    tokenizer = make_tokenizer([*WORDS, *stops])
    tokenizer.save_pretrained("model")
    model = make_model(len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    model.save_pretrained("model")

    def invoke(*arguments, model="model"):
        fixed = (model, "--text", "first.txt", "--text", "second.txt", "--context", "240")
        return CliRunner().invoke(cli, ["chunk", "calibrate", *fixed, *arguments])

    invoke.model = model
    return invoke


def test_a_calibration_from_the_command_line(run, tmp_path):
    done = run("--out", "out")
    assert done.exit_code == 0, done.output
    assert "| 0 " in done.output and 'ChunkSelection("out")' in done.output
    config = ChunkCalibration.from_pretrained("out").config
    assert config.shape == model_shape(run.model)
    assert config.sensitivity[0] > 1e-4 and config.sensitivity[1] < 1e-6
    assert set(config.about["texts"]) == {"first", "second"} and config.about["pieces"] == 2
    with ChunkSelection("out").attach(run.model) as chunks:
        assert chunks.plan.weights[0] > chunks.plan.weights[1]
    assert "holds a calibration already: add --resume" in run("--out", "out").output
    held = (tmp_path / "out" / "config.json").read_bytes()
    assert run("--out", "out", "--resume").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["sensitivity"] == json.loads(held)["sensitivity"]
    assert "another pieces (2, not 4)" in run("--out", "out", "--resume", "--pieces", "4").output


def test_what_was_measured_before_an_interruption_is_kept(run, monkeypatch):
    from experiments.long_context import calibrate

    measured, measure = [], calibrate.layer_sensitivity

    def interrupted(*args, **options):
        measured.append(options["ids"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(calibrate, "layer_sensitivity", interrupted)
    done = run("--out", "out")
    assert done.exit_code == 130 and "what was measured is kept: go on with --resume --out out" in done.output
    assert run("--out", "out", "--resume").exit_code == 0 and len(measured) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "out", "--context", "100"), "at least 204"),
        (("--out", "out", "--context", "300"), "256 positions"),
        (("--out", "out", "--pieces", "99"), "pieces of 240 tokens"),
        (("--out", "model"), "holds other files"),
        (("--out", "out", "--text", "none.txt"), "none.txt"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, says):
    done = run(*arguments)
    assert done.exit_code == 2 and says in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "out").exists()
