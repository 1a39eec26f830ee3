"""Styles and temperatures beside speculative decoding on vLLM's V2 model runner: vLLM's own scheduler, batches and
samplers, with drafts and without a model. V1 refuses that at start.
"""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from decoding import DecodingError
from tests.decoding.temperature.thinking import SMALL, markers
from tests.serving.conftest import WIDTH, assert_same_distribution, steered, wanted_temperature

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")

from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from decoding.vllm import fallbacks, processor
from decoding.vllm.declaration import STYLE_PROCESSOR, TEMPERATURE_PROCESSOR
from tests.serving.v2_runner import Serving, configured, put_plain_kernels

pytestmark = pytest.mark.real

DRAFTS, BLOCK, LENGTH = 3, 32, 256
PHASES = {"think_temperature": 2.0, "answer_temperature": 0.5}
ASKED = [  # arguments, and the styles and λ that they come to
    (None, []),
    ({"style": "plain", "lambda": 0.5}, [("plain", 0.5)]),
    ({"style": ["long", "short"], "lambda": [0.9, 0.4]}, [("long", 0.9), ("short", 0.4)]),
    ({"style": "guarded", "max_js": 0.05}, [("guarded", 0.8)]),
    (PHASES, []),
    ({"style": "one", **PHASES}, [("one", 0.5)]),
    ({"style": "mixed", "temperature": "auto"}, [("mixed", 0.6)]),
    ({"think_temperature": 3, "answer_temperature": "auto"}, []),
    ({"style": "ratio", "lambda": 0}, []),
]


@pytest.fixture
def config(tmp_path, monkeypatch, styles, choose):
    """An engine's configuration that drafts, with our processors, whose priors and selector are the tests'."""
    shape = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"max_position_embeddings": LENGTH, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(vocab_size=WIDTH, **shape).save_pretrained(tmp_path)
    put_plain_kernels(monkeypatch)
    for name in ("STYLES", "TEMPERATURE", "CHUNKS", "POLICY"):
        monkeypatch.delenv(f"DECODING_{name}", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setattr(fallbacks, "counts", Counter())
    monkeypatch.setattr(processor, "_styles_of", lambda *_: styles)
    monkeypatch.setattr(processor, "_temperatures_of", lambda *_: (choose, markers()))
    return configured(
        tmp_path,
        monkeypatch,
        max_model_len=LENGTH,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        block_size=BLOCK,
        logits_processors=[STYLE_PROCESSOR, TEMPERATURE_PROCESSOR],
        speculative_config={"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2},
    )


def test_a_model_with_a_sampler_of_its_own_is_refused(config):
    """One that writes by diffusion: vLLM asks no processor there."""
    config.diffusion_config = SimpleNamespace()
    for name in (processor.StyleLogitsProcessor, processor.TemperatureLogitsProcessor):
        with pytest.raises(DecodingError, match="sampled in a way of its own"):
            name(config, SimpleNamespace(device=torch.device("cpu")))


class Model:
    """Scores that follow from a token and its place. Small ids are likely: texts have many markers of thinking."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self._of_token, self._of_place = torch.randn(2, LENGTH, WIDTH, generator=draw)
        self._of_token[:, :SMALL] += 1.5

    def __call__(self, ids, places):
        """Scores [rows, V] behind tokens."""
        return self._of_token[ids.long().clamp(min=0)] + self._of_place[places]

    def of_batch(self, batch):
        """Those of a batch's rows."""
        return self(batch.input_ids[batch.logits_indices], batch.positions[batch.logits_indices])

    def alone(self, priors, asked, prompt, ids):
        """What the scores behind a text become for one request by itself, float32 [V]."""
        arguments, chosen = asked
        guards = {name: value for name, value in (arguments or {}).items() if name == "max_js"}
        row = steered(priors, chosen, ids, self(torch.tensor(ids[-1:]), torch.tensor([len(ids) - 1]))[0], guards)
        return row / wanted_temperature(arguments, prompt, ids)


class Checked:
    """Holds the scores of each row that is sampled to those of its request alone, with the drafts before that row."""

    def __init__(self, served, of_row):
        self._served, self._of_row = served, of_row
        self.rows, self._real = Counter(), served.runner.sampler.apply_sampling_params
        served.runner.sampler.apply_sampling_params = self.apply

    def apply(self, logits, slots, idx_mapping, places, pos, input_ids, local, *rest, **options):
        """vLLM's, checked."""
        got = self._real(logits, slots, idx_mapping, places, pos, input_ids, local, *rest, **options)
        states = self._served.runner.req_states
        for row, (slot, end, back) in enumerate(zip(slots.tolist(), (pos + 1).tolist(), local.tolist(), strict=True)):
            name = states.index_to_req_id[slot]
            text = list(self._served.requests[name].all_token_ids)
            drafts = input_ids[row - back + 1 : row + 1].tolist()
            assert drafts == states.draft_tokens[slot, :back].tolist() or set(drafts) == {-1}
            if end - back == len(text) and -1 not in drafts:  # else it reads a prompt, or stands behind no token
                assert_same_distribution(got[row], self._of_row(name, text + drafts))
                self.rows[back] += 1
        return got


@pytest.mark.parametrize(("seed", "at_once"), [(0, None), (1, 5), (2, 1)])
def test_each_row_is_what_its_request_gets_alone_and_so_is_each_text(config, monkeypatch, priors, seed, at_once):
    """Drafts that are right, wrong or none; prompts in pieces; preempted; verified in one or several parts."""
    if at_once is not None:
        monkeypatch.setattr(rejection_sampler, "MAX_CHUNK_BYTES", at_once * WIDTH * 4)
    choose, model, served = random.Random(seed), Model(seed), Serving(config, 9)
    asked, accepted = {}, Counter()

    def alone(name, ids):
        return model.alone(priors, asked[name], prompts[name], ids)

    def drafts(request):
        ids, found = list(request.all_token_ids), []
        for _ in range(choose.choice([0, 1, 2, DRAFTS, DRAFTS])):
            best = int(alone(request.request_id, ids + found).argmax()) if -1 not in found else 0
            found.append(best if choose.random() < 0.7 else choose.choice([-1, choose.randrange(SMALL)]))
        return found

    prompts, check = {}, Checked(served, alone)
    for number in range(2 * len(ASKED)):
        name, prompt = f"r{number:02}", choose.choices(range(1, WIDTH - 3), k=choose.choice([1, 9, 30, 50]))
        asked[name], prompts[name] = ASKED[number % len(ASKED)], prompt
        served.add(name, prompt, max_tokens=choose.randint(16, 40), extra_args=asked[name][0])
    while served.scheduler.has_unfinished_requests():
        before = {name: request.num_output_tokens for name, request in served.requests.items()}
        served.step_with_drafts(model.of_batch, drafts)
        accepted.update(request.num_output_tokens - before[name] for name, request in served.requests.items())
    for name, request in served.requests.items():
        ids = list(prompts[name])
        for token in request.output_token_ids:
            assert token == int(alone(name, ids).argmax())
            ids.append(token)
    assert min(accepted[count] for count in range(1, DRAFTS + 2)) > 5, accepted
    assert min(check.rows[place] for place in range(DRAFTS + 1)) > 20, check.rows
    assert sum(request.num_preemptions for request in served.requests.values())
    assert not fallbacks.counts
