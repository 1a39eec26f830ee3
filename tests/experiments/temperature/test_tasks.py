import json
import re
from collections import Counter

import pytest
import torch

from decoding import DecodingError
from experiments.temperature import task_metrics
from experiments.temperature.halves import is_for_training
from experiments.temperature.tasks import Item, load_tasks

SCORED = [*load_tasks(), *(task for task in load_tasks(suite="superglue") if task.name != "copa")]


def test_every_ability_and_all_of_superglue_have_tasks():
    assert {task.ability for task in load_tasks()} == {"CR", "CT", "ICL", "IF", "MT", "SUMM"}
    assert {task.name for task in load_tasks(suite="superglue")} == {
        *("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    }
    assert all(task.metric is not None for task in SCORED)


@pytest.mark.parametrize("task", [*SCORED, *load_tasks(suite="prompts")], ids=lambda task: task.name)
def test_prompts_are_made_of_the_records(task, shared):
    items = task.items(shared, 12, all_templates=True)
    assert len(items) == 12
    names = re.findall(r"\{[^}]+\}", " ".join(task.templates))
    assert all(item.prompt.strip() and not any(name in item.prompt for name in names) for item in items)
    assert len({item.position for item in items}) == 12
    if task.metric not in (None, "ifeval", "diversity_coherence"):
        assert all(item.answers and item.answers[0] for item in items)
    if task.labels:
        assert all(item.answers[0] in task.labels.values() for item in items)


@pytest.mark.parametrize(
    "task", [task for task in SCORED if task.answer and task.parser != "text"], ids=lambda t: t.name
)
def test_the_right_answer_scores_1(task, shared):
    items = task.items(shared, 12)
    right = [f" {item.answers[0]}.\nAnd so on" if task.parser == "label" else item.answers[0] for item in items]
    assert task.scores(items, right) == pytest.approx([1.0] * 12)
    assert max(task.scores(items, [""] * 12)) == 0


def test_shots_are_others_than_the_record(shared):
    (task,) = load_tasks(["ag-news"])
    for item in task.items(shared, 40):
        assert item.prompt.count("Article:") == 5
        assert item.prompt.count(item.record["title"]) == 1


def test_multirc_asks_about_every_answer(shared):
    (task,) = load_tasks(["multirc"])
    held = [json.loads(line) for line in (shared / task.source).read_text().splitlines()]
    answers = sum(len(question["answers"]) for record in held for question in record["passage"]["questions"])
    assert len(task.items(shared)) == answers


def test_translations_go_both_ways(shared):
    (task,) = load_tasks(["ntrex"])
    languages = Counter(item.prompt.split(":")[0] for item in task.items(shared, 60))
    assert languages["Translate into English"] == 30 and len(languages) == 4


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *(("B.", "B"), ("the answer is A", "A"), ("a cat sat", ""), ("Abba", ""), ("", ""), ("(B) or A", "B")),
        *(("A cat is chasing it", ""), ("Not A", ""), ("It is not A, it is B", "B"), ("not the option A", "")),
        *(("Option A fits better", "A"), ("A is the cause", "A"), ("b)", "B"), ("**B**", "B"), ("A\nB", "A")),
        *(("I'd choose B since", "B"), ("It isn't B", ""), ("Why not? A", "A"), ("I bought a. B", "B")),
    ],
)
def test_labels_are_words(output, label):
    (task,) = load_tasks(["e-care"])
    assert task.parse(output) == label


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *(("No doubt, yes", "Yes"), ("Yes, no doubt", "Yes"), ("no", "No"), ("No, it is not.", "No")),
        *(("There is no question: Yes.", "Yes"), ("not yes", ""), ("NO!", "No"), ("Nobody", "")),
    ],
)
def test_yes_and_no_in_phrases(output, label):
    (task,) = load_tasks(["boolq"])
    assert task.parse(output) == label


def test_choices_change_places_in_half_of_the_prompts(shared):
    (task,) = load_tasks(["copa"])
    items = task.items(shared)
    swapped = 0
    for item in items:
        right = item.record["choice2" if item.record["label"] else "choice1"]
        assert f"\n{item.answers[0]}. {right}\n" in item.prompt
        swapped += item.prompt.index(item.record["choice1"]) > item.prompt.index(item.record["choice2"])
    assert 15 < swapped < 35


def test_a_record_and_its_examples_belong_to_one_half(shared):
    (news,), (xsum,), (opening,) = (load_tasks([name]) for name in ("ag-news", "xsum", "news-continuation"))
    titles = {True: set(), False: set()}
    for item in news.items(shared, 200):
        titles[item.training] |= set(re.findall("Article: (.*)", item.prompt))
    assert not titles[True] & titles[False]
    sides = {item.record["document"]: item.training for item in xsum.items(shared)}
    assert all(sides[item.record["document"]] == item.training for item in opening.items(shared, 100))


def test_longer_labels_are_read_in_any_case():
    (task,) = load_tasks(["sst2"])
    assert task.parse(" Positive\nReview:") == "positive"
    assert task.parse("positively") == ""


def test_a_task_of_ones_own(tmp_path):
    definition = {
        "name": "mine",
        "suites": ["abilities"],
        "ability": "CR",
        "source": "mine.jsonl",
        "templates": ["{question}?"],
        "answer": "{reply}",
        "parser": "line",
        "metric": "exact_match",
    }
    (tmp_path / "mine.json").write_text(json.dumps(definition))
    (tmp_path / "mine.jsonl").write_text('{"question": "Who", "reply": "The Duke"}\n')
    (task,) = load_tasks([str(tmp_path / "mine.json")])
    items = task.items(tmp_path)
    expected = Item(0, "Who?", ["The Duke"], {"question": "Who", "reply": "The Duke"}, is_for_training("mine.jsonl", 0))
    assert items == [expected]
    assert task.scores(items * 2, ["duke!", "the king"]) == [1.0, 0.0]
    with pytest.raises(DecodingError, match="--data"):
        task.items(tmp_path / "elsewhere")
    (tmp_path / "mine.jsonl").write_text('{"reply": "x"}\n')
    with pytest.raises(DecodingError, match="have no 'question'"):
        task.items(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"question": "Who", "reply": "x"}\n["Who", "x"]\n')
    with pytest.raises(DecodingError, match=r"mine.jsonl: .*'Who', 'x'.* is no object with fields"):
        task.items(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"metric": "luck"}, "unknown metric"), ({"colour": "red"}, "its fields"), ({"ability": "XX"}, "unknown ability")],
)
def test_damaged_definitions(tmp_path, change, message):
    (tmp_path / "t.json").write_text(json.dumps({"name": "t", "suites": ["abilities"], "templates": ["x"]} | change))
    with pytest.raises(DecodingError, match=message):
        load_tasks([str(tmp_path / "t.json")])


def test_unknown_and_repeated_tasks():
    with pytest.raises(DecodingError, match="choose from .*ag-news"):
        load_tasks(["nothing"])
    with pytest.raises(DecodingError, match="same name"):
        load_tasks(["copa", "copa"])


def test_diversity_counts_distinct_n_grams():
    # 6 words: pairs 5, of which 4 differ; triples 4 of 4; four in a row 3 of 3.
    assert task_metrics.diversity("a b c a b d") == pytest.approx(4 / 5)
    assert task_metrics.diversity("a a a a") == pytest.approx(1 / 3 * 1 / 2 * 1)
    assert task_metrics.diversity("word") == task_metrics.diversity("") == 0


def test_diversity_and_coherence(encoder, monkeypatch):
    monkeypatch.setattr(task_metrics, "load_encoder", lambda: encoder)
    items = [Item(0, "the captain said that his ship", [], {}, False)] * 3
    scores = task_metrics.diversity_coherence(items, ["the captain said that his ship", "a a a a", ""])
    assert scores[0] == pytest.approx(1.0)
    assert scores[2] == 0


def test_corpus_scores_of_translations():
    pairs = [("the cat sat on the mat today", "the cat sat on the mat today")] * 2
    assert task_metrics.spbleu(pairs, str.split) == pytest.approx(100)
    item = Item(0, "", ["guten Morgen"], {}, False)
    assert task_metrics.chrf([item, item], ["guten Morgen", "xyz"]) == pytest.approx([1, 0], abs=0.02)
    assert task_metrics.rouge_l([item, item], ["guten Tag", ""]) == pytest.approx([0.5, 0])


def test_scores_are_in_range(encoder, monkeypatch, shared):
    monkeypatch.setattr(task_metrics, "load_encoder", lambda: encoder)
    torch.manual_seed(0)
    for task in SCORED:
        items = task.items(shared, 4)
        outputs = ["", "Yes", "the captain said that", "🌊 " * 20]
        assert all(0 <= score <= 1 for score in task.scores(items, outputs))
