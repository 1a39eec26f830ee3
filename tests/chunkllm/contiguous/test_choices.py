import pytest
import torch

from chunkllm import ChunkAdapters, ChunkCache, ChunkSelection
from chunkllm.contiguous.layer import ChunkLayer
from chunkllm.scorers import chunk_scores
from tests.chunkllm.conftest import Stops, cache_of, calibrated, prompts
from tests.chunkllm.contiguous.conftest import (
    SMALL,
    WAYS,
    assert_close,
    attach,
    generate,
    logits_of,
    read,
    sinks_of,
    steps_for,
)
from tests.chunkllm.contiguous.test_table import brute_force
from tests.chunkllm.test_selection import wanted_tokens


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
            selected_at, kept, has_chosen = [0] * len(lengths), [[]] * len(lengths), [False] * len(lengths)
            for step, rows in enumerate(attended):
                length = max(lengths) + step  # without the token that attends
                for row, places in enumerate(rows):
                    first = firsts[row]
                    chunks = brute_force([flags[row][:length]], [first], 8, sinks_of(cache))[0]
                    if not has_chosen[row] or sum(chunks[-1]) == length or every_step:
                        selected_at[row], has_chosen[row] = length, length - first > budget
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
