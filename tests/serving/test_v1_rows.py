"""The V1 runner's contract, played by a small scheduler: requests join, leave, move and swap at random."""

from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoding.vllm.requests import UNLIMITED
from decoding.vllm.v1 import BudgetRows, StyleRows, TemperatureRows
from tests.decoding.temperature.thinking import SMALL, markers
from tests.serving.conftest import (
    CUT,
    PHASED,
    TOP_P,
    UNKNOWN,
    WIDTH,
    V,
    assert_same_distribution,
    fake_temperature,
    random_arguments,
    sampling,
    steered,
    wanted_scores,
    wanted_temperature,
)


class Direction(Enum):
    UNIDIRECTIONAL = 0
    SWAP = 1


def batch_update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=list(removed), added=list(added), moved=list(moved))


def request(rng, priors):
    arguments, chosen, guards = random_arguments(rng, priors)
    prompt = rng.integers(0, V, rng.integers(1, 6)).tolist()
    params = sampling(extra_args=arguments)
    return SimpleNamespace(params=params, styles=chosen, guards=guards, prompt=prompt, output=[])


def added(row, it):
    return (row, it.params, it.prompt, it.output)


def steps(rng, new_request, count=40):
    """The requests in the rows of each step, and the ``BatchUpdate`` that made them so."""
    batch = []
    for _ in range(count):
        removed = sorted(rng.choice(len(batch), rng.integers(0, len(batch) + 1), replace=False).tolist(), reverse=True)
        new = [new_request() for _ in range(rng.integers(0, 4))]
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
        yield batch, batch_update(removed, placed, moved) if changed else None


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_get_what_each_request_gets_alone(priors, styles, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows = StyleRows(styles, torch.device("cpu"))
    for batch, update in steps(rng, lambda: request(rng, priors)):
        rows.update(update)
        if not batch:
            continue
        scores = torch.randn(len(batch), WIDTH)
        got = rows.apply(scores.clone())
        for row, it in enumerate(batch):
            wanted = steered(priors, it.styles, it.prompt + it.output, scores[row], it.guards)
            assert_same_distribution(got[row], wanted)
            if not any(value for _, value in it.styles):
                assert torch.equal(got[row], scores[row])
            it.output.append(int(rng.integers(0, V)))


def test_without_styles_the_logits_come_back_themselves(styles):
    rows = StyleRows(styles, torch.device("cpu"))
    logits = torch.randn(2, WIDTH)
    before = logits.clone()
    rows.update(None)
    assert rows.apply(logits) is logits
    rows.update(
        batch_update(
            added=[
                (0, sampling(extra_args=None), [1], []),
                (1, sampling(extra_args={"style": "plain", "lambda": 0}), [1], []),
            ]
        )
    )
    assert rows.apply(logits) is logits
    assert torch.equal(logits, before)


def test_masked_tokens_stay_masked_and_prompts_may_be_embeddings(priors, styles):
    rows = StyleRows(styles, torch.device("cpu"))
    params = sampling(extra_args={"style": ["plain", "long"], "lambda": [1, 1]})
    rows.update(batch_update(added=[(0, params, None, [])]))
    logits = torch.randn(1, WIDTH)
    logits[0, ::2] = -torch.inf
    got = rows.apply(logits.clone())
    assert torch.equal(torch.isneginf(got), torch.isneginf(logits))


def test_a_request_without_a_style_takes_the_place_of_one_with_it(styles):
    rows = StyleRows(styles, torch.device("cpu"))
    rows.update(batch_update(added=[(0, sampling(extra_args={"style": "plain"}), [1], [])]))
    logits = torch.randn(1, WIDTH)
    assert not torch.equal(rows.apply(logits.clone()), logits)
    rows.update(batch_update(added=[(0, sampling(extra_args=None), [1], [])]))
    assert torch.equal(rows.apply(logits.clone()), logits)


def test_a_placeholder_counts_only_until_its_token_is_there(priors, styles):
    """Async scheduling puts −1 into the list that it shares; the runner fills it in before the logits are processed."""
    rows = StyleRows(styles, torch.device("cpu"))
    output = [3, -1]
    rows.update(batch_update(added=[(0, sampling(extra_args={"style": "long", "lambda": 1}), [1, 2], output)]))
    output[-1] = 4
    scores = torch.randn(1, WIDTH)
    wanted = steered(priors, [("long", 1)], [1, 2, 3, 4], scores[0])
    assert_same_distribution(rows.apply(scores.clone())[0], wanted)


def test_a_move_onto_an_occupied_row_replaces_it(styles):
    rows = StyleRows(styles, torch.device("cpu"))
    plain = sampling(extra_args={"style": "plain"})
    rows.update(
        batch_update(added=[(0, plain, [1], []), (1, plain, [2], [])], moved=[(1, 0, Direction.UNIDIRECTIONAL)])
    )
    logits = torch.randn(2, WIDTH)
    got = rows.apply(logits.clone())
    assert not torch.equal(got[0], logits[0])
    assert torch.equal(got[1], logits[1])


def test_own_stops_move_with_their_requests(styles):
    rows = StyleRows(styles, torch.device("cpu"))
    plain = sampling(extra_args={"style": "plain"})
    ending = sampling(extra_args={"style": "plain"}, stop_token_ids=[5, 6])
    rows.update(batch_update(added=[(0, plain, [1], []), (1, ending, [2], [])], moved=[(0, 1, Direction.SWAP)]))
    logits = torch.randn(2, WIDTH)
    got = rows.apply(logits.clone())
    others = [i for i in range(WIDTH) if i not in (5, 6)]
    before, after = (each[:, [5, 6]] - each[:, others].amax(-1, keepdim=True) for each in (logits, got))
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    rows.update(batch_update(removed=[0]))
    assert torch.equal(rows.apply(logits.clone())[0], logits[0])


AUTO, OWN = sampling(extra_args={"temperature": "auto"}), sampling(extra_args={"style": "plain"})


def prompt_request(rng):
    prompt = rng.integers(1, V, rng.integers(1, 3)).tolist()  # short, so that some come again
    return SimpleNamespace(params=AUTO if rng.random() < 0.6 else OWN, prompt=prompt, output=[])


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_get_the_temperature_of_each_prompt(choose, selector, seed):
    rng = np.random.default_rng(seed)
    rows = TemperatureRows(choose, torch.device("cpu"))
    prompts, in_vain = set(), 0
    for batch, update in steps(rng, lambda: prompt_request(rng)):
        rows.update(update)
        if not batch or rng.random() < 0.2:  # a step of greedy requests alone does not ask
            continue
        scores = torch.randn(len(batch), WIDTH)
        reads = len(selector.batches)
        got = rows.apply(scores.clone())
        for row, it in enumerate(batch):
            if it.params is AUTO:
                prompts.add(tuple(it.prompt))
                assert torch.equal(got[row], scores[row] / fake_temperature(it.prompt))
            else:
                assert torch.equal(got[row], scores[row])
        assert len(selector.batches) - reads <= 1
        in_vain += len(selector.batches) == reads
    read = [prompt for batch in selector.batches for prompt in batch]
    assert len(read) == len(set(read)) == len(prompts)
    assert in_vain


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_are_cut_to_the_top_p_of_chosen_temperatures(choose, seed):
    rng = np.random.default_rng(seed)
    choose.top_p = TOP_P
    rows = TemperatureRows(choose, torch.device("cpu"))

    def new_request():
        params, is_cut = CUT[rng.integers(len(CUT))]
        prompt = rng.integers(1, V, rng.integers(1, 3)).tolist()
        return SimpleNamespace(params=params, is_cut=is_cut, prompt=prompt, output=[])

    for batch, update in steps(rng, new_request):
        rows.update(update)
        if not batch:
            continue
        scores = torch.randn(len(batch), WIDTH)
        scores[:, ::5] = -torch.inf
        got = rows.apply(scores.clone())
        for row, it in enumerate(batch):
            assert torch.equal(got[row], wanted_scores(it.params, it.is_cut, it.prompt, scores[row]))


def test_without_open_temperatures_the_logits_come_back_themselves(choose, selector):
    rows = TemperatureRows(choose, torch.device("cpu"))
    logits = torch.randn(1, WIDTH)
    before = logits.clone()
    rows.update(None)
    assert rows.apply(logits) is logits
    rows.update(batch_update(added=[(0, OWN, [1], [])]))
    assert rows.apply(logits) is logits
    rows.update(batch_update(removed=[0], added=[(0, AUTO, [1], [])]))
    rows.update(batch_update(removed=[0]))
    assert rows.apply(logits) is logits
    assert torch.equal(logits, before)
    assert not selector.batches


def test_masked_tokens_stay_masked_and_prompts_of_embeddings_are_of_unknown_kind(choose, selector):
    rows = TemperatureRows(choose, torch.device("cpu"))
    rows.update(batch_update(added=[(0, AUTO, None, []), (1, AUTO, [3], [])]))
    logits = torch.randn(2, WIDTH)
    logits[:, ::2] = -torch.inf
    got = rows.apply(logits.clone())
    assert torch.equal(got, logits / torch.tensor([[UNKNOWN], [fake_temperature([3])]]))
    assert selector.batches == [["3"]]


def test_a_request_keeps_its_temperature_when_its_prompt_is_forgotten(choose, selector, monkeypatch):
    monkeypatch.setattr(choose, "_remembered", 1)
    rows = TemperatureRows(choose, torch.device("cpu"))
    rows.update(batch_update(added=[(row, AUTO, [row + 1], []) for row in range(3)]))
    logits = torch.randn(3, WIDTH)
    first = rows.apply(logits.clone())
    rows.update(batch_update(moved=[(0, 2, Direction.SWAP)]))
    assert torch.equal(rows.apply(logits.flip(0)), first.flip(0))
    assert selector.batches == [["1", "2", "3"]]


def phased_request(rng, most=12):
    arguments = PHASED[rng.integers(len(PHASED))]
    prompt = rng.integers(1, SMALL, rng.integers(1, most)).tolist()
    return SimpleNamespace(params=sampling(extra_args=arguments), prompt=prompt, output=[])


@pytest.mark.parametrize("seed", range(8))
def test_random_batches_think_and_answer_at_the_temperatures_of_each(choose, seed):
    """With what preemption, greedy steps, placeholders and tokens taken back make of histories."""
    rng = np.random.default_rng(seed)
    rows = TemperatureRows(choose, torch.device("cpu"), markers())
    resumed, seen = [], set()

    def fill_in(it):
        if it.output and it.output[-1] == -1:
            it.output[-1] = int(rng.integers(0, SMALL))

    def new_request():
        return resumed.pop() if resumed and rng.random() < 0.5 else phased_request(rng)

    last = []
    for batch, update in steps(rng, new_request, 60):
        resumed += [it for it in last if not any(it is other for other in batch)]  # they come back with their output
        last = list(batch)
        rows.update(update)
        for it in batch:
            if rng.random() < 0.5:  # else it comes late
                fill_in(it)
        if batch and rng.random() < 0.8:  # a step of greedy requests alone does not ask
            scores = torch.randn(len(batch), WIDTH)
            got = rows.apply(scores.clone())
            for row, it in enumerate(batch):
                wanted = wanted_temperature(it.params.extra_args, it.prompt, it.prompt + it.output)
                torch.testing.assert_close(got[row], scores[row] / wanted, atol=0, rtol=0)
                seen.add(wanted)
        for it in batch:
            fill_in(it)
            if rng.random() < 0.1:
                del it.output[-3:]
                continue
            it.output.extend(rng.integers(0, SMALL, rng.integers(1, 3)).tolist())
            if rng.random() < 0.2:
                it.output[-1] = -1
    assert {2.0, 0.5, 3, 1} < seen


def test_phases_need_no_selector_and_prompts_may_be_embeddings():
    rows = TemperatureRows(None, torch.device("cpu"), markers())
    both = sampling(extra_args={"think_temperature": 2.0, "answer_temperature": 0.5})
    output = []
    rows.update(batch_update(added=[(0, both, None, output)]))
    logits = torch.ones(2, WIDTH)
    for token, wanted in ((1, 0.5), (7, 2), (5, 2), (7, 0.5)):
        got = rows.apply(logits.clone())
        assert got[:, 0].tolist() == [1 / wanted, 1]
        output.append(token)


@pytest.mark.parametrize("seed", range(4))
def test_budgets_move_with_their_requests(seed):
    rng = np.random.default_rng(seed)
    rows, default = BudgetRows(), 2048
    kinds = {None: default, 512: 512, 4096: 4096, "full": UNLIMITED}

    def new_request():
        budget = list(kinds)[rng.integers(len(kinds))]
        extra = None if budget is None else {"kv_budget": budget}
        return SimpleNamespace(params=sampling(extra_args=extra), prompt=[1], output=[], wanted=kinds[budget])

    for batch, update in steps(rng, new_request):
        rows.update(update)
        wanted = [it.wanted for it in batch]
        assert rows.of(np.arange(len(batch)), default).tolist() == wanted
        logits = torch.randn(len(batch), WIDTH)
        assert rows.apply(logits) is logits
