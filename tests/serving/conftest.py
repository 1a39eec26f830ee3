import numpy as np
import pytest
import torch

from decoding import StylePrior
from decoding.vllm.requests import LoadedStyles
from ngram import NGramModel

V, WIDTH = 40, 43


def make_priors():
    """Priors of several orders and mixtures over one vocabulary."""
    rng = np.random.default_rng(0)

    def model(order):
        return NGramModel.train(rng.zipf(1.5, 3000) % V, V, order=order, pad_vocab=True)

    return {
        "plain": StylePrior(model(3), λ=0.2),
        "long": StylePrior(model(4), λ=0.3, weights=[0.1, 0.2, 0.3, 0.4]),
        "short": StylePrior(model(2), λ=0.4, orders=[2]),
        "one": StylePrior(model(1), λ=0.5),
        "mixed": StylePrior(model(3), λ=0.6, combine="interpolated"),
    }


@pytest.fixture(scope="module")
def priors():
    return make_priors()


@pytest.fixture(scope="module")
def styles(priors):
    return LoadedStyles(list(priors), priors.__getitem__, WIDTH, "cpu")


def steered(priors, styles, history, row):
    """One row of scores steered by transformers' StylePrior, one style after the other."""
    for name, value in styles:
        prior = priors[name]
        prior.lambda_ = value
        row = prior(torch.tensor([history]), row[None])[0]
    return row


def assert_same_distribution(got, wanted):
    """The shims leave out what is the same for a whole row."""
    torch.testing.assert_close(got.log_softmax(-1), wanted.log_softmax(-1), atol=1e-5, rtol=1e-5)


def random_arguments(rng, priors):
    """``extra_args`` of a request, and the (name, λ) of its styles."""
    count = rng.choice([0, 0, 1, 1, 1, 2, 3])
    names = [str(name) for name in rng.choice(list(priors), count, replace=False)]
    lambdas = [float(rng.choice([0, 0.1, 0.5, 1])) for _ in names]
    if not names:
        return None, []
    if count == 1 and rng.random() < 0.5:
        return {"style": names[0], "lambda": lambdas[0]}, [(names[0], lambdas[0])]
    return {"style": names, "lambda": lambdas}, list(zip(names, lambdas, strict=True))
