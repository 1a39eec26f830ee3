"""Whatever a hook meets, the engine lives: that request is answered as plain vLLM would, and others are steered."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import decoding.vllm.styles as shim
from decoding.vllm import fallbacks
from decoding.vllm.requests import PLAIN, UNLIMITED, Request, read_admitted
from decoding.vllm.v1 import BudgetRows, StyleRows, TemperatureRows
from decoding.vllm.v2 import PhaseSlots, StyleSlots, TemperatureSlots
from tests.decoding.temperature.thinking import markers
from tests.serving.conftest import WIDTH, assert_same_distribution, fake_temperature, sampling, steered
from tests.serving.test_v1_rows import batch_update
from tests.serving.test_v2_slots import context, request_states, take_slot

CPU = torch.device("cpu")
UNREADABLE = [
    sampling({"style": "plain", "lambda": 2, "temperature": -1, "kv_budget": 0}),
    sampling({"style": "nobody", "temperature": "hot", "kv_budget": "much"}),
    sampling({"style": "plain", "max_js": "much", "think_temperature": [1], "chunks": {"vote": True}}),
    sampling([1]),
    SimpleNamespace(),
    None,
]
PROMPT = [3, 4, 5]


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    counts = Counter()
    monkeypatch.setattr(fallbacks, "counts", counts)
    return counts


@pytest.fixture
def spoilt(styles, monkeypatch):
    """A style that cannot be added to a step, alone or among others, once it has begun."""
    bad = styles._index["long"]

    def steer(tables, logits, history, strength, *args, prior, **options):
        if ((torch.as_tensor(prior) == bad) & (strength != 0)).any():
            raise RuntimeError("spoilt")
        return original(tables, logits, history, strength, *args, prior=prior, **options)

    original = shim.steer
    monkeypatch.setattr(shim, "steer", steer)


def style(name, **more):
    return sampling({"style": name, **more})


REQUESTS = [
    (style("plain"), [("plain", 0.2)]),
    (style("long"), []),
    (sampling(None), []),
    (style(["ratio", "short"]), [("ratio", 0.7), ("short", 0.4)]),
    (style(["plain", "long"]), []),
    (style("guarded", max_js=0.01), [("guarded", 0.8)]),
]


def assert_steered(got, scores, priors):
    for row, (params, chosen) in enumerate(REQUESTS):
        if not chosen:
            assert torch.equal(got[row], scores[row])
        else:
            guards = {name: value for name, value in params.extra_args.items() if name == "max_js"}
            assert_same_distribution(got[row], steered(priors, chosen, PROMPT, scores[row], guards))


def test_what_a_hook_cannot_read_is_a_plain_request(counts):
    assert read_admitted(style("plain"), "style").styles == (("plain", None),)
    for params in (UNREADABLE[0], sampling([1]), None, object()):
        assert read_admitted(params, "style") == PLAIN == Request(budget=UNLIMITED)
    assert counts == {"style": 4}


@pytest.mark.parametrize("params", UNREADABLE)
def test_unreadable_requests_are_plain_on_v1(priors, styles, choose, params, counts):
    style_rows = StyleRows(styles, CPU)
    style_rows.update(batch_update(added=[(0, params, PROMPT, []), (1, style("plain"), PROMPT, [])]))
    temperature_rows = TemperatureRows(choose, CPU, markers())
    auto = sampling({"temperature": "auto"})
    temperature_rows.update(batch_update(added=[(0, params, PROMPT, []), (1, auto, PROMPT, [])]))
    budget_rows = BudgetRows()
    budget_rows.update(batch_update(added=[(0, params, PROMPT, []), (1, sampling({"kv_budget": 512}), PROMPT, [])]))
    scores = torch.randn(2, WIDTH)
    got = style_rows.apply(scores.clone())
    assert torch.equal(got[0], scores[0])
    assert_same_distribution(got[1], steered(priors, [("plain", 0.2)], PROMPT, scores[1]))
    got = temperature_rows.apply(scores.clone())
    assert torch.equal(got, scores / torch.tensor([[1.0], [fake_temperature(PROMPT)]]))
    assert budget_rows.of(np.arange(3), 2048).tolist() == [UNLIMITED, 512, 2048]
    assert counts == {"style": 1, "temperature": 1, "chunk selection": 1}


@pytest.mark.parametrize("params", UNREADABLE)
def test_unreadable_requests_are_plain_on_v2_whoever_had_their_slot(priors, styles, choose, params, counts):
    states = request_states()
    style_slots = StyleSlots(styles, states)
    temperature_slots = TemperatureSlots(choose, states, PhaseSlots(markers(), states))
    auto = sampling({"temperature": "auto"})
    for slot in (0, 1):
        take_slot(states, slot, PROMPT)
        style_slots.add(slot, style("short", max_js=0.01))
        temperature_slots.add(slot, sampling({"temperature": 0.5, "think_temperature": 2.0}))
    assert not style_slots.add(0, params) and style_slots.add(1, style("plain"))
    assert not temperature_slots.add(0, params) and temperature_slots.add(1, auto)
    style_slots.flush()
    temperature_slots.flush()
    scores, ctx = torch.randn(2, WIDTH), context(states, [0, 1], {0: [], 1: []})
    got = style_slots.apply(scores.clone(), ctx)
    assert torch.equal(got[0], scores[0])
    assert_same_distribution(got[1], steered(priors, [("plain", 0.2)], PROMPT, scores[1]))
    got = temperature_slots.apply(scores.clone(), ctx)
    assert torch.equal(got, scores / torch.tensor([[1.0], [fake_temperature(PROMPT)]]))
    assert counts == {"style": 1, "temperature": 1}


def test_a_style_that_fails_in_a_step_leaves_the_others_steered_on_v1(priors, styles, spoilt, counts):
    rows = StyleRows(styles, CPU)
    rows.update(batch_update(added=[(row, params, PROMPT, []) for row, (params, _) in enumerate(REQUESTS)]))
    for _ in range(2):
        scores = torch.randn(len(REQUESTS), WIDTH)
        assert_steered(rows.apply(scores.clone()), scores, priors)
    assert counts == {"style": 3}  # the step, and the two requests that are left out from then on


def test_a_style_that_fails_in_a_step_leaves_the_others_steered_on_v2(priors, styles, spoilt, counts):
    states = request_states()
    slots = StyleSlots(styles, states)
    order = list(range(len(REQUESTS)))
    for slot, (params, _) in enumerate(REQUESTS):
        take_slot(states, slot, PROMPT)
        slots.add(slot, params)
    for _ in range(2):
        slots.flush()
        scores = torch.randn(len(REQUESTS), WIDTH)
        got = slots.apply(scores.clone(), context(states, order, {slot: [] for slot in order}))
        assert_steered(got, scores, priors)
    assert counts == {"style": 3}
    assert slots.add(1, style("plain"))  # the slot's next request is steered
    slots.flush()
    got = slots.apply(scores.clone(), context(states, order, {slot: [] for slot in order}))
    assert_same_distribution(got[1], steered(priors, [("plain", 0.2)], PROMPT, scores[1]))


def test_an_output_that_cannot_be_read_costs_its_own_request_alone(priors, styles, counts):
    rows = StyleRows(styles, CPU)
    rows.update(batch_update(added=[(0, style("plain"), PROMPT, ["?"]), (1, style("plain"), PROMPT, [6])]))
    scores = torch.randn(2, WIDTH)
    got = rows.apply(scores.clone())
    assert torch.equal(got[0], scores[0])
    assert_same_distribution(got[1], steered(priors, [("plain", 0.2)], [*PROMPT, 6], scores[1]))
    assert counts == {"style": 2}


def test_guards_that_fail_cost_their_own_request_alone_on_v2(priors, styles, monkeypatch, counts):
    def holds(held):
        if len(held) == 1:
            raise RuntimeError("spoilt")
        return original(held)

    original = styles.holds
    monkeypatch.setattr(styles, "holds", holds)
    states = request_states()
    slots = StyleSlots(styles, states)
    for slot in (0, 1):
        take_slot(states, slot, PROMPT)
    assert not slots.add(0, style("plain", max_js=0.01)) and slots.add(1, style("plain"))
    slots.flush()
    scores = torch.randn(2, WIDTH)
    got = slots.apply(scores.clone(), context(states, [0, 1], {0: [], 1: []}))
    assert torch.equal(got[0], scores[0]) and not torch.equal(got[1], scores[1])
    assert counts == {"style": 1}


def test_scores_may_be_columns_of_a_wider_table(styles, choose, counts):
    """As in float32 models whose vocabulary is no multiple of 64."""
    wide = torch.randn(len(REQUESTS), WIDTH + 21)
    scores, before = wide[:, :WIDTH], wide.clone()
    rows = StyleRows(styles, CPU)
    rows.update(batch_update(added=[(row, params, PROMPT, []) for row, (params, _) in enumerate(REQUESTS)]))
    rows.apply(scores)
    for row, (params, _) in enumerate(REQUESTS):
        alone = StyleRows(styles, CPU)
        alone.update(batch_update(added=[(0, params, PROMPT, [])]))
        wanted = alone.apply(before[row : row + 1, :WIDTH].clone())
        torch.testing.assert_close(scores[row : row + 1], wanted)
    assert torch.equal(wide[:, WIDTH:], before[:, WIDTH:])
    auto = sampling({"temperature": "auto"})
    temperatures = TemperatureRows(choose, CPU)
    temperatures.update(batch_update(added=[(1, auto, PROMPT, [])]))
    halves = wide.clone()
    temperatures.apply(halves[:, :WIDTH])
    assert torch.equal(halves[1, :WIDTH], scores[1] / fake_temperature(PROMPT))
    assert not counts


def test_styled_rows_that_are_not_in_a_step_harm_nothing(styles, counts):
    rows = StyleRows(styles, CPU)
    rows.update(batch_update(added=[(1, style("plain"), PROMPT, [])]))
    scores = torch.randn(2, WIDTH)
    for _ in range(2):
        assert torch.equal(rows.apply(scores[:1].clone()), scores[:1])
    assert not torch.equal(rows.apply(scores.clone()), scores)
    assert not counts


def test_where_nothing_can_be_steered_the_scores_come_back_themselves(styles, monkeypatch, counts):
    monkeypatch.setattr(shim, "steer", lambda *args, **options: 1 / 0)
    rows, states = StyleRows(styles, CPU), request_states()
    rows.update(batch_update(added=[(0, style("plain"), PROMPT, [])]))
    slots = StyleSlots(styles, states)
    take_slot(states, 0, PROMPT)
    slots.add(0, style("plain"))
    slots.flush()
    scores = torch.randn(1, WIDTH)
    for _ in range(2):
        assert torch.equal(rows.apply(scores.clone()), scores)
        assert torch.equal(slots.apply(scores.clone(), context(states, [0], {0: []})), scores)
    assert counts == {"style": 4}


def test_a_prompt_that_cannot_be_read_costs_its_own_temperature_alone(choose, counts):
    rows = TemperatureRows(choose, CPU, markers())
    phases = sampling({"think_temperature": 2.0, "answer_temperature": 0.5})
    asked = [(phases, ["?"]), (sampling({"temperature": "auto"}), PROMPT), (phases, PROMPT)]
    rows.update(batch_update(added=[(row, params, prompt, []) for row, (params, prompt) in enumerate(asked)]))
    scores = torch.randn(3, WIDTH)
    for _ in range(2):
        wanted = scores / torch.tensor([[1.0], [fake_temperature(PROMPT)], [0.5]])
        assert torch.equal(rows.apply(scores.clone()), wanted)
    assert counts == {"temperature": 2}


def test_a_selector_or_phases_that_fail_leave_temperatures_at_one_on_v2(choose, monkeypatch, counts):
    states = request_states()
    slots = TemperatureSlots(choose, states, PhaseSlots(markers(), states))
    asked = [{"temperature": "auto"}, {"temperature": 0.5}, {"think_temperature": 2.0, "answer_temperature": 0.25}]
    scores, ctx = torch.randn(3, WIDTH), context(states, [0, 1, 2], {0: [], 1: [], 2: []})

    def join():
        for slot, arguments in enumerate(asked):
            take_slot(states, slot, PROMPT)
            slots.add(slot, sampling(arguments))
        slots.flush()
        return slots.apply(scores.clone(), ctx)

    with monkeypatch.context() as patch:
        patch.setattr(type(choose), "__call__", lambda *args: 1 / 0)
        assert torch.equal(join(), scores / torch.tensor([[1.0], [0.5], [0.25]]))
    assert counts == {"temperature": 1}
    with monkeypatch.context() as patch:
        patch.setattr(slots._phases, "flush", lambda: 1 / 0)
        assert torch.equal(join(), scores / torch.tensor([[1.0], [0.5], [1.0]]))
    with monkeypatch.context() as patch:
        patch.setattr(slots._phases, "mix", lambda *args: 1 / 0)
        assert torch.equal(join(), scores / torch.tensor([[fake_temperature(PROMPT)], [0.5], [1.0]]))
    assert torch.equal(join(), scores / torch.tensor([[fake_temperature(PROMPT)], [0.5], [0.25]]))


def test_a_temperature_that_nobody_chooses_is_one():
    """Admission refuses it: this server has no selector."""
    states = request_states()
    slots = TemperatureSlots(None, states)
    take_slot(states, 0, PROMPT)
    slots.add(0, sampling({"temperature": 0.5}))
    slots.add(0, sampling({"temperature": "auto"}))
    slots.flush()
    scores = torch.randn(1, WIDTH)
    assert torch.equal(slots.apply(scores.clone(), context(states, [0], {0: []})), scores)


def test_budgets_are_no_more_than_a_request_can_have():
    rows = BudgetRows()
    rows.longest = 4096
    params = [sampling({"kv_budget": value}) for value in (512, 2**63, "full")]
    rows.update(batch_update(added=[(row, each, PROMPT, []) for row, each in enumerate(params)]))
    assert rows.of(np.arange(3), 2048).tolist() == [512, 4096, 4096]
