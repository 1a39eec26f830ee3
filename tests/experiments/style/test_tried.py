import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from experiments.style import tried
from ngram import NGramModel
from tests.conftest import make_tokenizer


class Adds(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 1


def test_names_and_numbers_are_spared():
    words = make_tokenizer(["the", "Captain", "7th", "ship"])
    the, captain, seventh, ship = (words.convert_tokens_to_ids(word) for word in ("the", "Captain", "7th", "ship"))
    ids = torch.tensor([[the, captain], [captain, the], [ship, seventh], [seventh, ship]])
    steered = tried.SparesNames(Adds(), words)(ids, torch.zeros(4, 5))
    assert steered[:, 0].tolist() == [0, 1, 0, 1] and (steered == steered[:, :1]).all()


def followers(documents, context):
    """By brute force: what follows the longest end of a context that stands in a document."""
    for length in range(min(tried.LONGEST, len(context)), tried.BEYOND - 1, -1):
        end = context[-length:]
        found = [
            ids[i + length] for ids in documents for i in range(len(ids) - length) if list(ids[i : i + length]) == end
        ]
        if found:
            return sorted(found)
    return []


def test_the_longest_context_is_found_as_by_brute_force(tokenizer):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4, size) for size in (120, 3, 60)]
    change = tried.LongestContexts(Adds(), documents, tokenizer, 0.5)
    for _ in range(200):
        context = rng.integers(0, 4, rng.integers(1, 12)).tolist()
        assert sorted(change._following(context[::-1][: tried.LONGEST])) == followers(documents, context)


def test_what_follows_is_likelier_by_its_share(tokenizer):
    documents = [np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 5])]
    change = tried.LongestContexts(Adds(), documents, tokenizer, 0.5)
    steered = change(torch.tensor([[9, 1, 2, 3], [1, 2, 9, 9]]), torch.zeros(2, 8))
    expected = np.ones((2, 8))
    expected[0, 4] += 0.5 * np.log1p((2 / 3) / (2 / 12))
    expected[0, 5] += 0.5 * np.log1p((1 / 3) / (1 / 12))
    assert steered.numpy() == pytest.approx(expected)


def test_learnt_weights_are_those_of_the_likeliest_text(model, tokenizer):
    """A style whose next token follows from the last one has its weight on the second order."""
    cycle = np.tile(np.arange(10, 26), 60)
    prior = NGramModel.train([cycle], order=3, vocab_size=len(tokenizer), eos_id=tokenizer.eos_token_id, pad_vocab=True)
    weights = tried.learnt_weights(model, prior, torch.zeros(prior.vocab_size), [cycle[:200]])
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert weights[0] < 0.1, "frequencies say nothing where all are alike"
