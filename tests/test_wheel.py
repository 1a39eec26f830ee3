"""The wheel, installed in an environment of its own (``make wheel``), works from any folder."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-wheel" / "bin" / "python"
COMMANDS = ("bench", "chunk", "doctor", "generate", "playground", "reproduce", "serve", "style", "sweep", "temperature")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="the wheel is not installed: make wheel"),
]


@pytest.fixture
def folder(tmp_path, style_file):
    """A working folder whose own packages have the names of ours, and may not be imported."""
    for name in ("experiments", "tests", "ngram", "chunkllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('somebody else is at home here')")
    return tmp_path


def run(folder, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("command", [(PYTHON.with_name("decoding"),), (PYTHON, "-m", "decoding")])
def test_help_shows_every_command(folder, command):
    done = run(folder, *command, "--help")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "cannot be loaded" not in done.stdout and done.stderr == ""


@pytest.mark.parametrize("command", [(PYTHON.with_name("decoding"),), (PYTHON, "-m", "decoding")])
def test_a_prior_is_trained(folder, command, model_folder):
    done = run(folder, *command, "style", "train", "style.txt", "--model", model_folder, "--out", "mine.safetensors")
    assert done.returncode == 0, done.stderr
    about = json.loads(run(folder, *command, "style", "info", "mine.safetensors").stdout)
    assert (about["style"], about["order"]) == ("style", 3)


def test_packages_of_the_users_that_stand_in_the_way_are_named(folder):
    (folder / "ngram" / "__init__.py").write_text("")
    done = run(folder, PYTHON, "-c", "from decoding import StylePrior")
    assert "decoding needs its own package 'ngram'" in done.stderr.splitlines()[-1]
    assert str(folder / "ngram" / "__init__.py") in done.stderr.splitlines()[-1]


def test_it_holds_what_the_packages_hold():
    (wheel,) = (ROOT / "build" / "wheel").glob("*.whl")
    packages = ("decoding", "ngram", "chunkllm", "experiments")
    listed = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    if max((ROOT / name).stat().st_mtime for name in tracked) > wheel.stat().st_mtime:
        pytest.skip("the wheel is older than the packages: make wheel")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(packages) and "dist-info" not in name}
    assert held == tracked
