import json
import random

import pytest
from click.testing import CliRunner

from chunkllm import ChunkAdapters
from decoding.cli import cli
from tests.conftest import make_model, make_tokenizer

WORDS = ["storm", "sea", "rain", "night"]
SMALL = ("--tokens", 512, "--context", 256, "--held-out-pieces", 1, "--epochs", 2, "--width", 4, "--boundaries", 4)


def prose(seed):
    rng = random.Random(seed)
    lines = [rng.choices(WORDS, k=rng.randint(3, 9)) for _ in range(200)]
    return " ".join(f"{first.capitalize()} {' '.join(others)}." for first, *others in lines)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `decoding chunk train` on two texts and a tiny model that are in the working folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("first.txt", "second.txt", "judge.txt")):
        (tmp_path / name).write_text(prose(i))
    tokenizer = make_tokenizer([*WORDS, *(word.capitalize() for word in WORDS), *(f"{word}." for word in WORDS)])
    tokenizer.save_pretrained("model")
    make_model(len(tokenizer)).save_pretrained("model")

    def invoke(*arguments, data=("first.txt", "second.txt"), judge="judge.txt"):
        fixed = ("--held-out", judge, "--model", tmp_path / "model", *SMALL)
        return CliRunner().invoke(cli, ["chunk", "train", *data, *map(str, (*fixed, *arguments))])

    return invoke


def test_adapters_from_the_command_line(run, tmp_path):
    result = run("--out", "out")
    assert result.exit_code == 0, result.output
    assert "| adapter | " in result.output and "f1" in result.output
    adapters = ChunkAdapters.from_pretrained(tmp_path / "out")
    assert adapters.config.width == 4
    assert len(adapters.config.sensitivity) == 2 and min(adapters.config.sensitivity) > 0
    about = adapters.config.about
    assert set(about["texts"]) == {"first", "second"} and set(about["held_out_texts"]) == {"judge"}
    assert about["tokens"] == 512
    results = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(results["history"]) == 4
    assert about["held_out"]["mean"]["pooled"]["missing_at_0.5"] == pytest.approx(
        results["held_out"]["mean"]["pooled"]["missing_at_0.5"], abs=1e-4
    )
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "add --resume" in run("--out", "out").output
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert run("--out", "out", "--resume").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    make_model(16).save_pretrained(tmp_path / "model")
    other = run("--out", "out", "--resume")
    assert other.exit_code == 2 and "another model" in other.output


def test_other_widths_are_in_the_table_alone(run, tmp_path):
    result = run("--out", "out", "--ablate-width", 0, "--ablate-width", 2, "--ablate-width", 4)
    assert result.exit_code == 0, result.output
    assert result.output.count("| adapter of width ") == 2  # 4 is the adapters' own
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| adapter of width 0 | " in table and table in result.output
    results = json.loads((tmp_path / "out" / "training.json").read_text())
    assert list(results["widths"]) == ["0", "2"] and len(results["widths"]["2"]["history"]) == 4
    assert results["widths"]["0"]["held_out"]["mean"]["pooled"] == results["held_out"]["mean"]["pooled"]
    assert ChunkAdapters.from_pretrained(tmp_path / "out").config.width == 4


def test_texts_in_fields(run, tmp_path):
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"body": prose(i)}) for i in range(2)))
    (tmp_path / "other.jsonl").write_text(json.dumps({"said": prose(2)}))
    result = run("--out", "out", "--field", "body", data=("all.jsonl",), judge="other.jsonl#said")
    assert result.exit_code == 0, result.output


def test_nothing_is_read_for_a_folder_that_is_taken(run, monkeypatch, tmp_path):
    assert run("--out", "out").exit_code == 0
    monkeypatch.setattr("experiments.long_context.train.load_texts", lambda *_: pytest.fail("texts were read"))
    result = run("--out", "out")
    assert result.exit_code == 2
    assert result.output == (
        "Error: out holds a training already: add --resume to go on with it, or choose another --out\n"
    )


def test_an_interrupted_training_says_how_to_go_on(run, monkeypatch):
    from chunkllm.training.loop import Training

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_learn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run("--out", "out")
    assert result.exit_code == 130
    assert "--resume --out out" in result.output
    assert run("--out", "out", "--resume").exit_code == 0


def test_adapters_are_there_before_other_widths_are_tried(run, monkeypatch, tmp_path):
    from chunkllm.training.loop import Training

    with monkeypatch.context() as patch:
        patch.setattr(Training, "of_width", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--out", "out", "--ablate-width", 0).exit_code == 130
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    result = run("--out", "out", "--ablate-width", 0, "--resume")
    assert result.exit_code == 0 and "| adapter of width 0 | " in result.output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("--out", "out"), {"judge": "first.txt"}, "first is to be learnt from"),
        (("--out", "out"), {"data": ("nothing.txt",)}, "nothing.txt"),
        (("--out", "model"), {}, "holds other files"),
        (("--out", "out", "--context", 100), {}, "at least 204"),
        (("--out", "out", "--context", 300), {}, "256 positions"),
        (("--out", "out", "--tokens", 10_000), {}, "not 39"),
        (("--out", "out", "--language", "xx"), {}, "'xx'"),
        (("--out", "out", "--seed", -1), {}, "seed must be at least 0"),
        (("--out", "out", "--learning-rate", -1), {}, "learning rate must be above 0"),
        (("--out", "out", "--weight-decay", "nan"), {}, "weight decay must be at least 0"),
        (("--out", "first.txt"), {}, "first.txt is a file"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, changes, message):
    result = run(*arguments, **changes)
    assert result.exit_code == 2, result.output
    assert message in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
