"""Chunk selection in vLLM itself, on the CPU."""

import gc
import random
from collections import Counter, defaultdict

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from chunkllm import AdapterConfig, CalibrationConfig, ChunkAdapters, ChunkCalibration
from chunkllm.contiguous.attention import intercept
from chunkllm.models import model_shape
from decoding import DecodingError
from decoding.models import DEFAULT_MODEL, resolve_model
from decoding.style.source import load_corpus
from decoding.vllm import engine_args, fallbacks

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
VLLMValidationError = pytest.importorskip("vllm.exceptions").VLLMValidationError
pytestmark = [pytest.mark.real, pytest.mark.usefixtures("in_this_process")]

BLOCK, VOCAB = 32, 300
BUDGET = 256
ENGINE = {"dtype": "float32", "disable_log_stats": True, "enforce_eager": True}
TINY = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "skip_tokenizer_init": True, "max_model_len": 1024}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of two layers whose attention is not flat, and one with adapters for it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2))
    model.save_pretrained(folder / "model")
    adapters = ChunkAdapters(AdapterConfig(model_shape(model), width=4, sensitivity=(4e-3, 1e-3)))
    with torch.no_grad():
        adapters.boundary.out.bias -= 0.3  # some tokens end a chunk
    adapters.save_pretrained(folder / "adapters")
    return folder


class Engines:
    """One engine at a time: the end of one takes the process's groups of workers away from all."""

    def __init__(self):
        self.asked, self.engine = None, None

    def __call__(self, model, **options):
        if self.asked != (model, options):
            self.asked, self.engine = None, None
            gc.collect()
            self.engine = vllm.LLM(str(model), **ENGINE | options)
            self.asked = model, options
        return self.engine


@pytest.fixture(scope="module")
def engines():
    return Engines()


@pytest.fixture
def llm(engines, tiny):
    """Four requests at a time, prefill in pieces, and a cache in which not all of them have room."""
    selecting = engine_args(chunk_adapters=tiny / "adapters", kv_budget=BUDGET)
    return engines(tiny / "model", **TINY, num_gpu_blocks_override=48, **selecting)


@pytest.fixture
def readings(monkeypatch):
    """What every step reads: its metadata from vLLM, and the selection."""
    from decoding.vllm.chunks import LayerGroup

    found, begin = [], LayerGroup.begin

    def spy(self, common):
        reading = begin(self, common)
        found.append((common.seq_lens.clone(), common.block_table_tensor.clone(), reading))
        return reading

    monkeypatch.setattr(LayerGroup, "begin", spy)
    return found


def params(budget=None, **options):
    extra = None if budget is None else {"kv_budget": budget}
    return vllm.SamplingParams(
        **{"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False, "extra_args": extra} | options
    )


def prompt(ids):
    return {"prompt_token_ids": list(ids)}


def texts(llm, prompts, sampling):
    outputs = llm.generate([prompt(ids) for ids in prompts], sampling, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


def random_ids(choose, count):
    return choose.choices(range(VOCAB), k=count)


def test_while_everything_is_kept_the_texts_are_stock_vllms(engines, tiny, llm, readings):
    choose = random.Random(0)
    prompts = [random_ids(choose, k) for k in (3, 31, 64, 100, 200)] + [random_ids(choose, k) for k in (400, 700)]
    sampling = [params() for _ in range(5)] + [params(4096), params("full")]
    ours = texts(llm, prompts, sampling)
    assert not any(reading is not None for _, _, reading in readings)
    assert texts(llm, prompts[5:], params()) != ours[5:]
    stock = engines(tiny / "model", **TINY, block_size=BLOCK)
    assert texts(stock, prompts, params()) == ours


def test_the_plugin_is_inert_unless_asked(engines, tiny):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    stock = engines(tiny / "model", **TINY, block_size=BLOCK)
    context = stock.llm_engine.vllm_config.compilation_config.static_forward_context
    assert {type(layer.impl) for layer in context.values()} == {CPUAttentionBackendImpl}
    worker = stock.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert not any(module._forward_hooks for module in worker.model_runner.model.modules())


def churn(seed):
    """Requests of mixed lengths and budgets, many with the same beginnings."""
    choose = random.Random(seed)
    beginnings = [random_ids(choose, k) for k in (200, 330)]
    budgets = [None, None, 320, "full", 192]
    for i in range(40):
        ids = list(choose.choice(beginnings)) if i % 2 else []
        ids += random_ids(choose, choose.choice([5, 40, 250, 450]))
        yield ids, params(budgets[i % 5], max_tokens=choose.randint(8, 100))


def test_forty_requests_at_different_times_get_what_each_gets_alone(llm, readings):
    engine, choose = llm.llm_engine, random.Random(1)
    requests = list(churn(0))
    waiting, together, step = list(enumerate(requests)), {}, 0
    written, preempted = defaultdict(list), {}
    shared = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and step % 3 == 0:
            for _ in range(min(choose.randint(1, 4), len(waiting))):
                number, (ids, sampling) = waiting.pop(0)
                engine.add_request(str(number), prompt(ids), sampling)
        for output in engine.step():
            written[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
            if output.finished:
                together[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
                shared += output.num_cached_tokens > 0
        for request in engine.engine_core.engine_core.scheduler.requests.values():
            number = int(request.request_id.split("-")[0])
            if request.num_preemptions:
                preempted.setdefault(number, len(written[number]))
        step += 1
    selected = sum(reading is not None for _, _, reading in readings)
    mixed = sum(
        reading is not None and len(lengths) > 1 and bool((reading.lengths == lengths).any())
        for lengths, _, reading in readings
    )
    assert preempted and shared > 10 and selected > 100 and mixed > 20
    for number, (ids, sampling) in enumerate(requests):
        (alone,) = texts(llm, [ids], sampling)
        # What was written before a preemption is read anew as a prompt is, in full.
        same = preempted.get(number, len(alone))
        assert together[number][:same] == alone[:same], f"request {number}, {sampling.extra_args}"


def test_out_of_the_prefix_cache_come_the_same_texts(llm):
    ids = random_ids(random.Random(5), 500)
    first, second = (llm.generate([prompt(ids)], params(max_tokens=60), use_tqdm=False)[0] for _ in range(2))
    assert second.num_cached_tokens == 480
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_all_blocks_in_another_order_give_the_same_texts(llm, readings, monkeypatch):
    """Everything kept, by way of tables in which the best blocks come first."""
    ids = [random_ids(random.Random(seed), 600) for seed in (10, 11, 12)]
    full = texts(llm, ids, params("full"))
    monkeypatch.setattr(
        "chunkllm.paged.selection.divide", lambda tokens, weights, most: most[:, None].repeat(1, len(weights))
    )
    readings.clear()
    assert texts(llm, ids, params()) == full
    selected = [each for each in readings if each[2] is not None]
    assert len(selected) > 23
    for lengths, table, reading in selected:
        assert (reading.lengths == lengths).all()
        assert (reading.block_table != table[:, : reading.block_table.shape[2]]).any()


def test_budgets_are_kept_on_average_over_layers(llm, readings):
    ids = random_ids(random.Random(6), 800)
    for budget in (None, 480):
        readings.clear()
        texts(llm, [ids], params(budget))
        tokens = [reading.lengths.float().mean() for _, _, reading in readings if reading is not None]
        assert len(tokens) == 23
        most = budget or BUDGET
        assert most - BLOCK * 2 < max(tokens) <= most


def test_logits_are_those_of_transformers_that_reads_the_same_blocks(engines, readings, real_model):
    """In each layer those that were selected, by adapters, on real text."""
    model, tokenizer = real_model
    text = "\n".join(load_corpus("presidents").documents[:3])
    ids = tokenizer(text)["input_ids"][:1200]
    selecting = engine_args(chunk_adapters="default", kv_budget=416)
    llm = engines(resolve_model(DEFAULT_MODEL), max_model_len=1300, max_num_seqs=1, max_logprobs=-1, **selecting)
    readings.clear()
    output = llm.generate([prompt(ids)], params(max_tokens=40, logprobs=-1), use_tqdm=False)[0].outputs[0]
    steps = [each for each in readings if each[2] is not None]
    assert len(steps) == 39
    written = torch.tensor([list(output.token_ids)])
    masks = [_mask(*step) for step in steps]
    now = {}

    def attend(attention, module, query, key, value, mask, **options):
        if now:
            mask = torch.where(masks[now["step"]][module.layer_idx], 0.0, -torch.inf)[None, None, None, : key.shape[2]]
        return attention(module, query, key, value, mask, **options)

    undo = intercept(model, attend)
    try:
        with torch.inference_mode():
            read = model(torch.tensor([ids]), use_cache=True)
            scores = [read.logits[0, -1]]
            cache = getattr(read, "cache", None) or read.past_key_values
            name = "cache" if getattr(read, "cache", None) is not None else "past_key_values"
            for step in range(39):
                now["step"] = step
                scores.append(model(written[:, step : step + 1], use_cache=True, **{name: cache}).logits[0, -1])
    finally:
        undo()
    assert all(mask.float().mean() < 0.4 for mask in masks)
    for step, wanted in enumerate(scores):
        got = torch.tensor([output.logprobs[step][token].logprob for token in range(wanted.shape[0])])
        torch.testing.assert_close(got, wanted.log_softmax(-1), atol=2e-3, rtol=2e-3)


def _mask(lengths, table, reading):
    """bool [L, tokens], what each layer reads of a lone request."""
    count = int(lengths[0])
    number = {int(block): i for i, block in enumerate(table[0, : -(-count // BLOCK)])}
    mask = torch.zeros(len(reading.lengths), count, dtype=torch.bool)
    for layer, (blocks, tokens) in enumerate(zip(reading.block_table[:, 0], reading.lengths[:, 0], strict=True)):
        for block in blocks[: -(-int(tokens) // BLOCK)].tolist():
            mask[layer, number[block] * BLOCK : (number[block] + 1) * BLOCK] = True
    return mask


@pytest.mark.parametrize("eager", [True, False])
def test_compiled_models_find_boundaries_too(engines, tiny, readings, eager):
    selecting = engine_args(chunk_adapters=tiny / "adapters", kv_budget=BUDGET)
    llm = engines(tiny / "model", **TINY, **selecting, enforce_eager=eager)
    readings.clear()
    texts(llm, [random_ids(random.Random(7), 700)], params(max_tokens=40))
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    group = runner.attn_groups[0][0].get_metadata_builder(0).group
    pieces = group.selection.summaries.lengths[1:-1].gt(0).sum(1)
    assert pieces[pieces > 0].float().mean() > 1.5
    assert sum(reading is not None for _, _, reading in readings) == 39


@pytest.mark.parametrize("budget", [0, -1, "much", 1.5, [3]])
def test_bad_budgets_are_refused_and_the_engine_lives_on(llm, budget):
    ids = random_ids(random.Random(8), 40)
    with pytest.raises(VLLMValidationError, match="kv_budget must be"):
        texts(llm, [ids], params(budget))
    assert texts(llm, [ids], params())


def test_the_option_alone_will_do_and_adapters_are_optional(engines, tiny, readings):
    alone = engines(tiny / "model", **TINY, block_size=BLOCK, additional_config={"chunkllm": {"kv_budget": BUDGET}})
    assert len(texts(alone, [random_ids(random.Random(9), 600)], params())[0]) == 24
    assert sum(reading is not None for _, _, reading in readings) == 23


def test_a_calibration_divides_the_budget_where_there_are_no_adapters(engines, tiny, readings, tmp_path):
    shape = ChunkAdapters.from_pretrained(tiny / "adapters").config.shape
    ChunkCalibration(CalibrationConfig(shape, (4e-3, 1e-3))).save_pretrained(tmp_path)
    llm = engines(tiny / "model", **TINY, **engine_args(chunk_adapters=tmp_path, kv_budget=BUDGET))
    texts(llm, [random_ids(random.Random(13), 600)], params())
    lengths = [reading.lengths.flatten().tolist() for _, _, reading in readings if reading is not None]
    assert len(lengths) == 23
    assert all(first > second and first + second <= 2 * BUDGET for first, second in lengths)


def test_layers_with_sliding_windows_are_left_alone(engines, readings, tmp_path):
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SHAPE, num_hidden_layers=6, head_dim=32, sliding_window=64)
    model = Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    sensitive = AdapterConfig(model_shape(model), width=4, sensitivity=(1e-3,))
    ChunkAdapters(sensitive).save_pretrained(tmp_path / "adapters")
    selecting = engine_args(chunk_adapters=tmp_path / "adapters", kv_budget=BUDGET)
    llm = engines(tmp_path / "model", **TINY, **selecting)
    texts(llm, [random_ids(random.Random(13), 600)], params())
    steps = [reading for _, _, reading in readings if reading is not None]
    assert len(steps) == 23
    assert all(len(reading.lengths) == 1 and int(reading.lengths) <= BUDGET for reading in steps)


def test_a_model_with_windows_in_all_layers_is_refused_at_start(engines, tmp_path):
    MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=2, sliding_window=64)).save_pretrained(tmp_path)
    with pytest.raises(DecodingError, match="none would select"):
        engines(tmp_path, **TINY, **engine_args(kv_budget=BUDGET))


def test_a_step_that_fails_is_plain_vllms_and_the_engine_lives_on(llm, readings, monkeypatch):
    """Whatever raises in it; and nothing that the step left out is trusted afterwards."""
    from decoding.vllm.chunks import LayerGroup

    engine, ids = llm.llm_engine, [random_ids(random.Random(seed), 600) for seed in (20, 21)]
    wanted = texts(llm, [ids[1]], params())
    monkeypatch.setattr(fallbacks, "counts", Counter())
    take_in, broken = LayerGroup.take_in, []

    def failing(self, layer, keys, queries):
        if broken:
            raise RuntimeError(broken.pop())
        take_in(self, layer, keys, queries)

    monkeypatch.setattr(LayerGroup, "take_in", failing)
    engine.add_request("a", prompt(ids[0]), params(max_tokens=40))
    written = []
    while engine.has_unfinished_requests():
        written += [output.outputs[0].token_ids for output in engine.step()]
        if len(written) == 12:
            broken.append("as nobody foresaw")
    assert len(written[-1]) == 40 and fallbacks.counts == {"chunk selection": 1}  # the step, and with it the next
    readings.clear()
    assert texts(llm, [ids[1]], params()) == wanted
    assert sum(reading is not None for _, _, reading in readings) == 23


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({}, {"kv_budget": 128}, "leaves nothing to choose: the first and the last blocks of 32 tokens take 128"),
        ({}, {"adapters": "default"}, "another model's: its hidden_size is 576, this one's 128"),
        ({}, {"budget": 512}, "an object with adapters, kv_budget"),
        ({"model_impl": "transformers"}, {"adapters": "own"}, "do not see the bottom layer's output: leave"),
        # The last: it loads a library that keeps vLLM from starting another engine in the process.
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            {"kv_budget": 512},
            "does not go with speculative decoding",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_start(engines, tiny, changes, settings, reason):
    from decoding.vllm import bottom

    if settings.get("adapters") == "own":
        settings = {"adapters": str(tiny / "adapters")}
    with pytest.raises(DecodingError, match=reason):
        engines(tiny / "model", **TINY, **changes, block_size=BLOCK, additional_config={"chunkllm": settings})
    assert not bottom._watching
