"""Runs pieces one after the other, each in a process of its own: none can end another, or keep its memory."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from decoding.errors import DecodingError
from experiments.gpu.record import DONE, FAILED, INTERRUPTED, NOT_RUN, RUNNING, TIMED_OUT, Record, close, read, said
from experiments.lab.device import card, device_here

NO_TIME = "no time left"
_LEAST = 0.5  # of a piece's share of the time: with less it is not begun


@dataclass(frozen=True)
class Piece:
    """One thing to measure, whatever becomes of the others.

    Attributes:
        name: for ``--only`` and of its file.
        title: what it says, for people.
        seconds: its share of the time, when all pieces together have eight minutes.
        measure: ``measure(settings, device, record)`` measures, and adds to the record what it finds as it finds it. A
            `DecodingError` says that something is not here.
        settings: a dataclass: sizes for a card.
        toy: the same at sizes that a CPU can do.
        needs: a module without which it is not run.
    """

    name: str
    title: str
    seconds: float
    measure: Callable[[Any, torch.device, Record], None]
    settings: Any
    toy: Any
    needs: str | None = None


def run(
    folder: Path,
    pieces: Sequence[Piece],
    minutes: float,
    is_toy: bool,
    show: Callable[[Piece, dict[str, Any] | None], None],
) -> dict[str, dict[str, Any]]:
    """Runs the pieces that are not done yet. Their records are ``folder/NAME.json``.

    A piece may take its share of the minutes, and what those before it left over.

    Args:
        folder: there already.
        pieces: in order of worth.
        minutes: for all that are run.
        is_toy: at toy sizes.
        show: is told of each piece when it begins, with None, and when it is over, with its record.

    Returns:
        Records by name.
    """
    paths = {piece.name: folder / f"{piece.name}.json" for piece in pieces}
    records = {name: record for name, path in paths.items() if (record := read(path)) and record["status"] == DONE}
    todo = [piece for piece in pieces if piece.name not in records]
    missing = [piece for piece in todo if piece.needs and importlib.util.find_spec(piece.needs) is None]
    shares = _shares([piece for piece in todo if piece not in missing], 60 * minutes)
    deadline = time.monotonic() + 60 * minutes
    for piece in todo:
        path = paths[piece.name]
        path.unlink(missing_ok=True)
        if piece in missing:
            records[piece.name] = close(path, piece.name, NOT_RUN, f"{piece.needs} is not installed", 0)
        else:
            share, left = shares.pop(piece.name), deadline - time.monotonic()
            if left < _LEAST * share:
                records[piece.name] = close(path, piece.name, NOT_RUN, NO_TIME, 0)
            else:
                show(piece, None)
                limit = min(max(share, left - sum(shares.values())), left)
                records[piece.name] = _run_one(piece, path, limit, is_toy)
        show(piece, records[piece.name])
    return {piece.name: records[piece.name] for piece in pieces}


def _shares(pieces: Sequence[Piece], seconds: float) -> dict[str, float]:
    total = sum(piece.seconds for piece in pieces)
    return {piece.name: seconds * piece.seconds / total for piece in pieces}


def _run_one(piece: Piece, path: Path, limit: float, is_toy: bool) -> dict[str, Any]:
    """In a process of its own, until it ends or its time is over."""
    log = path.with_suffix(".log")
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(piece, path, log, is_toy))
    began = time.monotonic()
    process.start()
    try:
        process.join(limit)
    except KeyboardInterrupt:
        _kill(process)
        close(path, piece.name, INTERRUPTED, None, time.monotonic() - began)
        raise
    seconds, is_late, code = time.monotonic() - began, process.is_alive(), process.exitcode
    _kill(process)
    held = read(path) or {"status": RUNNING}
    if held["status"] != RUNNING:
        status, why = held["status"], held["why"]
    elif is_late:
        status, why = TIMED_OUT, f"after {limit:.0f} s"
    else:
        status, why = FAILED, _end(code)
    if status == DONE:
        log.unlink(missing_ok=True)
    return close(path, piece.name, status, why, seconds)


def _kill(process: Any) -> None:
    """With all that it has started, also where it has ended by itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come as far as to lead a group, or nobody is left
        process.kill()
    process.join()


def _end(code: int | None) -> str:
    return f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"


def _child(piece: Piece, path: Path, log: Path, is_toy: bool) -> None:
    """The piece's process. What becomes of it once its record has ended is no part of the piece."""
    os.setsid()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        device = device_here()
        settings = piece.toy if is_toy else piece.settings
        torch.manual_seed(0)
        record = Record(path, piece.name, card(device), asdict(settings), is_toy)
        try:
            piece.measure(settings, device, record)
        except DecodingError as error:
            record.end(NOT_RUN, str(error))
        except Exception as error:
            traceback.print_exc(file=file)
            record.end(FAILED, said(error))
        else:
            record.end(DONE)
