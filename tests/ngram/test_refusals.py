"""Files and parameters that are not what they seem: read as KenLM reads them, or refused in one sentence, at once."""

import gzip
import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ngram import NGramError, NGramModel
from ngram.tables import MAX_ORDER, MOST_NGRAMS, add_log_prior

ARPA = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\t<unk>\t0
-0.5\t0\t-0.2
-0.5\t1\t-0.1
-0.7\t2\t0

\\2-grams:
-0.3\t0 1
-0.4\t1 2

\\end\\
"""


def read(tmp_path, text, **markers):
    path = tmp_path / "model.arpa"
    path.write_text(text, encoding="utf-8")
    return NGramModel.from_arpa(path, vocab_size=4, **markers)


def rows(model):
    return model.log_probs(torch.tensor([[0], [1], [3]]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\\data\\", "# made by hand\n\nsome words\n\\data\\"),
        ("<unk>", "<UNK>"),
        ("-0.4\t1 2\n", "-0.4\t1 2\t0\n"),
        ("\n", "\r\n"),
    ],
)
def test_what_kenlm_reads_is_read(tmp_path, old, new):
    assert ARPA.count(old)
    assert torch.equal(rows(read(tmp_path, ARPA.replace(old, new))), rows(read(tmp_path, ARPA)))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("-0.5\t0\t-0.2", "0.5\t0\t-0.2", "line 7: a probability above 1"),
        ("-0.4\t1 2", "1e-3\t1 2", "line 13: a probability above 1"),
        ("-0.4\t1 2\n", "-0.4\t1 2\t-0.3\n", "line 13: a back-off on an n-gram of the highest order"),
        ("ngram 2=2", "ngram 2=1", "line 13: more 2-grams than the 1"),
        ("ngram 1=4\n", "ngram 1=3\n", "line 9: more 1-grams than the 3"),
        ("ngram 2=2", "ngram 2=3", "not a whole ARPA file"),
        ("ngram 2=2\n", "", "line 6: a back-off on an n-gram of the highest order"),
        ("\\1-grams:\n", "", "line 5: no section of the file that it promises"),
        ("ngram 2=2\n", "ngram 2=2\n" + "".join(f"ngram {k}=1\n" for k in range(3, 9)), f"order is above {MAX_ORDER}"),
        ("\\data\\", "\\daten\\", "not a whole ARPA file"),
        ("-0.4\t1 2", "-0.4\t1 9", "token id 9 is beyond"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path, old, new, says):
    assert ARPA.count(old)
    with pytest.raises(NGramError, match=says.replace("\\", "\\\\")):
        read(tmp_path, ARPA.replace(old, new))


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "model.arpa.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(100):
            file.write(b"0" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(NGramError, match="a line of 4,096 characters and more"):
        NGramModel.from_arpa(path, vocab_size=4)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_more_n_grams_than_promised_are_refused_at_once(tmp_path):
    text = ARPA.replace("-0.4\t1 2\n", "-0.4\t1 2\n" * 300_000)
    began = time.perf_counter()
    with pytest.raises(NGramError, match="more 2-grams"):
        read(tmp_path, text)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("markers", [{"bos_id": 3, "eos_id": 3}, {"bos_id": 4}, {"eos_id": -1}])
def test_markers_that_cannot_be(tmp_path, markers):
    with pytest.raises(NGramError, match=r"both 3|must lie in \[0, 4\)"):
        NGramModel.train([0, 1, 2, 0, 1], 4, order=2, **markers)
    with pytest.raises(NGramError, match=r"both 3|must lie in \[0, 4\)"):
        read(tmp_path, ARPA, **markers)


@pytest.mark.parametrize("order", [2.0, "2", True, None, 0, 7])
def test_orders_that_cannot_be(order):
    with pytest.raises(NGramError, match="order must be"):
        NGramModel.train([0, 1, 2, 0, 1], 4, order=order)


@pytest.mark.parametrize("smoothing", ["kneser-ney", "witten-bell", "additive"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_negative_strength_changes_nothing_where_a_prior_predicts_nothing(smoothing, in_place):
    model = NGramModel.train([0, 1, 2, 0, 1, 2, 2, 1], 5, order=2, smoothing=smoothing, bos_id=4)
    scores, history = torch.randn(3, 5), torch.tensor([[0], [1], [4]])
    strength = torch.tensor([-0.5, 0.5, 0.0])
    before = scores.clone()
    got = add_log_prior(model.tables, scores, history, strength, out=scores if in_place else None)
    assert torch.equal(got[0, 4], before[0, 4]) and torch.equal(got[2], before[2])
    assert got[1, 4] < -1e29
    wanted = before[0] - 0.5 * model.log_probs(history[:1])[0]
    torch.testing.assert_close(got[0, :4], wanted[:4])


def test_more_n_grams_than_tables_hold(monkeypatch, tmp_path):
    assert MOST_NGRAMS == 2**31 - 1
    monkeypatch.setattr("ngram.layout.MOST_NGRAMS", 3)
    with pytest.raises(NGramError, match="lower the order"):
        NGramModel.train([0, 1, 2, 3, 0, 2], 4, order=2)


@pytest.fixture
def damaged(tmp_path):
    """Saves a model whose header or tensors were changed."""
    path = tmp_path / "model.safetensors"
    NGramModel.train([0, 1, 2, 0, 1, 2, 2], 4, order=2).save(path)

    def change(header=None, **tensors):
        with safe_open(path, framework="pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(file.metadata()["ngram"])
        content = header(about) if header else json.dumps(about)
        save_file(held | {k: v(held[k]) for k, v in tensors.items()}, path, {"ngram": content})
        return path

    return change


@pytest.mark.parametrize(
    ("header", "tensors", "says"),
    [
        (lambda h: json.dumps(h | {"lengths": [4] * 3002}), {}, "its order is 3003"),
        (lambda h: "[" * 100_000, {}, "not a whole n-gram model file"),
        (lambda h: json.dumps(h | {"bos_id": 1, "eos_id": 1}), {}, "bos_id and eos_id are one"),
        (None, {"unigram": lambda row: row.index_fill(0, torch.tensor([1]), 2.0)}, "probabilities above 1"),
    ],
)
def test_damaged_models(damaged, header, tensors, says):
    with pytest.raises(NGramError, match=says):
        NGramModel.load(damaged(header, **tensors))


def test_arpa_files_are_written_piece_by_piece(tmp_path, monkeypatch):
    model = NGramModel.train(np.random.default_rng(0).zipf(1.5, 5000) % 300, 300, order=4)
    model.to_arpa(tmp_path / "whole.arpa")
    monkeypatch.setattr("ngram.arpa._AT_A_TIME", 7)
    model.to_arpa(tmp_path / "pieces.arpa")
    model.to_arpa(tmp_path / "pieces.arpa.gz")
    whole = (tmp_path / "whole.arpa").read_bytes()
    assert (tmp_path / "pieces.arpa").read_bytes() == whole
    assert gzip.decompress((tmp_path / "pieces.arpa.gz").read_bytes()) == whole
