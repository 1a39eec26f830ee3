import numpy as np
import pytest
import torch

from chunkllm import ChunkAdapters, ChunkCache, ChunkSelection
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.scorers import chunk_scores
from tests.chunkllm.conftest import KINDS, VOCAB, Stops, cache_name, cache_of, calibrated, prompts, tiny_model
from tests.chunkllm.contiguous.test_table import brute_force
from tests.chunkllm.test_selection import wanted_tokens

SMALL = {"sinks": 2, "local": 6, "max_chunk": 8}  # 10 tokens that stay at least
EVERYTHING = ({"budget": 500}, {"retention": 1.0})
WAYS = {
    "greedy": ((23,), {}),
    "padded": ((23, 9, 16), {}),
    "beams": ((23, 9), {"num_beams": 3, "num_return_sequences": 2}),
    "sampling": ((23, 9), {"do_sample": True, "num_return_sequences": 2}),
}


def attach(model, **options):
    adapters = calibrated(model) if options.get("adaptive") else None
    return ChunkSelection(adapters, **SMALL | options).attach(model, Stops())


def generate(model, lengths=(23,), seed=0, ids=None, **options):
    held, mask = prompts(lengths) if ids is None else (ids, torch.ones_like(ids))
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return model.generate(held, attention_mask=mask, **settings | options)


def logits_of(output):
    return torch.stack(output.logits, 1)


@torch.no_grad()
def read(model, ids, mask, steps, cache=None):
    """Reads ids [B, T] at once, then steps [B, n] one by one: logits [B, n + 1, V] of the last token and the steps."""
    logits, name = [], cache_name(model)
    for new in (ids, *(steps.split(1, 1) if steps.shape[1] else ())):
        held = 0 if cache is None else cache.get_seq_length()
        grown = torch.cat((mask, mask.new_ones(len(mask), held + new.shape[1])), 1)[:, : held + new.shape[1]]
        output = model(input_ids=new, attention_mask=grown, use_cache=True, **{name: cache})
        cache = cache_of(output)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1), cache


def sinks_of(cache):
    """Tokens that are a chunk of their own at the beginning."""
    return getattr(cache.table, "sinks", 0)


def steps_for(lengths, count=20, seed=5):
    """Tokens to come; chunks of the rows end at different ones of them."""
    return torch.randint(3, VOCAB, (len(lengths), count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gathering(monkeypatch):
    """Selection always happens, and always selects everything, whichever row's turn it is."""
    monkeypatch.setattr(ChunkCache, "_slots", lambda self, held: held if len(self.table.first) == 1 else 300)
    due = ChunkCache._rows_to_refresh

    def rows_to_refresh(self, length):
        if self._front.selected or not self._front.has_queries:
            return due(self, length)
        return np.arange(len(self.table.first))

    monkeypatch.setattr(ChunkCache, "_rows_to_refresh", rows_to_refresh)


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# With everything kept, the model computes what it computes without.


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
def bottom(model, ids, mask):
    """Output of the bottommost layer, without a cache."""
    mask = torch.cat((mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])), 1)
    return model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states[1]


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


class Spy:
    """Boundaries, queries of all tokens by layer, and what `ChunkLayer.attend` was given at each step."""

    def __init__(self, monkeypatch):
        self.queries, self.steps, self.flags = {}, {}, []
        remember, attend, observe = ChunkLayer.remember, ChunkLayer.attend, ChunkCache.observe

        def spy_observe(cache, flags):
            self.flags.append(flags.clone())
            observe(cache, flags)

        def spy_remember(layer, queries, count):
            self.queries.setdefault(layer.place, []).append(queries.clone())
            remember(layer, queries, count)

        def spy_attend(layer, query, keys, values, scaling):
            slots = keys.shape[2]
            mask = torch.ones(len(keys), slots, dtype=torch.bool) if layer.mask is None else layer.mask[:, :slots]
            self.steps.setdefault(layer.place, []).append((torch.cat((keys, values), -1).clone(), mask.clone()))
            return attend(layer, query, keys, values, scaling)

        monkeypatch.setattr(ChunkCache, "observe", spy_observe)
        monkeypatch.setattr(ChunkLayer, "remember", spy_remember)
        monkeypatch.setattr(ChunkLayer, "attend", spy_attend)

    def places(self, layer):
        """Per step and row the places that were attended to, found by comparison with all that the layer holds."""
        layer.settle()
        stored = torch.cat((layer.keys, layer.values), -1)[:, :, : layer.stored].transpose(1, 2).flatten(2)
        for held, mask in self.steps[layer.place]:
            rows = []
            for row, slots in enumerate(held.transpose(1, 2).flatten(2)):
                same = (slots[mask[row], None] == stored[row]).all(-1)
                assert (same.sum(1) == 1).all()
                rows.append(same.int().argmax(1).tolist())
            yield rows


def pooled_ranks(queries, keys, chunks, scaling):
    """The docstring of `PooledScorer` in loops: per token, for one row; queries [H, m, D], keys [Hkv, T, D]."""
    total = torch.zeros(len(chunks))
    heads = len(queries)
    for head in range(heads):
        of_head = keys[head // (heads // len(keys))]
        for query in queries[head] * scaling:
            logits = []
            for start, size in chunks:
                tokens = of_head[start : start + size]
                spread = query**2 @ tokens.var(0, unbiased=False) / 2
                logits.append(query @ tokens.mean(0) + spread + torch.tensor(float(size)).log())
            total += torch.stack(logits).softmax(0) / (heads * queries.shape[1])
    return (total / torch.tensor([size for _, size in chunks])).tolist()


def adapter_ranks(scorer, place, queries, keys, chunks):
    """As `pooled_ranks`, from keys that are summarised all at once."""
    length = keys.shape[1]
    starts, sizes = torch.tensor(chunks).T
    chunk_of = torch.full((1, length), len(chunks))
    for number, (start, size) in enumerate(chunks):
        chunk_of[0, start : start + size] = number
    features = scorer.summarise(place, keys[None], chunk_of, (starts + sizes - 1)[None])
    distances = (length - starts - sizes + 1)[None].float()
    scores = chunk_scores(scorer, place, queries[None], features, sizes[None].float(), distances)
    return (scores[0] / sizes).tolist()


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("lengths", [(50,), (50, 20, 37)])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_step_attends_to_what_brute_force_selects(models, monkeypatch, kind, lengths, trained, every_step):
    model, budget, count, local = models(kind), 24, 20, 3
    adapters = None
    if trained:
        torch.manual_seed(0)
        adapters = ChunkAdapters.for_model(model)
        for weights in (adapters.key, adapters.gains):
            weights.data = torch.randn_like(weights) * 0.3
    ids, mask = prompts(lengths)
    steps = steps_for(lengths, count)
    firsts = [max(lengths) - length for length in lengths]
    spy = Spy(monkeypatch)
    chooser = ChunkSelection(adapters, **SMALL | {"local": local}, budget=budget, every_step=every_step)
    with chooser.attach(model, Stops()) as attached, torch.no_grad():
        _, cache = read(model, ids, mask, steps)
        plan = attached.plan
        flags = torch.cat(spy.flags, 1).tolist()
        if not trained:
            assert flags == (torch.cat((ids, steps), 1) % 5 == 0).tolist()
        for place in plan.shape.full_layers:
            layer = cache.layers[place]
            queries = torch.cat(spy.queries[place], 2)
            attended = list(spy.places(layer))
            assert len(attended) == count
            selected_at, kept = [0] * len(lengths), [[]] * len(lengths)
            for step, rows in enumerate(attended):
                length = max(lengths) + step  # without the token that attends
                for row, places in enumerate(rows):
                    first = firsts[row]
                    chunks = brute_force([flags[row][:length]], [first], 8, sinks_of(cache))[0]
                    if step == 0 or sum(chunks[-1]) == length or every_step:
                        selected_at[row] = length
                        recent = max(local, length - sum(chunks[-1]))
                        last = queries[row, :, length - 4 : length]
                        keys = layer.keys[row, :, :length]
                        if trained:
                            ranks = adapter_ranks(plan.scorer, place, last, keys, chunks)
                        else:
                            ranks = pooled_ranks(last, keys, chunks, plan.shape.scaling)
                        kept[row] = wanted_tokens(chunks, ranks, first, length, recent, SMALL["sinks"], budget)
                    since = list(range(selected_at[row], length + 1))
                    assert sorted(places) == sorted([*kept[row], *since])  # and none twice
                    assert len(places) == min(budget, selected_at[row] - first) + len(since)
                    assert {first, first + 1, *range(length - local + 1, length + 1)} <= set(places)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"budget": 24, "vote": True}, {"budget": 24, "adaptive": True}])
def test_sinks_recent_tokens_and_the_running_chunk_are_always_attended_to(llama, monkeypatch, options):
    ids, mask = prompts((50, 20))
    spy = Spy(monkeypatch)
    with ChunkSelection(calibrated(llama), **SMALL, **options).attach(llama):
        _, cache = read(llama, ids, mask, steps_for((50, 20), 30))
    attended = [list(spy.places(layer)) for layer in cache.full_layers]
    table = cache.table
    for step in range(30):
        for row, first in enumerate((0, 30)):
            starts, sizes = (x[row] for x in table.spans())
            ends = (starts + sizes)[sizes > 0]
            running = int(max(ends[ends <= 50 + step], default=first))
            for places in (layer[step][row] for layer in attended):
                assert len(places) == len(set(places))
                assert first <= min(places)
                assert {first, first + 1, *range(45 + step, 51 + step), *range(running, 51 + step)} <= set(places)
            if options.get("vote"):
                assert len({tuple(sorted(layer[step][row])) for layer in attended}) == 1
    sizes = {len(layer[0][0]) for layer in attended}
    assert (len(sizes) > 1) == bool(options.get("adaptive"))
    if options.get("adaptive"):
        assert sum(len(layer[0][0]) for layer in attended) == pytest.approx(3 * 25, abs=3)


def test_a_row_within_the_budget_loses_nothing_beside_a_longer_one(llama, monkeypatch):
    """Whatever share of the budget a layer has."""
    ids, mask = prompts((50, 12))
    steps = steps_for((50, 12), 9)
    plain, _ = read(llama, ids[1:, -12:], mask[1:, -12:], steps[1:])
    spy = Spy(monkeypatch)
    with attach(llama, budget=24, adaptive=True):
        got, cache = read(llama, ids, mask, steps)
    assert_close(got[1:], plain)
    attended = [list(spy.places(layer)) for layer in cache.full_layers]
    assert all(len(layer[5][1]) == 12 + 6 for layer in attended)
    assert len({len(layer[5][0]) for layer in attended}) > 1


# Selecting.


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("lengths", [(60,), (60, 25)])
def test_the_hosts_memory_gives_the_same_tokens(llama, lengths, options):
    got = []
    for offload in (False, True):
        with attach(llama, budget=20, offload=offload) as attached:
            got.append(generate(llama, lengths, max_new_tokens=30, **options))
            assert attached.stats["kv_retention"] < 0.8
    assert torch.equal(got[0].sequences, got[1].sequences)
    assert torch.equal(logits_of(got[0]), logits_of(got[1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 20},
        {"budget": 20, "every_step": True},
        {"budget": 20, "vote": True},
        {"budget": 20, "adaptive": True},
        {"top_k": 2},
        {"retention": 0.4},
        {"retention": 0.4, "adaptive": True, "offload": True},
    ],
)
def test_every_setting_selects(models, options, way):
    # Each way with each setting, and every other one with layers of both kinds.
    model, more = models("gemma3_text" if way in ("padded", "sampling") else "llama"), WAYS[way][1]
    lengths = {1: (60,), 2: (60, 40), 3: (60, 40, 50)}[len(WAYS[way][0])]
    with attach(model, **options) as attached:
        got = generate(model, lengths, max_new_tokens=16, **more)
        stats = attached.stats
    assert all(bool(step.isfinite().all()) for step in got.logits)
    assert stats["steps"] == 15
    assert 0.15 < stats["kv_retention"] < 0.9
    assert set(stats["layers"]) == set(cache_of(got).plan.shape.full_layers)
    rows = len(got.logits[0])
    assert rows <= stats["selections"] <= 15 * rows
    if "every_step" in options:
        assert stats["selections"] == 15 * rows
    assert attached.stats == stats  # detached, and asked again


@pytest.mark.parametrize("retention", [0.25, 0.5, 0.8])
def test_the_share_of_tokens_kept_is_about_the_one_wished_for(llama, retention):
    with attach(llama, retention=retention) as attached:
        generate(llama, (300,), max_new_tokens=40)
        stats = attached.stats
    assert stats["kv_retention"] == pytest.approx(retention, abs=0.03)
    assert all(share == pytest.approx(retention, abs=0.03) for share in stats["layers"].values())


def test_kept_tokens_are_counted(llama, monkeypatch):
    spy = Spy(monkeypatch)
    with attach(llama, budget=24) as attached:
        _held = generate(llama, (50, 20), max_new_tokens=21)  # with its cache, which has yet to count the last step
    kept = sum(int(mask.sum()) for _, mask in spy.steps[0])
    total = sum(50 + 20 + 2 * step for step in range(1, 21))
    assert attached.stats["layers"][0] == pytest.approx(kept / total)


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
