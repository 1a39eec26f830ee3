"""``decoding generate``: what it prints, when, and under which policy."""

import json
import subprocess
import sys

import pytest

from decoding import Policy


@pytest.fixture
def arguments(model_folder, style_file):
    return ["generate", "the captain", "--model", model_folder, "--max-new-tokens", 12, "--style", style_file]


def test_json_is_one_object_with_the_same_text(run, arguments):
    plain, found = run(*arguments), run(*arguments, "--json")
    about = json.loads(found.stdout)
    assert about["text"] + "\n" == plain.stdout and about["temperature"] == 1
    assert found.stdout.count("\n") == 1


def test_pieces_are_printed_as_they_come(run, arguments, monkeypatch):
    printed = []
    with monkeypatch.context() as patch:
        patch.setattr("click.echo", lambda text, nl: printed.append(text))
        assert run(*arguments).exit_code == 0
    assert printed[0].startswith("the captain ") and printed[-1] == "\n" and len(printed) > 8
    assert "".join(printed) == run(*arguments).stdout


def test_a_policy_and_what_changes_it(run, arguments, style_file, tmp_path):
    Policy(style=style_file, λ=1, temperature=0.5).save_pretrained(tmp_path / "mine")
    by_policy = [*arguments[:-2], "--policy", tmp_path / "mine"]
    spelt = run(*arguments, "--lambda", 1, "--temperature", 0.5).stdout
    assert run(*by_policy).stdout == spelt
    cooler = run(*arguments, "--lambda", 0.2, "--temperature", 0.1).stdout
    assert run(*by_policy, "--lambda", 0.2, "--temperature", 0.1).stdout == cooler != spelt
    greedy = run(*arguments, "--lambda", 1, "--temperature", 0).stdout
    assert run(*by_policy, "--temperature", 0).stdout == greedy
    narrow = run(*arguments, "--lambda", 1, "--temperature", 0.5, "--top-p", 0.2).stdout
    assert run(*by_policy, "--top-p", 0.2).stdout == narrow


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--order", 2], "a policy does not hold --order"),
        (["--allow-any-lambda"], "a policy does not hold --allow-any-lambda"),
        (["--lambda", 2], "[0, 1]"),
        (["--mode", "ratio"], "mode without a style"),
    ],
)
def test_what_a_policy_cannot_be_changed_to(run, arguments, tmp_path, more, says):
    Policy(temperature=0.5).save_pretrained(tmp_path / "mine")
    result = run(*arguments[:-2], "--policy", tmp_path / "mine", *more)
    assert result.exit_code == 2 and says in result.stderr and not result.stdout


def test_a_policy_that_is_not_there(run, arguments):
    result = run(*arguments, "--policy", "nowhere/at/all")
    assert result.exit_code == 2 and result.stderr.count("Error:") == 1


@pytest.mark.slow
def test_what_goes_to_the_output_is_json_alone(model_folder, style_file):
    """With a warning on the way: a folder that has another file than texts."""
    (style_file.parent / "notes.md").write_text("storm")
    words = [sys.executable, "-m", "decoding", "generate", "rain", "--json", "--max-new-tokens", "4"]
    words += ["--model", str(model_folder), "--style", str(style_file.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["text"].startswith("rain") and done.stdout.count("\n") == 1
    assert "notes.md" in done.stderr
