from dataclasses import replace

import pytest
import torch

from chunkllm import ChunkAdapters, ChunkSelection
from chunkllm.contiguous.attention import intercept
from chunkllm.training.calibration import RETENTION, Choice, boundaries_of, layer_sensitivity
from chunkllm.training.lessons import ReadingOptions
from tests.chunkllm.conftest import VOCAB, Stops, cache_name, cache_of, tiny_model

OPTIONS = ReadingOptions(context=100, max_chunk=6, local=6, sinks=2)
LENGTH, LAST = 120, 40


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(4))


def adapters_for(model, queries=1):
    torch.manual_seed(0)
    adapters = ChunkAdapters.for_model(model, 4, queries=queries)
    torch.nn.init.normal_(adapters.key, std=0.2)
    torch.nn.init.normal_(adapters.boundary.out.weight, std=2.0)
    return adapters


def sensitivity(model, adapters, ids, last, options):
    found = (adapters.scorer(), lambda _, bottom: adapters.is_boundary(bottom))
    return layer_sensitivity(model, *found, ids.numpy(), last, options)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_layers_damage_is_that_of_decoding_with_what_is_chosen(models, ids, kind):
    """The mask that a layer gets all at once is what decode steps read, in all layers together."""
    model = models(kind)
    adapters = adapters_for(model)
    flags = ids[None] % 5 == 0
    begin = int(flags[0, LENGTH - LAST :].nonzero()[0]) + LENGTH - LAST  # a chunk ends with the prompt
    full = adapters.config.shape.full_layers
    choice = Choice(adapters.scorer(), boundaries_of(flags[0].numpy(), begin, OPTIONS, model.device), begin, OPTIONS)

    def attend(attention, module, query, key, value, mask, **others):
        if module.layer_idx in full and query.shape[2] > 1 and key.shape[2] == LENGTH:
            kept = choice.mask(module.layer_idx, query, key)[None, None]
            mask = torch.zeros(kept.shape).masked_fill_(~kept, -torch.inf)
        return attention(module, query, key, value, mask, **others)

    budget = round(RETENTION * LENGTH)
    name = cache_name(model)
    with torch.no_grad():
        before = cache_of(model(ids[None, :begin], use_cache=True))
        undo = intercept(model, attend)
        got = model(ids[None, begin:], use_cache=True, **{name: before}).logits[0]
        undo()
        chosen = ChunkSelection(scorer=adapters.scorer(), budget=budget, max_chunk=6, local=6, sinks=2)
        with chosen.attach(model, Stops()):
            output = model(ids[None, : begin + 1], use_cache=True)
            wanted = [output.logits[0, -1]]
            for place in range(begin + 1, LENGTH):
                output = model(ids[None, place : place + 1], use_cache=True, **{name: cache_of(output)})
                wanted.append(output.logits[0, -1])
    torch.testing.assert_close(got, torch.stack(wanted), atol=2e-4, rtol=1e-4)


def test_a_layer_that_says_nothing_is_not_missed(ids):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.o_proj.weight.zero_()
    got = sensitivity(model, adapters_for(model, 4), ids, LAST, OPTIONS)
    assert got[1] == pytest.approx(0, abs=1e-6)
    assert min(got[0], got[2]) > 1e-3
    with torch.no_grad():
        assert torch.equal(model(ids[None]).logits, model(ids[None]).logits)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if "layers.1.self_attn.o_proj" not in n)


def test_no_chunk_that_ends_is_no_damage(llama, ids):
    adapters = adapters_for(llama)
    adapters.config = replace(adapters.config, threshold=2.0)
    assert sensitivity(llama, adapters, ids, 4, replace(OPTIONS, max_chunk=30)) == [0, 0, 0]


def test_nothing_is_missed_where_the_window_holds_everything(llama, ids):
    options = replace(OPTIONS, context=3 * 200, local=150)
    assert sensitivity(llama, adapters_for(llama), ids, LAST, options) == pytest.approx([0, 0, 0], abs=1e-6)
