"""A package of somebody else's, installed beside this one, adds commands, styles, tasks and scorers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from decoding import hooks
from decoding.cli import cli
from decoding.plugins import Hook

HOOKS = (hooks.COMMANDS, hooks.STYLES, hooks.TASKS, hooks.SCORERS)
PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where pip installed it."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(PLUGIN, folder / "source")  # building leaves files there
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder / "site", source], check=True)
    return folder / "site"


@pytest.fixture
def run(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    forget_found(monkeypatch)
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


def forget_found(monkeypatch):
    for hook in HOOKS:
        monkeypatch.setitem(vars(hook), "_found", Hook(hook.group)._found)


def test_the_whole_surface_is_in_one_short_file():
    lines = Path(hooks.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert [value for value in vars(hooks).values() if isinstance(value, Hook)] == list(HOOKS)
    assert len((PLUGIN / "captains.py").read_text().splitlines()) < 40


def test_commands(run):
    assert run("captain").output == run("bench", "captain").output == "I am\n"
    assert "Says who is the captain." in run("--help").output
    assert "captain" in run("bench", "--help").output


def test_a_style(run, model_folder, tmp_path):
    out = tmp_path / "log.safetensors"
    assert run("style", "train", "captains-log", "--model", model_folder, "--out", out).exit_code == 0
    assert json.loads(run("style", "info", out).output)["style"] == "captains-log"
    assert "captains-log" in run("style", "train", "nobodys", "--model", model_folder, "--out", out).output


def test_a_task(run, model_folder, tmp_path):
    arguments = ["temperature", "collect", "--task", "captains-orders", "--model", model_folder, "--data", tmp_path]
    result = run(*arguments, "--temperatures", "0.5,1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "run.json").read_text())["tasks"] == {"captains-orders": 4}


def test_a_scorer(run, model_folder, style_file, tmp_path):
    shape = ["--context", 150, "--scored", 4, "--pieces", 1, "--passkey-lengths", 80, "--passkey-depths", 1]
    arguments = ["chunk", "eval", style_file, "--no-adapters", "--model", model_folder, *shape, "--retention", 0.8]
    result = run(*arguments, "--method", "captains-choice", "--method", "pooled", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = {row["method"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["text"]}
    assert rows == {"full attention", "captains-choice", "pooled"}


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("raise ValueError('no sea')", "ValueError('no sea')"),
        ("import nothing_there", "nothing_there"),
        ("captain = 1", "is no click.Command, but 1"),
    ],
)
def test_a_broken_command_says_whose_it_is_and_the_others_work(run, tmp_path, monkeypatch, module, says):
    (tmp_path / "broken.py").write_text(module)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[decoding.commands]\nbroken = broken:captain\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    forget_found(monkeypatch)
    result = run("broken", "--some", "thing")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert says in result.output and "broken" in result.output
    assert "(cannot be loaded)" in run("--help").output
    assert run("captain").output == "I am\n"


def test_two_packages_with_one_name_are_refused(run, tmp_path, monkeypatch):
    info = tmp_path / "mutiny-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: mutiny\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[decoding.commands]\ncaptain = mutiny:captain\n")
    monkeypatch.syspath_prepend(tmp_path)
    forget_found(monkeypatch)
    assert "mutiny and captains both add 'captain'" in run("captain").output
