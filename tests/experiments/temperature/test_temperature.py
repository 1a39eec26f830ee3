import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from decoding import DecodingError, FixedTemperature, TemperatureSelector
from decoding.cli import cli
from decoding.temperature.processors import EntropyDependentTemperature
from experiments.temperature import data
from experiments.temperature.collect import (
    ByBlock,
    Collection,
    CollectOptions,
    Scores,
    prompts_in,
    read_collection,
)
from experiments.temperature.contest import Contest, Judged, compared, mutation
from experiments.temperature.evaluate import tables
from experiments.temperature.halves import is_for_training
from experiments.temperature.samplers import Nucleus
from experiments.temperature.tasks import Task

ABOUT = {"model": "tiny", "model_fingerprint": "0", "dtype": "float32"}


def task_of(name, ability, word, **changes):
    records = [{"prompt": f"{word} the storm and sea {i % 3 * 'black '}", "right": "wind"} for i in range(24)]
    base = {
        "suites": ["abilities"],
        "records": records,
        "templates": ["{prompt}"],
        "answer": "{right}",
        "parser": "line",
        "metric": "chrf",
        "max_new_tokens": 5,
    }
    return Task(name=name, ability=ability, **(base | changes))


@pytest.fixture
def collection(model, tokenizer, tmp_path):
    def make(out="run", resume=False, max_new_tokens=5, **options):
        tasks = [task_of("first", "CR", "captain", max_new_tokens=max_new_tokens), task_of("second", "MT", "wind")]
        chosen = CollectOptions(**({"temperatures": (0.1, 1.0), "batch_size": 4} | options))
        items = {task: task.items(tmp_path, 10) for task in tasks}
        return Collection(model, tokenizer, ABOUT, items, chosen, tmp_path / out, resume)

    return make


def cells(collection):
    """What is kept of each, but for what it cost."""
    held = {path.name: json.loads(path.read_bytes()) for path in (collection.folder.path / "cells").iterdir()}
    assert all(record.pop("cpu_seconds") >= 0 for record in held.values())
    return held


def test_blocks_of_rows_have_temperatures_of_their_own():
    scores = torch.randn(2 * 3 * 2, 9)
    blocks = [[FixedTemperature(0.5)], [FixedTemperature(2.0), Nucleus(0.5)], [EntropyDependentTemperature()]]
    got = ByBlock(blocks, 2)(None, scores)
    for row in range(12):
        wanted = scores[row : row + 1]
        for processor in blocks[row // 2 % 3]:
            wanted = processor(None, wanted)
        torch.testing.assert_close(got[row : row + 1], wanted)


def test_near_zero_temperature_is_greedy_from_a_shared_cache(collection, model, tokenizer):
    run = collection(temperatures=(1e-4, 1.0), baselines=False, seeds=3)
    run.run()
    held = prompts_in(run.folder.path, "first")
    assert len(held) == 10
    for each in held:
        inputs = tokenizer(each["prompt"], return_tensors="pt")
        output = model.generate(inputs["input_ids"], do_sample=False, max_new_tokens=5, pad_token_id=0)
        greedy = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert each["texts"]["T=0.0001"] == [greedy] * 3
    assert len({text for each in held for text in each["texts"]["T=1"]}) > 10


def test_an_interrupted_collection_goes_on_as_if_nothing_had_been(collection, monkeypatch):
    whole = collection("whole")
    whole.run()
    broken = collection("broken")
    write, left = broken.folder.write, [2]

    def write_twice(key, record):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(key, record)

    monkeypatch.setattr(broken.folder, "write", write_twice)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    with pytest.raises(DecodingError, match="--resume"):
        read_collection(broken.folder.path)
    resumed = collection("broken", resume=True)
    resumed.run()
    assert cells(resumed) == cells(whole)
    with pytest.raises(DecodingError, match=r"another top_p \(0\.9, not 0\.5\)"):
        collection("broken", resume=True, top_p=0.5)
    with pytest.raises(DecodingError, match="another definitions") as raised:
        collection("broken", resume=True, max_new_tokens=4)
    assert len(str(raised.value)) < 300


def test_collections_that_will_not_do(collection, tmp_path):
    run = collection()
    run.run()
    assert read_collection(run.folder.path, [0.1]).temperatures == [0.1, 1.0]
    with pytest.raises(DecodingError, match=r"misses temperature 0\.7"):
        read_collection(run.folder.path, [0.1, 0.7])
    with pytest.raises(DecodingError, match="no collection"):
        read_collection(tmp_path / "nothing")
    lonely = collection("lonely", temperatures=(0.5,))
    lonely.run()
    with pytest.raises(DecodingError, match="one temperature"):
        read_collection(lonely.folder.path)


def scores_of(task, ability, curve, count=40, noise=0.02):
    rng = np.random.default_rng(0)
    values = np.array(curve) + noise * rng.standard_normal((count, len(curve)))
    samplers = {f"T={t:g}": values[:, i] for i, t in enumerate((0.1, 0.7, 1.3))}
    word = {"CR": "captain said storm", "MT": "translate into german sea"}[ability]
    sides = [bool(i % 2) for i in range(count)]
    return Scores(task, ability, list(range(count)), sides, [word] * count, samplers)


def test_halves_are_for_good():
    scores = scores_of("a", "CR", [1, 0.5, 0.2])
    first, second = scores.half(True), scores.half(False)
    assert sorted(first.positions + second.positions) == scores.positions
    assert 8 < len(first.positions) < 32
    assert all(at % 2 for at in first.positions)
    assert np.array_equal(first.by_sampler["T=0.7"], scores.by_sampler["T=0.7"][first.positions])


def test_the_mutation_is_the_steepest_sure_fall():
    temperatures = [0.1, 0.7, 1.3]
    means = np.array([0.9, 0.8, 0.1])
    assert mutation(temperatures, means, means + 0.01 * np.random.default_rng(0).standard_normal((99, 3))) == [0.7, 1.3]
    assert mutation(temperatures, means, means + 9 * np.random.default_rng(0).standard_normal((99, 3))) is None
    rising = np.array([0.1, 0.2, 0.3])
    assert mutation(temperatures, rising, np.tile(rising, (9, 1))) is None


def judged_of(task, ability, curve, picks, count=40, **samplers):
    """Every prompt scores alike; a selector picks the temperatures of ``picks``."""
    scores = {f"T={t:g}": np.full(count, x) for t, x in zip((0.1, 0.7, 1.0), curve, strict=True)}
    scores |= {name: np.full(count, x) for name, x in samplers.items()}
    return Judged(task, ability, np.arange(count) % 2 == 0, scores, {"selector": np.array(picks)}, {})


def test_a_contest_by_hand():
    cuts = {"min-p 0.05, T=0.7": 0.3, "min-p 0.05, T=1": 0.6}
    tasks = [
        judged_of("a", "CR", [0.4, 0.8, 0.1], [0.7] * 40, **cuts),
        judged_of("b", "MT", [1.0, 0.5, 0.5], [0.1, 0.7] * 20, **cuts),
    ]
    rows = {row["policy"]: row for row in compared([Contest([0.1, 0.7, 1.0], tasks, tasks)])}
    share = {name: row["all"]["mean"] for name, row in rows.items()}
    assert share["T=0.1"] == pytest.approx((0.5 + 1) / 2)
    assert (rows["best fixed by the training half"]["setting"], share["best fixed by the training half"]) == (
        "T=0.1",
        pytest.approx(0.75),
    )
    assert (rows["min-p 0.05"]["setting"], share["min-p 0.05"]) == ("T=1", pytest.approx((0.75 + 0.6) / 2))
    assert share["selector"] == pytest.approx((1 + 0.75) / 2)
    assert share["each task's best in hindsight"] == pytest.approx(1)
    assert rows["selector"]["gain"]["mean"] == pytest.approx(0.125)
    assert rows["selector"]["worst"] == {"ability": "MT", "gain": pytest.approx(-0.25)}
    assert rows["selector"]["by_ability"] == {"CR": pytest.approx(1), "MT": pytest.approx(0.75)}
    with pytest.raises(DecodingError, match=r"chooses T=0.3 for prompts of c"):
        judged_of("c", "CR", [1, 1, 1], [0.3] * 40).picked("selector")


def test_all_models_weigh_the_same():
    one = [judged_of("a", "CR", [1.0, 0.5, 0.5], [0.1] * 40), judged_of("b", "CR", [1.0, 0.5, 0.5], [0.1] * 40)]
    other = [judged_of("a", "CR", [0.2, 0.2, 0.4], [0.1] * 40)]
    contests = [Contest([0.1, 0.7, 1.0], part, part) for part in (one, other)]
    rows = {row["policy"]: row for row in compared(contests)}
    assert rows["selector"]["all"]["mean"] == pytest.approx((1 + 0.5) / 2)
    assert rows["best fixed by the training half"]["setting"] == "T=0.1, T=1"


def test_tables_are_made_of_what_was_kept_alone():
    tasks = [judged_of("a", "CR", [0.4, 0.8, 0.1], [0.7] * 40), judged_of("boolq", None, [0.5, 0.6, 0.7], [0.7] * 40)]
    kept = json.loads(json.dumps([task.record() for task in tasks]))
    model = {"model": "m", "size": "small", "dtype": "float32", "seeds": 1, "top_p": 0.9, "translation": {}}
    model |= {"temperatures": [0.1, 0.7, 1.0], "trained_on": ["a"], "tasks": kept}
    found = tables({"models": [model]})
    (only,) = found["models"]
    assert only["held_out_prompts"] == {"a": 20} and only["kept_out"] == [] and found["together"] == []
    total = only["superglue"][-1]
    assert (total["task"], total["questions"]) == ("all questions", 40)
    assert total["accuracy"]["selector"]["mean"] == pytest.approx(0.6)
    assert total["gain"]["selector"]["T=0.1"]["mean"] == pytest.approx(0.1)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["temperature", *map(str, arguments)])


@pytest.fixture
def definitions(tmp_path):
    """Files of six tasks, one of each ability."""
    words = {"CR": "because", "CT": "poem", "ICL": "example", "IF": "tell", "MT": "translate", "SUMM": "summarize"}
    paths = []
    for ability, word in words.items():
        task = task_of(f"{word}-task", ability, word)
        (tmp_path / f"{word}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in task.records))
        fields = ("name", "suites", "ability", "templates", "answer", "parser", "metric", "max_new_tokens")
        definition = {name: getattr(task, name) for name in fields} | {"source": f"{word}.jsonl"}
        paths.append(tmp_path / f"{word}.json")
        paths[-1].write_text(json.dumps(definition))
    return paths


def test_collect_train_and_predict(run, definitions, model_folder, encoder_folder, tmp_path):
    tasks = [part for path in definitions for part in ("--task", path)]
    result = run("collect", *tasks, "--data", tmp_path, "--limit", 16, "--model", model_folder, "--out", "scores")
    assert result.exit_code == 0, result.output
    encoder = ("--encoder", encoder_folder, "--window", 16)
    arguments = ["train", *tasks, "--data", tmp_path, "--collection", "scores", *encoder]
    for extra in ((), ("--fine-tune", 1)):
        out = f"selector{len(extra)}"
        result = run(*arguments, *extra, "--out", out)
        assert result.exit_code == 0, result.output
        selector = TemperatureSelector.from_pretrained(tmp_path / out)
        assert selector.curve is not None and len(selector.curve.temperatures) == 7
        assert selector.about["fine_tuned"] == len(extra) / 2
        assert (tmp_path / out / "encoder").is_dir()
        assert selector.about["encoder"] == encoder_folder.name
        assert str(encoder_folder) not in (tmp_path / out / "temperature_selector.json").read_text()
    answer = run("predict", "translate the storm", "--selector", "selector0", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.output)
    assert found["curve"]["temperature"] in (0.1, 0.4, 0.7, 1.0, 1.3, 1.6, 1.9)
    assert found["ability"]["model_size"] == "small"
    assert "holds other files" in run(*arguments, "--out", "selector0").output
    by_curve = run("predict", "sea", "--selector", "selector0", "--policy", "curve", "--json")
    assert "ability" not in json.loads(by_curve.output)


@pytest.fixture
def few_wordings(monkeypatch):
    """One prompt of each wording: all of them take a minute."""
    for name in ("kept_out_wordings", "requests_written_apart"):
        monkeypatch.setattr(data, name, partial(_first_of_each, getattr(data, name)))


def _first_of_each(wordings, **options):
    return [replace(each, prompts=each.prompts[:1]) for each in wordings(**options)]


@pytest.mark.usefixtures("few_wordings")
def test_ones_own_tasks_are_judged_with_nothing_else_there(run, definitions, model_folder, tmp_path):
    mine = json.loads(definitions[0].read_text()) | {"name": "mine", "ability": None}
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    tasks = [part for path in (definitions[0], tmp_path / "mine.json") for part in ("--task", path)]
    sizes = ("--limit", 12, "--seeds", 1, "--no-baselines")
    result = run("collect", *tasks, "--data", tmp_path, *sizes, "--model", model_folder, "--out", "scores")
    assert result.exit_code == 0, result.output
    definitions[0].unlink()
    result = run("eval", "--collection", "scores", "--out", "judged")
    assert result.exit_code == 0, result.output
    (model,) = json.loads((tmp_path / "judged" / "results.json").read_text())["models"]
    assert sum(model["held_out_prompts"].values()) == sum(
        is_for_training("because.jsonl", i * 2) is False for i in range(12)
    )
    assert [row["task"] for row in model["others"]] == ["mine", "all questions"] and not model["superglue"]
    assert "Tasks without an ability" in (tmp_path / "judged" / "results.md").read_text()
    result = run("eval", "--task", tmp_path / "mine.json", "--data", tmp_path, "--out", "again")
    assert (result.exit_code, "no ability" in result.output) == (2, True)
    result = run("eval", "--task", definitions[1], "--data", tmp_path, "--out", "told")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "told" / "results.json").read_text())["classification"]
    assert list(told)[:3] == ["prompts held out", "wordings kept out", "requests written apart"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", " ", "--selector", "s"], "no temperature selector at s"),
        (["collect", "--task", "nothing", "--data", ".", "--out", "o"], "unknown task"),
        (["collect", "--task", "few-shot", "--data", ".", "--out", "o"], "no metric"),
        (["collect", "--task", "copa:x", "--data", ".", "--out", "o"], "NAME:100"),
        (["collect", "--data", "nowhere", "--out", "o"], "--data"),
        (["collect", "--temperatures", "0:1", "--data", ".", "--out", "o"], "positive number"),
        (["train", "--data", ".", "--collection", "nowhere", "--out", "o"], "no collection"),
        (["train", "--data", ".", "--task", "few-shot", "--out", "o"], "no prompts of ability"),
        (["eval", "--data", ".", "--model-size", "huge", "--out", "o"], "unknown model size"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(run, tmp_path, arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert message in result.output
    assert not (tmp_path / "o").exists()


def test_an_evaluation_writes_tables_and_a_picture(run, shared, encoder_folder, model_folder, tmp_path):
    tasks = [part for name in ("e-care", "ntrex", "sst2") for part in ("--task", f"{name}:24")]
    tiny = ("--data", shared, "--model", model_folder, "--out", "scores", "--seeds", 1)
    assert run("collect", *tasks, *tiny).exit_code == 0
    superglue = run(
        "collect", "--task", "cb:8", "--data", shared, "--model", model_folder, "--out", "glue", "--seeds", 1
    )
    assert superglue.exit_code == 0, superglue.output
    encoder = ("--encoder", encoder_folder, "--window", 16)
    trained = run("train", "--data", shared, "--collection", "scores", *encoder, "--out", "selector")
    assert trained.exit_code == 0, trained.output
    collections = ("--collection", "scores", "--collection", "glue")
    result = run("eval", "--data", shared, *collections, "--selector", "selector", "--generate", "--out", "judged")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "judged" / "results.json").read_text())
    (model,) = results["models"]
    assert {row["task"] for row in model["curves"]} == {"e-care", "ntrex", "sst2"}
    policies = [row["policy"] for row in model["held_out"]]
    assert policies[-3:] == ["selector, through generate", *policies[-2:]]
    assert policies[-1] == "each task's best in hindsight"
    assert "selector, curve" in policies and "min-p 0.05" in policies
    assert model["superglue"][-1]["questions"] == 8
    assert "Llama-3.2-1B (paper)" in (tmp_path / "judged" / "results.md").read_text()
    data = json.loads((tmp_path / "judged" / "scores.json").read_text())
    assert json.loads(json.dumps(tables(data)))["models"] == results["models"]
    for task in data["models"][0]["tasks"]:
        if task["ability"]:  # The public call chooses what the tables say.
            pairs = zip(task["chosen"]["selector, through generate"], task["chosen"]["selector, curve"], strict=True)
            assert all(one == other for one, other in pairs if one is not None)
    assert (tmp_path / "judged" / "scores.png").stat().st_size > 10_000
