"""Calls and what belongs to them: threads, forward passes in others, prompts, copies of caches, and what is freed."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from chunkllm import ChunkAdapters, ChunkCache, ChunkError, ChunkSelection
from chunkllm.contiguous.calls import wrap_generate
from tests.chunkllm.conftest import cache_name, cache_of, calibrated, prompts, tiny_model
from tests.chunkllm.contiguous.conftest import SMALL, assert_close, attach, generate, logits_of, read, steps_for

# Threads and forward passes in others.


def in_threads(functions):
    """What functions return when they are called at once, each in a thread."""
    results, start = [None] * len(functions), threading.Barrier(len(functions))

    def call(i):
        start.wait()
        results[i] = functions[i]()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_model_write_what_each_writes_alone(llama):
    lengths = [(60,), (41, 20), (75,), (33,)]
    with ChunkSelection(calibrated(llama), **SMALL, budget=20).attach(llama) as chunks:
        alone = [logits_of(generate(llama, each)) for each in lengths]
        wanted = chunks.stats
    with ChunkSelection(calibrated(llama), **SMALL, budget=20).attach(llama, record=True) as chunks:
        asks = threading.Event()

        def ask():
            while not asks.wait(0.001):
                assert chunks.stats["steps"] <= wanted["steps"]

        asking = threading.Thread(target=ask)
        asking.start()
        together = in_threads([lambda each=each: generate(llama, each) for each in lengths])
        asks.set()
        asking.join()
        assert chunks.stats == wanted
        assert len(chunks.readings) == wanted["selections"]
    assert all(torch.equal(logits_of(got), right) for got, right in zip(together, alone, strict=True))


def test_an_error_in_one_thread_is_no_others(llama):
    with attach(llama, budget=20):
        alone = logits_of(generate(llama, (60,)))

    ids, mask = prompts((40, 20))

    def fails():
        with pytest.raises(ChunkError, match="padding on the left only"):
            llama.generate(ids, attention_mask=mask.flip(1), max_new_tokens=2)
        return generate(llama, (60,))

    with attach(llama, budget=20) as chunks:
        got = in_threads([fails, lambda: generate(llama, (60,)), fails])
        assert not chunks._running.passes and not chunks._running.calls
    assert all(torch.equal(logits_of(each), alone) for each in got)


def test_an_interrupt_leaves_nothing(llama):
    def interrupts(*_):
        raise KeyboardInterrupt

    with attach(llama, budget=20) as chunks:
        alone = logits_of(generate(llama, (60,)))
        handle = llama.model.layers[1].register_forward_pre_hook(interrupts)
        with pytest.raises(KeyboardInterrupt):
            generate(llama, (60,))
        handle.remove()
        assert not chunks._running.passes and not chunks._running.calls
        assert torch.equal(logits_of(generate(llama, (60,))), alone)


class Asks(LogitsProcessor):
    """Lets another model, or the same, write meanwhile."""

    def __init__(self, write):
        self.write, self.asked = write, []

    def __call__(self, input_ids, scores):
        self.asked.append(self.write())
        return scores


def test_a_model_that_is_asked_within_another_call_writes_what_it_writes_alone(llama):
    other = tiny_model(seed=1)
    with attach(llama, budget=20), attach(other, budget=24):
        for asked in (other, llama):
            inner, outer = logits_of(generate(asked, (50,))), logits_of(generate(llama, (60,)))
            asks = Asks(lambda asked=asked: logits_of(generate(asked, (50,))))
            assert torch.equal(logits_of(generate(llama, (60,), logits_processor=[asks])), outer)
            assert len(asks.asked) == 12 and all(torch.equal(each, inner) for each in asks.asked)


def test_a_forward_pass_within_a_forward_pass(llama):
    ids, wrong = prompts((50,))[0], prompts((20, 9))
    with attach(llama, budget=20) as chunks:
        alone = logits_of(generate(llama, (60,)))
        is_within = []

        def asks(*_):
            if is_within:
                return
            is_within.append(True)
            llama(ids, use_cache=True)
            llama(ids, use_cache=False)
            with pytest.raises(ChunkError, match="padding on the left"):
                llama(wrong[0], attention_mask=wrong[1].flip(1), use_cache=True)
            is_within.clear()

        handle = llama.model.layers[1].register_forward_pre_hook(asks)
        try:
            within = logits_of(generate(llama, (60,)))
        finally:
            handle.remove()
        assert not chunks._running.passes
    assert torch.equal(within, alone)


def test_gradients_with_checkpoints(llama):
    model, ids = copy.deepcopy(llama).train(), prompts((50,))[0]
    model(ids, labels=ids).loss.backward()
    plain = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with attach(model, budget=20):
        model(ids, labels=ids).loss.backward()
    assert_close(model.model.layers[0].mlp.up_proj.weight.grad, plain)


@pytest.mark.parametrize("draft", [{"assistant_model": True}, {"assistant_early_exit": 1}])
@pytest.mark.parametrize("keeps", [{"budget": 500}, {"budget": 24}])
def test_a_model_that_assists_itself(llama, monkeypatch, draft, keeps):
    monkeypatch.setattr(llama.generation_config, "assistant_confidence_threshold", 0.0)  # it would import scikit-learn
    draft = {name: llama if value is True else value for name, value in draft.items()}
    plain = generate(llama, (60,), max_new_tokens=12)
    with attach(llama, **keeps) as chunks:
        got = generate(llama, (60,), max_new_tokens=12, **draft)
        assert (chunks.stats["kv_retention"] < 1) == (keeps["budget"] == 24)
    if keeps["budget"] == 500:
        assert torch.equal(got.sequences, plain.sequences)
        assert_close(logits_of(got), logits_of(plain))
    assert got.sequences.shape == plain.sequences.shape
    assert llama.config.num_hidden_layers == 3


# Prompts are read in full.


@pytest.mark.parametrize("lengths", [(65,), (65, 40)])
@pytest.mark.parametrize("size", [8, 16, 64, 1])
def test_the_last_piece_of_a_prompt_may_be_one_token(llama, lengths, size):
    plain = generate(llama, lengths, max_new_tokens=1)
    with attach(llama, budget=24) as chunks:
        whole = generate(llama, lengths)
        steps = chunks.stats["steps"]
        pieces = generate(llama, lengths, prefill_chunk_size=size)
        assert chunks.stats["steps"] == 2 * steps
    assert_close(logits_of(pieces)[:, :1], logits_of(plain))
    assert torch.equal(pieces.sequences, whole.sequences)
    assert_close(logits_of(pieces), logits_of(whole))


@pytest.mark.parametrize("more", [1, 2])
def test_a_prefix_and_a_token_more(llama, more):
    ids, mask = prompts((60,))
    plain = generate(llama, (60,), max_new_tokens=1)
    with attach(llama, budget=24):
        whole = generate(llama, (60,))
        _, prefix = read(llama, ids[:, :-more], mask[:, :-more], ids[:, :0])
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            got = generate(llama, (60,), **{cache_name(llama): cache})
            assert_close(logits_of(got)[:, :1], logits_of(plain))
            assert_close(logits_of(got), logits_of(whole))
        assert prefix.get_seq_length() == 60 - more


def test_another_token_than_the_one_that_was_written_is_a_prompts(llama):
    """With the written one, the text goes on: see `test_generation_goes_on_with_the_cache_that_it_returned`."""
    with attach(llama, budget=24):
        part = generate(llama, (50,), max_new_tokens=10)
        ids = part.sequences.clone()
        ids[:, -1] = (ids[:, -1] + 1) % 61 + 3
        mine, cache = [], cache_of(part)
        handle = llama.model.layers[0].register_forward_pre_hook(lambda *_: mine.append(cache.full_layers[0].selected))
        try:
            generate(llama, ids=ids, max_new_tokens=3, **{cache_name(llama): cache})
        finally:
            handle.remove()
    assert mine == [False, True, True]


def test_guidance_reads_its_own_text_with_selection(llama):
    """It writes beside the prompt, in a cache of its own, whose first token is read alone."""
    with attach(llama, budget=16) as chunks:
        generate(llama, (40,), max_new_tokens=20)
        alone = chunks.stats["selections"]
    with attach(llama, budget=16) as chunks:
        generate(llama, (40,), max_new_tokens=20, guidance_scale=1.5)
        assert chunks.stats["selections"] > alone


def test_generate_is_what_it_was(llama):
    def mine(*args, **options):
        return "mine"

    assert "generate" not in vars(llama)
    undo = wrap_generate(llama, lambda generate, *args, **options: ("around", generate(*args, **options)))
    assert llama.generate(prompts((5,))[0], max_new_tokens=1)[0] == "around"
    undo()
    assert "generate" not in vars(llama)
    llama.generate = mine
    try:
        undo = wrap_generate(llama, lambda generate: ("around", generate()))
        assert llama.generate() == ("around", "mine")
        undo()
        assert llama.generate is mine
        undo = wrap_generate(llama, lambda generate: ("around", generate()))
        within = llama.generate
        llama.generate = lambda: ("theirs", within())
        assert llama.generate() == ("theirs", ("around", "mine"))
        undo()
        assert llama.generate() == ("theirs", "mine")
    finally:
        del llama.generate


# Copies of caches.


@pytest.mark.parametrize("options", [{}, {"offload": True, "adaptive": True}, {"top_k": 2, "budget": None}])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_copy_of_a_cache_goes_on_by_itself(models, kind, options):
    model, steps, others = models(kind), steps_for((40, 17), 30), steps_for((40, 17), 20, seed=6)
    with attach(model, **{"budget": 20} | options) as chunks:
        whole, _ = read(model, *prompts((40, 17)), steps)
        _, cache = read(model, *prompts((40, 17)), steps[:, :12])
        mask = torch.cat((prompts((40, 17))[1], torch.ones(2, 12, dtype=torch.long)), 1)
        counted = chunks.stats["steps"]
        copied = copy.deepcopy(cache)
        assert chunks.stats["steps"] == counted
        read(model, others[:, :1], mask, others[:, 1:], copied)
        assert (copied.get_seq_length(), cache.get_seq_length()) == (72, 52)
        got, _ = read(model, steps[:, 12:13], mask, steps[:, 13:], cache)
        left = copy.deepcopy(cache)
    assert torch.equal(got, whole[:, 13:])
    assert not left.full_layers[0].selected  # detached, as the one that it is of


def test_copies_made_in_inference_mode_or_with_gradients(llama):
    ids, mask = prompts((60,))
    for mode in (torch.inference_mode, torch.no_grad):
        with attach(llama, budget=24), mode():
            _, cache = read.__wrapped__(llama, ids, mask, steps_for((60,), 3))
            assert copy.deepcopy(cache).get_seq_length() == 63
        assert copy.deepcopy(cache).get_seq_length() == 63


def test_other_copies_are_refused(llama):
    with attach(llama, budget=24) as chunks:
        cache = cache_of(generate(llama, (40,)))
        for copies in (copy.copy, pickle.dumps):
            with pytest.raises(ChunkError, match=r"copy\.deepcopy makes another"):
                copies(cache)
            with pytest.raises(ChunkError, match="detach it first"):
                copies(chunks)
        with pytest.raises(ChunkError, match="detach it first"):
            copy.deepcopy(llama)
    assert "generate" not in vars(copy.deepcopy(llama))


# Other caches.


class Quantized(DynamicCache):
    """As far as its name and its emptiness go."""


def test_a_cache_with_offloading_is_refused_unless_the_selection_offloads(llama):
    cache = DynamicCache(config=llama.config)
    cache.offloading = True
    with attach(llama, budget=24), pytest.raises(ChunkError, match=r"ChunkSelection\(offload=True\)"):
        generate(llama, (40,), **{cache_name(llama): cache})
    with attach(llama, budget=24, offload=True):
        assert isinstance(cache_of(generate(llama, (40,), **{cache_name(llama): cache})), ChunkCache)
    with attach(llama, budget=24):
        with pytest.raises(ChunkError, match="not a Quantized: leave the cache and cache_implementation out"):
            generate(llama, (40,), **{cache_name(llama): Quantized(config=llama.config)})
        with pytest.raises(ChunkError, match="not a StaticCache"):
            generate(llama, (40,), cache_implementation="static")
        generate(llama, (40,))


# What is freed, and what two models share.


@pytest.mark.parametrize("leave", ["attached", "detached"])
def test_a_model_that_is_dropped_is_freed(leave):
    model = tiny_model()
    chunks = ChunkSelection(calibrated(model), **SMALL, budget=20).attach(model)
    output = generate(model, (40,))
    cache = weakref.ref(cache_of(output))
    held = [weakref.ref(x) for x in (model, model.model.layers[0].self_attn, chunks)]
    del output
    gc.collect()
    assert cache() is None
    generate(model, (40,))
    if leave == "detached":
        chunks.detach()
    del model, chunks
    gc.collect()
    assert not any(x() is not None for x in held)


def test_an_attachment_that_nobody_holds_stays(llama):
    model = copy.deepcopy(llama)
    held = weakref.ref(ChunkSelection(**SMALL, budget=20).attach(model))
    gc.collect()
    assert isinstance(cache_of(generate(model, (40,))), ChunkCache)
    assert held() is not None


def test_one_selection_on_models_on_two_devices(llama):
    adapters = ChunkAdapters.for_model(llama)
    chooser = ChunkSelection(adapters, **SMALL, budget=20)
    elsewhere = copy.deepcopy(llama).to("meta")
    with chooser.attach(llama):
        alone = logits_of(generate(llama, (40,)))
        with chooser.attach(elsewhere) as other:
            assert other._adapters.boundary.out.weight.device.type == "meta"
            assert torch.equal(logits_of(generate(llama, (40,))), alone)
    assert all(weights.device.type == "cpu" for weights in adapters.parameters())
    assert chooser.adapters is adapters
