"""The V1 runner's contract, played by a small scheduler: requests join, leave, move and swap at random."""

from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoding.vllm.v1 import Rows
from tests.serving.conftest import WIDTH, V, assert_same_distribution, random_arguments, steered


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


def batch_update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=list(removed), added=list(added), moved=list(moved))


def request(rng, priors):
    arguments, chosen = random_arguments(rng, priors)
    prompt = rng.integers(0, V, rng.integers(1, 6)).tolist()
    return SimpleNamespace(params=SimpleNamespace(extra_args=arguments), styles=chosen, prompt=prompt, output=[])


def added(row, it):
    return (row, it.params, it.prompt, it.output)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_get_what_each_request_gets_alone(priors, styles, seed):
    rng = np.random.default_rng(seed)
    rows = Rows(styles, torch.device("cpu"))
    batch = []
    for _ in range(40):
        removed = sorted(rng.choice(len(batch), rng.integers(0, len(batch) + 1), replace=False).tolist(), reverse=True)
        new = [request(rng, priors) for _ in range(rng.integers(0, 4))]
        placed, moved = [], []
        free = sorted(removed)
        for it in new:  # new requests fill freed rows first, as in vLLM
            if free:
                batch[free[0]] = it
                placed.append(added(free.pop(0), it))
            else:
                batch.append(it)
                placed.append(added(len(batch) - 1, it))
        for empty in free:  # then the last rows move into what is still free
            while len(batch) - 1 in free and len(batch) - 1 > empty:
                batch.pop()
            if empty < len(batch) - 1:
                moved.append((len(batch) - 1, empty, Direction.UNIDIRECTIONAL))
                batch[empty] = batch.pop()
            elif empty == len(batch) - 1:
                batch.pop()
        if len(batch) > 1 and rng.random() < 0.5:
            i, j = rng.choice(len(batch), 2, replace=False).tolist()
            batch[i], batch[j] = batch[j], batch[i]
            moved.append((i, j, Direction.SWAP))
        changed = removed or placed or moved
        rows.update(batch_update(removed, placed, moved) if changed else None)
        if not batch:
            continue
        scores = torch.randn(len(batch), WIDTH)
        got = rows.apply(scores.clone())
        for row, it in enumerate(batch):
            wanted = steered(priors, it.styles, it.prompt + it.output, scores[row])
            assert_same_distribution(got[row], wanted)
            if not any(value for _, value in it.styles):
                assert torch.equal(got[row], scores[row])
            it.output.append(int(rng.integers(0, V)))


def test_without_styles_the_logits_come_back_themselves(styles):
    rows = Rows(styles, torch.device("cpu"))
    logits = torch.randn(2, WIDTH)
    before = logits.clone()
    rows.update(None)
    assert rows.apply(logits) is logits
    rows.update(
        batch_update(
            added=[
                (0, SimpleNamespace(extra_args=None), [1], []),
                (1, SimpleNamespace(extra_args={"style": "plain", "lambda": 0}), [1], []),
            ]
        )
    )
    assert rows.apply(logits) is logits
    assert torch.equal(logits, before)


def test_masked_tokens_stay_masked_and_prompts_may_be_embeddings(priors, styles):
    rows = Rows(styles, torch.device("cpu"))
    params = SimpleNamespace(extra_args={"style": ["plain", "long"], "lambda": [1, 1]})
    rows.update(batch_update(added=[(0, params, None, [])]))
    logits = torch.randn(1, WIDTH)
    logits[0, ::2] = -torch.inf
    got = rows.apply(logits.clone())
    assert torch.equal(torch.isneginf(got), torch.isneginf(logits))


def test_a_request_without_a_style_takes_the_place_of_one_with_it(styles):
    rows = Rows(styles, torch.device("cpu"))
    rows.update(batch_update(added=[(0, SimpleNamespace(extra_args={"style": "plain"}), [1], [])]))
    logits = torch.randn(1, WIDTH)
    assert not torch.equal(rows.apply(logits.clone()), logits)
    rows.update(batch_update(added=[(0, SimpleNamespace(extra_args=None), [1], [])]))
    assert torch.equal(rows.apply(logits.clone()), logits)


def test_a_placeholder_counts_only_until_its_token_is_there(priors, styles):
    """Async scheduling puts −1 into the list that it shares; the runner fills it in before the logits are processed."""
    rows = Rows(styles, torch.device("cpu"))
    output = [3, -1]
    rows.update(batch_update(added=[(0, SimpleNamespace(extra_args={"style": "long", "lambda": 1}), [1, 2], output)]))
    output[-1] = 4
    scores = torch.randn(1, WIDTH)
    wanted = steered(priors, [("long", 1)], [1, 2, 3, 4], scores[0])
    assert_same_distribution(rows.apply(scores.clone())[0], wanted)


def test_a_move_onto_an_occupied_row_replaces_it(styles):
    rows = Rows(styles, torch.device("cpu"))
    plain = SimpleNamespace(extra_args={"style": "plain"})
    rows.update(
        batch_update(added=[(0, plain, [1], []), (1, plain, [2], [])], moved=[(1, 0, Direction.UNIDIRECTIONAL)])
    )
    logits = torch.randn(2, WIDTH)
    got = rows.apply(logits.clone())
    assert not torch.equal(got[0], logits[0])
    assert torch.equal(got[1], logits[1])
