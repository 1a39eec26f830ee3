"""Models whose n-grams stay in their file, and ones with more n-grams than 32 bits count."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ngram import NGramError, NGramModel
from ngram.layout import join
from ngram.storage import FORMAT
from ngram.tables import TENSORS, add_log_prior


@pytest.fixture
def trained(tmp_path):
    model = NGramModel.train(np.random.default_rng(0).zipf(1.5, 20_000) % 300, 300, order=4)
    model.save(tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_same_model(tmp_path, order):
    model = NGramModel.train(np.random.default_rng(0).zipf(1.5, 20_000) % 300, 300, order=order)
    model.save(tmp_path / "model.safetensors")
    mapped = NGramModel.load(tmp_path / "model.safetensors", mmap=True)
    for name in TENSORS:
        assert torch.equal(getattr(mapped.tables, name), getattr(model.tables, name))
    for name in ("widest", "first_ngrams", "lengths", "shape"):
        assert getattr(mapped.tables, name) == getattr(model.tables, name)
    history = torch.randint(-1, 300, (100, 5))
    for rows in (3, 100):
        assert torch.equal(mapped.log_probs(history[:rows]), model.log_probs(history[:rows]))
    mapped.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_file_that_is_replaced_goes_on_for_those_who_opened_it(trained):
    model, path = trained
    mapped = NGramModel.load(path, mmap=True)
    NGramModel.train([0, 1, 2, 0, 1], 4, order=2).save(path)
    history = torch.randint(0, 300, (8, 3))
    assert torch.equal(mapped.log_probs(history), model.log_probs(history))


def test_one_by_itself_is_joined_as_it_is(trained):
    _, path = trained
    tables = NGramModel.load(path, mmap=True).tables
    joined = join([tables.shape], iter([tables]), 310)
    assert joined.words.data_ptr() == tables.words.data_ptr() and joined.unigram.shape == (1, 310)
    assert joined.nodes.data_ptr() == tables.nodes.data_ptr()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h | {"widest": [1]}, "widest does not fit"),
        (lambda h: h | {"widest": [-1, 0, 1]}, "widest are no whole numbers"),
        (lambda h: h | {"widest": "many"}, "widest does not fit"),
        (lambda h: h | {"lengths": [300, 5, 5]}, "the contexts do not fit the lengths"),
        (lambda h: {key: value for key, value in h.items() if key != "widest"}, "widest"),
    ],
)
def test_headers_that_cannot_be(trained, change, says):
    from safetensors.torch import save_file

    _, path = trained
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["ngram"])
    save_file(held, path, {"ngram": json.dumps(change(header))})
    with pytest.raises(NGramError, match=says):
        NGramModel.load(path, mmap=True)


V, CONTEXTS = 1 << 16, (1 << 15) + 3
RUN = 16


def write_sparse(path, known):
    """A model of two tokens' n-grams, each of the first contexts followed by every token: written are but some.

    Args:
        known: deltas [V] by context. Others are holes in the file.
    """
    ngrams = CONTEXTS * V
    assert ngrams > 1 << 31
    counts = np.zeros(V + 2, np.int64)  # of no token, all tokens, and the empty node
    counts[1 : 1 + CONTEXTS] = V
    starts = np.append(0, counts.cumsum())
    runs = starts[::RUN]
    nodes = np.stack((starts - np.repeat(runs, RUN)[: len(starts)], np.zeros(len(starts), np.int64)), 1)
    tensors = {
        "runs": runs,
        "backoff_values": np.zeros(1, np.float32),
        "unigram": np.full(V, -math.log(V), np.float32),
        "nodes": nodes.astype(np.int32),
        "seen": np.ones(V, bool),
    }
    shapes = {
        name: ({"int64": "I64", "float32": "F32", "int32": "I32", "bool": "BOOL"}[a.dtype.name], a.shape, a.nbytes)
        for name, a in tensors.items()
    }
    shapes |= {"deltas": ("F32", (ngrams,), 4 * ngrams), "words": ("I16", (ngrams,), 2 * ngrams)}
    told = {
        "format": FORMAT,
        "lengths": [V],
        "widest": [V],
        "smoothing": "arpa",
        "bos_id": None,
        "eos_id": None,
        "metadata": {},
    }
    header, at, places = {"__metadata__": {"ngram": json.dumps(told)}}, 0, {}
    for name in ("runs", "backoff_values", "deltas", "unigram", "nodes", "words", "seen"):
        dtype, shape, size = shapes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name], at = at, at + size
    front = json.dumps(header).encode()
    front += b" " * (-len(front) % 8)
    with path.open("wb") as file:
        file.write(len(front).to_bytes(8, "little") + front)
        begin = file.tell()
        file.truncate(begin + at)
        for name, array in tensors.items():
            file.seek(begin + places[name])
            file.write(array.tobytes())
        for context, deltas in known.items():
            file.seek(begin + places["deltas"] + 4 * context * V)
            file.write(deltas.astype(np.float32).tobytes())
            file.seek(begin + places["words"] + 2 * context * V)
            file.write((np.arange(V) - (1 << 15)).astype(np.int16).tobytes())


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "model.safetensors"
    generator = np.random.default_rng(0)
    known = {context: generator.normal(size=V) for context in (0, 1, CONTEXTS - 2, CONTEXTS - 1)}
    write_sparse(path, known)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no files with holes")
    return path, known


@pytest.mark.parametrize("rows", [4, 70])
def test_more_n_grams_than_32_bits_count(sparse, rows):
    path, known = sparse
    model = NGramModel.load(path, mmap=True)
    assert len(model) > 1 << 31 and model.tables.runs.dtype == torch.int64
    contexts = [list(known)[row % len(known)] for row in range(rows)]
    scores = torch.zeros(rows, V)
    got = add_log_prior(model.tables, scores, torch.tensor(contexts)[:, None], torch.ones(rows))
    for row, context in enumerate(contexts[:8]):
        wanted = torch.from_numpy(known[context]).float() - math.log(V)
        torch.testing.assert_close(got[row], wanted)
    tokens = torch.arange(rows) * 900 % V
    score = model.tables.score(torch.tensor(contexts)[:, None], tokens)
    torch.testing.assert_close(score, got[torch.arange(rows), tokens])
    absent = add_log_prior(model.tables, scores[:1], torch.tensor([[V - 1]]), torch.ones(1))
    torch.testing.assert_close(absent, torch.full((1, V), -math.log(V)))


OPEN = """
import resource, sys, time
import torch
from ngram import NGramModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
model = NGramModel.load(sys.argv[1], mmap=True)
seconds = time.perf_counter() - began
model.log_probs(torch.tensor([[0]]))
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_opening_twelve_gigabytes_takes_no_time_and_no_memory(sparse):
    path, _ = sparse
    assert path.stat().st_size > 12 << 30
    seconds, mebibytes = map(float, subprocess.check_output([sys.executable, "-c", OPEN, path]).split())
    assert seconds < 1 and mebibytes < 100
