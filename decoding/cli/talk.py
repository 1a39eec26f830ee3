"""A conversation with a model under a policy, and the commands that change it while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding.cli.policies import changed, opened
from decoding.errors import DecodingError
from decoding.generation import generate
from decoding.policy import Policy
from decoding.style.prior import StylePrior
from decoding.tokens import Conversation, as_chats, ends_of_sequence, require_text

OFF = "off"


@dataclass
class Talk:
    """What was said, and how the next answer is written.

    Attributes:
        model: the model.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: of an answer.
        policy: changed by `take`.
        is_greedy: whether answers take the most probable token at every step.
        system: what the model is told before all else, or None.
        turns: what was said since, oldest first.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int
    policy: Policy = field(default_factory=Policy)
    is_greedy: bool = False
    system: str | None = None
    turns: Conversation = field(default_factory=list)

    def take(self, policy: Policy, is_greedy: bool | None = None) -> None:
        """Another policy, if it fits the model: styles are trained now, and not when an answer is waited for.

        Raises:
            DecodingError, ChunkError, NGramError: it does not fit; the old one stays.
        """
        with policy.attach(self.model, self.tokenizer):
            self.policy = policy
        self.is_greedy = self.is_greedy if is_greedy is None else is_greedy

    def instruct(self, system: str | None) -> None:
        """Another system prompt.

        Raises:
            DecodingError: the model's template has no place for one; the old one stays.
        """
        before, self.system = self.system, system
        try:
            as_chats([self._with("Hello.")], self.tokenizer)
        except DecodingError:
            self.system = before
            raise

    def answer(self, said: str, show: Callable[[str], Any]) -> None:
        """Answers, and keeps what was said. An answer that is interrupted is kept as far as it was shown.

        Args:
            said: by the user.
            show: takes the answer in pieces.

        Raises:
            DecodingError: no text, or more than the model can read; then nothing is kept.
        """
        require_text(said, "what you say")
        messages, pieces = self._with(said), list[str]()

        def take(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        room = self._room(messages)
        try:
            generate(
                self.model,
                messages,
                tokenizer=self.tokenizer,
                policy=self.policy,
                chat=True,
                max_new_tokens=self.max_new_tokens if room is None else min(room, self.max_new_tokens),
                streamer=take,
                eos_token_id=ends_of_sequence(self.model, self.tokenizer),
                **({"do_sample": False} if self.is_greedy else {}),
            )
        finally:
            if pieces:
                self.turns += [messages[-1], {"role": "assistant", "content": "".join(pieces)}]

    def _with(self, said: str) -> Conversation:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns, {"role": "user", "content": said}]

    def _room(self, messages: Conversation) -> int | None:
        """How many tokens the model can write behind messages; None where it names no limit."""
        most = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        (text,) = as_chats([messages], self.tokenizer)
        length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if most is not None and length >= most:
            raise DecodingError(f"that is {length:,} tokens with all before, and the model reads {most:,}: /reset")
        return None if most is None else most - length

    @property
    def manner(self) -> str:
        """The policy in one line, with what its style has by itself."""
        others = ("temperature", "think_temperature", "selector", "chunks")
        parts = {name: getattr(self.policy, name) for name in others}
        prior = next((part for part in self.policy.parts() if isinstance(part, StylePrior)), None)
        about = [] if prior is None else [f"style {self.policy.style}, λ {prior.lambda_}, mode {prior.mode}"]
        about += ["temperature 0"] * self.is_greedy
        about += [f"{name.replace('_', ' ')} {value}" for name, value in parts.items() if value is not None]
        return "; ".join(about) or "the model as it is"


def obey(talk: Talk, line: str) -> str | None:
    """Does what a line that begins with / says; returns what to tell the user, None at the end of the conversation.

    Raises:
        DecodingError: no such command, or a value that it cannot have.
        ChunkError, NGramError: as `Talk.take`.
    """
    name, _, value = line[1:].strip().partition(" ")
    if name == "quit":
        return None
    if name not in _COMMANDS:
        raise DecodingError(f"no command /{name}: /help lists them; a text that begins with / wants a space before it")
    usage, _, does = _COMMANDS[name]
    if not value.strip() and usage and not usage.startswith("["):
        raise DecodingError(f"write /{name} {usage}")
    return does(talk, value.strip())


def _style(talk: Talk, value: str) -> str:
    return _taken(talk, style=None if value == OFF else value)


def _lambda(talk: Talk, value: str) -> str:
    return _taken(talk, lambda_=_number_in(value))


def _mode(talk: Talk, value: str) -> str:
    return _taken(talk, mode=value)


def _temperature(talk: Talk, value: str) -> str:
    given = None if value == OFF else _number_in(value)
    talk.take(changed(talk.policy, temperature=given), is_greedy=given == 0)
    return talk.manner


def _budget(talk: Talk, value: str) -> str:
    if value == OFF:
        return _taken(talk, chunks=None)
    if not value.isdecimal():
        raise DecodingError(f"a budget is a whole number of tokens, or {OFF}, not {value!r}")
    held = talk.policy.chunks if isinstance(talk.policy.chunks, Mapping) else {}
    kept = {name: each for name, each in held.items() if name not in ("top_k", "retention")}
    return _taken(talk, chunks=kept | {"budget": int(value)})


def _policy(talk: Talk, value: str) -> str:
    if value:
        talk.take(opened(value, {}), is_greedy=False)
    return talk.manner


def _save(talk: Talk, value: str) -> str:
    talk.policy.save_pretrained(Path(value))
    return f"saved in {value}" + ", but for temperature 0, which no policy holds" * talk.is_greedy


def _system(talk: Talk, value: str) -> str:
    talk.instruct(value or None)
    return "from now on" if value else "none from now on"


def _reset(talk: Talk, _: str) -> str:
    talk.turns = []
    return "a new conversation"


def _help(_: Talk, __: str) -> str:
    lines = [(f"/{name} {usage}", about) for name, (usage, about, _) in _COMMANDS.items()]
    lines.append(("/quit", "ends, as Ctrl-D does; Ctrl-C stops an answer"))
    return "\n".join(f"{command:30}{about}" for command, about in lines)


def _taken(talk: Talk, **changes: Any) -> str:
    talk.take(changed(talk.policy, **changes))
    return talk.manner


def _number_in(value: str) -> float | str:
    """What is no number is refused by what takes it, which may take "auto"."""
    with suppress(ValueError):
        return float(value)
    return value


_COMMANDS: dict[str, tuple[str, str, Callable[[Talk, str], str]]] = {
    "style": (f"NAME|{OFF}", "a registered style, a text, a saved style", _style),
    "lambda": ("X|auto", "how strongly it steers, 0 to 1", _lambda),
    "mode": ("paper|ratio", "how it steers", _mode),
    "temperature": (f"X|auto|{OFF}", f"0 is greedy, {OFF} the model's own way", _temperature),
    "budget": (f"N|{OFF}", "tokens that attention reads of a long conversation", _budget),
    "policy": ("[FOLDER|HUB_ID]", "shows all of this, or opens a saved one", _policy),
    "save": ("FOLDER", "saves it, for --policy", _save),
    "system": ("[TEXT]", "tells the model who it is; alone, nothing", _system),
    "reset": ("", "forgets what was said", _reset),
    "help": ("", "this", _help),
}
