"""``decoding playground``, up to where the page opens."""

import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from decoding.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["playground", *map(str, arguments)])


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "decoding.playground.page", None)  # as if it could not be imported
    result = run()
    assert result.exit_code == 2 and "pip install 'gradio>=" in result.output


@pytest.mark.parametrize(
    ("option", "value"), [("--model", "owner/model"), ("--dtype", "float32"), ("--style", "moby-dick")]
)
def test_what_the_server_decides_is_not_asked_here(option, value):
    result = run("--server", "http://127.0.0.1:9", option, value)
    assert result.exit_code == 2 and f"{option} is the server's own" in result.output


def test_it_binds_to_loopback_and_shares_nothing_unless_told(monkeypatch, model_folder):
    pytest.importorskip("gradio", reason="Gradio is not installed; the extra playground brings it")
    asked = []
    monkeypatch.setattr("decoding.playground.local.LocalModel.prepare", lambda self: None)
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **options: asked.append(options) or (None, "here", None))
    interrupted = SimpleNamespace(wait=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    command = sys.modules["decoding.cli.playground"]  # the attribute of that name is the command itself
    monkeypatch.setattr(command, "threading", SimpleNamespace(Event=lambda: interrupted))
    result = run("--model", model_folder, "--no-browser")
    assert result.exit_code == 0 and "The playground is at here" in result.output, result.output
    assert (asked[0]["server_name"], asked[0]["share"], asked[0]["inbrowser"]) == ("127.0.0.1", False, False)


def test_no_server_there_is_one_line():
    pytest.importorskip("gradio", reason="Gradio is not installed; the extra playground brings it")
    result = run("--server", "http://127.0.0.1:9", "--no-browser")
    assert result.exit_code == 2 and "no answer from http://127.0.0.1:9" in result.output
