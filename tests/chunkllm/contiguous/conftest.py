import numpy as np
import pytest
import torch

from chunkllm import ChunkCache, ChunkSelection
from tests.chunkllm.conftest import VOCAB, Stops, cache_name, cache_of, calibrated, prompts

SMALL = {"sinks": 2, "local": 6, "max_chunk": 8}  # 10 tokens that stay at least
EVERYTHING = ({"budget": 500}, {"retention": 1.0})
WAYS = {
    "greedy": ((23,), {}),
    "padded": ((23, 9, 16), {}),
    "beams": ((23, 9), {"num_beams": 3, "num_return_sequences": 2}),
    "sampling": ((23, 9), {"do_sample": True, "num_return_sequences": 2}),
}


def attach(model, **options):
    adapters = calibrated(model) if options.get("adaptive") else None
    return ChunkSelection(adapters, **SMALL | options).attach(model, Stops())


def generate(model, lengths=(23,), seed=0, ids=None, **options):
    held, mask = prompts(lengths) if ids is None else (ids, torch.ones_like(ids))
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return model.generate(held, attention_mask=mask, **settings | options)


def logits_of(output):
    return torch.stack(output.logits, 1)


@torch.no_grad()
def read(model, ids, mask, steps, cache=None):
    """Reads ids [B, T] at once, then steps [B, n] one by one: logits [B, n + 1, V] of the last token and the steps."""
    logits, name = [], cache_name(model)
    for new in (ids, *(steps.split(1, 1) if steps.shape[1] else ())):
        held = 0 if cache is None else cache.get_seq_length()
        grown = torch.cat((mask, mask.new_ones(len(mask), held + new.shape[1])), 1)[:, : held + new.shape[1]]
        output = model(input_ids=new, attention_mask=grown, use_cache=True, **{name: cache})
        cache = cache_of(output)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1), cache


def sinks_of(cache):
    """Tokens that are a chunk of their own at the beginning."""
    return getattr(cache.table, "sinks", 0)


def steps_for(lengths, count=20, seed=5):
    """Tokens to come; chunks of the rows end at different ones of them."""
    return torch.randint(3, VOCAB, (len(lengths), count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gathering(monkeypatch):
    """Selection always happens, and always selects everything, whichever row's turn it is."""
    monkeypatch.setattr(ChunkCache, "_slots", lambda self, held: held)
    monkeypatch.setattr(ChunkCache, "_is_long", lambda self, held: np.ones(len(held), bool))


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# With everything kept, the model computes what it computes without.


def bottom(model, ids, mask):
    """Output of the bottommost layer, without a cache."""
    mask = torch.cat((mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])), 1)
    return model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states[1]
