"""A LoRA beside each of the three methods.

It has an engine of its own: with LoRAs, vLLM's CPU build fails on the log-probabilities of a prompt. And it applies the
LoRA of one request to all rows of a batch, so that no others are among them here.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.conftest import make_tokenizer
from tests.serving.conftest import make_tiny
from tests.serving.together import METHODS, PROMPT, TOKENS, changed, engine, style_on, with_scores, written

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
pytestmark = pytest.mark.real
RANK = 4


def save_lora(where, model):
    """An adapter of a model's projections, by hand."""
    shape = AutoConfig.from_pretrained(model)
    head = shape.hidden_size // shape.num_attention_heads
    outputs = {"q_proj": shape.hidden_size, "v_proj": head * shape.num_key_value_heads}
    draw, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(shape.num_hidden_layers):
        for name, size in outputs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, shape.hidden_size, generator=draw)
            tensors[f"{place}.lora_B.weight"] = torch.randn(size, RANK, generator=draw)
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*outputs], "bias": "none"}
    (where / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    with engine(folder, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def lora(folder):
    from vllm.lora.request import LoRARequest

    save_lora(folder / "adapter", folder / "model")
    return LoRARequest("mine", 1, str(folder / "adapter"))


@pytest.fixture(scope="module")
def prior(folder, llm):
    return style_on(folder)


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_the_models_scores_and_a_method_what_they_become(llm, lora, prior, method):
    arguments, prompt = METHODS[method], make_tokenizer()(PROMPT)["input_ids"]
    asked = [with_scores(arguments, {})]
    (((_, plain),),) = written(llm, asked, "raw_logits")
    (((tokens, raw),),) = written(llm, asked, "raw_logits", lora_request=lora)
    (((same, got),),) = written(llm, asked, "processed_logprobs", lora_request=lora)
    assert tokens == same and len(tokens) == TOKENS
    assert not torch.allclose(raw[0], plain[0], atol=1e-2)
    for step in range(TOKENS):
        wanted = changed(raw[step], tokens[:step], prompt, arguments, {}, prior)
        torch.testing.assert_close(got[step], wanted, atol=2e-4, rtol=1e-4, msg=f"{method}, step {step}")
