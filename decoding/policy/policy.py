"""`Policy`: which style, which temperature and which chunks, in one object that can be saved and shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from os import PathLike
from typing import Any, Literal

from chunkllm import ChunkSelection
from decoding.errors import DecodingError
from decoding.hub import upload
from decoding.policy.files import read_folder, write_folder
from decoding.policy.parts import bound, open_selection, open_selector
from decoding.policy.values import AUTO, FIELDS, GUARDS, check_field, check_together, chunk_settings
from decoding.style.prior import StylePrior
from decoding.style.settings import Mode
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import AutoTemperature, FixedTemperature, Temperature
from decoding.temperature.selector import TemperatureSelector


@dataclass(frozen=True, init=False)
class Policy:
    """All of decoding's choices. What is left out is off; ``Policy()`` leaves the model as it is, bit for bit.

    Each part is what its own class is alone: `StylePrior`, `FixedTemperature`, `AutoTemperature` or `PhaseTemperature`,
    and `ChunkSelection`. Their effects come in this order:

    1. ``chunks``: what attention reads of a long context, before there are scores.
    2. ``style``: λ times its prior is added to the scores.
    3. ``temperature``: divides them.
    4. Truncation: with ``temperature="auto"`` the selector's top-p, unless the caller gives another; see
       `decoding.generate`. ``model.generate`` has to be told (`top_p`).

    In `decoding.generate` other processors come behind the policy's, between 3 and 4.

    A policy does not change, and keeps nothing of a call: threads may share it. One model reads one selection of
    chunks at a time.

    Examples:
        >>> policy = Policy(style="my.txt", λ=0.6, mode="ratio", temperature="auto", chunks=2048)
        >>> generate("path-or-hub-id", prompt, policy=policy)
        >>> with policy.attach(model, tokenizer) as processors:
        ...     model.generate(**inputs, do_sample=True, top_k=0, top_p=policy.top_p, logits_processor=processors)
        >>> policy.save_pretrained("my-policy")

    Args:
        style: as for `StylePrior`: a registered name, a text, a saved prior or style, a hub id.
        λ: its strength, in [0, 1], or "auto"; also as ``lambda_``. By default as for `StylePrior`.
        mode: "paper" or "ratio", likewise.
        plausibility: holds the style back, as for `StylePrior`.
        max_js: likewise.
        entropy_gate: likewise.
        steer_stop: likewise.
        temperature: a positive number, or "auto", chosen for each prompt. With ``think_temperature``, the answer's.
        think_temperature: that of thinking, for models that reason before they answer.
        selector: what chooses: a folder, a hub id, or "default", the embedded one.
        chunks: True, a budget in tokens, or `ChunkSelection`'s keywords, but for ``scorer``; ``adapters`` are a folder,
            a hub id, or "default", the embedded ones; a folder or hub id of a calibration does as well.

    Raises:
        DecodingError: a value that a field cannot have; λ, mode or guards without a style, ``think_temperature``
            without a temperature, a selector without "auto"; no such style, selector or adapters.
    """

    style: str | None = None
    lambda_: float | Literal["auto"] | None = None
    mode: Mode | None = None
    plausibility: float | None = None
    max_js: float | None = None
    entropy_gate: float | None = None
    steer_stop: bool | None = None
    temperature: float | Literal["auto"] | None = None
    think_temperature: float | None = None
    selector: str | None = None
    chunks: bool | int | Mapping[str, Any] | None = field(default=None, hash=False)

    def __init__(
        self,
        style: str | PathLike | None = None,
        *,
        λ: float | Literal["auto"] | None = None,
        lambda_: float | Literal["auto"] | None = None,
        mode: Mode | None = None,
        plausibility: float | None = None,
        max_js: float | None = None,
        entropy_gate: float | None = None,
        steer_stop: bool | None = None,
        temperature: float | Literal["auto"] | None = None,
        think_temperature: float | None = None,
        selector: str | PathLike | None = None,
        chunks: bool | int | Mapping[str, Any] | None = None,
    ):
        if λ is not None and lambda_ is not None:
            raise DecodingError("give λ or lambda_, not both: they are the same parameter")
        given = {
            "style": style,
            "lambda": λ if lambda_ is None else lambda_,
            "mode": mode,
            "plausibility": plausibility,
            "max_js": max_js,
            "entropy_gate": entropy_gate,
            "steer_stop": steer_stop,
            "temperature": temperature,
            "think_temperature": think_temperature,
            "selector": selector,
            "chunks": chunks,
        }
        for name, value in given.items():
            check_field(name, value)
        check_together(given)
        for name, value in given.items():
            object.__setattr__(self, _attribute(name), _plain(name, value))
        self._open()

    def _open(self) -> None:
        """Opens what was named, so that what is missing or damaged is said now; the embedded selector when used."""
        _ = self._prior, self._selection
        if self.selector is not None:
            _ = self._opened_selector

    @cached_property
    def _prior(self) -> StylePrior | None:
        guards = {name: getattr(self, name) for name in GUARDS}
        return None if self.style is None else StylePrior(self.style, λ=self.lambda_, mode=self.mode, **guards)

    @cached_property
    def _selection(self) -> ChunkSelection | None:
        return None if self.chunks is None else open_selection(self.chunks)

    @cached_property
    def _opened_selector(self) -> TemperatureSelector:
        return open_selector(self.selector)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: without what is open."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens it again, as making it does."""
        self.__dict__.update(state)
        self._open()

    @property
    def λ(self) -> float | Literal["auto"] | None:
        """As ``lambda_``."""
        return self.lambda_

    @property
    def top_p(self) -> float | None:
        """The selector's top-p, which a chosen temperature goes with, for ``model.generate``; None for all tokens."""
        return self._opened_selector.top_p if self.temperature == AUTO else None

    def parts(self) -> list[Any]:
        """What the policy does, bound to nothing, as ``logits_processor`` of `decoding.generate` takes it.

        In the order of their effects, the selection of chunks last, which is no processor. The style is the policy's
        own: leave it as it is.
        """
        return [part for part in (self._prior, self._temperature(), self._selection) if part is not None]

    def _temperature(self) -> Temperature | None:
        think, answer = self.think_temperature, self.temperature
        if answer is None:
            return None
        if answer == "auto":  # another for each call: it keeps what it chose
            return AutoTemperature(self._opened_selector, think=think)
        return FixedTemperature(answer) if think is None else PhaseTemperature(think, answer)

    def processors(self, tokenizer: Any, model: Any) -> list[Any]:
        """Logits processors for one call of ``model.generate``, without the selection of chunks: `attach` has that.

        Args:
            tokenizer: the generating model's.
            model: the generating model.

        Raises:
            DecodingError: the style is another tokenizer's, or the tokenizer has no markers of thinking.
        """
        return bound([part for part in self.parts() if not isinstance(part, ChunkSelection)], tokenizer, model)

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[list[Any]]:
        """Has the model read chunks, if the policy says so, for the block, which is given `processors`.

        Raises:
            DecodingError: as `processors`.
            ChunkError: chunks cannot be selected in the model, or are already.
        """
        processors = self.processors(tokenizer, model)
        if self._selection is None:
            yield processors
            return
        with self._selection.attach(model, tokenizer):
            yield processors

    def as_dict(self) -> dict[str, Any]:
        """The fields that are given, by their names in files; styles and folders as they are called here."""
        return {name: value for name in FIELDS if (value := getattr(self, _attribute(name))) is not None}

    def request_args(self) -> dict[str, Any]:
        """The policy as one request's arguments in vLLM: ``SamplingParams(extra_args=…)``, ``vllm_xargs`` over HTTP.

        The server must have what they name: a style of that name, a selector, chunk selection. What the policy leaves
        out is as the server has it.

        Raises:
            DecodingError: λ="auto", which no request can have, or settings of chunks that are not the budget.
        """
        given = self.as_dict()
        if self.lambda_ == AUTO:
            raise DecodingError(f'λ="{AUTO}" is measured with the model, not by request: give a number')
        if self._prior is not None and self._prior.source is not None:
            given["style"] = self._prior.source.served_name
        if self._selection is not None:
            if other := [name for name in chunk_settings(self.chunks) if name != "budget"]:
                raise DecodingError(f"{', '.join(other)} of chunks cannot vary by request: start the server with it")
            given["chunks"] = self._selection.budget
        return given

    def save_pretrained(self, save_directory: str | PathLike, *, custom_generate: bool = False) -> None:
        """Writes ``policy.json`` to a folder, and beside it what lies on this machine: texts, priors, heads, adapters.

        Args:
            save_directory: the folder.
            custom_generate: whether to write the code too, 4.6 MB, with which
                ``model.generate(custom_generate=FOLDER, trust_remote_code=True, tokenizer=tokenizer, …)`` decodes under
                the policy where this package is not installed.

        Raises:
            DecodingError: nothing can be written there, or what lies there is somebody else's.
        """
        source = None if self._prior is None else self._prior.source
        write_folder(self.as_dict(), save_directory, source, lambda: self._opened_selector, custom_generate)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, custom_generate: bool = False
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository on the hub, made if needed, and returns its address."""
        save = partial(self.save_pretrained, custom_generate=custom_generate)
        return upload(save, "policy", repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | PathLike, *, revision: str | None = None, token: str | None = None
    ) -> Policy:
        """Opens what `save_pretrained` or ``push_to_hub`` wrote.

        Args:
            name_or_path: a folder, or a repository on the Hugging Face hub.
            revision: of the repository.
            token: for the hub.

        Raises:
            DecodingError: nothing there, damaged, of a newer version, or something that it names is missing.
        """
        hub = {name: value for name, value in (("revision", revision), ("token", token)) if value is not None}
        values = read_folder(name_or_path, hub)
        return cls(**{_attribute(name): value for name, value in values.items()})


def _attribute(name: str) -> str:
    """Of a field in a file."""
    return "lambda_" if name == "lambda" else name


def _plain(name: str, value: Any) -> Any:
    """A checked value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: str(each) if isinstance(each, PathLike) else each for key, each in value.items()}
    if isinstance(value, PathLike):
        return str(value)
    is_number = name in ("lambda", "temperature", "think_temperature") and value not in (None, AUTO)
    return float(value) if is_number else value
