import numpy as np
import pytest

from decoding.tokens import tokenize


def test_tokens_are_cached(tokenizer, monkeypatch):
    documents = ("the captain said", "night")
    first = tokenize(documents, tokenizer)
    assert [ids.tolist() for ids in first] == [tokenizer(d)["input_ids"] for d in documents]
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    again = tokenize(documents, tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
