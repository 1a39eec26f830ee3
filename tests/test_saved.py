"""Folders and files that version 0.1.0 saved (`saved_by_0_1_0`) open, and its runs go on without a cell measured again.

They were written by its commands and classes with the model and the texts that lie beside them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from chunkllm import ChunkAdapters
from decoding import NGramModel, StylePrior, TemperatureSelector
from decoding.cli import cli
from experiments.temperature.collect import prompts_in, read_collection

SAVED = Path(__file__).with_name("saved_by_0_1_0")
EXPECTED = json.loads((SAVED / "expected.json").read_bytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy to work in."""
    copied = shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(copied)
    return copied


@pytest.fixture
def run(folder):
    def invoke(arguments):
        result = CliRunner().invoke(cli, arguments.split())
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return invoke


@pytest.fixture(scope="module")
def its_tokenizer():
    return AutoTokenizer.from_pretrained(SAVED / "model")


@pytest.mark.parametrize("name", ["style-ratio", "style-paper"])
def test_folders_of_style_priors_steer_as_they_did(name, its_tokenizer):
    prior = StylePrior.from_pretrained(SAVED / name, tokenizer=its_tokenizer)
    torch.manual_seed(0)
    scores = torch.randn(1, len(its_tokenizer))
    ids = torch.tensor([its_tokenizer("the captain said that")["input_ids"]])
    torch.testing.assert_close((prior(ids, scores) - scores)[0], torch.tensor(EXPECTED[name]), atol=1e-4, rtol=0)


def test_n_gram_models(its_tokenizer):
    tokens = its_tokenizer((SAVED / "style.txt").read_text())["input_ids"]
    model = NGramModel.load(SAVED / "prior.safetensors")
    assert model.perplexity(tokens) == pytest.approx(EXPECTED["prior.safetensors"], abs=1e-4)
    from_text = NGramModel.from_arpa(SAVED / "prior.arpa.gz", vocab_size=len(its_tokenizer), eos_id=1)
    assert from_text.perplexity(tokens) == pytest.approx(EXPECTED["prior.safetensors"], rel=1e-4)


def test_a_selector_with_an_encoder_of_its_own():
    selector = TemperatureSelector.from_pretrained(SAVED / "selector")
    prompts = ["because rain which cause", "write poem storm", "example : answer :", "answer which"]
    prompts += ["translate into german", "summarize article"]
    assert selector.select(prompts) == EXPECTED["selector"]
    assert selector.about == {"made": "for a test"}


def test_adapters():
    assert ChunkAdapters.from_pretrained(SAVED / "adapters").config.sensitivity == (0.01, 0.02)
    assert ChunkAdapters.from_pretrained(SAVED / "training").config.width == 2


def measured_again(*_):
    pytest.fail("a cell was measured again")


def test_a_sweep_goes_on(run, folder, monkeypatch):
    monkeypatch.setattr("experiments.style.sweep.Sweep._measured", measured_again)
    fixed = "sweep --model model --style style.txt --max-new-tokens 4 --prompts prompts.txt --out sweep --resume"
    run(f"{fixed} --lambda 0,0.5")
    assert len(json.loads((folder / "sweep" / "results.json").read_text())["rows"]) == 2


def test_an_evaluation_of_chunk_selection_goes_on(run, folder, monkeypatch):
    monkeypatch.setattr("experiments.long_context.evaluate.Evaluation._measured", measured_again)
    where = "--model model --adapters adapters --out judged --resume"
    shape = "--context 200 --scored 8 --pieces 1 --passkey-lengths 120 --passkey-depths 1 --passkey-keys 1"
    run(f"chunk eval held_out.txt {where} {shape} --retention 0.5 --method pooled --method adapter")
    assert len(json.loads((folder / "judged" / "results.json").read_text())["text"]) == 3


def test_a_collection_is_read(folder):
    collected = read_collection(folder / "collection")
    assert collected.tasks["mine"].positions == list(range(6))
    assert [prompt["position"] for prompt in prompts_in(folder / "collection", "mine")] == list(range(6))


def test_a_training_of_adapters_goes_on(run, folder, monkeypatch):
    monkeypatch.setattr("chunkllm.training.loop.Training._learn", measured_again)
    before = (folder / "training" / "model.safetensors").read_bytes()
    sizes = "--tokens 256 --context 256 --held-out-pieces 1 --epochs 1 --width 2 --boundaries 2 --calibration 1"
    run(f"chunk train learnt.txt --held-out judge.txt --model model {sizes} --out training --resume")
    assert (folder / "training" / "model.safetensors").read_bytes() == before
