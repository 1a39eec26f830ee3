"""``decoding chat``: turns, commands, pipes and a terminal."""

import os
import select
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import pytest

from decoding import DecodingError, Policy, StylePrior, generate
from decoding.cli.talk import Talk, obey
from decoding.models import load_tokenizer


@pytest.fixture
def greedy(model, chat_folder):
    """What the model answers to a spelt-out prompt."""
    options = {"tokenizer": load_tokenizer(str(chat_folder)), "max_new_tokens": 5, "do_sample": False}
    return lambda text, **more: generate(model, text, **options, **more).strip()


@pytest.fixture
def talk(model, chat_folder):
    return Talk(model, load_tokenizer(str(chat_folder)), max_new_tokens=5, is_greedy=True)


command = import_module("decoding.cli.chat")  # the package has the command by that name


def said(text):
    return f"night {text} captain said"


def test_a_pipe_has_a_turn_on_each_line(run, chat_folder, greedy, style_file):
    lines = ["rain", "", "sails", f"/style {style_file}", "/lambda 1", "/reset", "rain", "/quit", "never"]
    arguments = ["--model", chat_folder, "--max-new-tokens", 5, "--temperature", 0]
    result = run("chat", *arguments, input="\n".join(lines))
    assert result.exit_code == 0, result.output
    first = greedy(said("rain"))
    second = greedy(said(f"rain night {first} night sails"))
    third = greedy(said("rain"), logits_processor=[StylePrior(style_file, λ=1)])
    assert [line.strip() for line in result.stdout.splitlines()] == [first, second, third]
    assert first != third
    notes = result.stderr.splitlines()
    assert notes[0].startswith(f"style {style_file}, λ 0.1, mode paper; temperature 0")
    assert "λ 1.0" in notes[1] and notes[2] == "a new conversation" and len(notes) == 3


def test_options_and_a_saved_policy_come_before_commands(run, chat_folder, style_file, greedy, tmp_path):
    Policy(style=style_file, λ=0.2, temperature=0.5).save_pretrained(tmp_path / "mine")
    arguments = ["--model", chat_folder, "--policy", tmp_path / "mine", "--lambda", 1, "--temperature", 0]
    result = run("chat", *arguments, "--system", "sea", "--max-new-tokens", 5, input="rain\n/save out\n/policy out\n")
    spelt = "night sea night rain captain said"
    assert result.stdout.strip() == greedy(spelt, logits_processor=[StylePrior(style_file, λ=1)])
    assert Policy.from_pretrained(tmp_path / "out").λ == 1
    saved, opened = result.stderr.strip().split("\n")
    assert saved == "saved in out, but for temperature 0, which no policy holds" and "temperature" not in opened


def test_each_command_changes_what_it_names(talk, style_file):
    talk.is_greedy = False
    for line, fields in {
        f"/style {style_file}": {"style": str(style_file)},
        "/lambda 0.3": {"lambda_": 0.3},
        "/mode paper": {"mode": "paper"},
        "/temperature 0.7": {"temperature": 0.7},
        "/budget 100": {"chunks": {"budget": 100}},
        "/budget off": {"chunks": None},
        "/temperature 0": {"temperature": None},
        "/style off": {"style": None, "lambda_": None, "mode": None},
    }.items():
        assert obey(talk, line)
        assert {name: getattr(talk.policy, name) for name in fields} == fields
    assert obey(talk, "/policy") == "temperature 0" and talk.is_greedy
    obey(talk, "/temperature off")
    assert talk.policy == Policy() and not talk.is_greedy and obey(talk, "/policy") == "the model as it is"
    assert obey(talk, "/quit") is None and "/budget N|off" in str(obey(talk, "/help"))


def test_a_budget_keeps_what_else_was_said_of_chunks(talk):
    talk.take(Policy(chunks={"retention": 0.5, "local": 16}))
    obey(talk, "/budget 90")
    assert talk.policy.chunks == {"local": 16, "budget": 90}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sing", "no command /sing: /help"),
        ("/", "no command /:"),
        ("/style", "write /style NAME|off"),
        ("/style nothing-there", "no style 'nothing-there'"),
        ("/lambda 0.5", "without a style"),
        ("/mode loud", "unknown mode 'loud'"),
        ("/temperature hot", "temperature must be a positive number, not 'hot'"),
        ("/temperature -1", "temperature must be a positive number"),
        ("/temperature nan", "temperature must be a positive number"),
        ("/budget many", "a budget is a whole number of tokens, or off, not 'many'"),
        ("/budget 3", "a budget of 3 tokens leaves nothing to choose"),
        ("/policy nowhere/at/all", "nowhere/at/all"),
        ("/save /proc/nothing", "/proc/nothing"),
        ("/system boom", "cannot be filled in: no boom"),
        ("boom", "cannot be filled in: no boom"),
        ("\udce9", "what you say is no text"),
        ("rain " * 300, "the model reads 256: /reset"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_the_chat_goes_on(talk, monkeypatch, capsys, line, says):
    monkeypatch.setattr(command, "sys", SimpleNamespace(stdin=iter([line, "/policy"]), stdout=sys.stdout))
    monkeypatch.setattr(command, "_is_terminal", lambda: False)
    command._converse(talk, "tiny")
    first, last = capsys.readouterr().err.strip().split("\n")
    assert first.startswith("Error: ") and says in first
    assert last == "temperature 0" and talk.turns == [] and talk.system is None and talk.policy == Policy()


def test_an_interrupted_answer_is_kept_as_far_as_it_was_shown(talk, monkeypatch, capsys):
    def interrupted(line):
        shown = []

        def show(piece):
            shown.append(piece)
            if len(shown) == 2 and line == "rain":
                raise KeyboardInterrupt

        talk.answer(line, show)

    before = greedy_words(talk, "rain")
    monkeypatch.setattr(command, "_typed", lambda: iter(["rain", "sails"]))
    monkeypatch.setattr(command, "_is_terminal", lambda: True)
    monkeypatch.setattr(command, "_goes_on", lambda _, line: interrupted(line) or True)
    command._converse(talk, "tiny")
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    assert talk.turns[1]["content"].split() == before[:2]


def greedy_words(talk, line):
    found = Talk(talk.model, talk.tokenizer, 5, is_greedy=True)
    found.answer(line, lambda _: None)
    return found.turns[1]["content"].split()


def test_an_answer_ends_with_the_tokenizers_own_end_and_does_not_show_it(talk, monkeypatch):
    talk.model.generation_config.eos_token_id, before = None, talk.model.generation_config.eos_token_id
    monkeypatch.setattr("decoding.generation._require_one_text", lambda *_: None)
    given = {}
    monkeypatch.setattr(
        "decoding.cli.talk.generate", lambda *_, streamer, **options: given.update(options) or streamer("sea")
    )
    talk.answer("rain", lambda _: None)
    talk.model.generation_config.eos_token_id = before
    assert given["eos_token_id"] == [talk.tokenizer.eos_token_id] and given["chat"] is True


def test_a_model_without_a_template_is_told_before_it_is_loaded(run, model_folder, monkeypatch):
    monkeypatch.setattr("decoding.models.load_model", lambda *_: pytest.fail("loaded"))
    result = run("chat", "--model", model_folder)
    assert result.exit_code == 2 and "has no chat template: `decoding generate`" in result.stderr
    assert "no style 'x'" in run("chat", "--model", model_folder, "--style", "x").stderr


@pytest.mark.slow
def test_a_terminal(chat_folder):
    controller, terminal = pytest.importorskip("pty", reason="there are no terminals of this kind").openpty()
    words = [sys.executable, "-m", "decoding", "chat", "--model", str(chat_folder), "--temperature", "0"]
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    heard = ""

    def until(text):
        nonlocal heard
        end = time.monotonic() + 240
        while text not in heard:
            assert select.select([controller], [], [], max(0, end - time.monotonic()))[0], heard
            heard += os.read(controller, 4096).decode()
        heard = heard.partition(text)[2]

    try:
        until("/help lists commands")
        until("> ")
        os.write(controller, b"/temperature 0.5\n")
        until("temperature 0.5")
        until("> ")
        os.write(controller, b"\x1b[A\x01\x0b/lambda 1\n")  # the line before, its start, without its rest
        until("Error: lambda without a style")
        until("> ")
        os.write(controller, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(controller)


def test_a_talk_refuses_what_does_not_fit(talk, style_file, tmp_path):
    from tests.conftest import make_model, make_tokenizer

    other = make_tokenizer(["other"])
    StylePrior(style_file, tokenizer=talk.tokenizer).save_pretrained(tmp_path / "saved")
    stranger = Talk(make_model(len(other)), other, 5)
    with pytest.raises(DecodingError, match="was trained with tokenizer"):
        obey(stranger, f"/style {tmp_path / 'saved'}")
    assert stranger.policy == Policy()
