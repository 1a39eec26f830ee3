"""What a model is to this package: its layers, its tokenizer, its size, and whether the embedded curve is its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from chunkllm.models import layer_kinds
from chunkllm.selection import DEFAULT_BUDGET
from decoding.errors import DecodingError
from decoding.models import load_model, resolve_model
from decoding.temperature.abilities import size_class
from decoding.temperature.markers import known_markers
from decoding.temperature.prompts import PromptFrame
from decoding.temperature.selector import TemperatureSelector
from decoding.tokens import as_chats, has_chat_template, id_count, pad_id

_MOST_LOADED = 1_000_000_000  # parameters of a model whose weights are looked at
_ASKED = "Tell me about the sea, and about the ships that sail it."


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer is like.

    Attributes:
        kind: its class.
        is_fast: whether it is one of the Rust library's.
        ids: its highest token id, and 1.
        eos: the token that ends a text, or None.
        pads_with_eos: whether batches are filled up with that token.
        has_chat_template: whether the model is one to talk to.
        finds_user_turn: whether the user's text is found in what the template renders; None without one.
    """

    kind: str
    is_fast: bool
    ids: int
    eos: str | None
    pads_with_eos: bool
    has_chat_template: bool
    finds_user_turn: bool | None


@dataclass(frozen=True)
class ModelFacts:
    """What a model is like.

    Attributes:
        name: as the user called it.
        model_type: of its configuration.
        parameters: how many.
        size: the class by which the temperature selector goes.
        ids: how many token ids it scores.
        positions: how many tokens it can read, or None.
        full_layers, sliding_layers, other_layers: how many layers read everything, the last ``window`` tokens, or
            through something else than keys and values of their own; None if transformers does not tell.
        window: in tokens, or None.
        tokenizer: what it is like.
        thinking: the texts that begin and end thinking, or None.
        has_curve: whether the embedded selector's curve is of this model; None if not found out, and ``curve_why``.
        notes: what to mind.
    """

    name: str
    model_type: str
    parameters: int
    size: str
    ids: int
    positions: int | None
    full_layers: int | None
    sliding_layers: int | None
    other_layers: int | None
    window: int | None
    tokenizer: TokenizerFacts
    thinking: tuple[str, str] | None
    has_curve: bool | None
    curve_why: str | None
    notes: tuple[str, ...]


def facts_of(name: str, model: Any, tokenizer: Any) -> ModelFacts:
    """Looks at a model.

    Args:
        name: of a folder, or a hub id.
        model: without its weights.
        tokenizer: its tokenizer.
    """
    config = model.config.get_text_config(decoder=True)
    full, sliding, others = _layer_counts(config)
    about = _tokenizer_facts(tokenizer)
    positions = getattr(config, "max_position_embeddings", None)
    has_curve, curve_why = _curve_of(name, model.num_parameters())
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        parameters=model.num_parameters(),
        size=size_class(model.num_parameters()),
        ids=config.vocab_size,
        positions=positions,
        full_layers=full,
        sliding_layers=sliding,
        other_layers=others,
        window=getattr(config, "sliding_window", None) if sliding else None,
        tokenizer=about,
        thinking=_thinking(tokenizer),
        has_curve=has_curve,
        curve_why=curve_why,
        notes=tuple(_notes(about, config.vocab_size, positions)),
    )


def _layer_counts(config: Any) -> tuple[int, int, int] | tuple[None, None, None]:
    try:
        kinds = layer_kinds(config)
    except (AttributeError, RuntimeError):  # layers in a place of the model's own, or told one by one
        return None, None, None
    return len(kinds.full), len(kinds.sliding), len(kinds.others)


def _tokenizer_facts(tokenizer: Any) -> TokenizerFacts:
    has_template = has_chat_template(tokenizer)
    return TokenizerFacts(
        kind=type(tokenizer).__name__,
        is_fast=bool(getattr(tokenizer, "is_fast", False)),
        ids=id_count(tokenizer),
        eos=tokenizer.eos_token,
        pads_with_eos=tokenizer.eos_token_id is not None and pad_id(tokenizer) == tokenizer.eos_token_id,
        has_chat_template=has_template,
        finds_user_turn=_finds_user_turn(tokenizer) if has_template else None,
    )


def _finds_user_turn(tokenizer: Any) -> bool:
    """Whether what a user says comes back out of the template, as the tokenizer spells it, but for spaces."""
    try:
        (rendered,) = as_chats([_ASKED], tokenizer)
    except DecodingError:
        return False
    plain, framed = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (_ASKED, rendered))
    return PromptFrame(tokenizer).text_of(framed).split() == tokenizer.decode(plain).split()


def _thinking(tokenizer: Any) -> tuple[str, str] | None:
    try:
        return known_markers(tokenizer)
    except DecodingError:
        return None


def _curve_of(name: str, parameters: int) -> tuple[bool | None, str | None]:
    """Whether the embedded curve is of this model, or why that is not known. Reads its weights, if they are here."""
    folder = _weights(name)
    if folder is None:
        return None, "its weights are not here, as safetensors"
    if parameters > _MOST_LOADED:
        return None, "its weights are too many to be read for that: AutoTemperature looks when it is bound"
    try:
        return TemperatureSelector.from_pretrained().is_for(load_model(str(folder), device="cpu")), None
    except DecodingError as error:
        return None, str(error)


def _weights(name: str) -> Path | None:
    """The folder with a model's weights, if they are on this machine."""
    path: Path = Path(resolve_model(name))
    if not path.is_dir():
        kept = try_to_load_from_cache(str(path), "config.json")
        path = Path(kept).parent if isinstance(kept, str) else path
    return path if any(path.glob("*.safetensors")) else None


def _notes(tokenizer: TokenizerFacts, ids: int, positions: int | None) -> list[str]:
    more = tokenizer.ids - ids
    found = {
        "no chat template: prompts are continued as they stand, and the temperature selector reads all of a prompt": (
            not tokenizer.has_chat_template
        ),
        "the user's turn is not found in what the chat template renders: the temperature selector reads all of a "
        "prompt": tokenizer.finds_user_turn is False,
        "batches are filled up with the token that ends a text: give model.generate the attention_mask, as "
        "decoding.generate does": tokenizer.pads_with_eos,
        "the tokenizer names no token that ends a text: texts end at max_new_tokens, unless the model's "
        "generation_config names one": tokenizer.eos is None,
        "the tokenizer is one of Python's: reading a style's text takes long": not tokenizer.is_fast,
        f"the tokenizer has {more} ids that the model does not score: styles whose text has them are refused": more > 0,
        f"the model reads {positions} tokens at most: chunk selection drops nothing below its default budget of "
        f"{DEFAULT_BUDGET}, so give a smaller one": positions is not None and positions <= DEFAULT_BUDGET,
    }
    return [note for note, is_so in found.items() if is_so]
