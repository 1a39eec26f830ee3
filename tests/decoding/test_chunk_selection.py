import pytest
import torch
from transformers import LogitsProcessor

from chunkllm import ChunkError
from decoding import AutoTemperature, ChunkSelection, StylePrior, generate
from tests.decoding.temperature.test_processors import FixedSelector

PROMPTS = ["the captain said that his ship " * 8, "the sea was black with rain " * 3]
SMALL = {"budget": 16, "sinks": 2, "local": 4, "max_chunk": 6}


def write(model, tokenizer, processors, **options):
    torch.manual_seed(0)
    return generate(
        model,
        PROMPTS,
        tokenizer=tokenizer,
        logits_processor=processors,
        max_new_tokens=24,
        eos_token_id=None,
        **options,
    )


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_all_three_methods_in_one_list(model, tokenizer, style_file):
    prior = StylePrior(λ=0.5, style=str(style_file))
    auto = AutoTemperature(FixedSelector({"the": 0.7}), tokenizer)
    without = write(model, tokenizer, [prior, auto])
    roomy = ChunkSelection(budget=256)
    assert write(model, tokenizer, [prior, auto, roomy]) == without
    assert write(model, tokenizer, [roomy, auto, prior]) == without
    assert write(model, tokenizer, [prior, auto, ChunkSelection(**SMALL)]) != without
    assert hooks(model) == 0 and model.config._attn_implementation == "sdpa"
    assert write(model, tokenizer, [prior, auto]) == without


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"num_return_sequences": 3}])
def test_lossless_beside_the_others(model, tokenizer, style_file, options):
    prior = StylePrior(λ=0.5, style=str(style_file))
    auto = AutoTemperature(FixedSelector({"the": 0.7}), tokenizer)
    wanted = write(model, tokenizer, [prior, auto], **options)
    assert write(model, tokenizer, [prior, ChunkSelection(verify=True, **SMALL), auto], **options) == wanted
    assert "generate" not in vars(model)


def test_detached_when_generation_fails(model, tokenizer):
    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write(model, tokenizer, [ChunkSelection(**SMALL), Failing()])
    assert hooks(model) == 0 and model.config._attn_implementation == "sdpa"


def test_two_selections_are_one_too_many(model, tokenizer):
    with pytest.raises(ChunkError, match="has a selection attached"):
        write(model, tokenizer, [ChunkSelection(**SMALL), ChunkSelection(**SMALL)])
    assert hooks(model) == 0
