"""Chosen temperatures in vLLM itself, on the CPU: the V1 runner, and V2's interface by hand.

Run it by itself: vLLM 0.32 cannot start a second engine in a process. The texts of a request are those of
the same request with the chosen temperature as its own, token for token.
"""

from contextlib import contextmanager

import pytest
import torch

from decoding import TemperatureSelector
from decoding.models import DEFAULT_MODEL, load_tokenizer, resolve_model
from decoding.style.training import name_and_file
from decoding.temperature.encoder import Encoder
from decoding.temperature.prompts import PromptFrame
from decoding.vllm import engine_args
from decoding.vllm.temperatures import model_size_of
from tests.decoding.temperature.thinking import is_thinking
from tests.serving import test_v2_slots as stand_in

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
VLLMValidationError = pytest.importorskip("vllm.exceptions").VLLMValidationError
pytestmark = pytest.mark.real

# No prefill in pieces, which vLLM cannot seed on a CPU.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 224, "disable_log_stats": True}
ENGINE |= {"max_num_seqs": 8, "num_gpu_blocks_override": 64, "block_size": 32}
AUTO = {"temperature": "auto"}
MARKERS = ",", "."  # that this model writes often
PHASES = {"think_temperature": 1.2, "answer_temperature": 0.4}
STYLE = {"style": "king-james", "lambda": 0.3}
GLASS, GERMAN, SUM = "Why did the glass break when it fell?", "Translate into German: Good morning.", "What is 2 + 2?"


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
            patch.setenv(name, value)
        for name in ("DECODING_STYLES", "DECODING_TEMPERATURE"):
            patch.setenv(name, "{}")
        yield


@pytest.fixture(scope="module")
def llm(selector_folder):
    _, prior = name_and_file("king-james", load_tokenizer(), order=3, smoothing="kneser-ney")
    selector = {"temperature": selector_folder, "model_size": "medium"}
    declared = engine_args({"king-james": prior}, **selector, phases=MARKERS)
    return vllm.LLM(resolve_model(DEFAULT_MODEL), **ENGINE, **declared)


@pytest.fixture(scope="module")
def selector(selector_folder):
    return TemperatureSelector.from_pretrained(selector_folder)


@pytest.fixture
def batches(monkeypatch):
    """The prompts that are read, by batch."""
    read, encoded = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, texts: read.append(texts) or encoded(self, texts))
    return read


def params(**options):
    return vllm.SamplingParams(**{"temperature": 1, "max_tokens": 16, "ignore_eos": True, "seed": 7} | options)


def texts(llm, prompts, sampling):
    return [[list(one.token_ids) for one in each.outputs] for each in llm.generate(prompts, sampling, use_tqdm=False)]


def asked(prompt):
    """A user's message in the model's chat template."""
    turns = [{"role": "user", "content": prompt}]
    return load_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def processor_of(llm):
    """The engine's processors, and which of them is ours."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    processors = runner.input_batch.logitsprocs.argmax_invariant
    (ours,) = (each for each in processors if type(each).__name__ == "TemperatureLogitsProcessor")
    return processors, ours


@contextmanager
def taken_out(llm):
    """The engine without the processor."""
    processors, ours = processor_of(llm)
    place = processors.index(ours)
    del processors[place]
    try:
        yield
    finally:
        processors.insert(place, ours)


def test_one_batch_has_chosen_temperatures_fixed_ones_greedy_texts_and_styles(llm, selector):
    chosen = selector.select([GLASS, GERMAN, SUM], "medium")
    assert len(set(chosen)) == 2
    requests = [
        (GLASS, {"extra_args": AUTO}, {"temperature": chosen[0]}),
        (GLASS, {"temperature": 0.6}, {}),
        (asked(GERMAN), {"extra_args": AUTO}, {"temperature": chosen[1]}),
        (GLASS, {"temperature": 0}, {}),
        (SUM, {"extra_args": AUTO | STYLE}, {"temperature": chosen[2]}),
        (GLASS, {"extra_args": STYLE}, {}),
        (asked(GLASS), {"extra_args": AUTO, "top_p": 0.9, "presence_penalty": 0.5}, {"temperature": chosen[0]}),
        (GLASS, {}, {}),
    ]
    prompts = [prompt for prompt, _, _ in requests]
    sampling = [params(seed=i, **options) for i, (_, options, _) in enumerate(requests)]
    got = texts(llm, prompts, sampling)

    def own(options, change):
        extra = {key: value for key, value in options.get("extra_args", {}).items() if key != "temperature"}
        return options | change | {"extra_args": extra}

    fixed = [params(seed=i, **own(options, change)) for i, (_, options, change) in enumerate(requests)]
    assert got == texts(llm, prompts, fixed)

    with taken_out(llm):
        without = texts(llm, prompts, sampling)
    same = [a == b for a, b in zip(got, without, strict=True)]
    assert all(is_same for is_same, (_, _, change) in zip(same, requests, strict=True) if not change)
    assert not any(same[row] for row in (0, 2))  # two that can only agree by chance, and at these seeds do not


def test_prompts_are_read_once_for_all_their_texts(llm, selector, batches):
    prompts = ["Write a story about a lighthouse.", asked("Write a song about a lighthouse.")]
    got = texts(llm, prompts, params(extra_args=AUTO, n=3))
    assert batches == [["Write a story about a lighthouse.", "Write a song about a lighthouse."]]
    assert got == texts(llm, prompts, params(extra_args=AUTO, n=3))
    assert len(batches) == 1
    chosen = selector.select(batches[0], "medium")
    assert got == texts(llm, prompts, [params(temperature=value, n=3) for value in chosen])


def test_requests_that_come_and_go_get_what_each_gets_alone(llm, batches):
    prompts = [f"Tell me {count} things about the number {count}." for count in range(24)]
    sampling = [
        params(seed=i, max_tokens=4 + i % 5, **({"extra_args": AUTO} if i % 3 else {"temperature": i % 2 / 2}))
        for i in range(len(prompts))
    ]
    together = texts(llm, prompts, sampling)
    assert sum(map(len, batches)) == 16
    assert together == [texts(llm, [prompt], each)[0] for prompt, each in zip(prompts, sampling, strict=True)]
    assert sum(map(len, batches)) == 16


TOP_P = 0.6


@pytest.fixture
def cut(llm, monkeypatch):
    """The selector's scores were sampled with a top-p."""
    _, ours = processor_of(llm)
    monkeypatch.setattr(ours._rows._choose, "top_p", TOP_P)


def test_a_chosen_temperature_brings_its_top_p(llm, selector, cut):
    glass, german = selector.select([GLASS, GERMAN], "medium")
    auto, both = {"extra_args": AUTO}, {"extra_args": AUTO | {"temperature_top_p": False}}
    phases = {"think_temperature": 1.2, "answer_temperature": "auto"}
    requests = [
        (GLASS, auto, {"temperature": glass, "top_p": TOP_P}),
        (GERMAN, auto, {"temperature": german, "top_p": TOP_P}),
        (GLASS, both, {"temperature": glass}),
        (GLASS, auto | {"top_p": 0.95}, {"temperature": glass, "top_p": 0.95}),
        (GLASS, auto | {"top_k": 40}, {"temperature": glass, "top_k": 40}),
        (GLASS, auto | {"top_k": -1, "presence_penalty": 0.5}, {"temperature": glass, "top_p": TOP_P}),
        (GLASS, {"temperature": 0.6}, {}),
        (GLASS, {"temperature": 0}, {}),
        (GLASS, {"extra_args": phases}, {"temperature": glass, "top_p": TOP_P}),
    ]
    prompts = [prompt for prompt, _, _ in requests]
    for seed in range(3):
        got = texts(llm, prompts, [params(seed=seed, **options) for _, options, _ in requests])
        own = [params(seed=seed, **(options | own | {"extra_args": {}})) for _, options, own in requests]
        wanted = texts(llm, prompts, own)
        assert got[:-1] == wanted[:-1]
    assert texts(llm, prompts[:1], own[0]) == got[:1]
    assert len({str(got[row]) for row in (0, 2, 3)}) == 3  # top-p matters at this seed


def test_an_object_that_the_caller_gave_stays_as_it_is(llm, cut):
    sampling = params(extra_args=AUTO)
    before = repr(sampling)
    texts(llm, [GLASS, GERMAN], sampling)
    assert repr(sampling) == before


@pytest.fixture
def phase_of():
    """Whether a text is within thinking, by its tokens' letters."""
    spelt = {id_: token.lstrip("\u0120") for token, id_ in load_tokenizer().get_vocab().items()}
    begin, end = ([[[id_ for id_, text in spelt.items() if text == marker]]] for marker in MARKERS)
    return lambda ids: is_thinking(ids, begin, end)


@contextmanager
def watched(llm):
    """Keeps the request of every row of every step, its text so far, and its logits before and after."""
    _, ours = processor_of(llm)
    kept, apply = [], ours.apply

    def watching(logits, ctx=None):
        rows = {row: (it, [*it.prompt, *it.output]) for row, it in ours._rows._rows.items()}
        before = logits.clone()
        after = apply(logits, ctx)
        kept.extend((it, text, before[row], after[row].clone()) for row, (it, text) in rows.items())
        return after

    ours.apply = watching
    try:
        yield kept
    finally:
        del ours.apply


def test_each_token_of_each_request_has_its_phases_temperature(llm, selector, phase_of):
    plain = [f"Tell me {count} things about the number {count}." for count in range(10)]
    prompts = [f"{asked(prompt)}Well{mark}" for prompt in plain for mark in ("", *MARKERS)]
    kinds = [PHASES, {"think_temperature": 0.7}, {"think_temperature": 1.2, "answer_temperature": "auto"}, AUTO, {}]
    sampling = [params(seed=i, max_tokens=12 + i % 20, extra_args=kinds[i % 5]) for i in range(len(prompts))]
    with watched(llm) as kept:
        got = texts(llm, prompts, sampling)
    tokenizer, frame = load_tokenizer(), PromptFrame(load_tokenizer())
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    wholes = {tuple(prompt): prompt + outputs[0] for prompt, outputs in zip(ids, got, strict=True)}
    chosen = selector.temperatures([frame.text_of(each) for each in ids], "medium").tolist()
    chosen = {tuple(prompt): value for prompt, value in zip(ids, chosen, strict=True)}
    assert len(kept) == sum(len(outputs[0]) for i, outputs in enumerate(got) if kinds[i % 5])
    seen = set()
    for it, text, before, after in kept:
        prompt = tuple(it.prompt)
        assert wholes[prompt][: len(text)] == text
        is_thought = it.wanted.think is not None and phase_of(text)
        answer = chosen[prompt] if it.wanted.answer is None else it.wanted.answer
        temperature = it.wanted.think if is_thought else answer
        assert torch.equal(after, before / torch.tensor(temperature))
        seen.add((is_thought, temperature))
    assert {(True, 1.2), (False, 0.4), (True, 0.7), (False, 1.0)} < seen


def test_a_phase_is_as_its_own_temperature_while_it_lasts(llm, phase_of):
    tokenizer = load_tokenizer()
    prompts = [prompt for prompt in (f"{asked(GLASS)}Well,", f"{asked(GLASS)}Well.", asked(SUM)) for _ in range(3)]
    starts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    options = [{"seed": seed, "max_tokens": 32} for seed in range(len(prompts))]
    got = texts(llm, prompts, [params(extra_args=PHASES, **each) for each in options])
    name = {True: "think_temperature", False: "answer_temperature"}
    temperatures = [PHASES[name[phase_of(start)]] for start in starts]
    both = zip(options, temperatures, strict=True)
    own = texts(llm, prompts, [params(temperature=value, **each) for each, value in both])
    ends = set()
    for start, (mine,), (theirs,) in zip(starts, got, own, strict=True):
        phases = [phase_of(start + mine[:stop]) for stop in range(len(mine))]
        lasts = next((i for i, phase in enumerate(phases) if phase != phases[0]), len(phases))
        assert mine[:lasts] == theirs[:lasts]
        ends.add((phases[0], lasts < len(phases), mine == theirs))
    assert {(True, True, False), (False, True, False)} <= ends


def test_prompts_without_text_do_not_stop_the_engine(llm, batches):
    nothing = {"prompt_token_ids": [load_tokenizer().eos_token_id]}
    got = texts(llm, [nothing], params(extra_args=AUTO))
    assert not batches
    assert got == texts(llm, [nothing], params(temperature=0.1))


def test_bad_arguments_are_refused_and_the_engine_lives_on(llm):
    good = params(extra_args=AUTO)
    before = texts(llm, [GLASS], good)
    for options, reason in (
        ({"extra_args": {"temperature": -1}}, "temperature must be a positive number, not -1"),
        ({"extra_args": AUTO, "temperature": 0}, "must be 1, not 0 "),
        ({"extra_args": AUTO, "temperature": 0.5}, "must be 1, not 0.5 "),
        ({"extra_args": AUTO | {"style": "nobody"}}, "unknown style"),
        ({"extra_args": PHASES, "temperature": 0.7}, "think_temperature and answer_temperature .* must be 1, not 0.7 "),
        ({"extra_args": PHASES | AUTO}, "are the same beside think_temperature"),
        ({"extra_args": {"think_temperature": "auto"}}, "must be a number"),
        ({"extra_args": {"answer_temperature": True}}, "positive number"),
        ({"extra_args": AUTO | {"temperature_top_p": 0.9}}, "must be true or false, not 0.9"),
        ({"extra_args": {"temperature_top_p": True}}, 'goes with a temperature that is "auto"'),
    ):
        with pytest.raises(VLLMValidationError, match=reason):
            llm.generate([GLASS], params(**options), use_tqdm=False)
    assert texts(llm, [GLASS], good) == before


def test_the_models_size_is_known(llm):
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    before = config.to_dict()
    assert model_size_of(config) == "small"
    assert config.to_dict() == before


def test_without_a_declared_selector_the_processor_is_refused_at_start(llm, monkeypatch):
    from decoding.vllm.processor import TemperatureLogitsProcessor

    monkeypatch.delenv("DECODING_TEMPERATURE")
    with pytest.raises(ValueError, match="DECODING_TEMPERATURE is not set"):
        TemperatureLogitsProcessor(llm.llm_engine.vllm_config, torch.device("cpu"), False)


def test_without_known_markers_phases_are_refused_at_start(llm, monkeypatch):
    from decoding.vllm.processor import TemperatureLogitsProcessor

    monkeypatch.setenv("DECODING_TEMPERATURE", '{"selector": false, "phases": true}')
    with pytest.raises(ValueError, match="neither the chat template nor the vocabulary"):
        TemperatureLogitsProcessor(llm.llm_engine.vllm_config, torch.device("cpu"), False)


def test_the_v2_interface_scales_through_the_processor(llm, selector):
    from decoding.vllm.processor import TemperatureLogitsProcessor

    config = llm.llm_engine.vllm_config
    states = stand_in.request_states()
    processor = TemperatureLogitsProcessor(config, states)
    prompt = load_tokenizer()(asked(GERMAN))["input_ids"]
    stand_in.take_slot(states, 0, prompt)
    assert processor.add_request(0, params(extra_args=AUTO))
    stand_in.take_slot(states, 1, prompt)
    assert not processor.add_request(1, params())
    stand_in.take_slot(states, 2, [*prompt, *load_tokenizer()(MARKERS[0])["input_ids"]])
    assert processor.add_request(2, params(extra_args=PHASES))
    processor.apply_staged_writes()
    logits = torch.randn(3, config.model_config.get_vocab_size())
    got = processor.apply(logits.clone(), stand_in.context(states, [1, 0, 2], {0: [], 1: [], 2: []}))
    assert torch.equal(got[0], logits[0])
    assert torch.equal(got[1], logits[1] / selector.temperatures([GERMAN], "medium"))
    assert torch.equal(got[2], logits[2] / PHASES["think_temperature"])
