import gzip
import json

import numpy as np
import pytest

from ngram import NGramModel

V, BOS, EOS = 49152, 1, 2


def read_ids(path):
    return [np.array(line.split(), int) for line in path.read_text().splitlines()]


def read_arpa(lines):
    grams = {}
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        if len(fields) > 1:
            grams[fields[1]] = (float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0)
    return grams


@pytest.fixture(scope="module")
def oracle(shared):
    folder = shared / "reference" / "kenlm"
    return {
        "train": read_ids(folder / "shakespeare.train.ids"),
        "held": read_ids(folder / "shakespeare.held.ids"),
        "arpa": folder / "shakespeare.arpa.gz",
        "figures": json.loads((folder / "shakespeare.json").read_text()),
    }


@pytest.fixture(scope="module")
def trained(oracle):
    return NGramModel.train(oracle["train"], V, order=3, smoothing="kneser-ney", bos_id=BOS, eos_id=EOS)


def test_the_same_ngrams_probabilities_and_backoffs_as_lmplz(oracle, trained, tmp_path):
    trained.to_arpa(tmp_path / "ours.arpa")
    with gzip.open(oracle["arpa"], "rt") as file:
        theirs = read_arpa(file)
    ours = read_arpa((tmp_path / "ours.arpa").read_text().splitlines())
    assert len(theirs) == 4741 + 25003 + 41698
    assert ours.keys() == theirs.keys()
    names = sorted(theirs)
    np.testing.assert_allclose([ours[n] for n in names], [theirs[n] for n in names], atol=1e-5)


@pytest.mark.parametrize("source", ["trained", "read"])
def test_the_same_perplexities_as_query(oracle, trained, source):
    model = trained if source == "trained" else NGramModel.from_arpa(oracle["arpa"], V, bos_id=BOS, eos_id=EOS)
    figures = oracle["figures"]
    assert model.perplexity(oracle["held"], oov="unk") == pytest.approx(figures["Perplexity including OOVs"], rel=1e-5)
    assert model.perplexity(oracle["held"], oov="exclude") == pytest.approx(
        figures["Perplexity excluding OOVs"], rel=1e-5
    )


def test_scores_agree_with_the_kenlm_package(oracle):
    kenlm = pytest.importorskip("kenlm", reason="the package kenlm is not installed (it needs a C++ compiler)")
    theirs = kenlm.Model(str(oracle["arpa"]))
    ours = NGramModel.from_arpa(oracle["arpa"], V, bos_id=BOS, eos_id=EOS)
    seen = ours.seen.numpy()
    compared = 0
    for document in oracle["held"]:
        wanted = [score for score, _, _ in theirs.full_scores(" ".join(map(str, document)), eos=False)]
        got = ours.token_log_probs(document).numpy() / np.log(10)
        np.testing.assert_allclose(got[seen[document]], np.array(wanted)[seen[document]], atol=1e-5)
        compared += int(seen[document].sum())
    assert compared > 5000
