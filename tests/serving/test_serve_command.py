"""``decoding serve``: its help, vLLM's, and what it hands on."""

import os

import pytest
from click.testing import CliRunner

from decoding.cli import cli


def run(*arguments):
    return CliRunner().invoke(cli, ["serve", *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--port", "8000", "--help"], ["--help", "--port", "8000"]])
def test_help_has_our_options_and_says_how_to_see_vllms(arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    for option in ("--style", "--policy", "--temperature-selector", "--phases", "--chunk-adapters", "--kv-budget"):
        assert f"\n  {option} " in result.stdout
    assert "--help=all" in result.stdout.split("--kv-budget")[1]


@pytest.mark.parametrize("arguments", [["--help=Frontend"], ["--port", "8000", "--help", "Frontend"]])
def test_help_with_a_value_is_vllms(arguments, monkeypatch):
    asked = []
    monkeypatch.setattr("decoding.vllm.server.print_help", asked.append)
    assert run(*arguments).exit_code == 0
    assert asked == ["Frontend"]


def test_options_of_vllm_are_handed_on_as_they_are(monkeypatch, model_folder):
    """Also short ones with an h in them."""
    served = []
    monkeypatch.setattr("decoding.vllm.server.serve", lambda path, name, engine, arguments: served.append(arguments))
    given = ["-dph", "-tp", "2", "--max-num-seqs", "8", "--no-enable-prefix-caching", "-O3"]
    result = run("--model", str(model_folder), *given)
    assert result.exit_code == 0, result.output
    assert served == [tuple(given)]


@pytest.mark.parametrize(
    ("what", "there", "not_there"),
    [
        ("all", ("--max-num-seqs", "--allowed-origins", "--kv-cache-dtype"), ()),
        ("Frontend", ("--allowed-origins",), ("--max-num-seqs",)),
        ("max-num-seqs", ("--max-num-seqs",), ("--allowed-origins",)),
    ],
)
def test_vllms_help(what, there, not_there, capfd, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
    from decoding.vllm.server import print_help

    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_ENGINE_READY_TIMEOUT_S"):  # which vLLM's command line may set
        monkeypatch.setenv(name, os.environ.get(name, "spawn" if "METHOD" in name else "600"))
    print_help(what)
    shown = capfd.readouterr().out
    assert all(f"\n  {option}" in shown for option in there)
    assert not any(f"\n  {option}" in shown for option in not_there)
