"""A model on this machine, for any number of visitors."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch

from chunkllm import ChunkAdapters, ChunkError, ChunkSelection
from chunkllm.models import model_shape
from decoding.models import DEFAULT_MODEL, load_model, load_tokenizer
from decoding.playground.asked import Asked
from decoding.playground.turns import Line, RandomState, Turns, until_done
from decoding.playground.view import STOPPED, Side, View
from decoding.playground.writing import Writing
from decoding.policy import Policy
from decoding.policy.values import EMBEDDED
from decoding.style.background import model_frequencies
from decoding.temperature.processors import FixedTemperature
from decoding.tokens import has_chat_template

_MEASURING = "the model is measured"
_WRITING = "somebody else's text is being written"


class LocalModel:
    """Writes with a model of transformers. One visitor at a time has it; the others wait their turn.

    Args:
        name: a folder, a hub id, or the embedded default's name.
        dtype: as for `decoding.models.load_model`.

    Attributes:
        name: of the model.
        chats: whether it is made to be talked to.
        adapters: those of its own that chunks are selected with, as `Policy` takes them; None without.

    Raises:
        DecodingError: no such model.
    """

    server = None

    def __init__(self, name: str = DEFAULT_MODEL, dtype: str = "auto"):
        self.name = name
        self.tokenizer = load_tokenizer(name)
        self.chats = has_chat_template(self.tokenizer)
        self._steered = load_model(name, dtype)
        self._plain = _twin(self._steered)
        self.adapters = EMBEDDED if _fit(self._steered) else None
        self.line = Line()
        self._measured = threading.Event()
        self._measured.set()
        self._share = 0.0  # of measuring that is done

    def prepare(self) -> threading.Thread:
        """Measures the model for mode "ratio" in the background, if that was never done. Visitors come first."""
        self._measured.clear()
        thread = threading.Thread(target=self._measure, daemon=True)
        thread.start()
        return thread

    def _measure(self) -> None:
        self._place = self.line.enter(_MEASURING)
        try:
            self.line.ahead(self._place, threading.TIMEOUT_MAX)
            model_frequencies(self._plain, self.tokenizer, self._give_way)
        finally:
            self._measured.set()
            self.line.leave(self._place)

    def _give_way(self, share: float) -> None:
        """Lets visitors who are there have the model, between two steps of the measuring."""
        self._share = share
        if self.line.is_awaited():
            state = RandomState(self._plain.device)
            self.line.leave(self._place)
            self._place = self.line.enter(_MEASURING)
            self.line.ahead(self._place, threading.TIMEOUT_MAX)
            state.restore()

    def write(self, asked: Asked, stop: threading.Event) -> Generator[View]:
        """Writes both texts side by side.

        Args:
            asked: what a visitor wants.
            stop: set when they do not want it any more.

        Yields:
            What is known, several times a second; the last one when all is done.

        Raises:
            DecodingError: it cannot be had. ChunkError: chunks cannot be selected in the model.
        """
        policy = asked.policy(self.adapters)
        while asked.mode == "ratio" and not self._measured.wait(0.5) and not stop.is_set():
            yield View(
                f"What the model writes by itself is measured, once: {100 * self._share:.0f} % are done. "
                "Mode ratio needs that; mode paper writes at once."
            )
        place = self.line.enter(_WRITING)
        try:
            began = perf_counter()
            while (ahead := self.line.ahead(place, seconds=0.5)) and not stop.is_set():
                yield View(f"You wait, number {len(ahead)} in line, for {perf_counter() - began:.0f} s: {ahead[0]}.")
            if stop.is_set():
                yield View("Stopped.", Side(end=STOPPED), Side(end=STOPPED))
            else:
                yield from self._write(asked, policy, stop)
        finally:
            self.line.leave(place)

    def _write(self, asked: Asked, policy: Policy, stop: threading.Event) -> Generator[View]:
        with ThreadPoolExecutor(1) as worker:
            binding = worker.submit(policy.processors, self.tokenizer, self._steered)
            for seconds in until_done([binding]):
                yield View(f"The style is read, for {seconds:.0f} s. A new one is counted first.")
        device = self._steered.device
        view, turns = View("Writing."), Turns(2, device, stop)
        with ExitStack() as opened:
            opened.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            selection = next((part for part in policy.parts() if isinstance(part, ChunkSelection)), None)
            chunks = selection and opened.enter_context(selection.attach(self._steered, self.tokenizer))
            workers = opened.enter_context(ThreadPoolExecutor(2))
            opened.callback(stop.set)  # whatever happened, before the workers are waited for
            plain = Writing(asked, turns, 0, view.plain)
            steered = Writing(asked, turns, 1, view.steered, chunks)
            beside = [FixedTemperature(asked.plain_temperature)]
            writers = [
                workers.submit(plain.write, self._plain, self.tokenizer, beside),
                workers.submit(steered.write, self._steered, self.tokenizer, binding.result()),
            ]
            for _ in until_done(writers):
                yield view
        view.status = "Stopped." if STOPPED in (view.plain.end, view.steered.end) else "Done."
        yield view


def _twin(model: Any) -> Any:
    """A model with modules of its own and the same weights, so that what is attached to one leaves the other alone."""
    shared = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in shared})


def _fit(model: Any) -> bool:
    """Whether the embedded adapters are for such a model."""
    try:
        return ChunkAdapters.from_pretrained().config.shape == model_shape(model)
    except ChunkError:
        return False
