"""Chunk selection on vLLM's V2 model runner: vLLM's own scheduler, tables, batches and metadata, without a model."""

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from chunkllm import PooledScorer
from chunkllm.paged.selection import PagedSelection
from chunkllm.selection import DEFAULT_LOCAL, DEFAULT_SINKS
from decoding import DecodingError
from decoding.vllm import engine_args

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")

from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.input_batch import InputBatch

from decoding.vllm import fallbacks
from decoding.vllm.budgets import budget_slots
from decoding.vllm.processor import ChunkLogitsProcessor
from tests.chunkllm.paged.engine import NoLooking, Recording, step_of_one
from tests.serving.v2_runner import CPU, Serving, configured, put_plain_kernels

pytestmark = pytest.mark.real

L, H, HKV, D, M = 3, 4, 2, 32, 4
BLOCK, VOCAB, LENGTH, BUDGET = 32, 60, 1024, 224
PART = "chunk selection"
OPTIONS = {"max_model_len": LENGTH, "max_num_seqs": 4, "max_num_batched_tokens": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model's configuration."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=H * D,
        intermediate_size=8,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=HKV,
        max_position_embeddings=LENGTH,
        architectures=["LlamaForCausalLM"],
    )
    path = tmp_path_factory.mktemp("model")
    config.save_pretrained(path)
    return path


@pytest.fixture
def config(folder, monkeypatch):
    """An engine's configuration that selects by pooled scores."""
    put_plain_kernels(monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name in ("DECODING_STYLES", "DECODING_TEMPERATURE", "DECODING_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fallbacks, "counts", Counter())
    return configured(folder, monkeypatch, **OPTIONS, **engine_args(kv_budget=BUDGET))


class Model:
    """Keys, queries and ends of chunks that follow from tokens; notes what each layer's kernel reads."""

    def __init__(self, monkeypatch, seed=0, has_ends=False):
        draw = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(L, VOCAB, HKV, D, generator=draw)
        self.queries = torch.randn(L, VOCAB, H, D, generator=draw)
        self.ends = (torch.rand(VOCAB, generator=draw) < 0.05) & has_ends
        self.read = []  # metadata, layer by layer

        def kernel(impl, layer, query, key, value, cache, metadata, output):
            self.read.append(metadata)
            return output

        monkeypatch.setattr("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward", kernel)

    def is_boundary(self, states):
        return self.ends[states[..., 0].long()]

    def scorer(self):
        return PooledScorer(D)

    def __call__(self, batch, metadata):
        ids = batch.input_ids[: batch.num_tokens].long()
        self.read = []
        for layer, (name, of_layer) in enumerate(metadata.items()):
            attention = self.attention[name]
            impl, keys = attention.impl, self.keys[layer, ids]
            impl.do_kv_cache_update(attention, keys, keys, attention.kv_cache, of_layer.slot_mapping[: len(ids)])
            impl.forward(None, self.queries[layer, ids], keys, None, None, of_layer, None)
            if layer == 0:
                torch.ops.decoding.note_bottom_states(ids[:, None].float(), None, torch.zeros(1))

    def serving(self, config, blocks=60):
        """A server of this model."""
        served = Serving(config, blocks, ChunkLogitsProcessor)
        context = config.compilation_config.static_forward_context
        self.attention = dict(context)
        for layer in context.values():
            layer.kv_cache = torch.full((blocks, HKV, BLOCK, 2 * D), torch.nan)
        self.group = served.runner.attn_groups[0][0].get_metadata_builder(0).group
        if self.ends.any():
            self.group.adapters = self
        return served


class Alone:
    """A request in a selection of its own, whose blocks are 0, 1, …."""

    def __init__(self, model, ids):
        self._model, self._known = model, 0
        self._selection = PagedSelection(
            PooledScorer(D),
            range(L),
            torch.ones(L),
            heads=H,
            kv_heads=HKV,
            head_dim=D,
            blocks=LENGTH // BLOCK,
            block_size=BLOCK,
            rows=1,
            row_blocks=LENGTH // BLOCK,
            sinks=DEFAULT_SINKS,
            local=DEFAULT_LOCAL,
            dtype=torch.float32,
            device=CPU,
        )
        if ids:  # what comes out of the prefix cache: the summaries are there, its queries are not
            self.reads(0, ids, True, 2**31 - 1)
            self._known = 0

    def reads(self, held, ids, is_prompt, budget):
        """Of each layer the numbers of its blocks, and how many tokens are in them; None for all."""
        count, ids = len(ids), torch.tensor(ids)
        table, most = torch.arange(LENGTH // BLOCK, dtype=torch.int32), (held + count) * (self._known >= M)
        step = step_of_one(table, held, count, budget, most=most, is_prompt=is_prompt)
        reading = self._selection.begin(step)
        self._known += count
        self._selection.note_ends(self._model.ends[ids] if self._model.ends.any() else None)
        for layer in range(L):
            self._selection.add(layer, self._model.keys[layer, ids], self._model.queries[layer, ids])
        if reading is None:
            return None
        lengths = reading.lengths[:, 0].tolist()
        return [
            (reading.block_table[layer, 0, : -(-length // BLOCK)].tolist(), length)
            for layer, length in enumerate(lengths)
        ]


class Checked:
    """Holds what each row of a step reads to what its request would read alone."""

    def __init__(self, served, model):
        self.served, self.model = served, model
        self.alone, self.selected, self.shared, self.places = {}, 0, 0, Counter()

    def __call__(self, batch, metadata):
        self.model(batch, metadata)
        assert len(self.model.read) == L
        for row, name in enumerate(batch.req_ids):
            request, held = self.served.requests[name], int(batch.num_computed_tokens_np[row])
            life = name, request.num_preemptions
            ids = list(request.all_token_ids)
            if life not in self.alone:
                self.alone[life] = Alone(self.model, ids[:held])
                self.places[int(batch.idx_mapping_np[row])] += 1
                self.shared += held > 0
            count = int(batch.num_scheduled_tokens[row])
            budget = (request.sampling_params.extra_args or {}).get("kv_budget", BUDGET)
            budget = 2**31 - 1 if budget == "full" else budget
            is_prompt = bool(batch.is_prefilling_np[row])
            wanted = self.alone[life].reads(held, ids[held : held + count], is_prompt, budget)
            self.compare(name, row, held + count, wanted)

    def compare(self, name, row, length, wanted):
        """One row."""
        (blocks,) = self.served.scheduler.kv_cache_manager.get_block_ids(name)
        for layer, metadata in enumerate(self.model.read):
            got = metadata.block_table[row, : -(-int(metadata.seq_lens[row]) // BLOCK)].tolist()
            if wanted is None:
                assert (got, int(metadata.seq_lens[row])) == (blocks[: -(-length // BLOCK)], length)
            else:
                numbers, tokens = wanted[layer]
                assert int(metadata.seq_lens[row]) == tokens
                assert got[-1] == blocks[numbers[-1]]
                assert sorted(got) == sorted(blocks[number] for number in numbers)
        self.selected += wanted is not None and any(tokens < length for _, tokens in wanted)


def random_request(choose, beginnings):
    ids = list(choose.choice(beginnings)) if choose.random() < 0.5 else []
    ids += choose.choices(range(VOCAB), k=choose.choice([5, 40, 250, 450]))
    budget = choose.choice([None, None, 320, "full", 192])
    return ids, None if budget is None else {"kv_budget": budget}


class OnAGpu(PagedSelection):
    """With shapes that do not depend on what tensors hold."""

    def __init__(self, *args, **options):
        super().__init__(*args, fixed_shapes=True, **options)

    def begin(self, step):
        with NoLooking():
            return super().begin(step)

    def note_ends(self, ends):
        with NoLooking():
            super().note_ends(ends)


@pytest.mark.parametrize(("has_ends", "as_on_a_gpu"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("seed", range(2))
def test_requests_that_come_and_go_read_what_each_would_read_alone(config, monkeypatch, has_ends, as_on_a_gpu, seed):
    """In pieces, in any place of the table, with shared beginnings, preempted, in blocks that others had."""
    if as_on_a_gpu:
        monkeypatch.setattr("decoding.vllm.chunks.PagedSelection", OnAGpu)
    choose, model = random.Random(seed), Model(monkeypatch, seed, has_ends)
    served = model.serving(config, blocks=36)
    check = Checked(served, model)
    beginnings = [choose.choices(range(VOCAB), k=k) for k in (200, 330)]
    waiting = [random_request(choose, beginnings) for _ in range(18)]
    moved, number = 0, 0
    while waiting or served.scheduler.has_unfinished_requests():
        if waiting and choose.random() < 0.9:
            ids, extra = waiting.pop(0)
            served.add(f"r{number:02}", ids, max_tokens=choose.randint(30, 110), extra_args=extra)
            number += 1
        batch = served.step(check, lambda: choose.randrange(VOCAB))
        moved += batch is not None and batch.idx_mapping_np.tolist() != sorted(batch.idx_mapping_np.tolist())
    preempted = sum(request.num_preemptions for request in served.requests.values())
    assert preempted and check.shared > preempted and moved > 20 and check.selected > 150
    assert max(check.places.values()) > 2  # places are used again
    assert not fallbacks.counts


class Replaying(Model):
    """Captures a whole step of single tokens, and replays it for every one that vLLM has a graph for."""

    def serving(self, config, blocks):
        config.additional_config["chunkllm"]["full_graphs"] = True
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        served, rows, self.replayed = super().serving(config, blocks), OPTIONS["max_num_seqs"], 0
        batch = InputBatch.make_dummy(rows, rows, served.runner.input_buffers)
        tables, slots = served.runner.prepare_dummy_attn(batch)
        metadata = served.runner.metadata(batch, tables, slots, CUDAGraphMode.FULL, for_capture=True)
        with set_forward_context(metadata, config), Recording() as self.graph:
            super().__call__(batch, metadata)
        self.captured, served.runner.graph_rows = self.read, rows
        return served

    def __call__(self, batch, metadata):
        if batch.num_tokens > batch.num_reqs:
            super().__call__(batch, metadata)
            return
        self.graph.replay()
        self.read = self.captured
        self.replayed += 1


def test_whole_steps_that_are_replayed_read_what_each_request_would_read_alone(config, monkeypatch):
    choose, model = random.Random(1), Replaying(monkeypatch)
    served = model.serving(config, blocks=36)
    check = Checked(served, model)
    waiting = [random_request(choose, [choose.choices(range(VOCAB), k=200)]) for _ in range(12)]
    for number, (ids, extra) in enumerate(waiting):
        served.add(f"r{number:02}", ids, max_tokens=choose.randint(30, 110), extra_args=extra)
    run_to_the_end(served, check, choose)
    assert model.replayed > 100 and check.selected > 100
    assert not fallbacks.counts


def test_what_cannot_be_captured_ends_the_start_and_no_step(config, monkeypatch):
    monkeypatch.setattr(PagedSelection, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Replaying(monkeypatch).serving(config, blocks=36)
    assert not fallbacks.counts


def test_full_graphs_are_refused_where_there_are_none(config, monkeypatch):
    config.additional_config["chunkllm"]["full_graphs"] = True
    with pytest.raises(DecodingError, match="full graphs of chunk selection want a GPU, and a cudagraph_mode"):
        Model(monkeypatch).serving(config)


def run_to_the_end(served, model, choose):
    while served.scheduler.has_unfinished_requests():
        served.step(model, lambda: choose.randrange(VOCAB))


def long_request(served, name, seed=0, **options):
    served.add(name, random.Random(seed).choices(range(VOCAB), k=400), **options)


def reads_everything(model, row=0):
    return all(metadata.block_table.dim() == 2 and metadata is model.read[0] for metadata in model.read)


def test_before_the_cache_is_known_nothing_is_selected_and_then_a_group_fits_it(config, monkeypatch):
    """vLLM makes builders to measure CUDA graphs, with a small cache, and others when it knows how large it is."""
    model = Model(monkeypatch)
    served = model.serving(config)
    builder_of = type(served.runner.attn_groups[0][0].get_metadata_builder(0))
    group = served.runner.attn_groups[0][0]
    config.cache_config.num_gpu_blocks = None
    group.create_metadata_builders(config, CPU, BLOCK)
    early = group.get_metadata_builder(0)
    assert isinstance(early, builder_of) and early.group.selection is None
    batch = InputBatch.make_dummy(2, 8, served.runner.input_buffers)
    tables, slots = served.runner.prepare_dummy_attn(batch)
    metadata = served.runner.metadata(batch, tables, slots)
    assert all(each.chunks is None for each in metadata.values())
    for blocks in (6, 60):
        config.cache_config.num_gpu_blocks = blocks
        metadata = served.runner.metadata(batch, tables, slots)
        assert all(each.chunks.of_layers == () for each in metadata.values())
        assert len(early.group.selection.summaries.lengths) == blocks + 1
    assert not fallbacks.counts


def test_a_model_that_runs_twice_with_one_steps_metadata_is_taken_in_once(config, monkeypatch):
    """So vLLM does before it captures a CUDA graph."""
    texts = []
    for times in (1, 2):
        model = Model(monkeypatch, has_ends=True)
        served = model.serving(config)
        read = []

        def run(batch, metadata, model=model, times=times, read=read):
            for _ in range(times):
                model(batch, metadata)
            read.append([(each.block_table.tolist(), each.seq_lens.tolist()) for each in model.read])

        long_request(served, "a", max_tokens=40)
        run_to_the_end(served, run, random.Random(0))
        texts.append(read)
    assert texts[0] == texts[1]
    assert len({len(step[0][0][0]) for step in texts[0]}) > 1  # some steps select
    assert not fallbacks.counts


class Failing:
    """Has one of a selection's methods raise, while asked to."""

    def __init__(self, monkeypatch, part):
        self.now, real = False, getattr(PagedSelection, part)

        def method(selection, *args):
            if self.now and part != "begin":
                raise RuntimeError("as nobody foresaw")
            result = real(selection, *args)
            if self.now:
                raise RuntimeError("when it was almost done")
            return result

        monkeypatch.setattr(PagedSelection, part, method)


def own_blocks_alone(served, model, selected):
    """A model that holds what each row reads to its request's own blocks, and counts the rows that select."""

    def run(batch, metadata):
        model(batch, metadata)
        for row, name in enumerate(batch.req_ids):
            (blocks,) = served.scheduler.kv_cache_manager.get_block_ids(name)
            length = int(batch.seq_lens[row])
            for of_layer in model.read:
                tokens = int(of_layer.seq_lens[row])
                read = of_layer.block_table[row, : -(-tokens // BLOCK)].tolist()
                assert len(set(read)) == len(read) and set(read) <= set(blocks)
                assert read[-1] == blocks[(length - 1) // BLOCK]
                assert tokens == length or tokens < length and len(read) * BLOCK <= LENGTH
            selected[name] += any(int(of_layer.seq_lens[row]) < length for of_layer in model.read)

    return run


@pytest.mark.parametrize("part", ["begin", "note_ends", "add"])
@pytest.mark.parametrize("in_prompt", [False, True])
def test_whatever_goes_wrong_the_step_is_plain_vllms_and_others_select(config, monkeypatch, part, in_prompt):
    choose, model = random.Random(3), Model(monkeypatch, has_ends=True)
    served, failing, selected = model.serving(config), Failing(monkeypatch, part), Counter()
    run = own_blocks_alone(served, model, selected)
    for name in ("a", "b"):
        long_request(served, name, seed=ord(name), max_tokens=60)
    for _ in range(20):
        served.step(run, lambda: choose.randrange(VOCAB))
    assert selected["a"] and selected["b"] and not fallbacks.counts
    if in_prompt:  # of a third request, some of whose blocks get no summaries
        long_request(served, "c", seed=7, max_tokens=60)
    failing.now = True
    served.step(run, lambda: choose.randrange(VOCAB))
    failing.now = False
    assert fallbacks.counts[PART] == 1
    assert reads_everything(model) or part != "begin"
    selected.clear()
    served.step(run, lambda: choose.randrange(VOCAB))
    assert reads_everything(model) and not selected.total()  # nor does the next one trust what it knows
    assert fallbacks.counts[PART] == 1  # and it does not count again
    run_to_the_end(served, run, choose)
    assert not in_prompt or selected["c"] > 30  # its keys were read again from the cache
    long_request(served, "d", seed=9, max_tokens=60)  # in a place that one of them had
    run_to_the_end(served, run, choose)
    assert selected["d"] > 30
    assert fallbacks.counts[PART] == 1


def test_a_step_without_metadata_for_its_layers_counts_once_though_it_leaves_a_gap(config, monkeypatch):
    choose, model, selected = random.Random(6), Model(monkeypatch), Counter()
    served = model.serving(config)
    run = own_blocks_alone(served, model, selected)
    long_request(served, "a", max_tokens=60)
    for _ in range(20):
        served.step(run, lambda: choose.randrange(VOCAB))
    assert selected["a"]
    with monkeypatch.context() as patch:
        patch.setattr("decoding.vllm.selecting.SelectingBuilder.of_layers", lambda *_: 1 / 0)
        served.step(run, lambda: choose.randrange(VOCAB))
    assert reads_everything(model) and fallbacks.counts[PART] == 1
    run_to_the_end(served, run, choose)
    assert fallbacks.counts[PART] == 1


def test_a_step_whose_model_never_ran_is_followed_by_one_that_reads_everything(config, monkeypatch):
    choose, model, selected = random.Random(4), Model(monkeypatch, has_ends=True), Counter()
    served = model.serving(config)
    run = own_blocks_alone(served, model, selected)
    long_request(served, "a", max_tokens=60)
    for _ in range(20):
        served.step(run, lambda: choose.randrange(VOCAB))
    assert selected["a"]
    served.step(lambda *_: None, lambda: choose.randrange(VOCAB))
    assert not fallbacks.counts
    selected.clear()
    served.step(run, lambda: choose.randrange(VOCAB))
    assert reads_everything(model) and fallbacks.counts[PART] == 1 and not selected["a"]
    run_to_the_end(served, run, choose)
    assert fallbacks.counts[PART] == 1


def test_while_vllm_does_not_say_whose_rows_are_all_is_read_and_then_no_old_block_is_trusted(config, monkeypatch):
    choose, model, selected = random.Random(5), Model(monkeypatch), Counter()
    served = model.serving(config)
    run, real = own_blocks_alone(served, model, selected), served.runner.metadata

    def nameless(batch, *args):
        places, batch.idx_mapping_np = batch.idx_mapping_np, None
        metadata = real(batch, *args)
        batch.idx_mapping_np = places
        return metadata

    long_request(served, "a", max_tokens=60)
    with monkeypatch.context() as patch:
        patch.setattr(served.runner, "metadata", nameless)
        for _ in range(6):
            served.step(run, lambda: choose.randrange(VOCAB))
            assert reads_everything(model)
    assert fallbacks.counts[PART] == 6
    long_request(served, "b", seed=1, max_tokens=60)
    run_to_the_end(served, run, choose)
    assert selected["a"] > 30 and selected["b"] > 30  # the keys of ``a`` were read again from the cache
    assert fallbacks.counts[PART] == 6


def test_budgets_go_with_their_place_and_leave_with_their_request(config):
    count = OPTIONS["max_num_seqs"]
    processor = ChunkLogitsProcessor(config, SimpleNamespace(device=CPU, max_num_reqs=count))
    budgets = budget_slots(config.instance_id, count)
    for slot, asked in ((0, 320), (2, "full"), (3, None)):
        extra = None if asked is None else {"kv_budget": asked}
        assert not processor.add_request(slot, SamplingParams(extra_args=extra))
    processor.apply_staged_writes()
    assert budgets.of(np.array([3, 2, 0, 1]), BUDGET).tolist() == [BUDGET, OPTIONS["max_model_len"], 320, BUDGET]
    processor.add_request(0, SamplingParams())
    assert budgets.of(np.array([0, 2]), BUDGET).tolist() == [BUDGET, OPTIONS["max_model_len"]]
    logits = torch.randn(2, VOCAB)
    assert processor.apply(logits, SimpleNamespace()) is logits
