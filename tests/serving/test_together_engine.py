"""What goes together with each of the three methods, in vLLM itself on the CPU, V1: the table in docs/vllm.md.

A cell is a request with the method and vLLM's own parameter. It is written twice: once with the scores that the model
gave, once with what they became, which must be what both say, one after the other.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from decoding import StylePrior
from decoding.vllm import engine_args, fallbacks
from decoding.vllm.declaration import declared_styles
from decoding.vllm.styles import Chosen, load_styles
from tests.conftest import WORDS, make_tokenizer
from tests.serving.conftest import assert_same_distribution, make_tiny

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
pytestmark = pytest.mark.real

LENGTH, BUDGET, TOKENS = 400, 160, 8
PROMPT = " ".join(WORDS[(i * i) % len(WORDS)] for i in range(LENGTH))
METHODS = {
    "style": {"style": "a", "lambda": 0.5},
    "temperature": {"temperature": 0.5},
    "chunk selection": {"kv_budget": BUDGET},
    "all three": {"style": "a", "lambda": 0.5, "temperature": 0.5, "kv_budget": BUDGET},
}
FEATURES = {
    "none": {},
    "min_p": {"min_p": 0.2},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "logit_bias": {"logit_bias": {5: 2.0, 9: -1.5}},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": [6]},
    "allowed_token_ids": {"allowed_token_ids": list(range(4, 16))},
    "bad_words": {"bad_words": ["the", "ship"]},
    "top_k and top_p": {"top_k": 6, "top_p": 0.8},
    "n": {"n": 3},
}


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        for name in ("STYLES", "TEMPERATURE", "CHUNKS", "POLICY"):
            patch.delenv(f"DECODING_{name}", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    """Temperatures by a processor of ours, without the selector: phases have it there."""
    declared = engine_args({"a": folder / "a.safetensors"}, phases=("storm", "black"), kv_budget=BUDGET)
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "disable_log_stats": True}
    engine |= {"max_num_seqs": 64, "max_num_batched_tokens": 32768, "max_logprobs": -1, "num_gpu_blocks_override": 1024}
    yield vllm.LLM(str(folder / "model"), **engine, scheduling_policy="priority", **declared)
    assert not fallbacks.counts  # nothing failed on the way


@contextmanager
def logprobs_mode(llm, mode):
    """As ``--logprobs-mode`` sets it."""
    sampler = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.sampler
    parts = (sampler, sampler.topk_topp_sampler)
    before = [part.logprobs_mode for part in parts]
    for part in parts:
        part.logprobs_mode = mode
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.logprobs_mode = value


def params(arguments=None, **options):
    options = {"temperature": 1.0, "seed": 5, "max_tokens": TOKENS, "ignore_eos": True} | options
    return vllm.SamplingParams(**options, extra_args=arguments)


def written(llm, requests, mode="raw_logprobs", prompt=PROMPT, **options):
    """Of each request its texts: token ids, and the scores [tokens, V] that vLLM tells of each."""
    with logprobs_mode(llm, mode):
        outputs = llm.generate([prompt] * len(requests), requests, use_tqdm=False, **options)
    return [[(list(one.token_ids), scores_of(one)) for one in each.outputs] for each in outputs]


def scores_of(output):
    if not output.logprobs:
        return None
    width = max(max(step) for step in output.logprobs) + 1
    scores = torch.full((len(output.logprobs), width), -math.inf)
    for row, step in enumerate(output.logprobs):
        for token, told in step.items():
            scores[row, token] = told.logprob
    return scores


def is_same(scores, others):
    """But for rounding: requests with the same prompt share what the first of them computes."""
    return torch.allclose(scores, others, atol=1e-3)


def with_scores(arguments, options):
    return params(arguments, logprobs=-1, **options)


def changed(scores, tokens, prompt, arguments, options, prior):
    """What the model's scores of one step become, in vLLM's order."""
    scores = scores.clone()
    if allowed := options.get("allowed_token_ids"):
        scores[[i for i in range(len(scores)) if i not in allowed]] = -math.inf
    for word in options.get("bad_words", ()):
        scores[make_tokenizer().convert_tokens_to_ids(word)] = -math.inf
    if len(tokens) < options.get("min_tokens", 0):
        scores[[1, *options["stop_token_ids"]]] = -math.inf
    for token, bias in options.get("logit_bias", {}).items():
        scores[token] += bias
    if "style" in arguments:
        scores = prior(torch.tensor([[*prompt, *tokens]]), scores[None], options.get("stop_token_ids", ()))[0]
    if by := options.get("repetition_penalty"):
        scores = RepetitionPenaltyLogitsProcessor(by)(torch.tensor([[*prompt, *tokens]]), scores[None])[0]
    for token in set(tokens):
        scores[token] -= options.get("presence_penalty", 0)
        scores[token] -= options.get("frequency_penalty", 0) * tokens.count(token)
    if least := options.get("min_p"):  # on V1 before our temperature
        p = scores.softmax(-1)
        scores[p < least * p.max()] = -math.inf
    scores = scores / arguments.get("temperature", 1)
    if count := options.get("top_k"):
        scores[scores < scores.topk(count).values[-1]] = -math.inf
    if share := options.get("top_p"):
        ascending, order = scores.sort()
        scores[order[ascending.softmax(-1).cumsum(-1) <= 1 - share]] = -math.inf
    return scores.log_softmax(-1)


@pytest.fixture(scope="module")
def prior(folder, llm):
    """What the style makes of scores [1, V] by ``StylePrior``, on the level where vLLM's shim has it.

    A row is moved by one number more or less. Sampling does not see that; a penalty that scales scores does.
    """
    shim = load_styles(declared_styles(), make_tokenizer(), len(make_tokenizer()), "cpu", [1])

    def steered(history, scores, stops):
        wanted = StylePrior(folder / "a.safetensors", λ=0.5).bound(make_tokenizer(), stop_ids=list(stops))(
            history, scores
        )
        if stops:
            return wanted
        got = shim.add(scores.clone(), history[:, -shim.context :], shim.layers([[Chosen(0, 0.5)]]))
        assert_same_distribution(got, wanted)
        return got

    return steered


def test_each_method_with_each_parameter_gives_what_both_say(llm, prior):
    cells = [(name, arguments, options) for name, options in FEATURES.items() for arguments in METHODS.values()]
    requests = [with_scores(arguments, options) for _, arguments, options in cells]
    models, became = (written(llm, requests, mode) for mode in ("raw_logits", "processed_logprobs"))
    prompt = make_tokenizer()(PROMPT)["input_ids"]
    steps = 0
    for (name, arguments, options), raws, theirs in zip(cells, models, became, strict=True):
        cell = f"{name}, {arguments}"
        assert len(raws) == len(theirs) == options.get("n", 1), cell
        without, moved = {key: arguments[key] for key in arguments if key == "kv_budget"}, False
        for (tokens, raw), (same, got) in zip(raws, theirs, strict=True):
            assert tokens == same, cell
            for step, token in enumerate(tokens):
                told = raw[step], tokens[:step], prompt
                wanted = changed(*told, arguments, options, prior)
                torch.testing.assert_close(got[step], wanted, atol=2e-4, rtol=1e-4, msg=f"{cell}, step {step}")
                assert wanted[token] > -math.inf, cell
                moved |= not torch.allclose(wanted, changed(*told, without, options, prior), atol=1e-2)
                steps += 1
        assert moved == (arguments != without), f"{cell}: the method did nothing"
    assert steps >= len(cells) * TOKENS * 0.7


def test_chunk_selection_selects_in_these_requests(llm):
    """The model's own scores differ from those of a request that reads everything, from some step on."""
    options = {"temperature": 0}
    (selecting,), (full,) = written(
        llm, [with_scores({"kv_budget": value}, options) for value in (BUDGET, "full")], "raw_logits"
    )
    assert is_same(selecting[1][0], full[1][0])  # the prompt is read in full
    same = next((i for i, pair in enumerate(zip(selecting[0], full[0], strict=True)) if pair[0] != pair[1]), TOKENS - 1)
    assert not torch.allclose(selecting[1][1 : same + 1], full[1][1 : same + 1], atol=1e-3)


def test_logprobs_are_the_models_own_unless_the_server_says_otherwise(llm):
    """By default from before styles and temperatures, and under ``--logprobs-mode processed_logprobs`` from behind."""
    plain, *ours = (with_scores(arguments, {"max_tokens": 1}) for arguments in (None, *METHODS.values()))
    ((_, before),), *others = written(llm, [plain, *ours])
    for name, ((_, told),) in zip(METHODS, others, strict=True):
        assert is_same(told, before), name
    ((_, before),), *others = written(llm, [plain, *ours], "processed_logprobs")
    for name, ((_, told),) in zip(METHODS, others, strict=True):
        assert is_same(told, before) == (name == "chunk selection"), name  # it reads the whole prompt


def test_a_prompts_logprobs_are_the_models_own(llm):
    requests = [params(arguments, prompt_logprobs=1, max_tokens=1) for arguments in (None, *METHODS.values())]
    told = [each.prompt_logprobs for each in llm.generate([PROMPT] * len(requests), requests, use_tqdm=False)]
    values = [[next(iter(step.values())).logprob for step in each[1:]] for each in told]
    assert len(values[0]) == LENGTH - 1
    for name, each in zip(METHODS, values[1:], strict=True):
        torch.testing.assert_close(torch.tensor(each), torch.tensor(values[0]), msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_and_a_priority_do_what_they_do(llm, method):
    arguments = METHODS[method]
    requests = [params(arguments), params(arguments), params(arguments, seed=6), params(arguments)]
    first, again, other, late = (ids for ((ids, _),) in written(llm, requests, priority=[0, 0, 0, 9]))
    assert first == again == late and len(first) == TOKENS
    assert other != first or method == "temperature"


@pytest.mark.parametrize("method", METHODS)
def test_streams_and_stop_strings_give_the_same_text(llm, method):
    from vllm.sampling_params import RequestOutputKind

    engine, arguments = llm.llm_engine, METHODS[method]
    (whole,) = llm.generate([PROMPT], params(arguments), use_tqdm=False)
    engine.add_request("streamed", PROMPT, params(arguments, output_kind=RequestOutputKind.DELTA))
    parts = []
    while engine.has_unfinished_requests():
        parts += [each.outputs[0].text for each in engine.step()]
    text = whole.outputs[0].text
    assert "".join(parts) == text and len(list(filter(None, parts))) > 1
    word = text.split()[3]
    (stopped,) = llm.generate([PROMPT], params(arguments, stop=[word]), use_tqdm=False)
    assert stopped.outputs[0].finish_reason == "stop" and stopped.outputs[0].stop_reason == word
    assert stopped.outputs[0].text == text[: text.index(word)]


@pytest.mark.parametrize("method", METHODS)
def test_structured_output_stays_in_its_grammar(llm, method):
    from vllm.sampling_params import StructuredOutputsParams

    choices = ["captain", "storm", "sails"]
    asked = params(METHODS[method], structured_outputs=StructuredOutputsParams(choice=choices), ignore_eos=False)
    (got,) = llm.generate([PROMPT], asked, use_tqdm=False)
    assert got.outputs[0].text.strip() in choices
