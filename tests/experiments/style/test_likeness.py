import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from decoding.errors import DecodingError
from experiments.style.likeness import Likeness, StyleEncoder

LUAR = """
import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel


class LUARConfig(PretrainedConfig):
    model_type = "LUAR"


class LUAR(PreTrainedModel):
    config_class = LUARConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        assert input_ids.dim() == 3 and input_ids.shape[1] == 1, "authors, texts, tokens"
        return torch.stack(((input_ids * attention_mask).sum((1, 2)), attention_mask.sum((1, 2))), -1).float()
"""


def test_cosines_to_the_mean_of_an_authors_texts():
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}
    likeness = Likeness(lambda texts: np.array([vectors[text] for text in texts]), ["a", "b"])
    assert likeness(["a", "b", "c"]) == pytest.approx([np.sqrt(0.5), np.sqrt(0.5), -np.sqrt(0.5)])


def test_a_sentence_encoder_is_averaged_over_tokens(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["the captain", "rain and a longer line of rain", "ship"]
    vectors = StyleEncoder(str(tmp_path))(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_an_encoder_with_code_of_its_own_reads_episodes(tokenizer, tmp_path):
    (tmp_path / "luar.py").write_text(LUAR)
    auto = {"AutoConfig": "luar.LUARConfig", "AutoModel": "luar.LUAR"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "LUAR", "auto_map": auto}))
    tokenizer.save_pretrained(tmp_path)
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecodingError, match="trust_remote_code"):
        StyleEncoder(str(tmp_path))
    (vector,) = StyleEncoder(str(tmp_path), trust_remote_code=True)(["the captain"])
    ids = tokenizer("the captain")["input_ids"]
    assert vector == pytest.approx(np.array([sum(ids), len(ids)]) / np.hypot(sum(ids), len(ids)), abs=1e-5)


def test_an_encoder_that_is_not_there():
    with pytest.raises(DecodingError, match="cannot load the style encoder nowhere/at-all"):
        StyleEncoder("nowhere/at-all")


def test_a_tokenizer_without_padding(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    encoder = StyleEncoder(str(tmp_path))
    texts = ["the captain", "rain and a longer line of rain"]
    assert encoder(texts)[0] == pytest.approx(encoder(texts[:1])[0], abs=1e-5), "a row beside a longer one, and alone"


def test_a_model_that_encodes_nothing_is_refused_before_anything_is_written(model_folder, monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", lambda *_, **__: None)
    with pytest.raises(DecodingError, match="does not encode texts .AttributeError"):
        StyleEncoder(str(model_folder))
