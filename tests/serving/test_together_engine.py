"""What goes together with each of the three methods, in vLLM itself on the CPU, V1: the table in docs/vllm.md.

A cell is a request with the method and vLLM's own parameter.
"""

import math

import pytest
import torch

from tests.conftest import make_tokenizer
from tests.serving.conftest import make_tiny
from tests.serving.together import (
    BUDGET,
    LENGTH,
    METHODS,
    PROMPT,
    TOKENS,
    changed,
    engine,
    is_same,
    params,
    style_on,
    with_scores,
    written,
)

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
pytestmark = pytest.mark.real

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder, scheduling_policy="priority") as llm:
        yield llm


@pytest.fixture(scope="module")
def prior(folder, llm):
    return style_on(folder)


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
