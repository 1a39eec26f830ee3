import itertools
import sys

import numpy as np
import pytest
import torch

from chunkllm import ChunkError
from chunkllm.boundaries import agreement, boundary_labels, punctuation_boundaries, sentence_ends
from tests.conftest import make_tokenizer

TEXT = (
    'Mr. Smith went to sea at 5 p.m. and saw the U.S. fleet. "Where is it?" he asked. He paid $3.50 for '
    'it!\n\nThe storm came.  "Run!" \n"  \nIt was over.'
)


def sentences(text, **options):
    ends = sentence_ends(text, **options)
    return [text[a:b].strip() for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_sentences_end_where_they_do():
    found = sentences(TEXT)
    assert "".join("".join(found).split()) == "".join(TEXT.split())
    assert found[0] == "Mr. Smith went to sea at 5 p.m. and saw the U.S. fleet."
    assert "He paid $3.50 for it!" in found
    assert "The storm came." in found
    assert found[-1] == "It was over."


def test_a_piece_without_letters_belongs_to_the_sentence_before():
    assert sentences("The storm came.\n”\n. . .\nIt went.") == ["The storm came.\n”\n. . .", "It went."]
    assert sentence_ends(" \n\n ") == []


def test_a_sentence_that_comes_again_is_found_again():
    text = "It rained. It rained. It rained.\nIt rained."
    assert sentence_ends(text) == [10, 21, 32, 43]


def test_many_paragraphs_take_no_longer_each():
    text = "The storm came. It went.\n\n" * 3000
    assert len(sentence_ends(text)) == 6000


def test_other_languages():
    assert sentences("これは海です。嵐が来た。", language="ja") == ["これは海です。", "嵐が来た。"]
    with pytest.raises(ChunkError, match="'xx': choose from .*en"):
        sentence_ends("It rained.", language="xx")


def test_without_pysbd(monkeypatch):
    monkeypatch.setitem(sys.modules, "pysbd", None)
    with pytest.raises(ChunkError, match="pip install"):
        sentence_ends("It rained.")


def test_labels_mark_the_token_of_the_last_character():
    words = ["The", "storm", "came.", "It", "was", "black", '"Run!"', "he", "said."]
    tokenizer = make_tokenizer(words)
    text = 'The storm came.  It was black \n\n"Run!" he said. '
    ids, labels = boundary_labels(text, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == text.split()
    assert [word for word, ends in zip(text.split(), labels, strict=True) if ends] == ["came.", "black", "said."]
    assert (ids.dtype, labels.dtype) == (np.int64, bool)


def test_labels_need_offsets(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ChunkError, match="fast tokenizer"):
        boundary_labels("It rained.", Slow())


def test_punctuation():
    ends = ["came.", "it?", "Run!”", "said.)", "嵐。", "…"]
    others = ["came", "3.50", "Mr", "said,", '"']
    tokenizer = make_tokenizer(ends + others)
    table = punctuation_boundaries(tokenizer)
    assert table.dtype == torch.bool and len(table) == len(tokenizer)
    assert [word for word in ends + others if table[tokenizer.convert_tokens_to_ids(word)]] == ends
    assert punctuation_boundaries(tokenizer) is table  # looked up once
    tokenizer.add_tokens(["over."])
    assert len(punctuation_boundaries(tokenizer)) == len(table) + 1 and punctuation_boundaries(tokenizer)[-1]


@pytest.mark.real
def test_boundaries_of_the_real_tokenizer(real_model):
    _, tokenizer = real_model
    ids, labels = boundary_labels(TEXT, tokenizer)
    stops = [0, *(np.flatnonzero(labels) + 1)]
    pieces = [tokenizer.decode(ids[a:b]).strip() for a, b in itertools.pairwise(stops)]
    assert pieces[0] == "Mr. Smith went to sea at 5 p.m. and saw the U.S. fleet."
    table = punctuation_boundaries(tokenizer)
    assert bool(table[tokenizer(".")["input_ids"]].all()) and bool(table[tokenizer("\n")["input_ids"]].all())
    assert not bool(table[tokenizer(" the")["input_ids"]].any())


def test_agreement_by_hand():
    predicted = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
    labels = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    assert agreement(predicted, labels) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert agreement(predicted, ~predicted) == (0, 0, 0)
    assert agreement(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)) == (0, 0, 0)
