import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decoding import DecodingError, generate
from decoding.tokens import token_texts, tokenize


def test_tokens_are_cached(tokenizer, monkeypatch):
    documents = ("the captain said", "night")
    first = tokenize(documents, tokenizer)
    assert [ids.tolist() for ids in first] == [tokenizer(d)["input_ids"] for d in documents]
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    again = tokenize(documents, tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def byte_level():
    """A token for every byte, as byte-level BPE falls back to."""
    alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def with_spaces_before():
    """As SentencePiece has it: words begin with their space, and a text's first space is dropped."""
    words = ["\u2581the", "\u2581sea", "s", "\u2581日本"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["日本の海", "the sea", "a😀b é", "x\ufffdy", ""])
def test_characters_of_several_tokens_stay_whole(text):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer.decode)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert [letter for piece in texts for letter in piece] == list(text)


def test_a_text_that_ends_within_a_character():
    tokenizer = byte_level()
    ids = tokenizer("海")["input_ids"][:2]
    assert token_texts(ids, tokenizer.decode) == ["", "\ufffd"]


def test_a_text_that_goes_on_begins_with_its_space():
    assert token_texts([0, 1, 2, 3], with_spaces_before().decode) == [" the", " sea", "s", " 日本"]


@pytest.mark.parametrize("prompts", ["\udce9t\udce9", ["the captain", "a \ud83d"]])
def test_prompts_that_are_no_text(model, tokenizer, prompts):
    with pytest.raises(DecodingError, match=r"prompt \d is no text: character \d"):
        generate(model, prompts, tokenizer=tokenizer)
