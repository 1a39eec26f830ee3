"""What is trained on disk is what is trained in memory, bit for bit."""

import json
import os
import random
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ngram import NGramError, NGramModel
from ngram.distributed import Step, Training, counting, runs
from ngram.distributed.packing import Packing, begins, order_of, places_of, upper_bound
from ngram.distributed.settings import Place

SMOOTHINGS = ("kneser-ney", "witten-bell", "additive")
V = 60


def corpus(seed=0, documents=30, longest=80, vocab_size=V):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, documents)
    # Few ids are frequent, two are never seen, and two are left for markers.
    return [np.minimum(generator.geometric(0.12, n) - 1, vocab_size - 5) for n in lengths]


def dealt(documents, tasks):
    return lambda task: documents[task::tasks]


@pytest.fixture
def little(monkeypatch):
    """As if memory were full after a few records, and files had many blocks."""
    monkeypatch.setattr(Place, "rows", lambda *_: 97)
    monkeypatch.setattr(runs, "_BLOCK", 16)
    monkeypatch.setattr(counting, "_TOKENS", 50)


def train(work, documents, tasks=1, vocab_size=V, **options):
    training = Training(work, dealt(documents, tasks), vocab_size, tasks=tasks, **options)
    training.run_all()
    training.write(work / "model.safetensors")
    return (work / "model.safetensors").read_bytes()


def in_memory(folder, documents, vocab_size=V, **options):
    NGramModel.train(documents, vocab_size, **options).save(folder / "memory.safetensors")
    return (folder / "memory.safetensors").read_bytes()


class TestEquality:
    @pytest.mark.parametrize("markers", [{}, {"eos_id": 58}, {"bos_id": 57, "eos_id": 58}])
    @pytest.mark.parametrize("smoothing", SMOOTHINGS)
    def test_every_smoothing_with_markers(self, tmp_path, little, smoothing, markers):
        documents = corpus()
        options = {"smoothing": smoothing, **markers}
        assert train(tmp_path, documents, tasks=3, **options) == in_memory(tmp_path, documents, **options)

    @pytest.mark.parametrize("prune", [1, (0, 0, 2), (0, 1, 1), (0, 5, 400)])
    @pytest.mark.parametrize("smoothing", SMOOTHINGS)
    def test_cut_offs(self, tmp_path, little, smoothing, prune):
        documents = corpus(4)
        options = {"smoothing": smoothing, "prune": prune, "eos_id": 58}
        wanted = in_memory(tmp_path, documents, **options)
        assert len(wanted) < len(in_memory(tmp_path, documents, smoothing=smoothing, eos_id=58))
        assert train(tmp_path, documents, tasks=3, **options) == wanted

    @pytest.mark.parametrize("tasks", [1, 2, 7])
    def test_however_documents_are_divided(self, tmp_path, little, tasks):
        documents = corpus(1)
        wanted = in_memory(tmp_path, documents)
        random.Random(tasks).shuffle(documents)
        assert train(tmp_path / "all", documents, tasks) == wanted

    @pytest.mark.parametrize("parts", [1, 5, V, 1000])
    def test_however_ngrams_are_divided(self, tmp_path, little, parts):
        documents = corpus(2)
        assert train(tmp_path, documents, tasks=2, parts=parts) == in_memory(tmp_path, documents)

    @pytest.mark.parametrize("vocab_size", [V, 65_535, 151_936, 1 << 21])
    @pytest.mark.parametrize("order", [1, 2, 4, 6])
    def test_orders_and_vocabularies(self, tmp_path, little, order, vocab_size):
        documents = [ids * (vocab_size // V) for ids in corpus(3)]
        options = {"order": order, "vocab_size": vocab_size, "bos_id": vocab_size - 1}
        assert train(tmp_path, documents, tasks=2, **options) == in_memory(tmp_path, documents, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"pad_vocab": True},
            {"smoothing": "additive", "delta": 0.5, "interpolation": [1, 2, 0]},
            {"metadata": {"name": "ü"}},
        ],
    )
    def test_what_else_can_be_asked_for(self, tmp_path, options):
        documents = corpus(4)
        assert train(tmp_path, documents, tasks=2, **options) == in_memory(tmp_path, documents, **options)

    def test_one_long_document_and_tasks_without_any(self, tmp_path, little):
        documents = [np.concatenate(corpus(5))]
        assert train(tmp_path, documents, tasks=3) == in_memory(tmp_path, documents)

    def test_without_little_memory(self, tmp_path):
        documents = corpus(6, documents=300)
        assert train(tmp_path, documents, tasks=2, parts=3, order=5) == in_memory(tmp_path, documents, order=5)


class TestMemory:
    """Of a process that does all tasks, one after the other."""

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
    def test_a_task_takes_what_it_may(self, tmp_path):
        few, many = (peak_of(training, tmp_path / f"{count}", count) for count in (10, 6000))
        assert many - few <= (4 / 3) * (64 << 20)  # in memory 6 million tokens take some 400 MB


def training(work, count):
    Training(work, lambda _: (drawn(seed) for seed in range(count)), 50_000, memory=64 << 20).run_all()


def drawn(seed):
    """A document of new n-grams, most of them."""
    return np.minimum(np.random.default_rng(seed).zipf(1.2, 1000), 49_999)


def peak_of(work, *arguments):
    """The most bytes that a process of its own took for some work."""
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=report_peak, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    peak = ours.recv()
    process.join()
    return peak


def report_peak(answer, work, *arguments):
    work(*arguments)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    answer.send(1024 * int(line.split()[1]))


class TestGoingOn:
    def test_what_is_done_is_not_done_again(self, tmp_path, little, monkeypatch):
        documents = corpus(7)
        training = Training(tmp_path, dealt(documents, 2), V, tasks=2)
        for step in training.steps[:3]:
            for task in range(step.tasks):
                training.run(step, task)
        with pytest.raises(ZeroDivisionError):
            training.run(Step("context", 2, lambda *_: 1 / 0), 0)
        assert not list((tmp_path / "context").iterdir())
        never = Training(tmp_path, lambda _: pytest.fail("documents are counted"), V, tasks=2)
        never.run_all()
        never.write(tmp_path / "model.safetensors")
        assert (tmp_path / "model.safetensors").read_bytes() == in_memory(tmp_path, documents)

    def test_killed_at_any_point(self, tmp_path):
        documents, killed = corpus(8, 2000), 0
        for wait in np.linspace(0.01, 0.2, 20):
            process = get_context("fork").Process(target=train, args=(tmp_path / "all", documents, 3))
            process.start()
            process.join(wait)
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        assert killed >= 3
        assert train(tmp_path / "all", documents, tasks=3) == in_memory(tmp_path, documents)

    @pytest.mark.parametrize("step", ["count", "plan", "adjust", "discount", "context", "interpolate", "assemble"])
    def test_a_damaged_part_is_noticed(self, tmp_path, little, step):
        documents = corpus(9)
        training = Training(tmp_path, dealt(documents, 1), V)
        training.run_all()
        parts = [max((tmp_path / step).rglob("*.run"), key=lambda path: path.stat().st_size, default=None)]
        parts += [part.with_suffix(".json") for part in parts if part]
        names = [each.name for each in training.steps]
        for part in filter(None, [*parts, *(tmp_path / step).rglob("*.safetensors")]):
            whole = part.read_bytes()
            for place in (-1, len(whole) // 2):
                content = bytearray(whole)
                content[place] ^= 1
                part.write_bytes(content)
                for later in names[names.index(step) + 1 :]:
                    shutil.rmtree(tmp_path / later, ignore_errors=True)
                with pytest.raises(NGramError, match=f"{step}.* is damaged: remove the folder"):
                    training.run_all()
                    training.write(tmp_path / "model.safetensors")
                assert not (tmp_path / "model.safetensors").exists()
            part.write_bytes(whole)

    def test_a_part_that_is_cut_short_is_noticed(self, tmp_path, little):
        training = Training(tmp_path, dealt(corpus(9), 1), V)
        training.run(training.steps[0], 0)
        part = next((tmp_path / "count").rglob("*.run"))
        os.truncate(part, part.stat().st_size - 8)
        with pytest.raises(NGramError, match="is damaged"):
            training.run_all()

    def test_what_documents_raise_is_said(self, tmp_path):
        training = Training(tmp_path, lambda _: (Path("no.txt").read_text() for _ in range(1)), V)
        with pytest.raises(NGramError, match=r"task 0 of step count failed in .*no\.txt"):
            training.run_all()
        assert not list((tmp_path / "count").iterdir())


class TestRefusals:
    def test_a_folder_of_another_training(self, tmp_path):
        Training(tmp_path, dealt(corpus(), 1), V)
        for options in ({"order": 2}, {"tasks": 2}, {"source": "others"}, {"bos_id": 1}):
            with pytest.raises(NGramError, match="another training"):
                Training(tmp_path, dealt(corpus(), 1), V, **options)
        (tmp_path / "training.json").write_text(json.dumps([])[:1])
        with pytest.raises(NGramError, match="is damaged"):
            Training(tmp_path, dealt(corpus(), 1), V)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"order": 7}, "order must be 1 to 6"),
            ({"tasks": 0}, "at least 1"),
            ({"tasks": 1.5}, "whole number"),
            ({"memory": 1000}, "64 MiB"),
            ({"smoothing": "none"}, "unknown smoothing"),
            ({"bos_id": V}, "must lie in"),
        ],
    )
    def test_parameters(self, tmp_path, options, said):
        with pytest.raises(NGramError, match=said):
            Training(tmp_path / "work", dealt(corpus(), 1), V, **options)
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        ("documents", "said"),
        [
            ([], "no tokens"),
            ([np.array([1])], "1 tokens, fewer than the order 3"),
            ([np.array([1, V, 2])], "must lie in"),
            ([np.array([1, 7, 2])], "hold eos_id 7"),
            (["text"], "one-dimensional"),
        ],
    )
    def test_documents(self, tmp_path, documents, said):
        training = Training(tmp_path, dealt(documents, 1), V, eos_id=7 if said.endswith("7") else None)
        with pytest.raises(NGramError, match=said):
            training.run_all()


class TestKeys:
    @pytest.mark.parametrize(("vocab_size", "length"), [(3, 6), (255, 3), (49_152, 4), (49_152, 5), (151_936, 6)])
    def test_they_sort_as_tuples_do(self, vocab_size, length):
        generator = np.random.default_rng(0)
        rows = generator.integers(0, min(vocab_size, 4) + 1, (200, length))
        rows[rows > 1] += vocab_size - min(vocab_size, 4)
        packing = Packing(vocab_size, length)
        keys = packing.pack(rows.T)
        ordered = rows[order_of(keys)]
        assert ordered.tolist() == sorted(rows.tolist())
        for place in range(length):
            assert packing.column(keys, place).tolist() == rows[:, place].tolist()
        for shorter in range(1, length + 1):
            assert (packing.prefix(keys, shorter) == Packing(vocab_size, shorter).pack(rows.T[:shorter])).all()
        assert (packing.reversed(packing.reversed(keys)) == keys).all()
        distinct = keys[order_of(keys)]
        distinct = distinct[begins(distinct)]
        assert (distinct[places_of(keys, distinct)] == keys).all()
        assert [upper_bound(distinct, key) for key in distinct] == list(range(1, len(distinct) + 1))
