"""RULER's tasks, LongBench and completion: examples fit, scores are the suites' own, and a run answers them."""

import gzip
import json
import random
import string

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm import ChunkAdapters
from decoding.cli import cli
from decoding.errors import DecodingError
from experiments.long_context.baselines import FULL
from experiments.long_context.suites import longbench, ruler, scores
from experiments.long_context.suites.completion import NextLine
from experiments.long_context.suites.questions import Questions
from experiments.long_context.suites.tasks import Example, Window
from tests.conftest import WORDS, make_model, make_tokenizer

pytest.importorskip("wonderwords")
TEXT = " ".join(f"Sentence {i} of the text tells nothing. " for i in range(2000))
SQUAD = [
    {
        "title": f"t{i // 4}",
        "question": f"who {i}?",
        "context": f"person{i} did it.",
        "answers": {"text": [f"person{i}"]},
    }
    for i in range(800)
]
HOTPOT = [
    {
        "question": "where?",
        "answer": "Rome",
        "context": {"title": ["A", "B"], "sentences": [["It is", " so."], ["Rome."]]},
    }
]


@pytest.fixture(scope="module")
def words():
    """A tokenizer that splits at white space: every word is one token, known or not."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "squad.jsonl"
    path.write_text("\n".join(map(json.dumps, SQUAD)) + "\n")
    return Questions.read(path)


@pytest.fixture(scope="module")
def all_tasks(questions):
    return {task.name: task for task in ruler.tasks(ruler.Haystack([TEXT]), {"squad": questions})}


RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_squad"),
)


def test_rulers_tasks_are_there(all_tasks):
    assert tuple(all_tasks) == RULER


@pytest.mark.parametrize("name", RULER)
@pytest.mark.parametrize("length", [1200, 4096])
def test_examples_fill_their_window(all_tasks, words, name, length):
    window = Window(words, length)
    example = all_tasks[name].example(0, window)
    room = length - example.new_tokens - window.ids(example).shape[1]
    unit = {"fwe": 60, "cwe": 70, "vt": 30}.get(name, 30)  # a word more of fwe or cwe is some more in the list
    assert 0 <= room <= unit
    assert example == all_tasks[name].example(0, window) != all_tasks[name].example(1, window)


@pytest.mark.parametrize("name", RULER)
def test_what_is_right_stands_in_the_prompt(all_tasks, words, name):
    task = all_tasks[name]
    example = task.example(3, Window(words, 1500))
    count = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
    assert len(set(example.answers)) == count
    assert all(answer in example.prompt for answer in example.answers)
    assert task.score(" ".join(example.answers).upper(), example) == 1
    assert task.score("nothing of the kind", example) == 0
    assert task.score(example.answers[0], example) == pytest.approx(1 if name == "qa_squad" else 1 / count)


def test_values_belong_to_the_keys_that_are_asked_for(all_tasks, words):
    for name in ("niah_multikey_1", "niah_multiquery", "niah_multivalue", "niah_multikey_3"):
        example = all_tasks[name].example(0, Window(words, 3000))
        asked = example.opening.split(" for ")[1].split(" mentioned")[0].replace("and ", "").split(", ")
        told = [f"One of the special magic {kind} for {key} is: {value}."
                for kind in ("numbers", "uuids") for key in asked for value in example.answers]  # fmt: skip
        assert sum(sentence in example.prompt for sentence in told) == len(example.answers)


def test_variables_of_a_chain_have_the_value(all_tasks, words):
    example = all_tasks["vt"].example(0, Window(words, 1500))
    question = example.prompt.rsplit("Memorize and track", 1)[1]
    value = question.split("assigned the value ")[1].split(" ")[0]
    holds = {value}
    for line in question.splitlines():
        if line.startswith("VAR "):
            name, _, source = line.removeprefix("VAR ").strip().partition(" = ")
            if source.removeprefix("VAR ") in holds:
                holds.add(name)
    assert holds - {value} == set(example.answers)


def test_common_words_are_the_most_common(all_tasks, words):
    example = all_tasks["cwe"].example(0, Window(words, 5000))
    listed = example.prompt.rsplit("Memorize the ones", 1)[1].split("\n")[1].split()[1::2]
    counts = sorted(((listed.count(word), word) for word in set(listed)), reverse=True)
    assert {word for _, word in counts[:10]} == set(example.answers)
    assert [count for count, _ in counts[:11]] == [30] * 10 + [3]
    coded = all_tasks["fwe"].example(0, Window(words, 5000))
    listed = coded.prompt.split("coded words. ")[1].split("\n")[0].split()
    counts = sorted(((listed.count(word), word) for word in set(listed) - {"..."}), reverse=True)
    assert [word for _, word in counts[:3]] == list(coded.answers)


def test_a_window_without_room_is_an_error(all_tasks, words):
    for name in RULER:
        with pytest.raises(DecodingError, match="no room for the task"):
            all_tasks[name].example(0, Window(words, 80))
    with pytest.raises(DecodingError, match=r"there is text for [\d,]+ of 50,000 tokens"):
        all_tasks["niah_single_2"].example(0, Window(words, 50_000))
    with pytest.raises(DecodingError, match="qa_squad has 800 questions"):
        all_tasks["qa_squad"].example(800, Window(words, 1200))


def test_a_longest_example_is_the_longest(words):
    def make(units):
        return Example("word " * units, "", ("x",), 7)

    for tokens in (8, 9, 100, 5000):
        assert len(words(Window(words, tokens).longest(make, 1).prompt)["input_ids"]) == tokens - 7
    assert Window(words, 100).longest(make, 1, most=90).prompt == make(90).prompt
    assert Window(words, 100).longest(make, 1, most=93).prompt == make(93).prompt
    assert Window(words, 100).longest(make, 1, most=94).prompt == make(93).prompt


def test_rulers_wordings_are_those_of_lm_eval(all_tasks, words):
    tracked = pytest.importorskip("lm_eval.tasks.ruler.vt_utils").CONFIG["variable_tracking"]
    common = pytest.importorskip("lm_eval.tasks.ruler.cwe_utils")
    frequent = pytest.importorskip("lm_eval.tasks.ruler.fwe_utils").CONFIG
    example = all_tasks["vt"].example(0, Window(words, 1500))
    question = example.prompt[example.prompt.rindex("Memorize and track") :]
    context, value = (
        question.split("text.\n\n", 1)[1].rsplit("\nQuestion", 1)[0],
        example.opening.split("value ")[1][:5],
    )
    assert question == tracked["template"].format(context=context, query=value)
    example = all_tasks["cwe"].example(0, Window(words, 5000))
    question = example.prompt[example.prompt.rindex("Below is a numbered") :]
    context = question.split("most often.\n", 1)[1].rsplit("\nQuestion", 1)[0]
    assert question + example.opening == common.TEMPLATE.format(context=context)
    assert ruler._all_words() == sorted(common.WORDS)
    example = all_tasks["fwe"].example(0, Window(words, 5000))
    context = example.prompt.split("coded words. ", 1)[1].rsplit("\nQuestion", 1)[0]
    assert example.prompt == frequent["template"].format(context=context)
    assert example.opening == frequent["answer_prefix"]


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet="ab\n \x07C1", max_size=12), st.lists(st.text(alphabet="abC1", min_size=1, max_size=3), min_size=1)
)
def test_rulers_scores_are_those_of_lm_eval(written, answers):
    theirs = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    told = theirs.postprocess_pred([written])
    assert scores.all_found(written, answers) == theirs.string_match_all(told, [answers])
    assert scores.any_found(written, answers) == float(any(answer.lower() in told[0].lower() for answer in answers))


def test_questions_are_read_as_squad_and_hotpotqa_have_them(questions, tmp_path):
    asked = questions.asked[5]
    assert (asked.question, asked.documents, asked.answers) == ("who 5?", ("person5 did it.",), ("person5",))
    others = questions.others(5, random.Random(0))
    assert len(others) == len(set(others)) == 799 and asked.documents[0] not in others
    assert set(others[:3]) == {f"person{i} did it." for i in (4, 6, 7)}  # of the same title
    (tmp_path / "hotpot.jsonl").write_text("\n".join(map(json.dumps, HOTPOT)))
    unanswered = {"question": "no?", "context": "of no use", "answers": {"text": []}}
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, [SQUAD[0], unanswered])))
    two = Questions.read(tmp_path / "two.jsonl")
    assert len(two.asked) == 1 and two.others(0, random.Random(0)) == ["of no use"]
    (hotpot,) = Questions.read(tmp_path / "hotpot.jsonl").asked
    assert hotpot.documents == ("A\nIt is so.", "B\nRome.") and hotpot.answers == ("Rome",)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2"),
        ('{"question": "q", "context": "c"}', "line 2.*answer"),
        ("[1]", "line 2"),
        (None, "cannot read"),
    ],
)
def test_damaged_questions_are_one_error(tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    if line is not None:
        path.write_text(json.dumps(SQUAD[0]) + "\n" + line)
    with pytest.raises(DecodingError, match=says):
        Questions.read(path)


def test_questions_may_be_packed_or_marked(tmp_path):
    lines = "\n".join(map(json.dumps, SQUAD))
    (tmp_path / "marked.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in tmp_path.iterdir():
        assert len(Questions.read(path).asked) == len(SQUAD)


@pytest.mark.parametrize(
    "score, written, answer, choices, right",
    [
        (scores.f1, "The red car!", "a red car", (), 1.0),
        (scores.f1, "red blue", "red", (), 2 / 3),
        (scores.f1, "", "red", (), 0.0),
        (scores.classified, "it is Sport", "Sport", ("Sport", "News"), 1.0),
        (scores.classified, "Sport or News", "Sport", ("Sport", "News"), 0.5),
        (scores.classified, "Other food", "Other food", ("food", "Other food"), 1.0),
        (scores.counted, "7, or 8, or 7", "7", (), 2 / 3),
        (scores.counted, "none", "7", (), 0.0),
        (scores.retrieved, "Paragraph 12", "Paragraph 12", (), 1.0),
        (scores.retrieved, "Paragraph 1", "Paragraph 12", (), 0.0),
        (scores.similar_code, "# note\n\nreturn x\n", "return x", (), 0.0),  # its first line without a mark is empty
        (scores.similar_code, "\n# note\nreturn x\n", "return x", (), 1.0),
        (scores.letter_chosen, "**The correct answer is (C)**, since", "C", (), 1.0),
        (scores.letter_chosen, "C", "C", (), 0.0),
    ],
)
def test_scores_of_longbench(score, written, answer, choices, right):
    assert score(written, answer, choices) == pytest.approx(right)


def test_scores_that_packages_compute():
    pytest.importorskip("rouge")
    assert scores.rouge("a cat sat", "a cat sat", ()) == pytest.approx(1)
    assert scores.rouge("", "a cat sat", ()) == scores.rouge("...", "a cat", ()) == 0
    pytest.importorskip("jieba")
    assert scores.chinese_f1("我喜欢猫。", "我喜欢猫", ()) == pytest.approx(1)
    assert 0 < scores.chinese_rouge("我喜欢猫", "我喜欢狗", ()) < 1


@pytest.fixture
def bench(tmp_path):
    """A folder as LongBench's, with a row of a question and one of classes."""
    (tmp_path / "config").mkdir()
    (tmp_path / "data").mkdir()
    prompts = {"qasper": "Article: {context}\nQuestion: {input}\nAnswer:", "trec": "{context}\n{input}"}
    (tmp_path / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (tmp_path / "config" / "dataset2maxlen.json").write_text(json.dumps({"qasper": 8, "trec": 6}))
    row = {"input": "it?", "context": "begin " + "filler " * 500 + "end", "answers": ["yes"], "all_classes": None}
    (tmp_path / "data" / "qasper.jsonl").write_text(json.dumps(row | {"note": "a\u2028b"}, ensure_ascii=False) + "\n")
    row |= {"all_classes": ["yes", "no"]}
    (tmp_path / "data" / "trec.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_longbench_is_read_from_its_folder(bench):
    words = make_tokenizer(["Article:", "Question:", "Answer:", "begin", "filler", "end", "it?"])
    tasks = {task.name: task for task in longbench.tasks(bench)}
    assert list(tasks) == ["qasper", "trec"]
    window = Window(words, 100)
    example = tasks["qasper"].example(0, window)
    assert example.prompt.startswith("Article: ") and example.prompt.endswith("Answer:")
    assert 60 < window.ids(example).shape[1] <= 92
    assert tasks["qasper"].score("Yes.", example) == 1
    classes = tasks["trec"].example(0, Window(words, 1000))
    assert not classes.is_chat and "filler " * 500 in classes.prompt
    assert tasks["trec"].score("yes\nno", classes) == 1  # its first line alone counts
    with pytest.raises(DecodingError, match="has 1 examples"):
        tasks["trec"].example(1, window)


def test_longbench_v2_is_read_from_its_folder(tmp_path, words):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "0shot.txt").write_text("$DOC$ | $Q$ | $C_A$ $C_B$ $C_C$ $C_D$")
    row = {"context": " the text ", "question": "which?", "answer": "B"} | {f"choice_{x}": x.lower() for x in "ABCD"}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    (task,) = longbench.tasks(tmp_path)
    example = task.example(0, Window(words, 1000))
    assert example.prompt == "the text | which? | a b c d"
    assert task.score("The correct answer is (B)", example) == 1 and task.score("(B)", example) == 0


@pytest.mark.parametrize("gone", ["config/dataset2prompt.json", "data/qasper.jsonl data/trec.jsonl"])
def test_a_folder_that_is_not_longbenchs_is_one_error(bench, gone):
    for name in gone.split():
        (bench / name).unlink()
    with pytest.raises(DecodingError, match="dataset2prompt.json|none of LongBench's files"):
        list(longbench.tasks(bench))


def test_a_line_of_code_is_asked_for_behind_all_that_fits(words):
    code = "".join(f"    value_{i} = compute({i}) + {i}\n# {i}\n" for i in range(400))
    task = NextLine([code])
    window = Window(words, 200)
    example = task.example(0, window)
    assert example.ends_line and not example.is_chat
    assert (example.prompt + "    " + example.answers[0]) in code
    assert 200 - 64 - 7 < window.ids(example).shape[1] <= 200 - 64
    assert task.score("# so\n    " + example.answers[0] + "\nmore", example) == 1
    with pytest.raises(DecodingError, match="no line behind 20,000 tokens"):
        task.example(0, Window(words, 20_000))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("suites")
    alphabet = [*WORDS, *string.ascii_letters, *string.digits]
    spell = make_tokenizer(alphabet)
    model = make_model(len(spell), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    model.save_pretrained(path / "model")
    spell.save_pretrained(path / "model")
    ChunkAdapters.for_model(model, width=2, sensitivity=(0.01, 0.02)).save_pretrained(path / "adapters")
    (path / "text.txt").write_text("\n".join(TEXT[i : i + 80] for i in range(0, 20_000, 80)))
    return path


def run(folders, out, *more):
    where = ["--model", str(folders / "model"), "--adapters", str(folders / "adapters"), "--out", str(out)]
    methods = ["--method", "pooled", "--method", "pooled, by layer", "--retention", "0.5", "--budget", "100"]
    asked = ["--suite", "ruler", "--suite", "completion", "--lengths", "256", "--examples", "2"]
    tasks = ["--task", "niah_single_1", "--task", "next_line"]
    return CliRunner().invoke(
        cli, ["chunk", "eval", str(folders / "text.txt"), *where, *methods, *asked, *tasks, *more]
    )


@pytest.mark.slow
def test_a_run_answers_suites(folders, tmp_path):
    out = tmp_path / "out"
    done = run(folders, out, "--lossless", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    results = json.loads((out / "results.json").read_text())
    rows = results["tasks"]
    assert {row["task"] for row in rows} == {"niah_single_1", "next_line"}
    kept = {(row["method"], row.get("retention"), row.get("budget")) for row in rows}
    assert kept == {(FULL, 1.0, None)} | {
        (method, *limit) for method in ("pooled", "pooled, by layer") for limit in ((0.5, None), (None, 100))
    }
    for row in rows:
        assert row["examples"] == 2 and row["tokens"] <= 256 and 0 <= row["score"] <= 1
        if row["method"] == FULL:
            assert row["difference"] == 0 and row["kv_retention"] == 1
        else:
            assert 0 < row["kv_retention"] <= 1
    assert {row["same"] for row in results["lossless"]} == {2}  # in float32 the lossless mode writes the model's own
    assert all(row["acceptance"] is None or 0 <= row["acceptance"] <= 1 for row in results["lossless"])
    assert results["cpu_hours"]["256"] > 0 and (out / "tasks.png").stat().st_size > 1000
    assert "text" not in results and "passkey" not in results

    prompts = {path.stem: json.loads(path.read_text()) for path in (out / "prompts").glob("*.json")}
    assert len(prompts) == 4
    (out / "others").mkdir()
    right = {path.stem: json.loads(path.read_text())["answers"][0] for path in (out / "cells").glob("*.json")}
    elsewhere = {"method": "kvpress Oracle", "kept": 64, "written": right}
    (out / "others" / "oracle.json").write_text(json.dumps(elsewhere))
    cells = {path.name for path in (out / "cells").iterdir()}
    again = run(folders, out, "--lossless", "--dtype", "float32", "--resume")
    assert again.exit_code == 0 and cells == {path.name for path in (out / "cells").iterdir()}
    rows = json.loads((out / "results.json").read_text())["tasks"]
    assert {row["score"] for row in rows if row["method"] == "kvpress Oracle"} == {1.0}


def test_a_run_grows(folders, tmp_path):
    out = tmp_path / "out"
    assert run(folders, out, "--examples", "1").exit_code == 0
    first = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    done = run(folders, out, "--examples", "2", "--lengths", "240,256", "--resume")
    assert done.exit_code == 0, done.output
    cells = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(first) == 2 and len(cells) == 8 and first.items() <= cells.items()
    refused = run(folders, out, "--budget", "120", "--resume")
    assert refused.exit_code == 2 and "has another budgets" in refused.output


@pytest.mark.parametrize(
    "more, says",
    [
        (["--context", "100"], "--context goes with --suite perplexity"),
        (["--longbench", "."], "--longbench goes with --suite longbench"),
        (["--suite", "longbench"], "wants --longbench FOLDER"),
        (["--task", "magic"], "no task 'magic'"),
        (["--lengths", "512"], "the model has 256 positions: choose a shorter --lengths"),
        (["--questions", "squad"], "must read like squad=questions.jsonl"),
        (["--budget", "10"], "a budget of 10 tokens leaves nothing to choose"),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, more, says):
    done = run(folders, tmp_path / "out", *more)
    assert done.exit_code == 2 and says in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_options_of_suites_that_are_not_measured_are_refused(folders, tmp_path):
    where = ["--model", str(folders / "model"), "--no-adapters", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["chunk", "eval", str(folders / "text.txt"), *where, "--lossless"])
    assert done.exit_code == 2 and "--lossless goes with --suite ruler or longbench or completion" in done.output
    done = CliRunner().invoke(cli, ["chunk", "eval", *where])
    assert done.exit_code == 2 and "give TEXTS" in done.output


def test_what_a_method_writes_ends_where_the_model_ends(words):
    from experiments.long_context.reading import _has_ended

    new_line = make_tokenizer([*WORDS, "a", "b"])
    assert _has_ended([torch.tensor([1])], new_line, [1], False)
    assert not _has_ended([torch.tensor([3])], new_line, [1], False)
