"""``decoding style train --executor``: the model of training in memory, whatever it runs on and whoever stops it."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from filelock import FileLock

from decoding.cli import cli
from ngram import NGramModel
from ngram.distributed import Training
from tests.conftest import WORDS


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        texts = [" ".join(random.Random(100 * number + i).choices(WORDS, k=12)) for i in range(40)]
        (folder / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def train(corpus, model_folder, tmp_path):
    def run(*more, out="disk.safetensors"):
        arguments = ["style", "train", f"{corpus}#text", "--model", str(model_folder), "--out", str(tmp_path / out)]
        return CliRunner().invoke(cli, [*arguments, *more])

    return run


def model_in(path):
    held = NGramModel.load(path)
    held.metadata.pop("corpus_sha256", None)
    held.save(path)
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_the_model_is_that_of_training_in_memory(train, tmp_path, executor):
    if executor == "ray":
        pytest.importorskip("ray")
    assert train(out="memory.safetensors").exit_code == 0
    done = train("--executor", executor, "--workers", "2", "--tasks", "3", "--memory", "1GB")
    assert done.exit_code == 0 and done.stdout.endswith(" MB\n")
    assert model_in(tmp_path / "disk.safetensors") == model_in(tmp_path / "memory.safetensors")
    assert not (tmp_path / "disk.safetensors.work").exists()


@pytest.mark.slow
def test_killed_and_started_again(train, tmp_path, corpus, model_folder):
    assert train(out="memory.safetensors").exit_code == 0
    command = [sys.executable, "-m", "decoding", "style", "train", f"{corpus}#text", "--model", str(model_folder)]
    command += ["--out", str(tmp_path / "disk.safetensors"), "--executor", "local", "--workers", "2", "--memory", "1GB"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until, work = time.monotonic() + 120, tmp_path / "disk.safetensors.work"
    while not (work / "count" / "00000").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert (work / "count" / "00000").exists() and not (tmp_path / "disk.safetensors").exists()
    (work / "adjust").mkdir(exist_ok=True)
    (left := work / "adjust" / ".00000.abc").mkdir()
    assert train("--executor", "local", "--workers", "2", "--memory", "1GB").exit_code == 0
    assert not left.exists()
    assert model_in(tmp_path / "disk.safetensors") == model_in(tmp_path / "memory.safetensors")


def refused(train, *options):
    result = train(*options)
    assert result.exit_code == 2
    return result.stderr


@pytest.mark.slow
def test_refusals(train, tmp_path, corpus, monkeypatch):
    for option in ("--workers", "--tasks", "--gpus-per-worker"):
        assert f"Error: {option} goes with --executor" in refused(train, option, "1")
    assert "--memory goes with --executor" in refused(train, "--memory", "1GB")
    assert "--sbatch goes with --executor slurm" in refused(train, "--executor", "local", "--sbatch", "a=b")
    assert "must read like partition=cpu" in refused(train, "--executor", "slurm", "--sbatch", "cpu")
    assert "must read like 4GB" in refused(train, "--executor", "local", "--memory", "much")
    work = tmp_path / "work"
    monkeypatch.setattr(Training, "run", lambda *_: None)
    work.mkdir()
    with FileLock(work / ".lock"):
        assert f"another run works in {work}" in refused(train, "--executor", "local", "--work", str(work))
    (corpus / "1.jsonl").write_text('{"text": "ok"}\n{"txt": "no"}')
    said = refused(train, "--executor", "local", "--workers", "2", "--memory", "1GB")
    assert "of stage count failed: " in said and "1.jsonl, line 2: no text field 'text' (fields: txt)" in said
    assert not (tmp_path / "disk.safetensors").exists()


def test_several_sources_in_memory(train, tmp_path, corpus):
    (tmp_path / "more.txt").write_text("more of the sea " * 30)
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    train(out=alone.name)
    assert train(str(tmp_path / "more.txt"), out=both.name).exit_code == 0
    assert len(NGramModel.load(both)) > len(NGramModel.load(alone))
    assert NGramModel.load(both).metadata["style"] == "data"
    result = train(str(tmp_path / "more.txt"), "--mode", "paper", out="folder")
    assert result.exit_code == 2 and "is made of one SOURCE" in result.stderr


def test_pruning(train, tmp_path):
    whole, cut, small = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "small"))
    train(out=whole.name)
    train("--prune", "0,0,1", out=cut.name)
    arguments = ["--ngrams", "9", "--histories", str(cut), "--out", str(small)]
    result = CliRunner().invoke(cli, ["style", "prune", str(whole), *arguments])
    assert result.exit_code == 0 and f"{small}: " in result.stdout
    sizes = [NGramModel.load(path).tables.words.numel() for path in (whole, cut, small)]
    assert sizes[0] > sizes[1] > sizes[2] == 9
    assert NGramModel.load(small).metadata == NGramModel.load(whole).metadata
    result = train("--prune", "0,0,1", "--mode", "paper", out="folder")
    assert result.exit_code == 2 and "--prune makes a .safetensors file" in result.stderr
    assert "must read like 0,0,1" in refused(train, "--prune", "none")
    assert "prune must be whole numbers" in refused(train, "--prune", "1,0")
