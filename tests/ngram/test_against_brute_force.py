from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ngram import NGramModel
from ngram.layout import join
from ngram.tables import add_log_prior, mixture_of_orders
from tests.ngram.reference import Reference

V = 7


@st.composite
def cases(draw):
    bos, eos = draw(st.sampled_from([(None, None), (5, None), (None, 6), (5, 6)]))
    token = st.integers(0, 4)
    documents = draw(st.lists(st.lists(token, max_size=12), min_size=1, max_size=5))
    order = draw(st.integers(1, 6))
    documents.append(draw(st.lists(token, min_size=order, max_size=order + 6)))
    return {
        "documents": documents,
        "order": order,
        "smoothing": draw(st.sampled_from(["kneser-ney", "witten-bell", "additive"])),
        "bos": bos,
        "eos": eos,
        "pad": draw(st.booleans()),
        "prune": (0, *sorted(draw(st.lists(st.integers(0, 3), min_size=order - 1, max_size=order - 1)))),
        "contexts": draw(st.lists(st.lists(st.integers(-1, V + 1), min_size=5, max_size=5), min_size=1, max_size=6)),
    }


def build(case):
    common = (case["order"], case["smoothing"])
    documents = [np.array(d, int) for d in case["documents"]]
    markers = {"bos_id": case["bos"], "eos_id": case["eos"]}
    model = NGramModel.train(documents, V, *common, **markers, pad_vocab=case["pad"], prune=case["prune"])
    reference = Reference(case["documents"], V, *common, case["bos"], case["eos"], case["pad"], cutoffs=case["prune"])
    return model, reference


def usable(context, longest):
    """The tokens after the last one that is none."""
    tail = context[len(context) - longest :]
    bad = [i for i, t in enumerate(tail) if not 0 <= t < V]
    return tail[bad[-1] + 1 :] if bad else tail


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_rows_follow_the_formulas_and_sum_to_1(case):
    model, reference = build(case)
    rows = model.log_probs(torch.tensor(case["contexts"]))
    wanted = [reference.log_row(usable(context, case["order"] - 1), V) for context in case["contexts"]]
    torch.testing.assert_close(rows, torch.tensor(wanted), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(rows.exp().sum(1), torch.ones(len(rows)), atol=1e-5, rtol=0)


@settings(max_examples=100, deadline=None)
@given(case=cases(), data=st.data())
def test_the_batched_prior_is_the_sum_over_matching_orders(case, data):
    model, reference = build(case)
    order, contexts = case["order"], case["contexts"]
    weights = data.draw(st.lists(st.floats(0, 1), min_size=order, max_size=order))
    strength = torch.tensor(
        data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(contexts), max_size=len(contexts)))
    )
    scores = torch.randn(len(contexts), V + 3)
    scores[:, 1] = -torch.inf
    history = torch.tensor(contexts)
    got = add_log_prior(model.tables.widened(V + 3), scores, history, strength, mixture_of_orders(weights))
    for row, context in enumerate(contexts):
        longest = usable(context, order - 1)
        bonus = torch.zeros(V)
        for k in range(1, order + 1):
            suffix = longest[len(longest) - k + 1 :]
            if k - 1 <= len(longest) and reference.matches(suffix):
                # Impossible tokens have log p = −∞ in the formula, and a very large finite number in the tables.
                bonus += weights[k - 1] * torch.tensor(reference.log_row(suffix, V)).clamp(min=-1e30)
        wanted = scores[row, :V] + strength[row] * bonus
        torch.testing.assert_close(got[row, :V], wanted, atol=1e-4, rtol=1e-4)
        least = (got[row, :V] - scores[row, :V])[torch.tensor([w for w in range(V) if w not in (1, case["bos"])])].min()
        assert (got[row, V:] - scores[row, V:] <= least + 1e-4).all()
    assert (got[:, 1] == -torch.inf).all()
    untouched = strength == 0
    assert torch.equal(got[untouched], scores[untouched])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_token_scores_agree_with_rows_and_perplexity(case):
    model, reference = build(case)
    document = case["documents"][-1]
    scores = model.token_log_probs(np.array(document))
    before = [] if case["bos"] is None else [case["bos"]]
    sequence = before + document
    wanted = []
    for i in range(len(before), len(sequence)):
        context = sequence[max(0, i - case["order"] + 1) : i]
        wanted.append(np.log(reference.probability(context, sequence[i])))
    np.testing.assert_allclose(scores.numpy(), wanted, atol=2e-5)
    if case["eos"] is not None:
        full = sequence + [case["eos"]]
        wanted.append(np.log(reference.probability(full[max(0, len(full) - case["order"]) : -1], case["eos"])))
    assert model.perplexity(np.array(document)) == pytest.approx(np.exp(-np.mean(wanted)), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_arpa_and_files_keep_every_row(case, tmp_path_factory):
    model, _ = build(case)
    folder = tmp_path_factory.mktemp("files")
    contexts = torch.tensor(case["contexts"])
    rows = model.log_probs(contexts)
    model.save(folder / "m.safetensors")
    assert torch.equal(NGramModel.load(folder / "m.safetensors").log_probs(contexts), rows)
    for name in ("m.arpa", "m.arpa.gz"):
        model.to_arpa(folder / name)
        read = NGramModel.from_arpa(folder / name, V, bos_id=case["bos"], eos_id=case["eos"])
        torch.testing.assert_close(read.log_probs(contexts), rows, atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(some=st.lists(cases(), min_size=1, max_size=4), data=st.data())
def test_a_batch_may_mix_priors_that_share_a_trie(some, data):
    """Rows with a prior each, of different orders and smoothings, against each prior on its own, row by row."""
    tables = [build(case)[0].tables for case in some]
    joined = join([each.shape for each in tables], tables, width=V + 2)
    contexts = [context for case in some for context in case["contexts"]]
    which = data.draw(st.lists(st.integers(0, len(some) - 1), min_size=len(contexts), max_size=len(contexts)))
    history, scores, strength = torch.tensor(contexts), torch.randn(len(contexts), V + 2), torch.rand(len(contexts))
    mixtures = [mixture_of_orders(torch.rand(each.order).tolist()) for each in tables]
    padded = torch.cat([torch.nn.functional.pad(m, (0, joined.order - m.shape[1]) * 2) for m in mixtures])
    for mixed in (False, True):
        wanted = [
            add_log_prior(
                tables[s].widened(V + 2),
                scores[row : row + 1],
                history[row : row + 1],
                strength[row : row + 1],
                mixtures[s] if mixed else None,
            )
            for row, s in enumerate(which)
        ]
        for walked in (0, 64):  # rows are looked up by tensor operations, or by a walk in Python
            in_place = scores.clone()
            with patch("ngram.tables.MOST_ROWS_WALKED", walked):
                got = add_log_prior(
                    joined,
                    in_place,
                    history,
                    strength,
                    padded if mixed else None,
                    prior=torch.tensor(which),
                    out=in_place,
                )
            assert got is in_place
            torch.testing.assert_close(got, torch.cat(wanted), atol=1e-5, rtol=1e-5)
        together = add_log_prior(joined, scores, history, strength, padded if mixed else None, prior=which[0])
        torch.testing.assert_close(together[:1], wanted[0], atol=1e-5, rtol=1e-5)
