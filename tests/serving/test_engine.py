"""vLLM itself, on the CPU: the V1 runner.

The V2 runner needs a GPU. Its interface is called here by hand, and the stand-ins of `test_v2_slots` are held to its
classes.
"""

import dataclasses
import random
import warnings
from types import SimpleNamespace

import pytest
import torch

from decoding import StylePrior
from decoding.models import DEFAULT_MODEL, load_tokenizer, resolve_model
from decoding.style.files import load_prior
from decoding.style.training import name_and_file
from decoding.vllm import engine_args
from decoding.vllm.declaration import STYLE_PROCESSOR, TEMPERATURE_PROCESSOR
from experiments.lab.prompts import DEFAULT_PROMPTS, read_prompts
from tests.serving import test_v2_slots as stand_in

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
VLLMValidationError = pytest.importorskip("vllm.exceptions").VLLMValidationError
pytestmark = pytest.mark.real

NAMES = ("king-james", "presidents")
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 224, "disable_log_stats": True}
PROMPTS = read_prompts(DEFAULT_PROMPTS)
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def files():
    tokenizer = load_tokenizer()
    return dict(name_and_file(name, tokenizer, order=3, smoothing="kneser-ney") for name in NAMES)


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("DECODING_STYLES", "{}")
        patch.delenv("DECODING_TEMPERATURE", raising=False)
        yield


@pytest.fixture(scope="module")
def llm(files):
    """Four requests at a time, prefill in pieces of 64 tokens, and a cache of 288, so that some are preempted."""
    arguments = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 9, "block_size": 32}
    return vllm.LLM(resolve_model(DEFAULT_MODEL), **ENGINE, **arguments, **engine_args(files))


def params(**options):
    return vllm.SamplingParams(**{"temperature": 0, "max_tokens": 24} | options)


def style(name, value):
    return {"style": name, "lambda": value}


def texts(llm, prompts, sampling):
    return [[list(one.token_ids) for one in each.outputs] for each in llm.generate(prompts, sampling, use_tqdm=False)]


@pytest.mark.parametrize(
    ("value", "guards"), [(0, {}), (0.1, {}), (0.5, {}), (0.8, {"max_js": 0.02, "plausibility": 0.05})]
)
def test_greedy_texts_agree_with_transformers(llm, files, real_model, value, guards):
    model, tokenizer = real_model
    prompts = list(PROMPTS[:20])
    ours = texts(llm, prompts, params(extra_args=style("king-james", value) | guards))
    prior = StylePrior(load_prior(files["king-james"]), λ=value, tokenizer=tokenizer, **guards)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        **inputs,
        logits_processor=[prior],
        do_sample=False,
        max_new_tokens=24,
        pad_token_id=tokenizer.pad_token_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    theirs = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    for row, ((got,), wanted) in enumerate(zip(ours, theirs, strict=True)):
        wanted = wanted[: len(got)]  # then padding
        if got != wanted:
            step = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
            scores = output.scores[step][row]
            gap = float(scores[wanted[step]] - scores[got[step]])
            assert gap < NEAR_TIE, f"{prompts[row]!r}, step {step}: another token, whose logit is {gap} less"
            warnings.warn(f"near-tie: {prompts[row]!r}, λ={value}, step {step}, gap {gap:.1e}", stacklevel=1)


def churn(seed):
    """Requests of mixed lengths, styles and λ. Greedy: vLLM cannot seed a prefill in pieces on a CPU."""
    choose = random.Random(seed)
    kinds = [
        None,
        style("king-james", 0.1),
        style("presidents", 0.5),
        style(list(NAMES), [0.2, 0.1]),
        style(NAMES[0], 0),
        style(NAMES[0], 0.8) | {"max_js": 0.05},
    ]
    for i in range(40):
        prompt = " ".join(choose.choices(PROMPTS, k=choose.choice([1, 1, 3, 12])))
        yield (
            prompt,
            params(
                max_tokens=choose.randint(4, 40),
                extra_args=kinds[i % len(kinds)],
            ),
        )


def test_forty_requests_at_different_times_get_what_each_gets_alone(llm):
    engine, choose = llm.llm_engine, random.Random(1)
    requests = list(churn(0))
    waiting, together, step = list(enumerate(requests)), {}, 0
    preempted = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and step % 3 == 0:
            for _ in range(min(choose.randint(1, 4), len(waiting))):
                number, (prompt, sampling) = waiting.pop(0)
                engine.add_request(str(number), prompt, sampling)
        for output in engine.step():
            if output.finished:
                together[int(output.request_id)] = list(output.outputs[0].token_ids)
        scheduler = engine.engine_core.engine_core.scheduler
        preempted += sum(request.num_preemptions for request in scheduler.requests.values())
        step += 1
    assert preempted, "the cache was meant to be too small for some"
    for number, (prompt, sampling) in enumerate(requests):
        ((alone,),) = texts(llm, [prompt], sampling)
        assert together[number] == alone, f"request {number}, {sampling.extra_args}"


def test_several_texts_of_one_prompt_are_all_steered(llm):
    sampling = {"temperature": 1, "seed": 3, "n": 3}
    plain, steered = (
        texts(llm, [PROMPTS[0]], params(**sampling, extra_args=extra))[0] for extra in (None, style(NAMES[0], 0.8))
    )
    assert len(steered) == 3
    assert all(a != b for a, b in zip(plain, steered, strict=True))


def test_structured_output_stays_in_its_grammar(llm):
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(regex=r"(yes|no) [0-9]{4}")
    for value in (0, 1):
        got = llm.generate(
            [PROMPTS[0]], params(structured_outputs=grammar, extra_args=style(NAMES[0], value)), use_tqdm=False
        )
        words = got[0].outputs[0].text.split()
        assert words[0] in ("yes", "no") and words[1].isdigit() and len(words[1]) == 4


def test_bad_arguments_are_refused_and_the_engine_lives_on(llm):
    good = params(extra_args=style(NAMES[0], 0.5))
    before = texts(llm, [PROMPTS[0]], good)
    for extra, reason in (
        (style("nobody", 0.1), "unknown style"),
        (style(NAMES[0], 2), "λ must lie"),
        (style(list(NAMES), [0.1]), "same length"),
        ({"temperature": "auto"}, "own temperature must be 1, not 0"),
        ({"chunks": 2048}, "selects no chunks"),
    ):
        with pytest.raises(VLLMValidationError, match=reason):
            llm.generate([PROMPTS[0]], params(extra_args=extra), use_tqdm=False)
    assert texts(llm, [PROMPTS[0]], good) == before


def test_out_of_the_prefix_cache_come_the_same_texts(llm):
    prompt = " ".join(PROMPTS[:8])
    first, second = (
        llm.generate([prompt], params(extra_args=style(NAMES[0], 0.5)), use_tqdm=False)[0] for _ in range(2)
    )
    assert second.num_cached_tokens > 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_speculative_decoding_is_refused_at_start(files):
    """V1 gives draft tokens no history; vLLM refuses declared processors, and would skip installed ones in silence."""
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="speculative decoding"):
        vllm.LLM(resolve_model(DEFAULT_MODEL), **ENGINE, speculative_config=drafts, **engine_args(files))


def test_a_processor_that_is_not_declared_is_refused_at_start():
    from decoding.vllm.processor import StyleLogitsProcessor

    config = SimpleNamespace(model_config=SimpleNamespace(logits_processors=None))
    with pytest.raises(ValueError, match="--logits-processors"):
        StyleLogitsProcessor(config, torch.device("cpu"), False)


def test_both_loaders_take_the_classes():
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import (
        _load_v2_logitsprocs_by_fqcns,
        build_custom_logits_processors_params_validator,
    )

    both = [STYLE_PROCESSOR, TEMPERATURE_PROCESSOR]
    assert _load_logitsprocs_by_fqcns(both) == _load_v2_logitsprocs_by_fqcns(both)
    check = build_custom_logits_processors_params_validator(both)
    with pytest.raises(VLLMValidationError, match="unknown style"):
        check(params(extra_args=style("nobody", 0.1)))


def test_the_stand_ins_have_what_vllm_has():
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

    states = stand_in.request_states()
    states.total_len.gpu[:] = 1
    context = stand_in.context(states, [0], {0: []})
    for ours, theirs in ((states, LogitsProcRequestState), (context, LogitsContext)):
        assert set(vars(ours)) == {field.name for field in dataclasses.fields(theirs)}


def test_the_v2_interface_steers_through_the_processor(llm):
    from decoding.vllm.processor import StyleLogitsProcessor

    config = llm.llm_engine.vllm_config
    states = stand_in.request_states()
    states.total_len.gpu[:] = 1
    processor = StyleLogitsProcessor(config, states)
    assert processor.add_request(0, params(extra_args=style(NAMES[0], 0.5)))
    assert not processor.add_request(1, params())
    processor.apply_staged_writes()
    logits = torch.randn(2, config.model_config.get_vocab_size())
    got = processor.apply(logits.clone(), stand_in.context(states, [1, 0], {0: [], 1: []}))
    assert torch.equal(got[0], logits[0])
    assert not torch.equal(got[1], logits[1])
