import numpy as np

from decoding.tokens import tokenize


def test_tokens_are_cached(tokenizer):
    documents = ("the captain said", "night")
    first = tokenize(documents, tokenizer)
    assert [ids.tolist() for ids in first] == [tokenizer(d)["input_ids"] for d in documents]

    class Unused:
        name_or_path = ""
        get_vocab = tokenizer.get_vocab

    again = tokenize(documents, Unused())
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
