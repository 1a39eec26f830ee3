"""The V2 runner's contract, played on the CPU: its buffers' shapes and dtypes, recycled slots, reordered rows, drafts.

The runner itself needs a GPU and has not run with this; `test_engine.py` holds these stand-ins to vLLM's classes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from decoding.vllm.v2 import PhaseSlots, StyleSlots, TemperatureSlots
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

SLOTS, LENGTH = 6, 64


def request_states():
    def buffer(*size, dtype=torch.int32):
        held = torch.zeros(size, dtype=dtype)
        return SimpleNamespace(gpu=held, np=held.numpy())

    return SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=SLOTS,
        vocab_size=WIDTH,
        all_token_ids=buffer(SLOTS, LENGTH),
        prompt_len=buffer(SLOTS),
        prefill_len=buffer(SLOTS),
        total_len=buffer(SLOTS),
    )


def context(states, order, drafts, read=None):
    """One step's layout: requests in ``order`` of slots, each with its rows: the committed token, then its drafts.

    ``read`` has how many of each one's tokens are read in this step, by default all.
    """
    rows = [(slot, i) for slot in order for i in range(len(drafts[slot]) + 1)]
    total = states.total_len.gpu if read is None else read
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor([slot for slot, _ in rows], dtype=torch.int64),
        idx_mapping=torch.tensor(order, dtype=torch.int64),
        idx_mapping_np=np.array(order, dtype=np.intp),
        expanded_local_pos=torch.tensor([i for _, i in rows], dtype=torch.int32),
        input_ids=torch.tensor(
            [drafts[slot][i - 1] if i else states.all_token_ids.gpu[slot, total[slot] - 1] for slot, i in rows],
            dtype=torch.int32,
        ),
        pos=torch.tensor([total[slot] - 1 + i for slot, i in rows], dtype=torch.int64),
        seq_lens_upper_bound_np=np.array([total[slot] + len(drafts[slot]) for slot in order], dtype=np.int32),
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_get_what_each_row_gets_alone(priors, styles, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    states = request_states()
    states.all_token_ids.gpu.random_(0, V)  # what earlier occupants of the slots left behind
    slots = StyleSlots(styles, states)
    live = {}
    for step in range(40):
        for slot in [s for s in live if rng.random() < 0.15]:
            del live[slot]
        for slot in [s for s in range(SLOTS) if s not in live and rng.random() < 0.5]:
            arguments, chosen, guards = random_arguments(rng, priors)
            tokens = rng.integers(0, V, rng.integers(1, 6)).tolist()
            states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens)
            states.prompt_len.gpu[slot] = states.prefill_len.gpu[slot] = states.total_len.gpu[slot] = len(tokens)
            wants = slots.add(slot, sampling(extra_args=arguments))
            assert wants == any(value for _, value in chosen)
            live[slot] = (chosen, tokens, guards)
        slots.flush()
        running = [slot for slot in live if rng.random() < 0.8]
        if not running:
            continue
        order = rng.permutation(running).tolist()
        drafts = {slot: rng.integers(0, V, rng.integers(0, 4)).tolist() if step % 2 else [] for slot in order}
        ctx = context(states, order, drafts)
        scores = torch.randn(len(ctx.pos), WIDTH)
        got = slots.apply(scores.clone(), ctx)
        for row, (slot, local) in enumerate(
            zip(ctx.expanded_idx_mapping.tolist(), ctx.expanded_local_pos.tolist(), strict=True)
        ):
            chosen, tokens, guards = live[slot]
            wanted = steered(priors, chosen, tokens + drafts[slot][:local], scores[row], guards)
            assert_same_distribution(got[row], wanted)
            if not any(value for _, value in chosen):
                assert torch.equal(got[row], scores[row])
        for slot in order:  # some drafts are accepted, and one token is sampled
            accepted = [*drafts[slot][: rng.integers(0, len(drafts[slot]) + 1)], int(rng.integers(0, V))]
            begin = int(states.total_len.gpu[slot])
            states.all_token_ids.gpu[slot, begin : begin + len(accepted)] = torch.tensor(accepted)
            states.total_len.gpu[slot] += len(accepted)
            live[slot][1].extend(accepted)
            if states.total_len.gpu[slot] > LENGTH - 8:
                del live[slot]


def test_without_styles_in_the_step_the_logits_come_back_themselves(styles):
    states = request_states()
    slots = StyleSlots(styles, states)
    assert not slots.add(0, sampling(extra_args=None))
    assert slots.add(1, sampling(extra_args={"style": "plain"}))
    slots.flush()
    states.total_len.gpu[:] = 1
    logits = torch.randn(1, WIDTH)
    before = logits.clone()
    assert slots.apply(logits, context(states, [0], {0: []})) is logits
    assert torch.equal(logits, before)


def test_a_recycled_slot_forgets_its_last_request(styles):
    states = request_states()
    slots = StyleSlots(styles, states)
    states.total_len.gpu[:] = 1
    logits = torch.randn(1, WIDTH)
    slots.add(0, sampling(extra_args={"style": ["plain", "long"]}))
    slots.flush()
    assert not torch.equal(slots.apply(logits.clone(), context(states, [0], {0: []})), logits)
    slots.add(0, sampling(extra_args={"style": "short"}))
    slots.add(1, sampling(extra_args={"style": ["plain", "long"]}))
    slots.flush()
    both = slots.apply(torch.cat((logits, logits)), context(states, [0, 1], {0: [], 1: []}))
    alone = slots.apply(logits.clone(), context(states, [0], {0: []}))
    assert_same_distribution(both[:1], alone)


def test_rows_without_a_slot_are_left_alone_and_masked_tokens_stay_masked(styles):
    states = request_states()
    slots = StyleSlots(styles, states)
    states.total_len.gpu[:] = 2
    slots.add(0, sampling(extra_args={"style": "plain", "lambda": 1}))
    slots.flush()
    ctx = context(states, [0, 0], {0: []})
    ctx.expanded_idx_mapping[1] = -1
    logits = torch.randn(2, WIDTH)
    logits[:, ::3] = -torch.inf
    got = slots.apply(logits.clone(), ctx)
    assert torch.equal(got[1], logits[1])
    assert not torch.equal(got[0], logits[0])
    assert torch.equal(torch.isneginf(got), torch.isneginf(logits))


AUTO, OWN = sampling(extra_args={"temperature": "auto"}), sampling(extra_args={"style": "plain"})


def take_slot(states, slot, prompt, output=()):
    """As the runner does before it tells processors: lengths at once; tokens are sure to be there at `flush` only."""
    tokens = [*prompt, *output]
    states.all_token_ids.gpu[slot, : len(tokens)] = torch.tensor(tokens)
    states.prompt_len.np[slot] = len(prompt)
    states.prefill_len.np[slot] = states.total_len.np[slot] = len(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_get_the_temperature_of_each_prompt(choose, selector, seed):
    rng = np.random.default_rng(seed)
    states = request_states()
    states.all_token_ids.gpu.random_(0, V)
    slots = TemperatureSlots(choose, states)
    live, prompts = {}, set()
    for step in range(60):
        for slot in [s for s in live if rng.random() < 0.25]:
            del live[slot]
        for slot in [s for s in range(SLOTS) if s not in live and rng.random() < 0.5]:
            prompt, is_open = rng.integers(1, V, rng.integers(1, 3)).tolist(), bool(rng.random() < 0.6)
            take_slot(states, slot, prompt, output=rng.integers(0, V, rng.integers(0, 3)).tolist())
            assert slots.add(slot, AUTO if is_open else OWN) == is_open
            live[slot] = prompt if is_open else None
        slots.flush()
        order = rng.permutation([slot for slot in live if rng.random() < 0.7]).astype(int).tolist()
        if not order:
            continue
        drafts = {slot: rng.integers(0, V, rng.integers(0, 4)).tolist() if step % 2 else [] for slot in order}
        ctx = context(states, order, drafts)
        scores = torch.randn(len(ctx.pos), WIDTH)
        reads = len(selector.batches)
        got = slots.apply(scores.clone(), ctx)
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            wanted = scores[row] if live[slot] is None else scores[row] / fake_temperature(live[slot])
            assert torch.equal(got[row], wanted)
        assert len(selector.batches) - reads <= 1
        prompts |= {tuple(live[slot]) for slot in order if live[slot]}
    read = [prompt for batch in selector.batches for prompt in batch]
    assert len(read) == len(set(read)) >= len(prompts)


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_think_and_answer_at_the_temperatures_of_each_row(choose, seed):
    """With drafts, prompts read in pieces, preemption, and rows that only pad a batch."""
    rng = np.random.default_rng(seed)
    states, most = request_states(), int(rng.integers(0, 4))
    states.all_token_ids.gpu.random_(0, SMALL)
    slots = TemperatureSlots(choose, states, PhaseSlots(markers(), states, most))
    live, preempted, seen = {}, [], set()
    for _ in range(80):
        for slot in [s for s in live if rng.random() < 0.15]:
            preempted.append(live.pop(slot))
        for slot in [s for s in range(SLOTS) if s not in live and rng.random() < 0.5]:
            new = PHASED[rng.integers(len(PHASED))], rng.integers(1, SMALL, rng.integers(1, 12)).tolist(), []
            arguments, prompt, output = preempted.pop() if preempted and rng.random() < 0.5 else new
            take_slot(states, slot, prompt, output)
            asks = arguments is not None and "style" not in arguments
            assert slots.add(slot, sampling(extra_args=arguments)) == asks
            live[slot] = arguments, prompt, output
        slots.flush()
        order = rng.permutation([slot for slot in live if rng.random() < 0.7]).astype(int).tolist()
        if not order:
            continue
        drafts = {slot: rng.integers(0, SMALL, rng.integers(0, most + 1)).tolist() for slot in order}
        read = {slot: int(states.total_len.np[slot]) for slot in order}
        for slot in order:  # only a piece of what it begins with is read in this step
            if states.total_len.np[slot] == states.prefill_len.np[slot] > 1 and rng.random() < 0.4:
                drafts[slot], read[slot] = [], int(rng.integers(1, states.prefill_len.np[slot]))
        ctx = context(states, order, drafts, read)
        ctx.expanded_idx_mapping[-1] = -1 if drafts[order[-1]] else ctx.expanded_idx_mapping[-1]
        scores = torch.randn(len(ctx.pos), WIDTH)
        got = slots.apply(scores.clone(), ctx)
        for row, (slot, local) in enumerate(
            zip(ctx.expanded_idx_mapping.tolist(), ctx.expanded_local_pos.tolist(), strict=True)
        ):
            if slot < 0:
                assert torch.equal(got[row], scores[row])
            elif read[slot] == states.total_len.np[slot]:
                arguments, prompt, output = live[slot]
                wanted = wanted_temperature(arguments, prompt, prompt + output + drafts[slot][:local])
                assert torch.equal(got[row], scores[row] / wanted)
                seen.add(wanted)
        for slot in order:
            total = int(states.total_len.np[slot])
            if read[slot] == total:
                accepted = [*drafts[slot][: rng.integers(0, len(drafts[slot]) + 1)], int(rng.integers(0, SMALL))]
                states.all_token_ids.gpu[slot, total : total + len(accepted)] = torch.tensor(accepted)
                states.total_len.np[slot] += len(accepted)
                live[slot][2].extend(accepted)
            if states.total_len.np[slot] > LENGTH - 8:
                del live[slot]
    assert {2.0, 0.5, 3, 1} < seen


def test_a_marker_is_found_as_far_back_as_it_may_have_come():
    """It ended with the first of three tokens that the last step committed, and two more are drafted."""
    states = request_states()
    slots = TemperatureSlots(None, states, PhaseSlots(markers(), states, 2))
    take_slot(states, 0, [7, 2, 3])
    slots.add(0, sampling(extra_args={"think_temperature": 2.0, "answer_temperature": 0.5}))
    slots.flush()
    for tokens, drafts, wanted in (([], [], [2]), ([2, 7, 7], [7, 7], [0.5] * 3), ([7, 7, 7], [6, 6], [0.5, 0.5, 2])):
        begin = int(states.total_len.np[0])
        states.all_token_ids.gpu[0, begin : begin + len(tokens)] = torch.tensor(tokens)
        states.total_len.np[0] += len(tokens)
        logits = torch.ones(1 + len(drafts), WIDTH)
        assert slots.apply(logits, context(states, [0], {0: drafts}))[:, 0].tolist() == wanted


def test_phases_need_no_selector():
    states = request_states()
    slots = TemperatureSlots(None, states, PhaseSlots(markers(), states))
    for slot, prompt in enumerate(([1], [1, 5], [1])):
        take_slot(states, slot, prompt)
    for slot in range(2):
        assert slots.add(slot, sampling(extra_args={"think_temperature": 2.0, "answer_temperature": 0.5}))
    assert not slots.add(2, OWN)
    slots.flush()
    logits = torch.ones(3, WIDTH)
    got = slots.apply(logits.clone(), context(states, [2, 0, 1], {0: [], 1: [], 2: []}))
    assert got[:, 0].tolist() == [1, 0.5, 2]


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_are_cut_to_the_top_p_of_chosen_temperatures(choose, seed):
    """Draft tokens as well, and not the rows that only pad a batch."""
    rng = np.random.default_rng(seed)
    choose.top_p = TOP_P
    states = request_states()
    slots, live = TemperatureSlots(choose, states), {}
    for _ in range(40):
        for slot in [s for s in live if rng.random() < 0.3]:
            del live[slot]
        for slot in [s for s in range(SLOTS) if s not in live and rng.random() < 0.5]:
            prompt = rng.integers(1, V, rng.integers(1, 3)).tolist()
            live[slot] = (*CUT[rng.integers(len(CUT))], prompt)
            take_slot(states, slot, prompt)
            slots.add(slot, live[slot][0])
        slots.flush()
        order = rng.permutation([slot for slot in live if rng.random() < 0.7]).astype(int).tolist()
        if not order:
            continue
        ctx = context(states, order, {slot: rng.integers(0, V, rng.integers(0, 3)).tolist() for slot in order})
        if len(ctx.pos) > len(order):
            ctx.expanded_idx_mapping[-1] = -1
        scores = torch.randn(len(ctx.pos), WIDTH)
        scores[:, ::5] = -torch.inf
        got = slots.apply(scores.clone(), ctx)
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            wanted = scores[row] if slot < 0 else wanted_scores(*live[slot], scores[row])
            assert torch.equal(got[row], wanted)


def test_without_open_temperatures_in_the_step_the_logits_come_back_themselves(choose, selector):
    states = request_states()
    slots = TemperatureSlots(choose, states)
    take_slot(states, 0, [1])
    take_slot(states, 1, [2])
    assert not slots.add(0, OWN)
    assert slots.add(1, AUTO)
    slots.flush()
    logits = torch.randn(1, WIDTH)
    before = logits.clone()
    assert slots.apply(logits, context(states, [0], {0: []})) is logits
    assert torch.equal(logits, before)
    assert not selector.batches


def test_a_recycled_slot_has_the_temperature_of_its_new_request(choose, selector):
    states = request_states()
    slots = TemperatureSlots(choose, states)
    logits = torch.randn(2, WIDTH)
    both = {0: [], 1: []}
    for slot in both:
        take_slot(states, slot, [3])
        slots.add(slot, AUTO)
    slots.flush()
    assert torch.equal(slots.apply(logits.clone(), context(states, [0, 1], both)), logits / fake_temperature([3]))
    take_slot(states, 0, [4])
    slots.add(0, OWN)
    slots.flush()
    got = slots.apply(logits.clone(), context(states, [0, 1], both))
    assert torch.equal(got[0], logits[0])
    assert torch.equal(got[1], logits[1] / fake_temperature([3]))
    for prompt in ([5], [6]):  # the first is gone before its first step
        take_slot(states, 0, prompt)
        slots.add(0, AUTO)
        slots.flush()
    got = slots.apply(logits.clone(), context(states, [0, 1], both))
    assert torch.equal(got[0], logits[0] / fake_temperature([6]))
    assert selector.batches == [["3"], ["6"]]


def test_rows_without_a_slot_keep_their_scores_and_embeddings_are_of_unknown_kind(choose):
    states = request_states()
    slots = TemperatureSlots(choose, states)
    take_slot(states, 0, [0, 0, 0], output=[3])  # vLLM writes zeros for embeddings
    slots.add(0, AUTO)
    slots.flush()
    ctx = context(states, [0, 0], {0: []})
    ctx.expanded_idx_mapping[1] = -1
    logits = torch.randn(2, WIDTH)
    logits[:, ::3] = -torch.inf
    got = slots.apply(logits.clone(), ctx)
    assert torch.equal(got[0], logits[0] / UNKNOWN)
    assert torch.equal(got[1], logits[1])


def test_own_stops_stay_with_their_slot(styles):
    states = request_states()
    states.all_token_ids.gpu[:, 0] = 1
    states.total_len.gpu[:] = 1
    slots = StyleSlots(styles, states)
    for slot, ids in ((0, None), (2, [5, 6]), (3, [6])):
        slots.add(slot, sampling(extra_args={"style": "plain"}, stop_token_ids=ids))
    slots.flush()
    order, logits = [3, 0, 2], torch.randn(3, WIDTH)
    got = slots.apply(logits.clone(), context(states, order, [[]] * SLOTS))
    for row, ends in ((0, [6]), (2, [5, 6])):
        others = [i for i in range(WIDTH) if i not in ends]
        before, after = (each[row, ends] - each[row, others].max() for each in (logits, got))
        torch.testing.assert_close(before, after)
    slots.add(2, sampling(extra_args={"style": "plain"}))
    slots.flush()
    again = slots.apply(logits.clone(), context(states, order, [[]] * SLOTS))
    assert torch.equal(again[:2], got[:2]) and not torch.equal(again[2], got[2])
