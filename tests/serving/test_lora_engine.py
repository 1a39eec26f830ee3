"""A LoRA beside each of the three methods.

It has an engine of its own: with LoRAs, vLLM's CPU build fails on the log-probabilities of a prompt.
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


def test_it_changes_the_models_scores_and_a_method_what_they_become(tmp_path):
    """Requests with and without it go through one batch; each gets what it gets alone."""
    from vllm.lora.request import LoRARequest

    make_tiny(tmp_path)
    save_lora(tmp_path / "lora", tmp_path / "model")
    lora = LoRARequest("mine", 1, str(tmp_path / "lora"))
    prompt = make_tokenizer()(PROMPT)["input_ids"]
    with engine(tmp_path, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
        prior = style_on(tmp_path)
        asked = [with_scores(arguments, {}) for arguments in METHODS.values() for _ in range(2)]
        options = {"lora_request": [lora, None] * len(METHODS)}
        raw, became = (written(llm, asked, mode, **options) for mode in ("raw_logits", "processed_logprobs"))
    for i, (before, after) in enumerate(zip(raw, became, strict=True)):
        arguments = [*METHODS.values()][i // 2]
        (tokens, scores), (same, got) = before[0], after[0]
        assert tokens == same and len(tokens) == TOKENS
        for step in range(TOKENS):
            wanted = changed(scores[step], tokens[:step], prompt, arguments, {}, prior)
            torch.testing.assert_close(got[step], wanted, atol=2e-4, rtol=1e-4, msg=f"{arguments}, step {step}")
    for ((_, mine),), ((_, own),) in zip(raw[::2], raw[1::2], strict=True):
        assert not torch.allclose(mine[0], own[0], atol=1e-2)
