"""Entropy pruning against its definition: divergences between whole rows, one n-gram left out at a time."""

import numpy as np
import pytest
import torch

from ngram import NGramError, NGramModel
from ngram.pruning import _orders

V = 12


def trained(order=3, seed=0, **options):
    documents = [np.minimum(np.random.default_rng([seed, i]).geometric(0.25, 40) - 1, V - 4) for i in range(6)]
    return NGramModel.train(documents, V, order=order, eos_id=V - 2, **options)


def rows_of(model, contexts, order):
    """p of all tokens, float64 [N, V], behind contexts of any length."""
    history = torch.full((len(contexts), max(order - 1, 1)), -1)
    for row, context in enumerate(contexts):
        if len(context):
            history[row, -len(context) :] = torch.tensor(context)
    return model.log_probs(history).double().exp().numpy()


def by_definition(model, order, beginning):
    """p(h) · KL(p(·|h) ‖ p′(·|h)) of every n-gram that is left out by itself, by n-gram."""
    grams = {
        tuple(row): k
        for k in range(2, order + 1)
        for row in _orders(model.tables, model.tables, beginning)[k - 2].tokens.tolist()
    }
    losses = {}
    for gram in grams:
        context, word = gram[:-1], gram[-1]
        own = {g[-1] for g in grams if g[:-1] == context}
        (row,), (below,) = rows_of(model, [context], order), rows_of(model, [context[1:]], order)
        stays = np.array([v in own and v != word for v in range(V)])
        gamma = (1 - row[stays].sum()) / (1 - below[stays].sum())
        other = np.where(stays, row, gamma * below)
        assert other.sum() == pytest.approx(1, abs=1e-5)
        chain = np.prod(
            [
                rows_of(model, [context[:i]], order)[0][w] if i or w != model.bos_id else np.exp(beginning)
                for i, w in enumerate(context)
            ]
        )
        likely = row > 0
        losses[gram] = chain * (row[likely] * np.log(row[likely] / other[likely])).sum()
    return losses


@pytest.mark.parametrize("options", [{}, {"pad_vocab": True}, {"bos_id": V - 1}, {"smoothing": "witten-bell"}])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_losses_are_the_divergences(order, options):
    model = trained(order, **options)
    beginning = float(model.tables.unigram[0, V - 2])
    wanted = by_definition(model, order, beginning)
    found = {
        tuple(t): loss
        for each in _orders(model.tables, model.tables, beginning)
        for t, loss in zip(each.tokens.tolist(), each.loss, strict=True)
    }
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[g] for g in wanted], list(wanted.values()), atol=2e-7, rtol=1e-3)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.02, 0.0])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_what_stays_keeps_its_probability_and_rows_sum_to_1(order, share):
    model = trained(order)
    total = model.tables.words.numel()
    smaller = model.pruned(int(share * total))
    assert smaller.tables.words.numel() == int(share * total) and smaller.order == order
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(-1, V, (200, 3), generator=generator)
    torch.testing.assert_close(smaller.log_probs(history).exp().sum(1), torch.ones(200), atol=1e-5, rtol=0)
    for each in _orders(smaller.tables, smaller.tables, 0.0):
        got = rows_of(smaller, each.tokens[:, :-1].tolist(), order)
        was = rows_of(model, each.tokens[:, :-1].tolist(), order)
        at = np.arange(len(each.tokens)), each.tokens[:, -1]
        np.testing.assert_allclose(got[at], was[at], rtol=1e-4)
    if share == 1:
        torch.testing.assert_close(smaller.log_probs(history), model.log_probs(history), atol=1e-5, rtol=1e-5)


def test_what_goes_is_what_is_missed_least():
    model = trained(2)
    (order,) = _orders(model.tables, model.tables, 0.0)
    (left,) = _orders(model.pruned(10).tables, model.tables, 0.0)
    best = {tuple(t) for t in order.tokens[np.argsort(-order.loss)[:10]].tolist()}
    assert {tuple(t) for t in left.tokens.tolist()} == best


def test_by_entropy_a_model_of_a_size_is_better_than_by_counts(tmp_path):
    generator = np.random.default_rng(0)
    chain = generator.dirichlet(np.full(60, 0.08), 60)
    ids = [0]
    for _ in range(30_000):
        ids.append(int(generator.choice(60, p=chain[ids[-1]])))
    train, held = np.array(ids[:25_000]), np.array(ids[25_000:])
    options = {"order": 3, "smoothing": "witten-bell"}
    whole = NGramModel.train(train, 60, **options)
    by_count = NGramModel.train(train, 60, prune=(0, 0, 2), **options)
    by_entropy = whole.pruned(by_count.tables.words.numel())
    assert whole.tables.words.numel() > 1.3 * by_count.tables.words.numel()
    assert by_entropy.perplexity(held) < by_count.perplexity(held)
    by_entropy.to_arpa(tmp_path / "model.arpa")
    read = NGramModel.from_arpa(tmp_path / "model.arpa", 60)
    assert read.perplexity(held) == pytest.approx(by_entropy.perplexity(held), rel=1e-5)


def test_histories_of_another_model():
    model, other = trained(3), trained(2, smoothing="witten-bell")
    (_, own), (_, theirs) = (_orders(model.tables, each.tables, 0.0) for each in (model, other))
    chain = np.log([rows_of(other, [[]], 2)[0][a] * rows_of(other, [[a]], 2)[0][b] for a, b, _ in own.tokens.tolist()])
    own_chain = np.log(
        [rows_of(model, [[]], 3)[0][a] * rows_of(model, [[a]], 3)[0][b] for a, b, _ in own.tokens.tolist()]
    )
    np.testing.assert_allclose(theirs.loss, own.loss * np.exp(chain - own_chain), rtol=1e-4, atol=1e-9)
    assert model.pruned(20, histories=other).tables.words.numel() == 20


def test_refusals():
    model = trained(2)
    with pytest.raises(NGramError, match="histories have 4 token ids, and the model 12"):
        model.pruned(3, NGramModel.train([0, 1, 2, 0, 1], 4, order=2))
    for ngrams in (-1, 1.5, True, None):
        with pytest.raises(NGramError, match="ngrams must be"):
            model.pruned(ngrams)
    for prune in (-1, 1.5, True, (1,), (0, 2, 1), (0, 0, 0, 0), "0,1", (0, -1)):
        with pytest.raises(NGramError, match="prune must be whole numbers that do not fall"):
            NGramModel.train([0, 1, 2, 0, 1], 4, order=3, prune=prune)
