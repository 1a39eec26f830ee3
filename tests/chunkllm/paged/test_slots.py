"""Slots that the engine gives, and slots that are found."""

import pytest
import torch

from chunkllm import ChunkError
from chunkllm.paged.slots import FoundSlots, GivenSlots, Rows

CPU, S = torch.device("cpu"), 6


def rows(*of_rows, given=True):
    """Rows of (slot, tokens held, tokens of the step, block of the last held, block of the last of the step)."""
    slot, held, sizes, block, next_block = torch.tensor(of_rows).unbind(1)
    is_prompt = torch.zeros(len(of_rows), dtype=torch.bool)
    return Rows(held, sizes, block, next_block, is_prompt, ~is_prompt, slot if given else None)


def assigned(slots, *of_rows, resting=()):
    given = rows(*of_rows)
    slot, is_new = slots.assign(given._replace(is_awake=torch.tensor([i not in resting for i in range(len(of_rows))])))
    return list(zip(slot.tolist(), is_new.tolist(), strict=True))


@pytest.mark.parametrize(
    ("row", "is_new"),
    [
        ((2, 9, 1, 40, 40), False),  # goes on
        ((2, 9, 7, 40, 41), False),
        ((2, 8, 1, 40, 40), True),  # fewer tokens: computed anew
        ((2, 10, 1, 40, 40), True),  # more tokens: a step was missed
        ((2, 9, 1, 41, 41), True),  # another's blocks
        ((2, 0, 9, 40, 40), True),
        ((3, 9, 1, 40, 40), True),  # where nobody was before
    ],
)
def test_a_row_goes_on_with_as_many_tokens_and_the_same_last_block(row, is_new):
    slots = GivenSlots(S, CPU)
    assert assigned(slots, (2, 0, 9, 0, 40)) == [(2, True)]
    assert assigned(slots, row) == [(row[0], is_new)]


def test_slots_stay_when_rows_change_places_and_are_left_out():
    slots = GivenSlots(S, CPU)
    assigned(slots, (0, 0, 5, 0, 10), (5, 0, 6, 0, 11), (3, 0, 7, 0, 12))
    assert assigned(slots, (3, 7, 1, 12, 12), (0, 5, 1, 10, 10)) == [(3, False), (0, False)]
    assert assigned(slots, (5, 6, 1, 11, 11), (0, 0, 4, 0, 13)) == [(5, False), (0, True)]
    slots.forget()
    assert assigned(slots, (5, 7, 1, 11, 11), (3, 8, 1, 12, 12)) == [(5, True), (3, True)]


def test_rows_without_tokens_and_places_out_of_the_table_go_nowhere():
    slots = GivenSlots(S, CPU)
    assigned(slots, (1, 0, 9, 0, 40))
    nowhere = (S, True)
    assert assigned(slots, (1, 9, 0, 40, 40), (0, 0, 0, 0, 0), (-1, 5, 1, 7, 7), (S, 5, 1, 7, 7)) == [nowhere] * 4
    assert assigned(slots, (1, 9, 1, 40, 40), (-1, 6, 1, 7, 7)) == [(1, False), nowhere]


def test_rows_that_share_a_slot_get_none_and_it_is_forgotten():
    slots = GivenSlots(S, CPU)
    assigned(slots, (1, 0, 9, 0, 40), (2, 0, 9, 0, 41))
    nowhere = (S, True)
    both = assigned(slots, (1, 9, 1, 40, 40), (2, 9, 1, 41, 41), (1, 10, 2, 40, 40))
    assert both == [nowhere, (2, False), nowhere]
    assert assigned(slots, (1, 12, 1, 40, 40), (2, 10, 1, 41, 41)) == [(1, True), (2, False)]


@pytest.mark.parametrize("kind", [GivenSlots, FoundSlots])
def test_rows_that_rest_get_no_slot_and_nobody_goes_on_where_one_was(kind):
    """The request was preempted, and another has its place and its block by now, with as many tokens."""
    slots, nowhere = kind(S, CPU), (S, True)
    (first, _), (second, _) = assigned(slots, (1, 0, 5, 0, 10), (2, 0, 6, 0, 11))
    assert assigned(slots, (1, 2, 2, 10, 10), (2, 6, 1, 11, 11), resting=[0]) == [nowhere, (second, False)]
    ((_, is_new), (_, goes_on)) = assigned(slots, (1, 5, 1, 10, 10), (2, 7, 1, 11, 11))
    assert is_new and not goes_on


def test_rows_that_only_pad_take_nobodys_block():
    slots = FoundSlots(S, CPU)
    ((first, _),) = assigned(slots, (0, 0, 5, 0, 10))
    padding = (0, 0, 0, 10, 10)
    assert assigned(slots, padding, (0, 5, 1, 10, 10), resting=[0]) == [(S, True), (first, False)]


def test_slots_that_are_not_given_are_an_error():
    with pytest.raises(ChunkError, match="slots of a step are missing"):
        GivenSlots(S, CPU).assign(rows((0, 0, 1, 0, 0), given=False))


def test_found_slots_go_on_where_the_last_block_is_known_and_else_to_whoever_was_away_longest():
    slots = FoundSlots(3, CPU)
    (first, _), (second, _) = assigned(slots, (0, 0, 5, 0, 10), (0, 0, 6, 0, 11))
    assert assigned(slots, (0, 6, 1, 11, 11)) == [(second, False)]
    assert assigned(slots, (0, 0, 0, 0, 0), (0, 5, 1, 10, 10), (0, 0, 4, 0, 12)) == [
        (3, True), (first, False), ({0, 1, 2}.difference({first, second}).pop(), True)
    ]  # fmt: skip
    assert assigned(slots, (0, 0, 4, 0, 13)) == [(second, True)]
    slots.forget()
    assert [is_new for _, is_new in assigned(slots, (0, 6, 1, 10, 10), (0, 4, 1, 13, 13))] == [True, True]
