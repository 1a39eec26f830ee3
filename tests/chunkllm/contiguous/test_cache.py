import pytest
import torch

from chunkllm import ChunkSelection
from tests.chunkllm.conftest import Stops, cache_name, cache_of, prompts
from tests.chunkllm.contiguous.conftest import (
    SMALL,
    assert_close,
    attach,
    generate,
    logits_of,
    read,
    sinks_of,
    steps_for,
)
from tests.chunkllm.contiguous.test_table import brute_force


@pytest.mark.parametrize("removed", [1, 7, 25])
def test_what_was_cropped_is_forgotten(llama, gathering, removed):
    ids, mask = prompts((40, 17))
    steps, others = steps_for((40, 17), 20), steps_for((40, 17), 20, seed=6)
    whole = torch.cat((ids, steps), 1)[:, : 60 - removed]
    whole_mask = torch.cat((mask, torch.ones(2, 20, dtype=torch.long)), 1)[:, : 60 - removed]
    plain, _ = read(llama, whole, whole_mask, others)
    with attach(llama, budget=16):
        _, cache = read(llama, ids, mask, steps)
        cache.crop(-removed)
        assert cache.get_seq_length() == 60 - removed
        got, cache = read(llama, others[:, :1], mask, others[:, 1:], cache)
        flags = (torch.cat((whole, others), 1) % 5 == 0).tolist()
    assert_close(got, plain[:, 1:])
    cache._read_flags(cache.get_seq_length())
    assert cache.table.counts.tolist() == [len(row) for row in brute_force(flags, [0, 23], 8, sinks_of(cache))]


def test_rows_are_repeated_and_selected(llama, gathering):
    ids, mask = prompts((40, 17))
    steps = steps_for((40, 17), 12)
    order = torch.tensor([1, 0])
    later = steps_for((1,) * 6, 15, seed=7)
    with attach(llama, budget=16):
        _, cache = read(llama, ids, mask, steps)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([5, 0, 3, 1]))
        got, _ = read(llama, later[:4, :1], mask[[1, 0, 1, 0]], later[:4, 1:], cache)
    both, both_mask = torch.cat((ids, steps), 1), torch.cat((mask, torch.ones_like(steps)), 1)
    rows = order.repeat(2)
    plain, _ = read(llama, both[rows], both_mask[rows], later[:4])
    assert_close(got, plain[:, 1:])


# What a step attends to.


@pytest.mark.parametrize("keeps", [{"budget": 500}, {"budget": 20}, {"retention": 0.5, "adaptive": True}, {"top_k": 3}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_generation_goes_on_with_the_cache_that_it_returned(models, kind, keeps):
    model = models(kind)
    with attach(model, **keeps):
        whole = generate(model, (50,), max_new_tokens=24)
        part = generate(model, (50,), max_new_tokens=10)
        rest = generate(model, ids=part.sequences, max_new_tokens=14, **{cache_name(model): cache_of(part)})
    assert torch.equal(rest.sequences, whole.sequences)
    assert torch.equal(torch.cat((logits_of(part), logits_of(rest)), 1), logits_of(whole))


def test_another_turn_is_read_with_full_attention(llama, gathering):
    ids, mask = prompts((40, 17))
    more = steps_for((40, 17), 9)
    steps = steps_for((40, 17), 15, seed=6)
    plain, cache = read(llama, ids, mask, more[:, :5])
    plain_more, _ = read(llama, more[:, 5:], mask, steps, cache)
    with attach(llama, budget=16):
        _, cache = read(llama, ids, mask, more[:, :5])
        assert all(layer.selected for layer in cache.full_layers)
        got, _ = read(llama, more[:, 5:], mask, steps, cache)
    assert_close(got, plain_more)


@pytest.mark.parametrize("keeps", [{"budget": 500}, {"budget": 24}])
@pytest.mark.parametrize("first", [1, 20, 30])
def test_a_prompt_read_in_two_pieces_is_the_same_prompt(llama, keeps, first):
    ids, mask = prompts((40, 17))
    steps = steps_for((40, 17), 20)
    with attach(llama, **keeps):
        whole, _ = read(llama, ids, mask, steps)
        _, cache = read(llama, ids[:, :first], mask[:, :first], steps[:, :0])
        both, _ = read(llama, ids[:, first:], mask, steps, cache)
    assert_close(both, whole)


def test_generate_reads_prompts_in_pieces(llama):
    with attach(llama, budget=24):
        whole, pieces = (generate(llama, (40, 17), prefill_chunk_size=size) for size in (None, 16))
    assert torch.equal(whole.sequences, pieces.sequences)
    assert_close(logits_of(pieces), logits_of(whole))


def test_assisted_generation_selects_when_a_token_comes_alone(llama):
    with attach(llama, budget=24) as attached:
        got = generate(llama, (60,), max_new_tokens=30, prompt_lookup_num_tokens=3)
        assert attached.stats["kv_retention"] < 1
    assert got.sequences.shape == (1, 90)


def test_a_cache_outlives_the_selection(llama):
    ids, mask = prompts((40, 17))
    steps = steps_for((40, 17), 24)
    plain, _ = read(llama, ids, mask, steps)
    with attach(llama, budget=500):
        before, cache = read(llama, ids, mask, steps[:, :8])
    after, _ = read(llama, steps[:, 8:9], mask, steps[:, 9:], cache)
    assert_close(torch.cat((before, after), 1), plain)


def test_a_cache_goes_on_selecting_when_its_selection_is_attached_again(llama, gathering):
    ids, mask = prompts((40, 17))
    steps = steps_for((40, 17), 24)
    plain, _ = read(llama, ids, mask, steps)
    chooser = ChunkSelection(**SMALL, budget=16)
    logits, cache = [], None
    for a, b in ((0, 0), (0, 10), (10, 14), (14, 24)):
        new = ids if cache is None else steps[:, a : a + 1]
        rest = steps[:, a + (cache is not None) : b]
        if (a, b) == (10, 14):
            got, cache = read(llama, new, mask, rest, cache)
        else:
            with chooser.attach(llama, Stops()):
                got, cache = read(llama, new, mask, rest, cache)
        logits.append(got)
    assert_close(torch.cat(logits, 1), plain)
    cache._read_flags(cache.get_seq_length())
    known = torch.cat((ids, steps), 1) % 5 == 0
    known[:, 50:54] = False  # nobody looked for boundaries there
    assert cache.table.counts.tolist() == [len(row) for row in brute_force(known.tolist(), [0, 23], 8, sinks_of(cache))]


def test_inference_mode_and_gradients_do_not_matter(llama):
    ids, mask = prompts((60, 25))
    steps = steps_for((60, 25), 20)
    with attach(llama, budget=24):
        wanted, _ = read(llama, ids, mask, steps)
        with torch.inference_mode():
            inferred, _ = read.__wrapped__(llama, ids, mask, steps)
        with torch.enable_grad():
            followed, _ = read.__wrapped__(llama, ids, mask, steps)
    assert torch.equal(inferred, wanted)
    assert torch.equal(followed, wanted)


def test_a_cache_made_in_inference_mode_goes_on_outside(llama):
    ids, mask = prompts((60, 25))
    steps = steps_for((60, 25), 20)
    with attach(llama, budget=24):
        wanted, _ = read(llama, ids, mask, steps)
        with torch.inference_mode():
            before, cache = read.__wrapped__(llama, ids, mask, steps[:, :5])
        after, _ = read(llama, steps[:, 5:6], mask, steps[:, 6:], cache)
    assert torch.equal(torch.cat((before, after), 1), wanted)
