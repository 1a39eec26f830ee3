from pathlib import Path

import pytest
import torch

from decoding import (
    AutoTemperature,
    ChunkAdapters,
    ChunkSelection,
    FixedTemperature,
    PhaseTemperature,
    StylePrior,
    TemperatureSelector,
    generate,
)
from decoding.temperature.heads import AbilityHead

PROMPTS = ["storm and sea", "wind", "none of them"]
LONG = ["the captain said that his ship " * 8, "the sea was black with rain " * 3]
SMALL = {"budget": 16, "sinks": 2, "local": 4, "max_chunk": 6}


@pytest.fixture
def selector(encoder):
    return TemperatureSelector(encoder, AbilityHead.fit(encoder(PROMPTS), [1, 2, 4], 6), about={"top_p": 0.8})


@pytest.fixture
def selector_folder(selector, tmp_path):
    selector.save_pretrained(tmp_path / "my-selector")
    return tmp_path / "my-selector"


@pytest.fixture
def adapters_folder(thinker, tmp_path):
    torch.manual_seed(1)
    adapters = ChunkAdapters.for_model(thinker)
    torch.nn.init.normal_(adapters.key)
    adapters.save_pretrained(tmp_path / "my-adapters")
    return tmp_path / "my-adapters"


@pytest.fixture
def write(thinker, thinking):
    def texts(policy=None, processors=(), prompts=LONG, **options):
        torch.manual_seed(0)
        options = {"max_new_tokens": 24, "eos_token_id": None} | options
        if policy is not None:
            options["policy"] = policy
        return generate(thinker, prompts, tokenizer=thinking, logits_processor=processors, **options)

    return texts


@pytest.fixture
def scored(thinker, thinking):
    """The scores that tokens were sampled from, in a batch with left padding."""

    def scores(processors):
        torch.manual_seed(0)
        inputs = thinking(LONG, return_tensors="pt", padding=True, return_token_type_ids=False)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_scores": True}
        return torch.stack(thinker.generate(**inputs, logits_processor=processors, **options).scores)

    return scores


@pytest.fixture
def parts(style_file, selector_folder, adapters_folder):
    """By name, each part as a policy has it, and as its own class."""
    style, selector = str(style_file), str(selector_folder)
    adapters = ChunkAdapters.from_pretrained(adapters_folder)
    chosen = TemperatureSelector.from_pretrained(selector)
    return {
        "style": ({"style": style}, [StylePrior(style)]),
        "λ": ({"style": style, "λ": 0.7}, [StylePrior(style, λ=0.7)]),
        "lambda_": ({"style": Path(style), "lambda_": 0.7}, [StylePrior(style, λ=0.7)]),
        "guards": (
            {"style": style, "λ": 1, "max_js": 0.1, "plausibility": 0.1, "entropy_gate": 3, "steer_stop": True},
            [StylePrior(style, λ=1, max_js=0.1, plausibility=0.1, entropy_gate=3, steer_stop=True)],
        ),
        "temperature": ({"temperature": 0.7}, [FixedTemperature(0.7)]),
        "auto": ({"temperature": "auto", "selector": selector}, [AutoTemperature(chosen)]),
        "phases": ({"temperature": 0.4, "think_temperature": 1.5}, [PhaseTemperature(1.5, 0.4)]),
        "auto phases": (
            {"temperature": "auto", "think_temperature": 1.5, "selector": selector},
            [AutoTemperature(chosen, think=1.5)],
        ),
        "chunks": ({"chunks": SMALL}, [ChunkSelection(**SMALL)]),
        "budget": ({"chunks": 69}, [ChunkSelection(budget=69)]),
        "True": ({"chunks": True}, [ChunkSelection()]),
        "adapters": (
            {"chunks": SMALL | {"adapters": adapters_folder, "vote": None}},
            [ChunkSelection(adapters, **SMALL)],
        ),
        "all": (
            {
                "style": style,
                "λ": 0.7,
                "temperature": "auto",
                "think_temperature": 1.5,
                "selector": selector,
                "chunks": SMALL | {"adapters": str(adapters_folder)},
            },
            [StylePrior(style, λ=0.7), AutoTemperature(chosen, think=1.5), ChunkSelection(adapters, **SMALL)],
        ),
    }
