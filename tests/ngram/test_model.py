import os
import time
import tracemalloc
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes

import ngram.layout
import ngram.smoothing
from ngram import NGramError, NGramModel
from ngram.layout import join
from ngram.smoothing import Smoothing
from ngram.tables import TENSORS, add_log_prior, mixture_of_orders

IDS = np.random.default_rng(0).integers(0, 40, 3000)


@pytest.fixture(scope="module")
def trained():
    return NGramModel.train(IDS, 50, order=3)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no tokens"),
        (np.array([], int), "no tokens"),
        ([[], []], "no tokens"),
        (np.array([1, 2]), "fewer than the order"),
        (np.array([1, 2, 50]), r"\[0, 50\)"),
        (np.array([-1, 2, 5]), r"\[0, 50\)"),
        (np.array([1.0, 2.0, 3.0]), "integer"),
        (np.zeros((2, 2, 2), int), "one-dimensional"),
        ("abc", "integer"),
        (7, "iterable"),
    ],
)
def test_unusable_documents_are_refused(documents, message):
    with pytest.raises(NGramError, match=message):
        NGramModel.train(documents, 50)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"order": 0}, "order"),
        ({"order": 7}, "order"),
        ({"smoothing": "good-turing"}, "unknown smoothing"),
        ({"smoothing": "additive", "delta": 0}, "delta"),
        ({"smoothing": "additive", "interpolation": [1, 1]}, "interpolation"),
        ({"smoothing": "additive", "interpolation": [0, 1, 1]}, "interpolation"),
        ({"bos_id": 50}, "bos_id"),
        ({"bos_id": "a"}, "bos_id must be a whole number, not 'a'"),
        ({"eos_id": True}, "eos_id must be a whole number, not True"),
        ({"eos_id": int(IDS[3])}, "eos_id"),
    ],
)
def test_unusable_parameters_are_refused(parameters, message):
    with pytest.raises(NGramError, match=message):
        NGramModel.train(IDS, 50, **parameters)


def test_all_kinds_of_documents_mean_the_same():
    contexts = torch.from_numpy(IDS[:10].reshape(5, 2))
    rows = [
        NGramModel.train(documents, 50).log_probs(contexts)
        for documents in (IDS, IDS.tolist(), torch.from_numpy(IDS), [IDS], [IDS.tolist()], iter([IDS.astype(np.int32)]))
    ]
    assert all(torch.equal(rows[0], row) for row in rows)


@pytest.mark.parametrize(
    "context", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2)]
)
def test_contexts_of_another_shape_are_refused(trained, context):
    with pytest.raises(NGramError, match="context must be int64"):
        trained.log_probs(context)


def test_perplexity_of_unknown_tokens_alone_is_refused(trained):
    with pytest.raises(NGramError, match="unknown"):
        trained.perplexity([45, 46], oov="exclude")
    with pytest.raises(NGramError, match="unknown oov"):
        trained.perplexity([1], oov="skip")


def test_padding_the_vocabulary_fits_new_text_better():
    train, held = IDS[IDS < 30], IDS
    assert NGramModel.train(train, 50, pad_vocab=True).perplexity(held) < NGramModel.train(train, 50).perplexity(held)


def joined(tables):
    return join([each.shape for each in tables], iter(tables))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_dtype(trained, dtype):
    history, strength = torch.from_numpy(IDS[:8].reshape(4, 2)), torch.full((4,), 0.5)
    scores = torch.randn(4, 50).to(dtype)
    got = add_log_prior(trained.tables, scores, history, strength, mixture_of_orders([0.2, 0.3, 0.5]))
    wanted = add_log_prior(trained.tables, scores.float(), history, strength, mixture_of_orders([0.2, 0.3, 0.5]))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.01)


def test_the_accelerator_path_agrees_with_the_host_path(trained, monkeypatch):
    """Elsewhere than on the CPU the number of continuations is unknown to the host: slots are left over."""
    history, strength = torch.from_numpy(IDS[:40].reshape(20, 2)), torch.rand(20)
    scores = torch.randn(20, 50)
    wanted = add_log_prior(trained.tables, scores, history, strength)
    monkeypatch.setattr("ngram.tables.counts_on_host", lambda device: False)
    torch.testing.assert_close(add_log_prior(trained.tables, scores, history, strength), wanted)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_on_an_accelerator_nothing_waits_for_the_device(order):
    """The device "meta" holds no data: whatever asks it for a number, or for a shape that depends on one, fails."""
    one = NGramModel.train(IDS, 50, order=order).tables
    several = joined([one, NGramModel.train(IDS[:200], 50, order=2).tables, one])
    scores, history = torch.empty(8, 55, device="meta"), torch.empty(8, 9, dtype=torch.int64, device="meta")
    prior, strength = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, device="meta")
    for tables, which in ((one, 0), (several, prior)):
        mixture = mixture_of_orders([1 / tables.order] * tables.order).expand(3, -1, -1).to("meta")
        moved = tables.to("meta").widened(55)
        for options in ((), (mixture,)):
            result = add_log_prior(moved, scores, history, strength, *options, prior=which)
            assert result.shape == scores.shape
    with pytest.raises(RuntimeError, match="meta"):
        bool(result[0, 0] > 0)


def test_in_memory_the_tables_are_as_small_as_their_file(tmp_path):
    ids = np.random.default_rng(0).zipf(1.3, 200_000) % 5000
    priors = [NGramModel.train(ids + shift, 5010, order=4) for shift in (0, 7)]
    size = 0
    for prior in priors:
        prior.save(tmp_path / "m.safetensors")
        size += (tmp_path / "m.safetensors").stat().st_size
    for tables in ([prior.tables for prior in priors], [joined([prior.tables for prior in priors])]):
        memory = sum(getattr(each, name).nbytes for each in tables for name in TENSORS)
        assert memory < 1.05 * size


def test_priors_of_different_vocabularies_are_not_joined(trained):
    with pytest.raises(NGramError, match="one vocabulary"):
        joined([trained.tables, NGramModel.train(IDS, 51).tables])


def test_an_old_file_survives_a_failed_save(trained, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    trained.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NGramError, match="No space left"):
        NGramModel.train(IDS, 50, order=2).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def damaged_copies(path, folder):
    """(name, file) of every way in which a file can be off."""
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def variant(name, **changes):
        save_file({**tensors, **changes}, folder / name, metadata)
        return folder / name

    for name, content in {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 100}.items():
        (folder / name).write_bytes(content)
        yield folder / name
    save_file(tensors, folder / "foreign")
    yield folder / "foreign"
    words = tensors["words"].clone()
    words[3] = 49 - 2**15 + 1  # id 50 in a vocabulary of 50
    yield variant("ids beyond V", words=words)
    yield variant("unsorted", words=tensors["words"].flip(0))
    yield variant("short", deltas=tensors["deltas"][:-1].clone())
    yield variant("shapes", unigram=tensors["unigram"][:-1].clone())
    yield variant("code book", backoff_values=tensors["backoff_values"][:-1].clone())
    yield variant("nan", deltas=tensors["deltas"] * float("nan"))
    yield variant("dtype", unigram=tensors["unigram"].double())
    yield variant("nodes", nodes=tensors["nodes"].flip(0).contiguous())
    yield variant("runs", runs=tensors["runs"] + 1)
    yield variant("too few runs", runs=tensors["runs"][:-1].clone())
    negative = tensors["nodes"].clone()
    negative[2, 0] -= 1
    yield variant("negative", nodes=negative)
    for key in tensors:
        save_file({name: t for name, t in tensors.items() if name != key}, folder / f"without {key}", metadata)
        yield folder / f"without {key}"


def test_damaged_files_are_refused(trained, tmp_path):
    trained.save(tmp_path / "m.safetensors")
    copies = list(damaged_copies(tmp_path / "m.safetensors", tmp_path))
    assert len(copies) >= 15
    for path in copies:
        with pytest.raises(NGramError, match="damaged|not a whole|not an n-gram model"):
            NGramModel.load(path)
    with pytest.raises(NGramError, match="no n-gram model"):
        NGramModel.load(tmp_path / "nowhere")


ARPA = (
    "\\data\\\nngram 1=3\nngram 2=1\n\n\\1-grams:\n-1\t<unk>\n-0.5\t3\t-0.2\n-0.6\t4\n\n"
    "\\2-grams:\n-0.1\t3 4\n\n\\end\\\n"
)


def test_an_arpa_file_with_backoffs_left_out(tmp_path):
    path = tmp_path / "m.arpa"
    path.write_text(ARPA)
    model = NGramModel.from_arpa(path, 6)
    row = model.log_probs(torch.tensor([[3]])) / np.log(10)
    unseen = -1 - np.log10(4)
    np.testing.assert_allclose(row[0], [unseen - 0.2] * 3 + [-0.7, -0.1, unseen - 0.2], atol=1e-6)


def test_a_pruned_arpa_file_backs_off_as_a_decoder_would(tmp_path):
    """ "3 4 5" is listed, its suffix "4 5" is not."""
    path = tmp_path / "m.arpa"
    path.write_text(
        "\\data\\\nngram 1=3\nngram 2=1\nngram 3=1\n\n\\1-grams:\n-0.5\t3\t-0.2\n-0.6\t4\t-0.3\n-0.7\t5\n\n"
        "\\2-grams:\n-0.1\t3 4\t-0.4\n\n\\3-grams:\n-0.05\t3 4 5\n\n\\end\\\n"
    )
    row = NGramModel.from_arpa(path, 6).log_probs(torch.tensor([[3, 4]])) / np.log(10)
    np.testing.assert_allclose(row[0, 3:], [-0.5 - 0.3 - 0.4, -0.6 - 0.3 - 0.4, -0.05], atol=1e-6)


def test_markers_without_an_id_are_left_out_with_a_warning(tmp_path):
    path = tmp_path / "m.arpa"
    path.write_text(ARPA.replace("3 4", "<s> 4").replace("-0.5\t3", "0\t<s>"))
    with pytest.warns(UserWarning, match="uses <s>.*bos_id"):
        model = NGramModel.from_arpa(path, 6)
    row = model.log_probs(torch.tensor([[3]])) / np.log(10)
    unseen = -1 - np.log10(5)
    np.testing.assert_allclose(row[0], [unseen] * 4 + [-0.6, unseen], atol=1e-6)
    with_id = NGramModel.from_arpa(path, 6, bos_id=3).log_probs(torch.tensor([[3]])) / np.log(10)
    np.testing.assert_allclose(with_id[0, 4], -0.1, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3 4", "3 x", "line 11: words must be decimal"),
        ("3 4", "3 9", "beyond the vocabulary"),
        ("3 4", "5 4", "not its 1-grams"),
        ("-0.1\t3 4", "-0.1\t3", "line 11: expected"),
        ("-0.1\t3 4", "x\t3 4", "line 11"),
        ("-0.1\t3 4", "nan\t3 4", "finite"),
        ("\\end\\\n", "", "not a whole ARPA"),
        ("ngram 2=1", "ngram 2=2", "not a whole ARPA"),
        ("-0.6\t4", "-0.6\t3", "twice"),
    ],
)
def test_malformed_arpa_files_are_refused(tmp_path, old, new, message):
    path = tmp_path / "m.arpa"
    path.write_text(ARPA.replace(old, new, 1))
    with pytest.raises(NGramError, match=message):
        NGramModel.from_arpa(path, 6)


def test_a_truncated_gzip_file_is_refused(trained, tmp_path):
    trained.to_arpa(tmp_path / "m.arpa.gz")
    (tmp_path / "cut.arpa.gz").write_bytes((tmp_path / "m.arpa.gz").read_bytes()[:2000])
    with pytest.raises(NGramError, match="cannot read"):
        NGramModel.from_arpa(tmp_path / "cut.arpa.gz", 50)


@pytest.fixture(scope="module")
def novel_ids(shared):
    """Half a million ids with the statistics of words: the novel's words numbered by rank."""
    words = (shared / "style" / "don_quixote_ormsby_pg996.txt").read_text(encoding="utf-8").split()
    _, ids = np.unique(words, return_inverse=True)
    return ids


def test_training_counts_a_million_tokens_a_second(novel_ids):
    assert len(novel_ids) / best_of_five(lambda: NGramModel.train(novel_ids, 49152, order=3)) > 1e6


def test_a_saved_model_is_small_and_opens_fast(novel_ids, tmp_path):
    model = NGramModel.train(novel_ids, 49152, order=3)
    path = tmp_path / "m.safetensors"
    model.save(path)
    assert path.stat().st_size / len(model) < 9.2
    assert best_of_five(lambda: NGramModel.load(path)) < 0.05


def best_of_five(work):
    """Seconds. The best, since other processes can only slow it down."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@pytest.mark.parametrize("smoothing", get_args(Smoothing))
def test_training_takes_at_most_120_bytes_a_token_beside_the_corpus(smoothing):
    ids = np.random.default_rng(0).zipf(1.2, 200_000) % 2000
    tracemalloc.start()
    NGramModel.train(ids, 2001, order=5, smoothing=smoothing, eos_id=2000, pad_vocab=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / len(ids) < 120


@pytest.mark.parametrize("smoothing", get_args(Smoothing))
def test_how_much_is_smoothed_at_a_time_changes_nothing(smoothing, monkeypatch):
    documents = [IDS[:1000], IDS[1000:1002], IDS[1002:]]
    whole = NGramModel.train(documents, 50, order=4, smoothing=smoothing)
    for module in (ngram.smoothing, ngram.layout):
        monkeypatch.setattr(module, "_AT_A_TIME", 7)
    pieces = NGramModel.train(documents, 50, order=4, smoothing=smoothing)
    assert all(torch.equal(getattr(pieces.tables, name), getattr(whole.tables, name)) for name in TENSORS)


def test_a_file_is_as_the_library_writes_it(tmp_path):
    model = NGramModel.train([1, 2, 1, 2, 3], 5, metadata={"name": 'ü "quoted"\n'})
    model.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        told = file.metadata()
    tensors = load_file(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == to_bytes(tensors, told)
