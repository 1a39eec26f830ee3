"""On the embedded default model: what a user sees first."""

import numpy as np
import pytest
import torch

from decoding import StylePrior, generate
from decoding.errors import DecodingError
from decoding.style.source import load_corpus

pytestmark = pytest.mark.real

PROMPTS = ["The captain said", "There was once a man who", "In the village by the river", "The king and his servants"]


@pytest.fixture(scope="module")
def style():
    try:
        load_corpus("king-james")
    except DecodingError as error:
        pytest.skip(str(error))
    return "king-james"


def sample(real_model, processor, **options):
    model, tokenizer = real_model
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 24} | options
    return generate(model, PROMPTS, tokenizer=tokenizer, logits_processor=[processor], **options)


def test_lambda_moves_text_towards_the_style_and_0_leaves_it(real_model, style):
    model, tokenizer = real_model
    off = StylePrior(λ=0, style=style, tokenizer=tokenizer)
    on = StylePrior(λ=0.5, style=style, tokenizer=tokenizer)
    plain = sample(real_model, off)
    assert plain == generate_plain(model, tokenizer)
    steered = sample(real_model, on)

    def perplexity(texts):
        return on.model.perplexity([np.array(tokenizer(text)["input_ids"]) for text in texts])

    assert perplexity(steered) < perplexity(plain) / 3


def generate_plain(model, tokenizer):
    torch.manual_seed(0)
    return generate(model, PROMPTS, tokenizer=tokenizer, do_sample=True, top_k=0, max_new_tokens=24)


def test_greedy_rows_of_a_padded_batch_equal_their_own_runs(real_model, style):
    model, tokenizer = real_model
    processor = StylePrior(λ=0.5, style=style, tokenizer=tokenizer)
    together = sample(real_model, processor, do_sample=False, top_k=None)
    alone = [
        generate(model, p, tokenizer=tokenizer, logits_processor=[processor], do_sample=False, max_new_tokens=24)
        for p in PROMPTS
    ]
    assert together == alone


def test_beam_search(real_model, style):
    processor = StylePrior(λ=0.3, style=style, tokenizer=real_model[1])
    texts = sample(real_model, processor, do_sample=False, top_k=None, num_beams=3)
    assert all(text.strip() for text in texts)


QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 7 times 8?",
    "Who wrote Hamlet?",
    "What do bees make?",
    "How many days are in a week?",
    "Is the earth flat?",
    "What is the largest ocean?",
    "How do you say hello in Spanish?",
    "Who was Albert Einstein?",
    "What is the boiling point of water?",
    "What is the opposite of hot?",
    "How far is the moon?",
    "What language is spoken in Brazil?",
    "What is a good name for a dog?",
    "What is the speed of light?",
    "Can penguins fly?",
    "What is the square root of 81?",
    "Who painted the Mona Lisa?",
    "What is the chemical sign of gold?",
    "Which animal barks?",
    "What comes after Monday?",
    "Who was the first man on the moon?",
    "What is the tallest mountain?",
    "How many legs has a spider?",
    "What is frozen water called?",
    "In which country is Rome?",
    "What do cows drink?",
    "Which planet is red?",
    "What is two plus two?",
]
LONGEST = 64


@pytest.fixture(scope="module")
def lengths(real_model):
    """How many tokens greedy answers have, with some processors."""
    model, tokenizer = real_model
    options = {"tokenizer": tokenizer, "chat": True, "do_sample": False, "max_new_tokens": LONGEST}

    def lengths(*processors):
        texts = generate(model, QUESTIONS, logits_processor=processors, **options)
        return np.array([min(len(tokenizer(text)["input_ids"]), LONGEST) for text in texts])

    return lengths


@pytest.fixture(scope="module")
def lengths_without(lengths):
    return lengths()


@pytest.mark.parametrize("mode", ["paper", "ratio"])
def test_answers_in_a_books_style_end_as_they_do_without(lengths, lengths_without, style, tmp_path, mode):
    """The whole book as one text, of whose million tokens one is an end: steered, it would hardly ever be said."""
    (tmp_path / "book.txt").write_text("\n\n".join(load_corpus(style).documents), encoding="utf-8")
    found = lengths(StylePrior(tmp_path / "book.txt", λ=0.3, mode=mode))
    assert (lengths_without < LONGEST).mean() > 0.3
    assert abs(found.mean() / lengths_without.mean() - 1) < 0.2
