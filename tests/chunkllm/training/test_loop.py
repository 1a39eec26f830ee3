import json
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chunkllm import AdapterScorer, ChunkAdapters, ChunkError, PooledScorer
from chunkllm.training.distillation import lesson_scores
from chunkllm.training.lessons import ReadingOptions, cut, load_reading, read_piece, save_reading
from chunkllm.training.loop import SENSITIVITY_FILE, STATE_FILE, Training, TrainingOptions
from tests.conftest import WORDS, make_model, make_tokenizer

KNOWN = ["storm", "sea", "rain", "night"]
READING = ReadingOptions(context=96, boundaries=6, queries=2, max_chunk=8, local=6, sinks=2)
OPTIONS = TrainingOptions(
    tokens=6 * 96, held_out=2, width=4, detector_width=32, epochs=8, learning_rate=0.02, save_every=5, reading=READING
)


def prose(seed, sentences=160):
    """Sentences of three to nine words; the last ends in a point."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        first, *others, last = rng.choices(KNOWN, k=rng.randint(3, 9))
        lines.append(" ".join([first.capitalize(), *others, f"{last}."]))
    return " ".join(lines)


@pytest.fixture(scope="module")
def tokenizer():
    capitals, lasts = [word.capitalize() for word in KNOWN], [f"{word}." for word in KNOWN]
    return make_tokenizer([*KNOWN, *capitals, *lasts])


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture
def training(model, tokenizer, tmp_path):
    def make(out="run", resume=False, options=OPTIONS, texts=None, judged=None, **others):
        texts, judged = texts or [prose(0), prose(1)], judged or [prose(2)]
        return Training(model, tokenizer, texts, judged, options, tmp_path / out, resume, **others)

    return make


def mean_of(history, key):
    return sum(record[key] for record in history) / len(history)


def test_adapters_learn(training, model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = training()
    untrained = run.judge()
    adapters = run.run()
    assert run.step == run.steps == len(run.history) == 48
    first, last = run.history[:6], run.history[-6:]
    assert mean_of(last, "distillation") < 0.8 * mean_of(first, "distillation")
    assert mean_of(last, "boundary") < 0.5 * mean_of(first, "boundary")
    judged = run.judge()
    assert judged["detector"]["f1"] > 0.6 > 2 * untrained["detector"]["f1"]
    pooled = untrained["mean"]["pooled"]
    assert untrained["mean"]["adapter"] == pytest.approx(pooled)
    assert judged["mean"]["pooled"] == pooled
    assert judged["mean"]["adapter"]["divergence"] < pooled["divergence"]
    for figures in judged["mean"].values():
        assert judged["mean"]["true attention"]["missing_at_0.5"] <= figures["missing_at_0.5"] < 1
    assert len(judged["by_layer"]["recent"]["missing_at_0.25"]) == 2
    by_epoch = [record["held_out"] for record in run.history if "held_out" in record]
    assert len(by_epoch) == OPTIONS.epochs
    assert by_epoch[-1] == {part: judged[part] for part in ("detector", "mean")}
    assert adapters.config.threshold in [i / 20 for i in range(2, 19)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("left", [3, 21])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(training, monkeypatch, left, tmp_path):
    whole = training("whole", options=replace(OPTIONS, epochs=4)).run()
    broken = training("broken", options=replace(OPTIONS, epochs=4))
    seen = []

    def interrupt(*progress):
        seen.append(progress)
        if len(seen) == left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(interrupt)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").rglob("0*.safetensors")}
    resumed = training("broken", options=replace(OPTIONS, epochs=4), resume=True)
    got = resumed.run().state_dict()
    assert all(torch.equal(value, got[name]) for name, value in whole.state_dict().items())
    assert len(resumed.history) == resumed.steps
    assert times and all(path.stat().st_mtime_ns == time for path, time in times.items())  # nothing was read again
    again = training("broken", options=replace(OPTIONS, epochs=4), resume=True).run()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in got.items())


def test_layers_sensitivities_are_measured_once(training, monkeypatch, tmp_path):
    options = replace(OPTIONS, epochs=1)
    run = training(options=options)
    run.run()
    measured = run.measure_sensitivity()
    assert run.adapters.config.sensitivity == tuple(measured) and len(measured) == 2
    by_piece = json.loads((tmp_path / "run" / SENSITIVITY_FILE).read_text())
    assert len(by_piece) == OPTIONS.calibration
    assert measured == pytest.approx([sum(layer) / 2 for layer in zip(*by_piece, strict=True)])
    (tmp_path / "run" / SENSITIVITY_FILE).write_text(json.dumps(by_piece[:1]))  # interrupted after the first
    resumed = training(options=options, resume=True)
    resumed.run()
    assert resumed.measure_sensitivity() == pytest.approx(measured, rel=1e-5)
    monkeypatch.delattr("chunkllm.training.loop.layer_sensitivity")
    assert resumed.measure_sensitivity() == pytest.approx(measured, rel=1e-5)


def test_a_write_that_is_cut_short_leaves_the_state_before(training, monkeypatch, tmp_path):
    run = training()
    held = (tmp_path / "run" / STATE_FILE).read_bytes()

    def half(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("chunkllm.training.loop.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == held
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_file()] == [STATE_FILE]


def test_a_folder_with_another_training_is_refused(training, tmp_path):
    training(about={"model": "tiny"})
    with pytest.raises(ChunkError, match="add --resume"):
        training(about={"model": "tiny"})
    with pytest.raises(ChunkError, match="another width"):
        training(resume=True, options=replace(OPTIONS, width=5), about={"model": "tiny"})
    with pytest.raises(ChunkError, match="another text"):
        training(resume=True, texts=[prose(7), prose(8)], about={"model": "tiny"})
    with pytest.raises(ChunkError, match="another model"):
        training(resume=True, about={"model": "small"})
    with pytest.raises(ChunkError, match=r"another boundaries \(6, not 5\)"):
        training(resume=True, options=replace(OPTIONS, reading=replace(READING, boundaries=5)), about={"model": "tiny"})


def test_a_damaged_state_says_so(training, tmp_path):
    training()
    path = tmp_path / "run" / STATE_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damaged = [
        {name: tensor for name, tensor in tensors.items() if name != "adapters.key"},
        tensors | {"adapters.key": torch.zeros(1)},
        tensors | {"optimizer.key": torch.zeros(1)},
    ]
    for content in damaged:
        save_file(content, path, metadata)
        with pytest.raises(ChunkError, match=r"state.safetensors is damaged: choose another --out"):
            training(resume=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ChunkError, match="damaged"):
        training(resume=True)


def test_another_width_learns_from_the_same_readings(training, tmp_path):
    options = replace(OPTIONS, epochs=2)
    run = training(options=options)
    kept = run.run().state_dict()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("0*.safetensors")}
    other = run.of_width(2)
    got = other.run().state_dict()
    wanted = training("alone", options=replace(options, width=2)).run().state_dict()
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("0*.safetensors")} == files
    assert (tmp_path / "run" / "width-2" / STATE_FILE).is_file()
    assert run.of_width(2).step == other.steps  # it is gone on with
    assert run.options.width == 4 and run.step == run.steps
    again = training(options=options, resume=True).run().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_a_damaged_reading_says_so(training, tmp_path):
    run = training()
    run.readings[0]
    path = tmp_path / "run" / "readings" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ChunkError, match="00000.safetensors is damaged"):
        run.readings[0]


@pytest.mark.parametrize(
    ("options", "texts", "message"),
    [
        (OPTIONS, [prose(0, 5)], "pieces of 96 tokens with sentences, not 6"),
        (OPTIONS, [" ".join(WORDS * 40)], "no sentence ends"),
        (replace(OPTIONS, reading=replace(READING, context=512)), None, "256 positions: --context 512"),
        (replace(OPTIONS, reading=replace(READING, language="xx")), None, "'xx'"),
    ],
)
def test_nothing_is_written_for_texts_that_will_not_do(training, tmp_path, options, texts, message):
    with pytest.raises(ChunkError, match=message):
        training(options=options, texts=texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [{"context": 23}, {"boundaries": 0}, {"queries": 0}, {"max_chunk": 0}, {"seed": -1}, {"local": -1}, {"sinks": -1}],
)
def test_readings_that_teach_nothing(change):
    with pytest.raises(ChunkError, match="at least"):
        replace(READING, **change)


@pytest.mark.parametrize(
    "change",
    [
        *({name: 0} for name in ("tokens", "held_out", "detector_width", "epochs", "save_every", "learning_rate")),
        *({name: value} for name in ("learning_rate", "weight_decay") for value in (-1, math.nan, math.inf)),
        {"width": -1},
    ],
)
def test_options_that_cannot_be(change):
    with pytest.raises(ChunkError, match="must be"):
        replace(OPTIONS, **change)


def test_a_reading_is_what_selection_sees(model, tokenizer, tmp_path):
    """Chunks end where labels or the longest chunk say, and the boundary detector reads the bottommost layer."""
    (piece,) = cut([prose(3)], tokenizer, 1, READING)
    reading = read_piece(model, piece, READING, 0)
    states = model(torch.from_numpy(piece.ids)[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(reading.bottom, states[1][0])
    ends = reading.boundaries.ends.tolist()
    assert set(piece.labels.nonzero()[0].tolist()) <= set(ends)
    assert max(b - a for a, b in zip([-1, *ends], ends, strict=False)) <= READING.max_chunk
    assert reading.boundaries.chosen.max() < len(ends) - 1
    assert reading.boundaries.ends[reading.boundaries.chosen].min() > READING.context // 4
    assert model.config._attn_implementation == "sdpa"
    save_reading(reading, tmp_path / "reading.safetensors")
    held = load_reading(tmp_path / "reading.safetensors", "cpu")
    assert list(held.lessons) == [0, 1]
    scorer = PooledScorer(8)
    for layer, lesson in reading.lessons.items():
        assert torch.equal(held.lessons[layer].target, lesson.target)
        scores = [lesson_scores(scorer, layer, each, reading.boundaries) for each in (lesson, held.lessons[layer])]
        torch.testing.assert_close(*scores, atol=0.02, rtol=0.02)  # the file holds bfloat16


def test_saved_adapters_score_as_the_trained(training, tmp_path):
    run = training(options=replace(OPTIONS, epochs=1))
    adapters = run.run()
    adapters.half().float()
    reading = run.judged[0]
    wanted = lesson_scores(AdapterScorer(adapters), 1, reading.lessons[1], reading.boundaries)
    flags = adapters.is_boundary(reading.bottom)
    adapters.half().save_pretrained(tmp_path / "adapters")
    opened = ChunkAdapters.from_pretrained(tmp_path / "adapters")
    assert load_file(tmp_path / "adapters" / "model.safetensors")["query"].dtype == torch.float16
    assert json.loads((tmp_path / "adapters" / "config.json").read_text())["threshold"] == adapters.config.threshold
    got = lesson_scores(opened.scorer(), 1, reading.lessons[1], reading.boundaries)
    assert torch.equal(got, wanted)
    assert torch.equal(opened.is_boundary(reading.bottom), flags)
