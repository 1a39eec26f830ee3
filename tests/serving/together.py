"""Each of the three methods beside what vLLM has of its own: what an engine gives, and what both say together.

A request is written twice: once with the scores that the model gave, once with what they became.
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
from tests.serving.conftest import assert_same_distribution

LENGTH, BUDGET, TOKENS = 400, 160, 8
PROMPT = " ".join(WORDS[(i * i) % len(WORDS)] for i in range(LENGTH))
METHODS = {
    "style": {"style": "a", "lambda": 0.5},
    "temperature": {"temperature": 0.5},
    "chunk selection": {"kv_budget": BUDGET},
    "all three": {"style": "a", "lambda": 0.5, "temperature": 0.5, "kv_budget": BUDGET},
}


@contextmanager
def engine(folder, **more):
    """vLLM in this process with all three methods. No step of it may fall back.

    Temperatures by a processor of ours, without the selector: phases have it there.
    """
    import vllm

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        for name in ("STYLES", "TEMPERATURE", "CHUNKS", "POLICY"):
            patch.delenv(f"DECODING_{name}", raising=False)
        declared = engine_args({"a": folder / "a.safetensors"}, phases=("storm", "black"), kv_budget=BUDGET)
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "disable_log_stats": True}
        options |= {"max_num_seqs": 64, "max_num_batched_tokens": 32768, "num_gpu_blocks_override": 1024}
        yield vllm.LLM(str(folder / "model"), max_logprobs=-1, **options, **more, **declared)
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
    from vllm import SamplingParams

    options = {"temperature": 1.0, "seed": 5, "max_tokens": TOKENS, "ignore_eos": True} | options
    return SamplingParams(**options, extra_args=arguments)


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


def style_on(folder):
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
