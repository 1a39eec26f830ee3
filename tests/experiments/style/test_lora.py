import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from decoding.errors import DecodingError
from experiments.style.lora import LoraRecipe, open_lora, train_lora, with_lora
from tests.conftest import make_model

pytest.importorskip("peft")

EOS = 1
RECIPE = LoraRecipe(rate=2e-2, window=16, batch=4, steps=60)
BRIEF = LoraRecipe(window=16, batch=4, steps=4)
WEIGHTS = "adapter_model.safetensors"
DOCUMENTS = [np.tile(np.arange(3, 11), 8), np.tile(np.arange(3, 11), 4)]


@pytest.fixture
def model():
    return make_model(12)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "lora"


def state(model):
    parameters = [(name, parameter.requires_grad, id(parameter)) for name, parameter in model.named_parameters()]
    return parameters, list(map(str, model.modules())), model.training, hasattr(model, "peft_config")


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 11)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_learns_and_leaves_the_model_alone(model, folder, dtype):
    model = model.to(dtype)
    plain, weights, before = logits(model), [p.clone() for p in model.parameters()], state(model)
    drawn = torch.random.get_rng_state()
    record = train_lora(model, DOCUMENTS, folder, RECIPE, EOS)
    assert record["last_loss"] < record["first_loss"] / 2
    assert record["tokens"] == 60 * 4 * 16
    assert record["seconds"] > 0
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(map(torch.equal, model.parameters(), weights))
    assert torch.equal(logits(model), plain)
    with with_lora(model, folder) as styled:
        assert styled is model
        assert not torch.equal(logits(styled), plain)
        factors = [p for name, p in styled.named_parameters() if "lora_" in name]
        assert len(factors) == 2 * 7 * 2  # of two layers with seven linear maps each; not of the head
        assert {p.dtype for p in factors} == {torch.float32}
    assert state(model) == before
    assert torch.equal(logits(model), plain)


def test_it_predicts_the_style(model, folder):
    train_lora(model, DOCUMENTS, folder, RECIPE, EOS)
    with with_lora(model, folder):
        assert logits(model).argmax(-1)[0, 1:-1].tolist() == list(range(5, 11))


def test_a_model_in_training_is_plain_after_an_error(model, folder):
    train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
    model.train()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), with_lora(model, folder):
        assert not model.training
        raise KeyboardInterrupt
    assert state(model) == before


def test_a_finished_one_is_kept(model, folder):
    record = train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
    written = (folder / WEIGHTS).stat().st_mtime_ns
    assert train_lora(model, DOCUMENTS, folder, BRIEF, EOS) == record
    assert (folder / WEIGHTS).stat().st_mtime_ns == written


def test_the_same_training_gives_the_same_weights(model, folder, tmp_path):
    for place in (folder, tmp_path / "other"):
        train_lora(model, DOCUMENTS, place, BRIEF, EOS)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": replace(BRIEF, steps=5)},
        {"documents": DOCUMENTS[:1]},
        {"eos_id": 2},
        {"model": make_model(13)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_recipe_corpus_or_model_trains_again(model, folder, changed):
    arguments = {"model": model, "documents": DOCUMENTS, "folder": folder, "recipe": BRIEF, "eos_id": EOS}
    train_lora(**arguments)
    held = (folder / WEIGHTS).read_bytes()
    train_lora(**(arguments | changed))
    assert (folder / WEIGHTS).read_bytes() != held


def test_an_interrupted_one_is_not_opened_and_trains_again(model, folder, monkeypatch):
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.style.lora.clip_grad_norm_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
    assert state(model) == before
    with pytest.raises(DecodingError, match="no finished LoRA"):
        open_lora(model, folder)
    train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
    open_lora(model, folder)


def test_one_of_another_model_is_refused(model, folder):
    train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
    with pytest.raises(DecodingError, match="another model"):
        open_lora(make_model(13), folder)


@pytest.mark.parametrize("documents", [[], [np.arange(3, 11)], [np.arange(3, 10), np.arange(3, 11)]])
def test_a_short_corpus_is_refused(model, folder, documents):
    with pytest.raises(DecodingError, match=f"windows of 16 tokens, and the style has {sum(map(len, documents))}"):
        train_lora(model, documents, folder, BRIEF, EOS)


def test_without_peft_it_says_what_to_install(model, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DecodingError, match=r"decoding-middleware\[compare\]"):
        train_lora(model, DOCUMENTS, folder, BRIEF, EOS)
