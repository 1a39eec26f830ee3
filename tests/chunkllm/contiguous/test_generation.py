import pytest
import torch

from chunkllm import ChunkAdapters, ChunkCache, ChunkSelection
from chunkllm.contiguous.layer import ChunkLayer
from tests.chunkllm.conftest import KINDS, VOCAB, Stops, cache_of, prompts, tiny_model
from tests.chunkllm.contiguous.conftest import (
    EVERYTHING,
    SMALL,
    WAYS,
    assert_close,
    attach,
    bottom,
    generate,
    logits_of,
    read,
    sinks_of,
    steps_for,
)
from tests.chunkllm.contiguous.test_table import brute_force


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_kept_generation_is_bit_identical(models, kind, implementation, way):
    model, (lengths, options) = models(kind, implementation), WAYS[way]
    plain = generate(model, lengths, **options)
    keeps = EVERYTHING[KINDS.index(kind) % 2]
    with attach(model, **keeps) as attached:
        got = generate(model, lengths, **options)
        assert attached.stats["selections"] == 0
        assert attached.stats["kv_retention"] == 1
        assert attached.stats["boundaries"] > 0
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(logits_of(got), logits_of(plain))
    assert isinstance(cache_of(got), ChunkCache)


@pytest.mark.parametrize("keeps", EVERYTHING)
def test_with_everything_kept_the_other_options_change_nothing(llama, keeps):
    plain = generate(llama, (23, 9))
    for options in ({"offload": True}, {"vote": True}, {"adaptive": True}, {"every_step": True}):
        with attach(llama, **keeps, **options):
            assert torch.equal(logits_of(generate(llama, (23, 9))), logits_of(plain))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_assisted_generation_with_everything_kept_is_plain_greedy(models, kind):
    model = models(kind)
    ids = prompts((12,))[0].repeat(1, 3)
    # What greedy decoding repeats is guessed right now and then: then nothing is cropped.
    plain = generate(model, ids=ids, max_new_tokens=40)
    with attach(model, budget=500):
        got = generate(model, ids=ids, max_new_tokens=40, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, plain.sequences)
    assert_close(logits_of(got), logits_of(plain))


def test_cropping_nothing_drops_nothing(llama):
    ids, mask = prompts((30,))
    with attach(llama, budget=16):
        _, cache = read(llama, ids, mask, steps_for((30,), 3))
        cache.crop(0)
        assert cache.get_seq_length() == 33
        assert cache.table.length == 33


# The path that selects computes what full attention does when it selects everything.


@pytest.mark.parametrize("lengths", [(40,), (40, 17, 29), (12, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_gathering_everything_is_full_attention(models, gathering, kind, lengths):
    model = models(kind)
    ids, mask = prompts(lengths)
    steps = steps_for(lengths, 40)
    plain, _ = read(model, ids, mask, steps)
    with attach(model, budget=16) as attached:
        got, _ = read(model, ids, mask, steps)
        stats = attached.stats
    assert_close(got, plain)
    assert stats["steps"] == 40
    assert stats["kv_retention"] == pytest.approx(1)
    assert stats["selections"] > 2 * len(lengths)  # rows, each at its own steps


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 3}])
def test_gathering_everything_generates_as_full_attention_does(models, gathering, implementation, options):
    model = models("llama", implementation)
    plain = generate(model, (40, 17), max_new_tokens=30, **options)
    for more in ({}, {"offload": True}, {"vote": True}, {"every_step": True}):
        with attach(model, budget=16, **more):
            got = generate(model, (40, 17), max_new_tokens=30, **options)
        assert torch.equal(got.sequences, plain.sequences)
        assert_close(logits_of(got), logits_of(plain))


def test_gathering_everything_with_adapters_is_full_attention(llama, gathering):
    torch.manual_seed(0)
    adapters = ChunkAdapters.for_model(llama)
    ids, mask = prompts((40, 17))
    steps = steps_for((40, 17), 30)
    plain, _ = read(llama, ids, mask, steps)
    with ChunkSelection(adapters, **SMALL, budget=16).attach(llama) as attached:
        got, cache = read(llama, ids, mask, steps)
        assert attached.stats["selections"] > 4
        cache._read_flags(cache.get_seq_length())
        flags = attached.boundaries(torch.cat((ids, steps), 1), bottom(llama, torch.cat((ids, steps), 1), mask))
    assert_close(got, plain)
    assert 0.05 < flags.float().mean() < 0.95
    chunks = brute_force(flags.tolist(), [0, 23], 8, sinks_of(cache))
    assert [len(row) for row in chunks] == cache.table.counts.tolist()


@torch.no_grad()
@pytest.mark.parametrize("keeps", [{"budget": 500}, {"budget": 24}])
def test_without_a_cache_the_model_is_untouched(llama, keeps):
    ids, mask = prompts((60, 25))
    with torch.no_grad():
        plain = llama(ids, attention_mask=mask, use_cache=False)
        with attach(llama, **keeps) as attached:
            got = llama(ids, attention_mask=mask, use_cache=False)
            tokens = llama.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=3, do_sample=False)
            assert attached.stats["steps"] == 0
    assert cache_of(got) is None
    assert torch.equal(got.logits, plain.logits)
    assert torch.equal(tokens, llama.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))


def test_embeddings_instead_of_ids(llama):
    ids, _ = prompts((60,))
    with attach(llama, budget=500):
        got = llama.generate(inputs_embeds=llama.get_input_embeddings()(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, generate(llama, (60,), max_new_tokens=8).sequences[:, 60:])


def test_a_model_may_have_more_tokens_than_its_tokenizer(llama):
    with ChunkSelection(**SMALL, budget=24).attach(llama, Stops(VOCAB - 20)):
        got = generate(llama, (60, 25), do_sample=True)
    assert (got.sequences >= VOCAB - 20).any()


def test_without_a_tokenizer_chunks_have_20_tokens(llama):
    with ChunkSelection(budget=40, local=8).attach(llama):
        cache = cache_of(generate(llama, (90, 70)))
    cache._read_flags(cache.get_seq_length())
    wanted = brute_force([[False] * 101] * 2, [0, 20], 20, sinks_of(cache))
    assert [row[row > 0].tolist() for row in cache.table.spans()[1]] == [[size for _, size in row] for row in wanted]


def test_one_layer_and_half_precision():
    model = tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    with attach(model, budget=24) as attached:
        got = generate(model, (60, 25))
        assert attached.stats["kv_retention"] < 1
    assert all(bool(step.isfinite().all()) for step in got.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_bias_of_keys_overflows_in_no_dtype(dtype):
    model = tiny_model("qwen2", num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 4.0})
    model.model.layers[0].self_attn.k_proj.bias.data.fill_(300.0)
    with attach(model.to(dtype), budget=24):
        got = generate(model, (60, 25))
    (layer,) = cache_of(got).full_layers
    table = cache_of(got).table
    starts, lengths = (x[0] for x in table.spans())
    for chunk, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        keys = layer.keys[0, :, start : start + length].double()
        wanted = torch.cat((keys.mean(1), keys.var(1, unbiased=False)), -1)
        torch.testing.assert_close(layer.features[0, :, chunk].double(), wanted, rtol=1e-4, atol=1e-3)
    assert layer.features.max() > torch.finfo(torch.float16).max
    assert all(bool(step.isfinite().all()) for step in got.logits)


@pytest.mark.parametrize("options", [{"budget": 24}, {"retention": 0.5, "offload": True}])
def test_a_prompt_that_was_read_elsewhere(llama, options):
    ids, mask = prompts((60, 60))
    steps = steps_for((60, 60), 20)
    with torch.no_grad():
        elsewhere = cache_of(llama(ids[:, :56], use_cache=True))
    with attach(llama, **options) as attached:
        wanted, _ = read(llama, ids, mask, steps)
        cache = attached.new_cache()
        states = [(layer.keys, layer.values) for layer in elsewhere.layers]
        cache.load(states, attached.boundaries(ids[:, :56], torch.zeros(2, 56, 32)))
        got, _ = read(llama, ids[:, 56:], mask, steps, cache)
        assert_close(got, wanted)
        cache = attached.new_cache()
        cache.load(states, torch.zeros(2, 56, dtype=torch.bool))
        alone, _ = read(llama, ids[:, 56:57], mask, steps[:, :1], cache)  # no query yet to select by
    with torch.no_grad():
        assert_close(alone[:, 0], llama(ids[:, :57]).logits[:, -1])


def test_steps_are_counted_up_to_the_last_though_asked_afterwards(llama):
    with attach(llama, budget=24) as attached:
        _, cache = read(llama, *prompts((60,)), steps_for((60,), 1))
    assert attached.stats["kv_retention"] == pytest.approx(25 / 61)
    assert (attached.stats["read"], attached.stats["held"]) == (pytest.approx(25), 61)
    assert attached.stats["steps"] == 1
    assert not cache.full_layers[0].selected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: looks for waits of the host for it")
@pytest.mark.parametrize("lengths", [(60,), (60, 25)])
@pytest.mark.parametrize(
    "options",
    [{"budget": 24}, {"budget": 24, "vote": True}, {"budget": 24, "adaptive": True}, {"top_k": 2}, {"retention": 0.5}],
)
def test_a_decode_step_never_waits_for_the_device(monkeypatch, lengths, options):
    """Only what is done here: transformers looks at the values of attention masks."""

    def watched(function):
        def call(*args, **named):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    model = tiny_model("llama").cuda()
    ids, mask = (x.cuda() for x in prompts(lengths))
    steps = steps_for(lengths, 30).cuda()
    with attach(model, **options) as attached:
        _, cache = read(model, ids, mask, steps[:, :2])
        before = attached.stats["selections"]
        for kind, names in ((ChunkCache, ("begin", "observe")), (ChunkLayer, ("update", "remember", "attend"))):
            for name in names:
                monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
        for step in range(2, 30):
            read(model, steps[:, step : step + 1], mask, steps[:, :0], cache)
        assert attached.stats["selections"] > before
