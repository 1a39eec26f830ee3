"""Which methods work with a model, found out by what they do themselves when they are attached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import decoding
from chunkllm import ChunkAdapters, ChunkError, ChunkSelection
from decoding.doctor.machine import Machine, vllm_install
from decoding.errors import DecodingError
from decoding.models import resolve_model
from decoding.style.prior import StylePrior
from decoding.style.source import Corpus
from decoding.style.training import train_prior
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import AutoTemperature
from ngram import NGramError

METHODS = ("style", "temperature", "phases", "chunks")
ENGINES = ("transformers", "vllm")
_TEXT = "The captain said that the sea was black with rain, and the men went down to the boats. " * 8
_SECONDS = 300
_CHUNK_FIX = "leave chunk selection out for this model: it then reads everything"
_FIXES = {
    "transformers": {"phases": 'PhaseTemperature(think, answer, begin="…", end="…")', "chunks": _CHUNK_FIX},
    "vllm": {"phases": "decoding serve --phase-markers BEGIN END", "chunks": _CHUNK_FIX},
}


@dataclass(frozen=True)
class Verdict:
    """Whether a method works with a model in an engine.

    Attributes:
        method: one of `METHODS`.
        engine: one of `ENGINES`.
        works: None if that could not be found out.
        why: it does not, in the method's own words.
        fix: the command or setting that helps, where ``why`` does not name it.
        note: how it works.
    """

    method: str
    engine: str
    works: bool | None
    why: str | None = None
    fix: str | None = None
    note: str | None = None


def in_transformers(model: Any, tokenizer: Any, has_curve: bool | None) -> Iterator[Verdict]:
    """What works in ``generate``.

    Args:
        model: without its weights.
        tokenizer: its tokenizer.
        has_curve: whether the embedded selector's curve is of this model, as far as is known.
    """
    checks: dict[str, Callable[[], str | None]] = {
        "style": lambda: _style(model, tokenizer),
        "temperature": lambda: _temperature(model, tokenizer, has_curve),
        "phases": lambda: _phases(tokenizer),
        "chunks": lambda: _chunks(model, tokenizer),
    }
    for method, check in checks.items():
        try:
            yield Verdict(method, "transformers", True, note=check())
        except (DecodingError, ChunkError, NGramError) as error:
            yield _refused(method, "transformers", str(error))
        except Exception as error:  # Models and tokenizers of others raise what they like.
            said = " ".join(str(error).split())
            yield _refused(method, "transformers", f"{type(error).__name__}: {said}")


def _refused(method: str, engine: str, why: str) -> Verdict:
    return Verdict(method, engine, False, why, _FIXES[engine].get(method))


def _style(model: Any, tokenizer: Any) -> None:
    """Trains a prior of a few words, and steers a step of as many ids as the model scores."""
    prior = train_prior(Corpus("doctor", (_TEXT,)), tokenizer)
    width = model.config.get_text_config(decoder=True).vocab_size
    ids = tokenizer(_TEXT, return_tensors="pt")["input_ids"][:, :8]
    StylePrior(prior, λ=1.0).bound(tokenizer, model)(ids, torch.zeros(1, width))


def _temperature(model: Any, tokenizer: Any, has_curve: bool | None) -> str:
    bound = AutoTemperature().bound(tokenizer, model)
    chosen = "this model's own curve" if has_curve else f"the paper's table for {bound.model_size} models"
    return f"by {chosen}, with top-p {bound.selector.top_p}"


def _phases(tokenizer: Any) -> None:
    PhaseTemperature().bind(tokenizer)


def _chunks(model: Any, tokenizer: Any) -> str:
    with ChunkSelection().attach(model, tokenizer) as attached:
        full = len(attached.plan.shape.full_layers)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    selecting = f"{full} of {layers} layers select"
    unseen = "" if model.device.type != "meta" else "; with its weights it is compared with the model's own attention"
    try:
        with ChunkSelection(ChunkAdapters.from_pretrained()).attach(model):
            return f"{selecting}; the embedded adapters have its shape{unseen}"
    except ChunkError as error:
        return f"{selecting}, by punctuation and pooled keys; of the embedded adapters: {error}{unseen}"


def in_vllm(name: str, here: Machine) -> Iterator[Verdict]:
    """What works in vLLM, which tries the methods in a process of its own, without the model's weights."""
    if here.engines["vllm"] is None:
        yield from (Verdict(method, "vllm", False, "vLLM is not installed", vllm_install()) for method in METHODS)
        return
    found = _tried(name)
    for method in METHODS:
        if found["engine"] is not None:
            fix = f"write with transformers: decoding generate --model {name}"
            yield Verdict(method, "vllm", found["works"], found["engine"], fix)
        elif method == "chunks" and not here.vllm_plugin.works:
            yield Verdict(method, "vllm", False, here.vllm_plugin.why, here.vllm_plugin.fix)
        elif found[method] is not None:
            yield _refused(method, "vllm", found[method])
        else:
            yield Verdict(method, "vllm", True)


def _tried(name: str) -> dict[str, Any]:
    """What `decoding.vllm.trial` writes of a model; ``engine`` says why there is nothing, and ``works`` if that is it.

    vLLM logs, keeps state in its process and may end it: hence another one, which finds the packages that this does.
    """
    packages = os.pathsep.join(filter(None, [str(Path(decoding.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, "PYTHONPATH": packages, "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder) / "doctor.txt", Path(folder) / "found.json"
        text.write_text(_TEXT, encoding="utf-8")
        command = [sys.executable, "-P", "-m", "decoding.vllm.trial", resolve_model(name), str(text), str(out)]
        try:
            done = subprocess.run(command, env=surroundings, capture_output=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"engine": f"vLLM did not answer within {_SECONDS} seconds", "works": None}
        if out.is_file():
            return json.loads(out.read_bytes()) | {"works": False}
        last = next(reversed(done.stderr.decode(errors="replace").split("\n")[:-1]), "it said nothing")
        return {"engine": f"vLLM ended with status {done.returncode}: {last}", "works": None}
