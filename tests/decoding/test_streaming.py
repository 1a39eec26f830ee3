"""Texts while they are written: whole characters, at once, and in the end the text that is returned."""

import pytest
import torch

from decoding import DecodingError, FixedTemperature, PhaseTemperature, Policy, StylePrior, generate
from decoding.streaming import TextStreamer
from decoding.tokens import continuations
from tests.conftest import make_model, make_tokenizer
from tests.decoding.test_tokens import byte_level, with_spaces_before


def streamed(tokenizer, ids, steps=1):
    """The pieces of a text whose first token is its prompt, given some tokens at a time."""
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([ids[:1]]))
    shown = []
    for at in range(1, len(ids), steps):
        streamer.put(torch.tensor(ids[at : at + steps]))
        shown.append("".join(pieces))
    streamer.end()
    return pieces, shown


@pytest.mark.parametrize("text", ["日本の海", " the  sea\n\n", "a😀b é👩‍👩‍👧 …", "x\ufffdy", "¡Olé! — ถ้า"])
@pytest.mark.parametrize("steps", [1, 3])
def test_pieces_are_whole_characters_of_the_text(text, steps):
    tokenizer = byte_level()
    pieces, shown = streamed(tokenizer, tokenizer("!" + text)["input_ids"], steps)
    assert "".join(pieces) == text and all(pieces)
    spelt = b"!" + text.encode()
    for at, so_far in enumerate(shown, start=1):
        whole = spelt[1 : 1 + at * steps].decode(errors="ignore")  # a byte is a token
        assert so_far == whole.rstrip(" \ufffd") or so_far == text


def test_unfinished_characters_are_shown_at_the_end_as_they_are_returned():
    tokenizer = byte_level()
    ids = tokenizer("!a😀")["input_ids"][:-1]
    pieces, shown = streamed(tokenizer, ids)
    assert shown[-1] == "a" and "".join(pieces) == continuations(torch.tensor([ids]), 1, tokenizer)[0] == "a\ufffd"


def test_spaces_of_words_and_special_tokens():
    tokenizer = with_spaces_before()
    pieces, _ = streamed(tokenizer, [0, 1, 2, 3, 0])
    assert pieces == [" sea", "s", " 日本", " the"]
    tokenizer = make_tokenizer()
    assert "".join(streamed(tokenizer, [*tokenizer("the captain said")["input_ids"], 1, 0])[0]) == " captain said"


@pytest.mark.parametrize(
    "processors", [[], [FixedTemperature(1.3)], [PhaseTemperature(1.0, 0.5, begin="his", end="sea")]]
)
def test_what_streams_is_what_is_returned(model, tokenizer, style_file, processors):
    options = {"tokenizer": tokenizer, "max_new_tokens": 24}
    processors = [StylePrior(style_file, λ=0.5), *processors]
    pieces = []
    torch.manual_seed(1)
    text = generate(model, "the captain", logits_processor=processors, streamer=pieces.append, **options)
    torch.manual_seed(1)
    assert "".join(pieces) == text == generate(model, "the captain", logits_processor=processors, **options)
    assert len(pieces) > 10


def test_one_prompt_in_a_list_an_encoder_decoder_and_information(model, tokenizer, bart):
    pieces = []
    (found,) = generate(
        model, ["the captain"], tokenizer=tokenizer, policy=Policy(), return_info=True, streamer=pieces.append
    )
    assert "".join(pieces) == found.text
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 1, "do_sample": False}
    pieces = []
    text = generate(bart, "the captain said", tokenizer=tokenizer, streamer=pieces.append, **options)
    assert "".join(pieces) == text and len(pieces) > 1


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (["the", "sea"], {}, "not 2 prompts"),
        ("the", {"num_beams": 2}, "not 2 beams"),
        ("the", {"num_return_sequences": 3, "do_sample": True}, "not 3 texts"),
    ],
)
def test_what_cannot_be_shown_is_refused(model, tokenizer, prompts, options, says):
    with pytest.raises(DecodingError, match=says):
        generate(model, prompts, tokenizer=tokenizer, streamer=print, **options)


def test_a_conversation_is_one_prompt(chat_folder, model):
    from decoding.models import load_tokenizer

    options = {"tokenizer": load_tokenizer(str(chat_folder)), "max_new_tokens": 5, "do_sample": False}
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, ("rain", "sails", "the sea"), strict=True)]
    one = generate(model, turns, chat=True, **options)
    assert one == generate(model, "night rain night sails night the sea captain said", **options)
    assert generate(model, [turns, "rain"], chat=True, **options)[0] == one
    with pytest.raises(DecodingError, match="write chat=True"):
        generate(model, turns, **options)
    with pytest.raises(DecodingError, match="a message of prompt 1 is no text"):
        generate(model, [{"role": "user", "content": "\udce9"}], chat=True, **options)


@pytest.mark.real
def test_any_tokens_of_the_real_vocabulary(real_model):
    _, tokenizer = real_model
    ids = torch.randint(len(tokenizer), (400,), generator=torch.Generator().manual_seed(0)).tolist()
    ids += tokenizer(" A line. 海は広い 🌊🏴‍☠️\n\n  indented , spaced .")["input_ids"]
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == continuations(torch.tensor([ids]), 1, tokenizer)[0]


def test_a_tokenizer_that_cleans_spaces_up():
    tokenizer = make_tokenizer(["the", "sea", ".", "n't"])
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("the sea . the sea")["input_ids"]
    assert "".join(streamed(tokenizer, ids)[0]) == continuations(torch.tensor([ids]), 1, tokenizer)[0]


def test_a_model_that_stops_at_once(tokenizer):
    pieces = []
    model = make_model(len(tokenizer))
    options = {"tokenizer": tokenizer, "max_new_tokens": 3, "suppress_tokens": list(range(2, len(tokenizer)))}
    assert generate(model, "the", streamer=pieces.append, do_sample=False, **options) == "".join(pieces) == ""
