"""Shells complete commands, options, styles and files, and do not wait for it."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from decoding.cli import cli
from decoding.names import DEFAULT_MODEL
from decoding.style.registered import registered_styles


def offered(words, incomplete):
    found = ShellComplete(cli, {}, "decoding", "_DECODING_COMPLETE").get_completions(words, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize(
    ("words", "incomplete", "names"),
    [
        ([], "ch", ["chat", "chunk"]),
        ([], "", ["bench", "chat", "chunk", "completion", "doctor", "generate", "lm-eval", "playground", "reproduce",
                  "serve", "style", "sweep", "temperature"]),
        (["bench"], "vllm", ["vllm", "vllm-long-context"]),
        (["style"], "", ["compare", "eval", "info", "prune", "train"]),
        (["chat"], "--te", ["--temperature"]),
        (["generate", "--style"], "", registered_styles()),
        (["sweep", "--style"], "king", ["king-james"]),
        (["chat", "--model"], "smol", [DEFAULT_MODEL]),
        (["chat", "--device"], "cu", ["cuda"]),
        (["chat", "--dtype"], "b", ["bfloat16"]),
        (["chat", "--mode"], "", ["paper", "ratio"]),
        (["completion"], "z", ["zsh"]),
    ],
)  # fmt: skip
def test_names(words, incomplete, names):
    assert offered(words, incomplete) == [("plain", name) for name in names]


@pytest.mark.parametrize("words", [["chat", "--model"], ["generate", "x", "--style"], ["chat", "--policy"]])
def test_files_where_no_name_fits(words):
    assert offered(words, "./my") == [("file", "./my")]


def test_a_device_is_not_looked_for(monkeypatch):
    monkeypatch.setattr("decoding.models.checked_device", lambda _: pytest.fail("looked for"))
    assert offered(["chat", "--device", "cuda"], "--po") == [("plain", "--policy")]


@pytest.mark.parametrize("shell", [BashComplete, ZshComplete, FishComplete])
def test_the_script(run, shell, monkeypatch):
    monkeypatch.setattr(BashComplete, "_check_version", lambda _: None)  # of the bash that is there, if it is
    expected = shell(cli, {}, "decoding", "_DECODING_COMPLETE").source()
    assert run("completion", shell.name).stdout.strip() == expected.strip()
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell.name}")
    assert run("completion").stdout.strip() == expected.strip()


def test_help_has_every_command_and_option_once_in_its_section(run):
    shown, ctx = run("--help").stdout, click.Context(cli)
    own, others = shown.split("Write:")[1], "Others:"
    assert others not in own and all(own.count(f"\n  {name} ") == 1 for name in cli.list_commands(ctx))
    assert own.index("\n  chat ") < own.index("Make and judge:") < own.index("\n  style ") < own.index("Measure:")
    options = run("generate", "--help").stdout
    for parameter in cli.get_command(ctx, "generate").params[1:]:
        assert options.count(f"\n  {parameter.opts[0]} ") == 1
    assert options.index("Model:") < options.index("--device") < options.index("Policy and style:")
    assert "\n  -h, --help" in options.split("Others:")[1]


def test_an_unknown_shell_is_one_error(run, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/dash")
    result = run("completion")
    assert result.exit_code == 2 and "decoding completion bash|zsh|fish" in result.stderr


def test_nothing_heavy_is_imported():
    code = (
        "import json, sys\n"
        "from decoding.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'numpy', 'rich', 'matplotlib', 'chunkllm', 'ngram', 'experiments')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))\n"
    )
    typed = {"_DECODING_COMPLETE": "bash_complete", "COMP_WORDS": "decoding generate --sty", "COMP_CWORD": "2"}
    environment = os.environ | typed
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *offered, heavy = done.stdout.splitlines()
    assert offered == ["plain,--style"] and json.loads(heavy) == []
