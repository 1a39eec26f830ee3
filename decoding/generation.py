"""`generate`: text in, text out, with processors that bind themselves to the model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, overload

from chunkllm import ChunkError, ChunkSelection
from decoding.errors import DecodingError
from decoding.models import TRUNCATIONS, input_device, load_model, load_tokenizer, undoing
from decoding.policy import Policy
from decoding.policy.parts import bound
from decoding.streaming import TextStreamer
from decoding.style.bound import BoundStyle
from decoding.style.prior import StylePrior
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import BoundTemperature, FixedTemperature, Temperature
from decoding.tokens import Conversation, as_chats, continuations, pad_id, padded, require_text


@dataclass(frozen=True)
class Generation:
    """A text, and how it was sampled.

    Attributes:
        text: the continuation, without its prompt.
        temperature: the processor's, with phases the answer's; None without one, and where each token has its own.
        think_temperature: that of thinking, with phases.
        top_p: what was asked for, or the selector's.
        ability: the most probable one of the prompt, and with ``abilities``, ``prompt``, ``policy`` and ``reason`` as
            for `decoding.temperature.Explained`; None where no selector chose.
        abilities: their probabilities.
        prompt: what the selector read, the last turn of a conversation.
        policy: by which it chose.
        reason: why it chose what is best for all prompts, if it did.
    """

    text: str
    temperature: float | None = None
    think_temperature: float | None = None
    top_p: float | None = None
    ability: str | None = None
    abilities: dict[str, float] | None = None
    prompt: str | None = None
    policy: str | None = None
    reason: str | None = None


@overload
def generate(model: Any, prompts: str | Conversation, *, return_info: Literal[True], **options: Any) -> Generation: ...
@overload
def generate(
    model: Any, prompts: list[str] | list[Conversation], *, return_info: Literal[True], **options: Any
) -> list[Generation]: ...
@overload
def generate(model: Any, prompts: str | Conversation, **options: Any) -> str: ...
@overload
def generate(model: Any, prompts: list[str] | list[Conversation], **options: Any) -> list[str]: ...
def generate(
    model: Any,
    prompts: str | Conversation | list[str] | list[Conversation],
    *,
    tokenizer: Any | None = None,
    logits_processor: Sequence[Any] = (),
    policy: Policy | None = None,
    max_new_tokens: int = 64,
    chat: bool = False,
    return_info: bool = False,
    streamer: Callable[[str], Any] | Any | None = None,
    **options: Any,
) -> str | Generation | list[str] | list[Generation]:
    """Continues one prompt, or a list of them in one batch, or answers them.

    Args:
        model: a folder, a GGUF file, a hub id, the embedded default's name, or a loaded model (then with its
            tokenizer).
        prompts: plain text; with ``chat`` also conversations, each a list of messages ``{"role": …, "content": …}``.
        tokenizer: of a loaded model.
        logits_processor: transformers' processors. A `StylePrior`, an `AutoTemperature` and a `PhaseTemperature` are
            bound to tokenizer and model for the call, and a `ChunkSelection` is attached to the model.
            With one of `decoding.temperature.processors` the texts are sampled, from all tokens unless
            ``options`` has ``top_k``, ``top_p`` or the like, by itself or in a ``generation_config``. With an
            `AutoTemperature` they are sampled with its selector's top-p instead, which its temperatures were found
            with; ``top_p=1.0`` is all tokens.
        policy: does what its parts would in ``logits_processor``, where other processors then come behind them.
        max_new_tokens: how many tokens to write at most.
        chat: whether prompts are what a user says, to be put into the model's chat template. Without it they are
            continued as they stand, which few models that are made to be talked to do well.
        return_info: whether to tell how the texts were sampled. They are the same.
        streamer: takes the text of one prompt while it is written, in pieces that together are what is returned: a
            function of a text, ``lambda piece: print(piece, end="", flush=True)``, or one of transformers' streamers,
            which does as it likes.
        options: anything that ``model.generate`` takes (``do_sample``, ``num_beams``, ``stop_strings``, …).

    Returns:
        The continuations, without the prompts: one text for one prompt, else a list; with ``return_info`` a
        `Generation` for each.

    Raises:
        DecodingError: no prompt, an empty one, a loaded model without its tokenizer, two temperatures, something that
            policy and ``logits_processor`` both do, ``chat`` with a model that has no chat template, a conversation
            without ``chat``, or a streamer with more than one text or with beams.
        ChunkError: chunks cannot be selected in the model, or two selections.
    """
    is_one = isinstance(prompts, str) or _is_conversation(prompts)
    batch: list[Any] = [prompts] if is_one else list(prompts)
    _require_prompts(batch, chat)
    if streamer is not None:
        _require_one_text(len(batch), options)
    if not isinstance(logits_processor, Sequence):
        raise DecodingError(f"logits_processor must be a list: write [{type(logits_processor).__name__}(…)]")
    logits_processor = _with_policy(policy, logits_processor)
    _require_one_of_each(logits_processor, options)
    is_loaded = not isinstance(model, str | PathLike)
    if is_loaded and tokenizer is None:
        raise DecodingError("a loaded model needs its tokenizer: generate(model, prompts, tokenizer=tokenizer)")
    tokenizer = tokenizer or load_tokenizer(str(model))
    batch = as_chats(batch, tokenizer) if chat else batch
    model = model if is_loaded else load_model(str(model))
    processors = bound(logits_processor, tokenizer, model, _stops(options))
    options.setdefault("pad_token_id", pad_id(tokenizer))
    is_decoder = not model.config.is_encoder_decoder
    if streamer is not None:
        is_ready = hasattr(streamer, "put") and hasattr(streamer, "end")
        options["streamer"] = streamer if is_ready else TextStreamer(tokenizer, streamer, has_prompt=is_decoder)
    inputs = padded(batch, tokenizer, input_device(model), on_the_left=is_decoder, add_special_tokens=not chat)
    options["max_new_tokens"] = max_new_tokens
    output = _run(model, tokenizer, processors, options, inputs)
    sequences = getattr(output, "sequences", output)
    temperature = _temperature_of(processors)
    texts = continuations(sequences, inputs["input_ids"].shape[1] if is_decoder else 0, tokenizer)
    found = _informed(texts, len(batch), temperature, options) if return_info else texts
    return found[0] if is_one and len(found) == 1 else found


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(message, Mapping) for message in prompt)


def _require_prompts(batch: Sequence[Any], chat: bool) -> None:
    """Refuses what is no prompt.

    Raises:
        DecodingError: as said.
    """
    if not batch or not all(_is_conversation(prompt) or (isinstance(prompt, str) and prompt) for prompt in batch):
        raise DecodingError("prompts must be a text, or a list of texts, and none empty; with chat=True also messages")
    for number, prompt in enumerate(batch, start=1):
        if isinstance(prompt, str):
            require_text(prompt, f"prompt {number}")
        elif not chat:
            raise DecodingError("messages go into the model's chat template: write chat=True")
        else:
            for message in prompt:
                require_text(str(message.get("content", "")), f"a message of prompt {number}")


def _require_one_text(prompts: int, options: dict[str, Any]) -> None:
    """Refuses what cannot be shown while it is written.

    Raises:
        DecodingError: as said.
    """
    several = {"num_beams": "beams", "num_return_sequences": "texts"}
    asked = [f"{count} {what}" for name, what in several.items() if (count := _given(options, name) or 1) > 1]
    if asked or prompts > 1:
        what = asked[0] if asked else f"{prompts} prompts"
        raise DecodingError(f"a streamer shows one text while it is written, not {what}: leave it out, or take one")


def generate_ids(model: Any, tokenizer: Any, policy: Policy, *, logits_processor: Any = None, **options: Any) -> Any:
    """What ``model.generate`` does, under a policy, as `generate` does it.

    Args:
        model: a loaded model.
        tokenizer: its tokenizer.
        policy: `Policy()` leaves everything as it is.
        logits_processor: others, which come behind the policy's.
        options: anything else that ``model.generate`` takes, the inputs among it.

    Returns:
        What ``model.generate`` returns.

    Raises:
        DecodingError, ChunkError: as `generate`.
    """
    parts = _with_policy(policy, logits_processor or ())
    _require_one_of_each(parts, options)
    return _run(model, tokenizer, bound(parts, tokenizer, model, _stops(options)), options, {})


def _run(
    model: Any, tokenizer: Any, processors: Sequence[Any], options: dict[str, Any], inputs: Mapping[str, Any]
) -> Any:
    """Calls ``model.generate`` with bound processors, and what they need of its options, which are set."""
    temperature = _temperature_of(processors)
    if temperature is not None:
        sample_at_temperature_1(model, options, _top_p_of(temperature))
    if options.get("stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    steps = [processor for processor in processors if not isinstance(processor, ChunkSelection)]
    with ExitStack() as attached:
        for selection in processors:
            if isinstance(selection, ChunkSelection):
                attached.enter_context(selection.attach(model, tokenizer))
        return model.generate(**inputs, logits_processor=steps, **options)


def _temperature_of(processors: Sequence[Any]) -> Temperature | None:
    return next((each for each in processors if isinstance(each, Temperature)), None)


def _stops(options: dict[str, Any]) -> Any:
    """The ids that end a text in this call, where it says so."""
    return options.get("eos_token_id") or getattr(options.get("generation_config"), "eos_token_id", None)


def _informed(
    texts: Sequence[str], prompts: int, temperature: Temperature | None, options: dict[str, Any]
) -> list[Generation]:
    """Texts, as many for each prompt, with what a call's processor says of them."""
    top_p = _given(options, "top_p")
    if isinstance(temperature, FixedTemperature):
        return [Generation(text, temperature.temperature, top_p=top_p) for text in texts]
    if isinstance(temperature, PhaseTemperature):
        return [Generation(text, temperature.answer, temperature.think, top_p) for text in texts]
    rows = temperature.explained() if isinstance(temperature, BoundTemperature) else []
    if not rows:  # Each token has a temperature of its own, none was set, or no step was taken.
        return [Generation(text, top_p=top_p) for text in texts]
    think = temperature.thinking[0] if isinstance(temperature, BoundTemperature) and temperature.thinking else None
    # Beams of a prompt are rows beside each other, and of as many rows as there are beams fewer may be returned.
    of_texts = (rows[at * prompts // len(texts) * (len(rows) // prompts)] for at in range(len(texts)))
    return [
        Generation(text, row.temperature, think, top_p, row.ability, row.abilities, row.prompt, row.policy, row.reason)
        for text, row in zip(texts, of_texts, strict=True)
    ]


_DOING = {"style": StylePrior | BoundStyle, "temperature": Temperature, "chunks": ChunkSelection}


def _with_policy(policy: Policy | None, others: Sequence[Any]) -> list[Any]:
    """A policy's parts, and the other processors behind them.

    Raises:
        DecodingError: no policy, or others that do what it does.
    """
    if policy is None:
        return list(others)
    if not isinstance(policy, Policy):
        raise DecodingError(f"policy must be a Policy, not {policy!r}: open a saved one by Policy.from_pretrained")
    parts = policy.parts()
    if twice := [what for what in _done_by(parts) if what in _done_by(others)]:
        raise DecodingError(
            f"{' and '.join(twice)} by the policy and in logits_processor too: each would be done twice; leave one out"
        )
    return [*parts, *others]


def _done_by(processors: Sequence[Any]) -> list[str]:
    return [what for what, kind in _DOING.items() if any(isinstance(each, kind) for each in processors)]


def _require_one_of_each(processors: Sequence[Any], options: dict[str, Any]) -> None:
    """Refuses what would be done twice.

    Raises:
        DecodingError: two temperatures. ChunkError: two selections.
    """
    temperatures = sum(isinstance(processor, Temperature) for processor in processors)
    if temperatures > 1:
        raise DecodingError("two processors that set the temperature: each divides what the other left; keep one")
    for name, plain in (("temperature", 1.0), ("do_sample", True)):
        if temperatures and (given := options.get(name, plain)) != plain:
            raise DecodingError(f"{name}={given!r} and a processor that sets the temperature: leave one out")
    if sum(isinstance(processor, ChunkSelection) for processor in processors) > 1:
        raise ChunkError("with two selections in one call the model has a selection attached already: keep one")


def sample_at_temperature_1(model: Any, options: dict[str, Any], top_p: float | None) -> None:
    """Sets what a processor that sets the temperature needs of ``model.generate``, whatever the model's defaults are.

    The caller's truncations stand; without any there is ``top_p``.
    """
    options |= {"do_sample": True, "temperature": 1.0}
    given = {name: value for name in TRUNCATIONS if (value := _given(options, name)) is not None}
    if not given and top_p is not None:
        given = {"top_p": top_p}
    options |= {"top_k": 0} | undoing(model, TRUNCATIONS) | given


def _given(options: dict[str, Any], name: str) -> Any:
    """What the caller asks for, by itself or in a ``generation_config``; None for nothing."""
    value = options.get(name)
    return getattr(options.get("generation_config"), name, None) if value is None else value


def _top_p_of(temperature: Temperature) -> float | None:
    """The top-p that a processor's temperatures go with."""
    return temperature.selector.top_p if isinstance(temperature, BoundTemperature) else None
