import json

import pytest
import torch
from click.testing import CliRunner

from decoding import TemperatureSelector
from decoding.cli import cli
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.explained import BLANK, NO_GAIN, UNREAD, Explained
from decoding.temperature.heads import AbilityHead, CurveHead
from experiments.temperature.predict import as_dict, as_text, explained, request_in
from tests.conftest import WORDS, make_tokenizer

PROMPTS = ["cause storm because", "write poem storm", "example : sea", "tell men", "translate german", "summarize him"]


def make_selector(encoder, about):
    """Of a model that writes poems best at 0.7, and all else at 0.1."""
    vectors = encoder(PROMPTS).repeat(40, 1)
    head = AbilityHead.fit(vectors, list(range(6)) * 40, 6)
    scores = torch.tensor([[1.0, 0.8, 0.2]] * 6)
    scores[1] = torch.tensor([0.5, 1.0, 0.3])
    noise = 0.05 * torch.randn(240, 3, generator=torch.Generator().manual_seed(0))
    fixed = 0
    temperatures = [0.1, 0.7, 1.3]
    curve = CurveHead.fit(
        head(vectors), scores.repeat(40, 1) + noise, torch.ones(240), temperatures, fixed, encoder.width
    )
    return TemperatureSelector(encoder, head, curve, about=about)


@pytest.fixture
def selector(encoder):
    return make_selector(encoder, {"model": "a model"})


def by_curve(expected, errors, temperature, reason):
    shares = dict(zip(ABILITIES, [0.75, 0.05, 0.05, 0.05, 0.05, 0.05], strict=True))
    return Explained("the sea", shares, (0.1, 0.7, 1.0), expected, errors, 0.1, temperature, "curve", reason)


def test_bars_stand_at_their_scores(selector):
    found = by_curve((0.5, 1.0, 0.25), (0.0, 2 / 32 / 1.96, 1 / 32 / 1.96), 0.7, None)
    lines = as_text(selector, [found], "small").splitlines()
    assert lines[0] == "Read: the sea"
    assert lines[2] == f"  causal reasoning        75.0 %  {24 * '█'}"
    start = next(i for i, line in enumerate(lines) if line.startswith("Policy curve: scores of a model"))
    assert lines[start + 1] == f"   0.1   50.0 %  {16 * '█':<40} best fixed"
    assert lines[start + 2] == f"   0.7  100.0 %  {30 * '█' + '├─┼┤':<40} ◀ chosen"
    assert lines[start + 3] == f"     1   25.0 %  {7 * '█' + '├┼'}"
    assert lines[start + 4] == "Temperature 0.7"
    assert max(map(len, lines[start + 1 :])) <= 80


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (NO_GAIN, "no expected gain over it exceeds 2 × its standard error"),
        (UNREAD, "does not read this language"),
        (BLANK, "no text to read"),
    ],
)
def test_it_says_why_it_fell_back(selector, reason, why):
    has_scores = reason == NO_GAIN
    scores = (((0.5, 0.6, 0.25), (0.0, 0.2, 0.2))) if has_scores else (None, None)
    shown = as_text(selector, [by_curve(*scores, 0.1, reason)], "small")
    assert why in shown.splitlines()[-1] and shown.splitlines()[-1].startswith("Temperature 0.1: ")
    assert ("◀ chosen, the best fixed" in shown) == has_scores
    assert ("causal reasoning" in shown) == has_scores


def test_json_says_what_was_expected_and_gained(selector):
    found = by_curve((0.5, 1.0, 0.25), (0.0, 0.1, 0.2), 0.7, None)
    shown = as_dict(selector, [found], "small")
    assert shown["text"] == "the sea" and shown["encoder_reads_it"] is True
    assert shown["curve"] == {
        "model": "a model",
        "temperature": 0.7,
        "reason": None,
        "expected_scores": {"0.1": 0.5, "0.7": 1.0, "1": 0.25},
        "best_fixed_temperature": 0.1,
        "expected_gain": 0.5,
        "standard_error": 0.1,
        "standard_errors": {"0.1": 0.0, "0.7": 0.1, "1": 0.2},
    }


def test_each_policy_says_what_it_chooses(selector):
    for text in PROMPTS:
        ability, curve = explained(selector, text, "medium")
        assert [ability.temperature] == selector.select([text], "medium", "ability")
        assert [curve.temperature] == selector.select([text], policy="curve")
    assert curve.reason is None or curve.reason == NO_GAIN
    assert [each.policy for each in explained(selector, "sea", "small", "curve")] == ["curve"]
    selector.curve = None
    assert [each.policy for each in explained(selector, "sea", "small")] == ["ability"]


def test_a_text_is_encoded_once_and_a_blank_one_not_at_all(selector, monkeypatch):
    read = []
    encode = type(selector.encoder).__call__
    monkeypatch.setattr(
        type(selector.encoder), "__call__", lambda self, texts: read.append(texts) or encode(self, texts)
    )
    explained(selector, "write poem", "small")
    found = explained(selector, " \n", "small")
    assert read == [["write poem"]]
    assert [each.reason for each in found] == [BLANK, BLANK]
    assert as_dict(selector, found, "small")["curve"]["expected_scores"] is None


@pytest.fixture
def chatting(tmp_path):
    """A folder with a tokenizer whose template has words for markers."""
    tokenizer = make_tokenizer([*WORDS, "user:", "assistant:", "system:", "write", "poem"])
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chatting")
    return tmp_path / "chatting"


def test_the_last_user_turn_is_read(chatting):
    prompt = "system: tell men </s> user: the captain said </s> assistant: the sea </s> user: write poem that men heard"
    assert request_in(prompt + " </s> assistant: ", str(chatting)) == "write poem that men heard"
    assert request_in("user:  </s> assistant: ", str(chatting)).strip() == ""


def test_the_command(selector, chatting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    selector.save_pretrained("s")

    def run(*arguments):
        result = CliRunner().invoke(cli, ["temperature", "predict", *arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    prompt = "system: tell men </s> user: write poem of the storm </s> assistant: "
    turn = "write poem of the storm"
    framed = ("--model", str(chatting))
    shown = run(prompt, "--selector", "s", *framed)
    assert shown.startswith(f"Read: {turn}\n") and "◀ chosen" in shown
    found = json.loads(run(prompt, "--selector", "s", *framed, "--json"))
    assert found["text"] == turn
    assert [found["ability"]["temperature"]] == selector.select([turn])
    assert [found["curve"]["temperature"]] == selector.select([turn], policy="curve")
    assert json.loads(run(prompt, "--selector", "s", "--json"))["text"] == prompt
