import pytest
import torch
from click.testing import CliRunner
from transformers import BartConfig, BartForConditionalGeneration

from decoding.cli import cli
from tests.conftest import WORDS, make_model, make_tokenizer


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **options: CliRunner().invoke(cli, [str(each) for each in arguments], **options)


@pytest.fixture(scope="module")
def thinking():
    return make_tokenizer([*WORDS, "<think>", "</think>"])


@pytest.fixture(scope="module")
def thinker(thinking):
    return make_model(len(thinking))


@pytest.fixture
def bart(tokenizer):
    """An encoder-decoder."""
    torch.manual_seed(0)
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    shape |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, init_std=1.0, **shape, **ids)
    return BartForConditionalGeneration(config).eval()


@pytest.fixture
def chat_folder(model, tmp_path):
    """A model to talk to: its template says "night" before what anybody says, and "captain said" after it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'boom' %}{{ raise_exception('no boom') }}{% endif %}"
        "night {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}captain said{% endif %}"
    )
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"
