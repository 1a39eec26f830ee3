import inspect
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from chunkllm import ChunkAdapters, ChunkSelection

VOCAB, PAD = 64, 0
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
_CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma3_text": Gemma3TextConfig,
}
_EXTRAS = {
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 4},
}


def tiny_model(kind="llama", seed=0, implementation="sdpa", **changes):
    """Weights wide enough that attention is not flat; no token ends the text."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.4,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = _CONFIGS[kind](**shape | _EXTRAS.get(kind, {}) | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    model.generation_config.pad_token_id = PAD
    return model


def prompts(lengths, seed=1):
    """Random ids [B, longest] padded on the left, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def cache_name(model):
    """`cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cache_of(output):
    """The cache of an output of a forward pass or of `generate`."""
    return output.cache if getattr(output, "cache", None) is not None else output.past_key_values


class Stops:
    """A tokenizer as far as boundaries need one: every fifth token of its vocabulary ends a sentence."""

    def __init__(self, size=VOCAB):
        self.size = size

    def __len__(self):
        return self.size

    def batch_decode(self, ids):
        return ["." if i % 5 == 0 else "x" for (i,) in ids]


def calibrated(model):
    """Adapters that score as the pooled scorer does, and know of a layer that needs most."""
    torch.manual_seed(0)
    adapters = ChunkAdapters.for_model(model)
    layers = len(adapters.config.shape.full_layers)
    adapters.config = replace(adapters.config, sensitivity=tuple(0.1 * (i + 1) ** 4 for i in range(layers)))
    return adapters


@pytest.fixture(scope="session")
def models():
    """Tiny models by kind and implementation; tests leave them as they are.

    A selection was attached to each before, so that what is compared then is not among what a test looks at.
    """
    made = {}

    def get(kind="llama", implementation="sdpa"):
        key = kind, implementation
        if key not in made:
            made[key] = tiny_model(kind, implementation=implementation)
            ChunkSelection().attach(made[key]).detach()
        return made[key]

    return get


@pytest.fixture
def llama(models):
    return models("llama")


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tensors here are so small that a second thread only waits, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
