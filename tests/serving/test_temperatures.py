"""What is chosen for prompts, and that none is read twice."""

import pytest
import torch
from transformers import LlamaConfig

from decoding import DecodingError, TemperatureSelector
from decoding.vllm.declaration import DeclaredSelector
from decoding.vllm.temperatures import PromptTemperatures, load_temperatures, model_size_of
from tests.serving.conftest import EXAMPLES, UNKNOWN, FakeFrame, fake_temperature


def values(choose, prompts):
    return [float(value) for value in choose(prompts)]


def test_prompts_are_read_once_and_together(choose, selector):
    prompts = [[1, 2], [3], [1, 2], [2, 1]]
    assert values(choose, prompts) == [fake_temperature(prompt) for prompt in prompts]
    assert selector.batches == [["1 2", "3", "2 1"]]
    assert values(choose, [[3], [4]]) == [fake_temperature([3]), fake_temperature([4])]
    assert selector.batches[1:] == [["4"]]
    assert choose([]) == []
    assert len(selector.batches) == 2


def test_prompts_that_did_not_come_lately_are_forgotten(selector):
    choose = PromptTemperatures(selector, FakeFrame(), "medium", remembered=2)
    for prompts in ([[1], [2]], [[1]], [[3]], [[1]], [[2]]):
        choose(prompts)
    assert selector.batches == [["1", "2"], ["3"], ["2"]]
    many = [[i] for i in range(1, 6)]
    assert values(choose, many) == [fake_temperature(prompt) for prompt in many]


def test_prompts_without_text_are_of_unknown_kind(choose, selector):
    assert values(choose, [None, [], [0, 0], [0, 1]]) == [UNKNOWN] * 3 + [fake_temperature([0, 1])]
    assert selector.batches == [["0 1"]]
    assert values(choose, [None]) == [UNKNOWN]


def test_an_error_does_not_come_through(choose, selector, monkeypatch, caplog):
    def fail(prompts):
        raise RuntimeError("out of memory")

    fail.width, fail.model = selector.encoder.width, selector.encoder.model
    monkeypatch.setattr(selector, "encoder", fail)
    assert values(choose, [[1], [2]]) == [UNKNOWN] * 2
    assert "out of memory" in caplog.text


def test_a_saved_selector_gives_what_select_gives(selector_folder, tokenizer):
    prompts = [prompt for both in EXAMPLES.values() for prompt in both]
    texts = {(i + 3,): text for i, text in enumerate(prompts)}

    class Frame:
        def text_of(self, ids):
            return texts.get(tuple(ids), " \n")

    selector = TemperatureSelector.from_pretrained(selector_folder)
    for size in ("small", "medium"):
        choose = PromptTemperatures(selector, Frame(), size)
        wanted = torch.tensor(selector.select(prompts, size))
        assert torch.equal(torch.stack(choose(list(texts))), wanted)
        assert len(set(wanted.tolist())) >= 2
        assert values(choose, [[1]]) == pytest.approx([0.1])


def test_what_cannot_be_loaded_is_refused_at_start(selector_folder, tokenizer, tmp_path):
    declared = DeclaredSelector(str(selector_folder), "small")
    with pytest.raises(DecodingError, match="the model's tokenizer"):
        load_temperatures(declared, None, None, "cpu")
    with pytest.raises(DecodingError, match="no curve"):
        load_temperatures(declared._replace(policy="curve"), tokenizer, None, "cpu")
    with pytest.raises(DecodingError, match="unknown model size"):
        load_temperatures(declared._replace(model_size="tiny"), tokenizer, None, "cpu")
    with pytest.raises(DecodingError, match="temperature selector"):
        load_temperatures(DeclaredSelector(str(tmp_path), "small"), tokenizer, None, "cpu")


def test_a_model_is_as_large_as_its_parameters(caplog):
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    assert model_size_of(LlamaConfig(num_hidden_layers=2, **wide)) == "small"
    assert model_size_of(LlamaConfig(num_hidden_layers=32, **wide)) == "medium"
    assert model_size_of(LlamaConfig(num_hidden_layers=160, **wide)) == "large"
    assert not caplog.text
    assert model_size_of(object()) == "small"
    assert 'takes "small"' in caplog.text
