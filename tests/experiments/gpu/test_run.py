"""The runner, with pieces of our own: what becomes of one is no other's concern, and nothing that was found is lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from decoding import DecodingError
from experiments.gpu.record import DONE, FAILED, INTERRUPTED, NOT_RUN, TIMED_OUT, Record, read
from experiments.gpu.run import NO_TIME, Piece, run
from experiments.lab.figures import Figure


@dataclass(frozen=True)
class Sizes:
    value: float = 2.0
    note: str = ""


def finds(sizes, device, record):
    record.check("it is there", lambda: (True, "yes"))
    record.figure(Figure("found", sizes.value, str(sizes.value), "≤ 3", sizes.value <= 3), "it is there")


def raises(sizes, device, record):
    finds(sizes, device, record)
    raise RuntimeError("the device is gone")


def dies(sizes, device, record):
    os.kill(os.getpid(), signal.SIGKILL)


def lacks(sizes, device, record):
    raise DecodingError("the package p is not installed: pip install p")


def hangs(sizes, device, record):
    finds(sizes, device, record)
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sizes.note).write_text(str(started.pid))
    started.wait()


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def piece(name, measure, seconds=60.0, needs=None, note=""):
    return Piece(name, "tries the runner", seconds, measure, Sizes(note=note), Sizes(1.0), needs)


def ran(folder, *pieces, minutes=8.0, is_toy=False):
    return run(folder, pieces, minutes, is_toy, lambda *_: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """For records. Processes are forked, which takes no time; `test_pieces` starts them as the command does."""
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr("experiments.gpu.run.multiprocessing.get_context", lambda _: forking)
    return tmp_path


def test_a_piece_that_fails_is_recorded_and_the_rest_is_run(folder):
    records = ran(
        folder,
        piece("raises", raises),
        piece("dies", dies),
        piece("lacks", lacks),
        piece("no-module", finds, needs="a_module_that_nobody_has"),
        piece("finds", finds),
    )
    ends = {name: (record["status"], record["why"]) for name, record in records.items()}
    assert ends == {
        "raises": (FAILED, "RuntimeError: the device is gone"),
        "dies": (FAILED, "ended by SIGKILL"),
        "lacks": (NOT_RUN, "the package p is not installed: pip install p"),
        "no-module": (NOT_RUN, "a_module_that_nobody_has is not installed"),
        "finds": (DONE, None),
    }
    assert [figure["value"] for figure in records["raises"]["figures"]] == [2.0]  # found before it failed
    assert {name: read(folder / f"{name}.json") for name in records} == records
    assert "the device is gone" in (folder / "raises.log").read_text()
    assert not (folder / "finds.log").exists()


@pytest.mark.slow
def test_a_piece_out_of_time_ends_with_all_that_it_started_and_keeps_what_it_found(folder):
    note = folder / "started"
    hanging = piece("hangs", hangs, note=str(note))
    began = time.monotonic()
    records = ran(folder, hanging, piece("finds", finds), minutes=0.2)
    assert time.monotonic() - began < 60
    assert (records["hangs"]["status"], records["hangs"]["why"]) == (TIMED_OUT, "after 6 s")
    assert [figure["value"] for figure in records["hangs"]["figures"]] == [2.0]
    assert not is_running(int(note.read_text()))
    assert records["finds"]["status"] == DONE  # in the time that was its own


def test_without_time_nothing_is_begun(folder):
    records = ran(folder, piece("late", finds), piece("later", finds), minutes=1e-12)
    assert {(record["status"], record["why"]) for record in records.values()} == {(NOT_RUN, NO_TIME)}


def test_an_interruption_keeps_what_was_found(folder):
    note, caught = folder / "started", threading.Event()

    def interrupt():
        while not (note.exists() and note.read_text()):
            time.sleep(0.05)
        wait = 0.5  # Python swallows what is raised while a fork returns: until the runner waits
        while not caught.wait(wait):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            wait = 10.0  # on a busy machine the fork may not have returned

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        ran(
            folder, piece("finds", finds), piece("hangs", hangs, note=str(note)), minutes=10.0
        )  # far more than it takes, also on a busy machine
    caught.set()
    assert not is_running(int(note.read_text()))
    assert read(folder / "finds.json")["status"] == DONE
    held = read(folder / "hangs.json")
    assert held["status"] == INTERRUPTED and [figure["value"] for figure in held["figures"]] == [2.0]


def test_what_is_done_is_not_run_again_and_the_rest_is(folder):
    first = ran(folder, piece("done", finds), piece("failed", raises))
    again = ran(folder, piece("done", raises), piece("failed", finds))
    assert again["done"] == first["done"]
    assert (first["failed"]["status"], again["failed"]["status"]) == (FAILED, DONE)
    assert len(again["failed"]["figures"]) == 1


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "r.json", "a-piece", {"name": None}, {"rounds": 3}, is_toy=False)


def test_a_figure_is_written_only_if_its_checks_passed(record, tmp_path):
    record.check("right", lambda: (True, "0 apart"))
    record.check("wrong", lambda: (False, "7 apart"))
    record.check("broken", lambda: 1 / 0)
    for needs in (["right"], ["wrong"], ["right", "wrong"], ["broken"], ["never made"]):
        record.figure(Figure("speed", 4.5, "4.5×", "≥ 4×", True), *needs)
    held = read(tmp_path / "r.json")
    assert [(each["value"], each["met"]) for each in held["figures"]] == [(4.5, True)] + [(None, None)] * 4
    assert [each["shown"].rpartition(": ")[2] for each in held["figures"][1:]] == [
        *("wrong", "wrong", "broken", "never made")
    ]
    assert all(each["target"] == "≥ 4×" for each in held["figures"])
    assert [each["seen"] for each in held["checks"]] == ["0 apart", "7 apart", "ZeroDivisionError: division by zero"]
    with pytest.raises(ValueError, match="which check"):
        record.figure(Figure("speed", 4.5, "4.5×"))


def test_a_check_that_failed_once_has_not_passed(record):
    assert record.check("at each size", lambda: (True, ""))
    record.check("at each size", lambda: (False, ""))
    record.check("at each size", lambda: (True, ""))
    assert not record.passed("at each size")


def test_toy_sizes_have_no_targets_and_say_what_they_are(tmp_path):
    toy = Record(tmp_path / "r.json", "a-piece", {"name": None}, {}, is_toy=True)
    toy.check("right", lambda: (True, ""))
    toy.figure(Figure("speed", 4.5, "4.5×", "≥ 4×", True), "right")
    toy.absent("another", "no card here", "≥ 5×")
    held = json.loads((tmp_path / "r.json").read_text())
    assert [(each["target"], each["met"]) for each in held["figures"]] == [("", None)] * 2
    assert "nothing here is a speed" in held["sizes"]
