"""A cache goes on over the turns of a conversation: what was read and summarised once stays so."""

import pytest
import torch

from chunkllm.scorers import PooledScorer
from tests.chunkllm.conftest import VOCAB, cache_name, cache_of
from tests.chunkllm.contiguous.conftest import assert_close, attach, generate, logits_of, steps_for

TURNS, SAID, ANSWERED = 5, 11, 9


def converse(model, keeps_cache=True, on_turn=lambda: None):
    """A context, then turns: all logits of the answers [turns, 1, n, V], and how many tokens each turn read at once."""
    text, cache, answers, read = steps_for((1,), 60, seed=8), None, [], []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    for turn in range(TURNS):
        text = torch.cat((text, torch.randint(3, VOCAB, (1, SAID), generator=torch.Generator().manual_seed(turn))), 1)
        go_on = {cache_name(model): cache} if keeps_cache and cache is not None else {}
        output = generate(model, ids=text, max_new_tokens=ANSWERED, **go_on)
        text, cache = output.sequences, cache_of(output)
        answers.append(logits_of(output))
        on_turn()
    hook.remove()
    return torch.stack(answers), [count for count in read if count > 1], cache


@pytest.fixture
def summarised(monkeypatch):
    """Tokens whose keys were summarised, in the bottom layer, since the last look."""
    counts = []
    summarise = PooledScorer.summarise

    def spy(self, layer, keys, chunk_of, ends):
        if layer == 0:
            counts.append(keys.shape[2])
        return summarise(self, layer, keys, chunk_of, ends)

    monkeypatch.setattr(PooledScorer, "summarise", spy)
    return counts


def test_answers_over_five_turns_are_the_full_models(llama, gathering, summarised):
    plain, _, _ = converse(llama)
    with attach(llama, budget=16) as chunks:
        got, read, _ = converse(llama)
    assert_close(got, plain)
    assert chunks.stats["selections"] >= TURNS, "each turn selects"
    # An answer's last token was not read when it was written: it stands before what is said next.
    assert read == [60 + SAID, *[SAID + 1] * (TURNS - 1)]


def test_a_turn_summarises_what_is_new_alone(llama, summarised):
    by_turn = []

    def look():
        by_turn.append(sum(summarised))
        summarised.clear()

    with attach(llama, budget=24):
        _, _, cache = converse(llama, on_turn=look)
        by_cache = list(by_turn)
        by_turn.clear()
        converse(llama, keeps_cache=False, on_turn=look)
    added = SAID + ANSWERED
    assert by_cache[0] <= 60 + added
    assert all(tokens <= added + 8 for tokens in by_cache[1:]), "with the chunk that was running, at most"
    starts, lengths = cache.table.spans()
    summarised_of = int(cache._summarised[0])
    assert sum(by_cache) == int((starts + lengths)[0, summarised_of - 1]), "each token once"
    assert all(again > before for before, again in zip(by_turn, by_turn[1:], strict=False)), "all, without the cache"
    assert by_turn[-1] > 3 * by_cache[-1]
