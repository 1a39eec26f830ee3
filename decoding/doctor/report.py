"""`examine`: all that can be found out, as one report that can be handed on."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decoding.doctor.facts import ModelFacts, facts_of
from decoding.doctor.machine import Machine, machine
from decoding.doctor.methods import Verdict, in_transformers, in_vllm
from decoding.doctor.speed import Timing, timings
from decoding.models import load_tokenizer, unloaded_model

_FORMAT = "decoding-doctor/1"
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        machine: what is here.
        model: what it is like; None where none was asked about, and then there are no verdicts.
        methods: which methods work with it, in which engine.
        speed: what was measured; empty if nothing was to be.
    """

    machine: Machine
    model: ModelFacts | None
    methods: tuple[Verdict, ...]
    speed: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Values of JSON under keys that stay, without the user's home folder and tokens."""
        return _redacted({"format": _FORMAT, **asdict(self)})


def examine(name: str | None = None, *, with_speed: bool = True) -> Report:
    """Looks at this machine and, without its weights, at a model.

    Args:
        name: a folder, a hub id, or the embedded default's name. A configuration and a tokenizer will do.
        with_speed: whether to measure, which takes some ten seconds.

    Raises:
        DecodingError: no such model, or a configuration or a tokenizer that cannot be read.
    """
    here, facts, verdicts = machine(), None, []
    if name is not None:
        model, tokenizer = unloaded_model(name), load_tokenizer(name)
        facts = facts_of(name, model, tokenizer)
        verdicts = [*in_transformers(model, tokenizer, facts.has_curve), *in_vllm(name, here)]
    measured = timings(None if facts is None else facts.ids) if with_speed else []
    return Report(here, facts, tuple(verdicts), tuple(measured))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(each) for each in value]
    return _without_secrets(value) if isinstance(value, str) else value


def _without_secrets(text: str) -> str:
    home = str(Path.home())
    if len(Path(home).parts) > 1:  # some users' home is the root
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    for token in filter(None, map(os.environ.get, _SECRET_VARIABLES)):
        text = text.replace(token, "***") if len(token) >= _SHORTEST_SECRET else text
    return _SECRET.sub("***", text)
