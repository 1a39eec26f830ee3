import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy

from decoding import metrics

LOGITS = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (2, 5, 11)))
OTHER = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (2, 5, 11)))


def test_entropy_is_scipys():
    got = metrics.entropy(LOGITS)
    np.testing.assert_allclose(got, scipy_entropy(softmax(LOGITS.numpy(), -1), axis=-1), rtol=1e-5)


def test_jensen_shannon_is_scipys():
    got = metrics.jensen_shannon(LOGITS, OTHER)
    wanted = jensenshannon(softmax(LOGITS.numpy(), -1), softmax(OTHER.numpy(), -1), axis=-1) ** 2
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_jensen_shannon_lies_between_0_and_ln_2():
    assert metrics.jensen_shannon(LOGITS, LOGITS).max() < 1e-6
    apart = torch.full((2, 4), -torch.inf)
    apart[0, 0] = apart[1, 1] = 0.0
    assert metrics.jensen_shannon(apart[0], apart[1]) == pytest.approx(math.log(2))


def test_masked_entries_do_not_count():
    masked = LOGITS.clone()
    masked[..., 3] = -torch.inf
    without = torch.cat((LOGITS[..., :3], LOGITS[..., 4:]), -1)
    other = torch.cat((OTHER[..., :3], OTHER[..., 4:]), -1)
    masked_other = OTHER.clone()
    masked_other[..., 3] = -torch.inf
    torch.testing.assert_close(metrics.entropy(masked), metrics.entropy(without))
    torch.testing.assert_close(metrics.jensen_shannon(masked, masked_other), metrics.jensen_shannon(without, other))


def test_token_log_probs_and_their_mean():
    tokens = torch.tensor([[1, 2, 3, 4, 5], [0, 10, 9, 8, 7]])
    got = metrics.token_log_probs(LOGITS, tokens)
    wanted = np.take_along_axis(log_softmax(LOGITS.numpy(), -1), tokens.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics.mean_nll(got), -wanted.mean(-1), rtol=1e-5)


def ids(tokens):
    return torch.tensor(tokens, dtype=torch.int64)


texts = st.lists(st.integers(0, 4), max_size=12)


@given(texts, st.integers(1, 3))
def test_distinct_n(tokens, n):
    grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    got = metrics.distinct_n(ids(tokens), n)
    assert math.isnan(got) if not grams else got == len({tuple(g) for g in grams}) / len(grams)


@given(texts.filter(bool), texts)
def test_token_overlap(tokens, reference):
    left, hits = list(reference), 0
    for token in tokens:
        if token in left:
            left.remove(token)
            hits += 1
    assert metrics.token_overlap(ids(tokens), ids(reference)) == pytest.approx(hits / len(tokens))


@given(st.lists(texts.filter(bool), min_size=1, max_size=4), texts.filter(bool))
def test_what_a_text_shares_with_a_corpus(documents, tokens):
    index = metrics.CorpusIndex([np.array(d) for d in documents])
    assert index.overlap(ids(tokens)) == np.mean([any(t in d for d in documents) for t in tokens])

    def stands(run):
        return any(run == d[i : i + len(run)] for d in documents for i in range(len(d)))

    longest = max(
        (j - i for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1) if stands(tokens[i:j])), default=0
    )
    assert index.longest_copied_run(ids(tokens)) == longest
