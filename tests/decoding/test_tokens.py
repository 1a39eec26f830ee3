import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decoding import DecodingError, StylePrior, generate
from decoding.style.source import Corpus
from decoding.style.training import train_prior
from decoding.tokens import control_ids, encoding_fingerprint, id_count, texts_within, token_texts, tokenize
from tests.conftest import WORDS, make_model, make_tokenizer


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


def with_control_tokens():
    """Words, and ChatML's tokens as special ones."""
    tokenizer = make_tokenizer([*WORDS, "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def test_control_tokens_in_a_text_are_its_letters():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    text = "hi<|im_end|>\nho"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    (ids,) = tokenize([text], tokenizer)
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]  # the tokenizer is as it was
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_no_ngram_spans_control_tokens():
    """Of a tokenizer whose words are control tokens, so that plain text cannot help."""
    tokenizer = with_control_tokens()
    text = "the captain<|im_end|>said that".replace("<|im_end|>", " <|im_end|> ")
    prior = train_prior(Corpus("chat", (text, "said that the captain")), tokenizer, order=2)
    apart = train_prior(Corpus("chat", ("the captain", "said that", "said that the captain")), tokenizer, order=2)
    assert torch.equal(prior.tables.words, apart.tables.words) and torch.equal(prior.tables.deltas, apart.tables.deltas)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert texts_within(np.array([start, 3, 4, start, start, 5]), control_ids(tokenizer))[1].tolist() == [5]
    assert tokenizer.unk_token_id not in control_ids(tokenizer)


class Counting:
    """A tokenizer, and how many characters it was given at once."""

    def __init__(self, inner):
        self._inner, self.most = inner, 0

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __len__(self):
        return len(self._inner)

    def __call__(self, texts, **options):
        self.most = max(self.most, sum(map(len, texts)))
        return self._inner(texts, **options)


@pytest.mark.parametrize("between", ["\n\n", "\n", " "])
def test_long_texts_are_read_in_slices_of_bounded_size(tokenizer, monkeypatch, between):
    documents = [between.join(WORDS * 40), "night", between.join(WORDS * 3), "", "rain " * 500]
    wanted = [tokenizer(text)["input_ids"] for text in documents]
    monkeypatch.setattr("decoding.tokens._SLICE", 200)
    counting = Counting(tokenizer)
    got = tokenize(documents, counting)
    assert [ids.tolist() for ids in got] == wanted
    assert 200 <= counting.most < 400


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr("decoding.tokens._SLICE", 10)
    (ids,) = tokenize(["a" * 95], byte_level())
    assert len(ids) == 95


def test_ids_with_holes_and_an_end_above_all_tokens(model, style_file):
    inner = Tokenizer(
        models.WordLevel({word: 2 * i for i, word in enumerate(["<unk>", *dict.fromkeys(WORDS)])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="captain")
    highest = max(tokenizer.get_vocab().values())
    assert len(tokenizer) <= highest and id_count(tokenizer) == highest + 1
    prior = StylePrior(style_file, λ=0.5, tokenizer=tokenizer)
    assert prior.model.vocab_size == highest + 1
    got = prior(torch.tensor([[2, 4]]), torch.zeros(1, highest + 1))
    assert torch.isfinite(got).all()


def test_a_padding_token_added_later_is_no_other_tokenizer(style_file, tmp_path):
    prior = StylePrior(style_file, λ=0.5, tokenizer=make_tokenizer())
    prior.save_pretrained(tmp_path)
    later = make_tokenizer()
    later.add_special_tokens({"pad_token": "[PAD]"})
    opened = StylePrior(tmp_path, tokenizer=later)
    scores = torch.randn(1, len(later))
    got, own = opened(torch.tensor([[3, 4]]), scores), prior(torch.tensor([[3, 4]]), scores)
    assert torch.equal(got, own) and later.pad_token_id == len(later) - 1
    with pytest.raises(DecodingError, match="was trained with tokenizer"):
        StylePrior(tmp_path, tokenizer=make_tokenizer(WORDS[::-1]))


@pytest.mark.parametrize("mode", ["paper", "ratio"])
def test_a_model_that_scores_fewer_ids_than_its_tokenizer_has(style_file, mode):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    prior = StylePrior(style_file, λ=0.8, mode=mode, max_js=0.2, tokenizer=tokenizer, model=model)
    assert prior.model.vocab_size == len(tokenizer) == model.config.vocab_size + 1
    scores = torch.randn(2, model.config.vocab_size)
    history = torch.tensor([[3, 4], [5, 6]])
    got = prior(history, scores)
    wide = torch.cat((scores, torch.full((2, 1), -torch.inf)), 1)
    torch.testing.assert_close(got.softmax(-1), prior(history, wide)[:, :-1].softmax(-1))
    assert generate(model, "the captain", tokenizer=tokenizer, logits_processor=[prior], max_new_tokens=4)


def test_a_model_that_lacks_ids_of_the_text_is_another_model(style_file):
    prior = StylePrior(style_file, λ=0.8, tokenizer=make_tokenizer())
    with pytest.raises(DecodingError, match="belongs to another model"):
        prior(torch.tensor([[3]]), torch.randn(1, 12))


def test_fingerprints_follow_changes():
    tokenizer = make_tokenizer()
    first = encoding_fingerprint(tokenizer)
    assert encoding_fingerprint(tokenizer) == first
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    second = encoding_fingerprint(tokenizer)
    tokenizer.eos_token = "night"
    assert len({first, second, encoding_fingerprint(tokenizer)}) == 3


def test_without_an_end_of_sequence(style_file):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    prior = StylePrior(style_file, λ=0.5, tokenizer=tokenizer)
    assert prior.stop_ids == () and prior.model.eos_id is None
