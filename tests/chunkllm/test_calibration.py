"""A calibration: what it is, its file, and how a selection takes it."""

import json
from dataclasses import asdict

import pytest
import torch

from chunkllm import CalibrationConfig, ChunkAdapters, ChunkCalibration, ChunkError, ChunkSelection
from chunkllm.calibration import open_saved
from chunkllm.models import model_shape
from chunkllm.selection import layer_weights
from tests.chunkllm.conftest import Stops, calibrated, prompts, tiny_model

SMALL = {"sinks": 2, "local": 6, "max_chunk": 8}
SENSITIVITY = (0.25, 0.0, 1.5e-4)


@pytest.fixture
def calibration(llama):
    return ChunkCalibration(CalibrationConfig(model_shape(llama), SENSITIVITY, {"command": "decoding chunk calibrate"}))


@pytest.fixture
def folder(calibration, tmp_path):
    calibration.save_pretrained(tmp_path / "calibration")
    return tmp_path / "calibration"


def kept(model, *saved, **options):
    with ChunkSelection(*saved, **SMALL, **options).attach(model, Stops()) as chunks:
        text = model.generate(prompts((80,))[0], max_new_tokens=12, do_sample=False)
    return chunks.stats["layers"], text.tolist()


def test_it_comes_back_as_it_was_saved(calibration, folder):
    assert {path.name for path in folder.iterdir()} - {"README.md"} == {"config.json"}
    assert ChunkCalibration.from_pretrained(folder).config == calibration.config
    assert ChunkCalibration.from_pretrained(str(folder)).config == calibration.config
    calibration.save_pretrained(folder)  # over it
    assert isinstance(open_saved(folder), ChunkCalibration)


def test_it_travels_over_the_hub(hub, calibration, llama):
    calibration.save_pretrained(hub.store / "me" / "mine")
    assert ChunkCalibration.from_pretrained("me/mine", revision="main").config == calibration.config
    assert {"revision": "main"} in hub.calls
    assert ChunkSelection("me/mine").calibration.config == calibration.config


def test_it_divides_the_budget_without_adapters(llama, calibration, folder):
    told, even = kept(llama, calibration, budget=24), kept(llama, budget=24)
    assert told[0][0] > told[0][2] + 0.05 and told[0][1] == pytest.approx(told[0][2], abs=0.02)
    assert len(set(even[0].values())) == 1
    with ChunkSelection(calibration).attach(llama) as chunks:
        assert torch.equal(chunks.plan.weights, layer_weights(SENSITIVITY))
    assert kept(llama, folder, budget=24) == kept(llama, str(folder), budget=24) == told
    assert kept(llama, folder, budget=24, adaptive=False) == even
    assert kept(llama, folder, top_k=2) == kept(llama, top_k=2)


def test_a_text_may_name_adapters_too(llama, tmp_path):
    adapters = calibrated(llama)
    adapters.save_pretrained(tmp_path)
    assert kept(llama, str(tmp_path), budget=24) == kept(llama, adapters, budget=24)
    assert ChunkSelection(tmp_path).calibration is None


def test_another_models_is_refused(calibration):
    with pytest.raises(ChunkError, match=r"calibration is another model's \(its hidden_size is 64, theirs 32\): make"):
        ChunkSelection(calibration).attach(tiny_model(hidden_size=64))


@pytest.mark.parametrize("sensitivity", [(0.1, 0.2), (0.1, -0.2, 0.3), (0.1, float("nan"), 0.1)])
def test_numbers_that_cannot_be(llama, sensitivity):
    with pytest.raises(ChunkError, match="sensitivity must be 3 numbers of at least 0"):
        CalibrationConfig(model_shape(llama), sensitivity)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "chunkllm-calibration/2"},
        {"sensitivity": [0.1]},
        {"sensitivity": None},
        {"sensitivity": ["a", "b", "c"]},
        {"shape": None},
        {"shape": {"full_layers": [0, 1, 2]}},
        {"wide": 1},
        '{"format": "chunkllm-calibration/1"',
        "[]",
        "null",
    ],
)
def test_a_damaged_one_is_refused(calibration, folder, change):
    held = {"format": "chunkllm-calibration/1", **asdict(calibration.config)}
    text = change if isinstance(change, str) else json.dumps(held | change)
    (folder / "config.json").write_text(text)
    with pytest.raises(ChunkError, match="calibration at .* is damaged"):
        ChunkCalibration.from_pretrained(folder)
    with pytest.raises(ChunkError, match="damaged"):
        ChunkSelection(folder)


def test_nothing_there(tmp_path, llama):
    with pytest.raises(ChunkError, match="no calibration at"):
        ChunkCalibration.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ChunkError, match="no adapters at"):
        ChunkSelection(str(tmp_path / "nowhere"))
    ChunkAdapters.for_model(llama).save_pretrained(tmp_path)
    with pytest.raises(ChunkError, match="its format is 'chunkllm-adapters/1'"):
        ChunkCalibration.from_pretrained(tmp_path)
