"""Requests with more than one style, among others: what a step copies for them, and that nothing else depends on it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decoding.vllm.styles as shim
from decoding.vllm.v1 import StyleRows
from decoding.vllm.v2 import StyleSlots
from tests.serving.conftest import WIDTH, V, sampling
from tests.serving.test_v1_rows import batch_update
from tests.serving.test_v2_slots import context, request_states, take_slot

ASKED = [
    {"style": "plain"},
    {"style": ["long", "ratio", "short"], "lambda": [0.4, 0.2, 0.7]},
    None,
    {"style": "guarded", "max_js": 0.01},
    {"style": ["guarded", "plain"], "plausibility": 0.1},
    {"style": "mixed"},
]
SEVERAL = [1, 4]


class Copies(TorchDispatchMode):
    """How many rows of scores were copied to be taken back, each time."""

    def __init__(self):
        self.rows = []
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.index.Tensor) and made.shape[1:] == (WIDTH,):
            self.rows.append(len(made))
        return made


def text(row):
    return torch.randint(0, V, (5,), generator=torch.Generator().manual_seed(row)).tolist()


def stand_ins(styles, asked):
    """V1 and V2 with the same requests in the same rows: functions of scores."""
    rows = StyleRows(styles, torch.device("cpu"))
    params = [sampling(extra_args=arguments) for arguments in asked]
    rows.update(batch_update(added=[(row, each, text(row), []) for row, each in enumerate(params)]))
    states, slots = request_states(), None
    slots = StyleSlots(styles, states)
    for slot, each in enumerate(params):
        take_slot(states, slot, text(slot))
        slots.add(slot, each)
    slots.flush()

    def on_v2(scores, drafts=()):
        order = range(len(asked))
        return slots.apply(scores, context(states, list(order), {slot: list(drafts) for slot in order}))

    return rows.apply, on_v2


def one_behind_the_other(styles, scores, asked):
    """Each request's first styles together, then its second ones, and so on, into copies."""
    requests = [styles.asked(sampling(extra_args=arguments)).styles for arguments in asked]
    history = torch.tensor([text(row)[-styles.context :] for row in range(len(asked))])
    for depth in range(3):
        layer = styles._layer([each[depth] if depth < len(each) else None for each in requests])
        scores = styles.add(scores.clone(), history, [layer])
    return scores


def test_texts_do_not_depend_on_the_layer_that_a_style_stands_in(styles):
    scores = torch.randn(len(ASKED), WIDTH)
    wanted = one_behind_the_other(styles, scores, ASKED)
    for apply in stand_ins(styles, ASKED):
        assert torch.equal(apply(scores.clone()), wanted)


def test_a_step_copies_the_rows_with_several_styles_alone(styles):
    for apply in stand_ins(styles, ASKED):
        apply(torch.randn(len(ASKED), WIDTH))  # what is sent once for all steps
        with Copies() as copies:
            apply(torch.randn(len(ASKED), WIDTH))
        assert copies.rows == [len(SEVERAL)]
    one_each = [ASKED[row] for row in range(len(ASKED)) if row not in SEVERAL]
    for apply in stand_ins(styles, one_each):
        with Copies() as copies:
            apply(torch.randn(len(one_each), WIDTH))
        assert copies.rows == []


@pytest.mark.parametrize("drafts", [(), (3, 4)])
def test_what_the_layers_before_a_failing_one_have_written_is_taken_back(styles, monkeypatch, drafts):
    """With drafts as well, where the host does not know which rows are whose."""
    scores, calls, real = torch.randn(len(ASKED) * (1 + len(drafts)), WIDTH), [], shim.steer

    def steer(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("in the last layer")
        return real(*args, **options)

    for number, apply in enumerate(stand_ins(styles, ASKED)):
        if number == 0 and drafts:  # V1 has none
            continue
        options = {"drafts": drafts} if number else {}
        wanted = apply(scores.clone(), **options)
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(shim, "steer", steer)
            assert torch.equal(apply(scores.clone(), **options), wanted)  # the step is made again
        assert len(calls) > 6
