"""Tensor parallelism in vLLM itself: two processes on the CPU, held to one. Beside it, an fp8 cache.

A model with random weights and a real tokenizer. Each engine writes everything once; the tests compare what they wrote.
"""

import gc
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chunkllm import AdapterConfig, ChunkAdapters
from chunkllm.adapters import AdapterScorer
from chunkllm.models import model_shape
from decoding import DecodingError
from decoding.models import load_tokenizer
from decoding.style.training import name_and_file
from decoding.vllm import engine_args

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
pytestmark = [pytest.mark.real, pytest.mark.usefixtures("in_this_process")]

BLOCK, BUDGET, RANKS = 32, 256, 2
ENGINE = {"dtype": "float32", "disable_log_stats": True, "enforce_eager": True, "max_model_len": 1024}
ENGINE |= {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "num_gpu_blocks_override": 160}
LENGTHS = (3, 300, 600, 900)
STYLE, AUTO = {"style": "king-james", "lambda": 0.3}, {"temperature": "auto"}
PHASES = {"think_temperature": 1.5, "answer_temperature": 0.4}
GLASS, GERMAN = "Why did the glass break when it fell?", "Translate into German: Good morning."
REQUESTS = [
    (GLASS, {}),
    (GLASS, {"extra_args": STYLE}),
    (GERMAN, {"extra_args": STYLE | {"max_js": 0.02, "plausibility": 0.05}}),
    (GLASS, {"temperature": 1, "seed": 1, "extra_args": STYLE}),
    (GLASS, {"temperature": 0.6, "seed": 2, "top_p": 0.9}),
    (GLASS, {"temperature": 1, "seed": 3, "extra_args": AUTO}),
    (GERMAN, {"temperature": 1, "seed": 4, "extra_args": AUTO | STYLE}),
    (GLASS, {"temperature": 1, "seed": 5, "extra_args": PHASES}),
]


class Written(NamedTuple):
    """What an engine wrote, and what each of its processes noted at a selection of a lone request."""

    full: list[list[int]]
    kept: list[list[int]]  # a budget larger than any text
    turned: list[list[int]]  # everything, by way of tables that begin with the best blocks
    selected: list[list[int]]
    steered: list[list[int]]
    keys: list[torch.Tensor]  # of each process: what the bottom layer's selection took in, [T, Hkv, D]
    scores: list[list[torch.Tensor]]  # of each process, by layer: of chunks, [C]
    blocks: list[list[list[int]]]  # of each process, by layer: which are read, in order
    tokens: list[list[int]]  # of each process, by layer: how many


# In the processes of an engine, by `collective_rpc`.
noted = SimpleNamespace(keys=[], scores=[], table=[], reading=None)
patch = pytest.MonkeyPatch()


def listen(worker):
    """Notes the bottom layer's keys of all steps, and scores and block tables of the last."""
    from decoding.vllm.chunks import LayerGroup

    reduce, begin, take_in = AdapterScorer.reduce, LayerGroup.begin, LayerGroup.take_in

    def noting_scores(self, *args):
        scores = reduce(self, *args)
        noted.scores += [of_layer[0].clone() for of_layer in scores]
        return scores

    def noting_tables(self, common):
        noted.scores.clear()
        noted.reading = begin(self, common)
        noted.table = common.block_table_tensor[0].tolist()
        return noted.reading

    def noting_keys(self, layer, keys, queries):
        if layer == 0:
            noted.keys.append(keys.clone())
        take_in(self, layer, keys, queries)

    noted.keys.clear()
    patch.setattr(LayerGroup, "take_in", noting_keys)
    patch.setattr(AdapterScorer, "reduce", noting_scores)
    patch.setattr(LayerGroup, "begin", noting_tables)


def notes(worker):
    """The keys of the first step; scores, numbers of the blocks that are read, and tokens of these, by layer."""
    lengths = noted.reading.lengths[:, 0].tolist()
    blocks = [
        [noted.table.index(block) for block in table[: -(-length // BLOCK)]]
        for table, length in zip(noted.reading.block_table[:, 0].tolist(), lengths, strict=True)
    ]
    return noted.keys[0], list(noted.scores), blocks, lengths


def keep_everything(worker):
    patch.setattr(
        "chunkllm.paged.selection.divide", lambda tokens, weights, most: most[:, None].repeat(1, len(weights))
    )


def undo(worker):
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers whose attention is not flat, and adapters in which every head differs."""
    made = tmp_path_factory.mktemp("parallel")
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    adapters = ChunkAdapters(AdapterConfig(model_shape(model), width=4, sensitivity=(4e-3, 1e-3)))
    with torch.no_grad():
        adapters.boundary.out.bias -= 0.3  # some tokens end a chunk
        adapters.key.normal_(std=0.1)
        adapters.gains.normal_(1, 0.3)
    adapters.save_pretrained(made / "adapters")
    return made


def params(budget=None, **options):
    extra = {} if budget is None else {"extra_args": {"kv_budget": budget}}
    return vllm.SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True} | extra | options)


def texts(llm, prompts, sampling):
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts, sampling, use_tqdm=False)]


def written(folder, **options):
    """Starts an engine, has it write everything, and ends it."""
    _, prior = name_and_file("king-james", load_tokenizer(), order=3, smoothing="kneser-ney")
    asked = engine_args(
        {"king-james": prior},
        temperature=True,
        model_size="small",
        phases=(",", "."),
        chunk_adapters=folder / "adapters",
        kv_budget=BUDGET,
    )
    llm = vllm.LLM(str(folder / "model"), **ENGINE, **asked, **options)
    choose = torch.Generator().manual_seed(1)
    prompts = [{"prompt_token_ids": torch.randint(1000, (n,), generator=choose).tolist()} for n in LENGTHS]
    try:
        full, kept, selected = (texts(llm, prompts, params(budget)) for budget in ("full", 4096, None))
        asked_for = [prompt for prompt, _ in REQUESTS]
        steered = texts(llm, asked_for, [params(**options) for _, options in REQUESTS])
        llm.collective_rpc(listen)
        texts(llm, prompts[-1:], params(max_tokens=2))
        keys, scores, blocks, tokens = zip(*llm.collective_rpc(notes), strict=True)
        llm.collective_rpc(keep_everything)
        turned = texts(llm, prompts, params())
        texts(llm, prompts[-1:], params(max_tokens=2))
        (in_turn, *_), _ = llm.collective_rpc(notes)[0][2:]
        assert in_turn != sorted(in_turn) == list(range(-(-(LENGTHS[-1] + 1) // BLOCK)))
    finally:
        llm.collective_rpc(undo)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return Written(full, kept, turned, selected, steered, list(keys), list(scores), list(blocks), list(tokens))


@pytest.fixture(scope="module")
def one(folder):
    return written(folder)


@pytest.fixture(scope="module")
def two(folder, one):
    return written(folder, tensor_parallel_size=RANKS)


@pytest.fixture(scope="module")
def of_fp8(folder, one):
    try:
        return written(folder, kv_cache_dtype="fp8")
    except NotImplementedError as error:  # of vLLM, on processors without AVX-512
        pytest.skip(str(error))


def test_two_processes_that_keep_everything_write_what_one_does(one, two):
    assert len(two.scores) == RANKS
    assert one.full == one.kept == one.turned == two.full == two.kept == two.turned
    assert one.selected[:1] == one.full[:1] and one.selected != one.full


def test_styles_and_temperatures_are_those_of_one_process(one, two):
    assert two.steered == one.steered
    assert len(set(map(tuple, one.steered))) > len(REQUESTS) - 2


def test_a_process_scores_by_its_own_heads(one, two):
    """Scores are means over heads, of which all processes have as many: their mean is what one process has."""
    (alone,) = one.scores
    assert len(alone) == 2
    for layer, wanted in enumerate(alone):
        by_rank = torch.stack([scores[layer] for scores in two.scores])
        torch.testing.assert_close(by_rank.mean(0), wanted, atol=1e-5, rtol=1e-4)
        assert (by_rank[0] - by_rank[1]).abs().max() > 1e-3


def test_each_process_reads_the_budget_in_blocks_of_its_own_choice(one, two):
    (of_one,), (tokens,) = one.blocks, one.tokens
    assert two.tokens == [tokens] * RANKS
    assert tokens[0] > tokens[1] and sum(tokens) <= 2 * BUDGET
    assert two.blocks[0] != two.blocks[1]
    for blocks in two.blocks:
        shares = [len(set(a) & set(b)) / len(b) for a, b in zip(blocks, of_one, strict=True)]
        assert min(shares) > 0.5


def test_an_fp8_cache_is_summarised_as_its_keys_were_before(one, of_fp8):
    (keys,), (wanted,) = of_fp8.keys, one.keys  # the bottom layer's, which follow from tokens alone
    assert torch.equal(keys, wanted)
    assert not torch.equal(keys, keys.to(torch.float8_e4m3fn).float())
    assert of_fp8.full == of_fp8.kept == of_fp8.turned
    assert of_fp8.full != one.full  # the cache really is another
    assert of_fp8.selected[:1] == of_fp8.full[:1] and of_fp8.selected != of_fp8.full


def engine_of(cache="auto", **parallel):
    """As much of vLLM's configuration as says which engine it is."""
    sizes = {"tensor": 2, "pipeline": 1, "decode_context": 1, "prefill_context": 1} | parallel
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            **{f"{kind}_parallel_size": size for kind, size in sizes.items()}, use_ubatching=False
        ),
        cache_config=SimpleNamespace(cache_dtype=cache),
        speculative_config=None,
        kv_transfer_config=None,
    )


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (
            engine_of(pipeline=2),
            r"pipeline parallelism \(boundaries are found .* first stage has\): leave out",
        ),
        (engine_of(decode_context=2), "context parallelism"),
        (engine_of("nvfp4"), r"a key-value cache of type nvfp4 \(its blocks hold more than keys and values\)"),
        (engine_of("fp8_per_token_head"), "a key-value cache of type fp8_per_token_head"),
    ],
)
def test_what_cannot_be_parallel_or_quantized_is_refused(engine, reason):
    from decoding.vllm.chunks import refuse_what_is_missing

    with pytest.raises(DecodingError, match=reason):
        refuse_what_is_missing(engine)


@pytest.mark.parametrize("cache", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_tensor_parallelism_and_plain_or_fp8_caches_are_not(cache):
    from decoding.vllm.chunks import refuse_what_is_missing

    refuse_what_is_missing(engine_of(cache))


@pytest.mark.parametrize(
    ("ranks", "rank", "heads", "query", "kv"),
    [
        (1, 0, (8, 2), slice(0, 8), slice(0, 2)),
        (2, 1, (4, 1), slice(4, 8), slice(1, 2)),
        (4, 1, (2, 1), slice(2, 4), slice(0, 1)),  # two processes have the first key-value head
        (4, 2, (2, 1), slice(4, 6), slice(1, 2)),
        (4, 6, (2, 1), slice(4, 6), slice(1, 2)),  # the third of a second group of processes
    ],
)
def test_the_heads_of_a_process(ranks, rank, heads, query, kv):
    from decoding.vllm.ranks import kv_heads, query_heads

    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, rank=rank),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 2),
    )
    impl = SimpleNamespace(num_heads=heads[0], num_kv_heads=heads[1])
    assert query_heads(engine, impl) == (8, query)
    assert kv_heads(engine, impl) == (2, kv)
