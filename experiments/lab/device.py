"""A device under measurement: times by its own clock, of calls and of CUDA graphs; its bandwidth; what it is."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from decoding.environment import installed

_WARM = 3
_BEYOND_CACHES = 1 << 28  # bytes: more than a card's last cache holds
T = TypeVar("T")


def device_here() -> torch.device:
    """The first card, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish(device: torch.device) -> None:
    """Waits until all that a device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside, an operator for which the host waits for a card raises a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def replayed(step: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """A step as a CUDA graph that is replayed, on the same tensors each time. On a CPU it is the step itself.

    Args:
        step: works on the device. It is called a few times before it is captured.
        device: where.

    Returns:
        What replays it, and returns what the captured call returned.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def device_seconds(
    works: Sequence[Callable[[], Any]], rounds: int, device: torch.device, *, cold: bool = False
) -> np.ndarray:
    """Seconds [works, rounds], by a card's own clock; the works take turns.

    Args:
        works: each is done once untimed first.
        rounds: how often each is timed.
        device: where they work.
        cold: clear a card's caches before each, so that nothing is read from there that lay in memory.
    """
    for work in works:
        work()
    finish(device)
    if device.type != "cuda":
        return np.array([[_host_seconds(work) for work in works] for _ in range(rounds)]).T
    other = torch.empty(_BEYOND_CACHES if cold else 0, dtype=torch.uint8, device=device)
    seconds = np.zeros((len(works), rounds))
    for i in range(rounds):
        events = []
        for work in works:
            other.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        finish(device)
        seconds[:, i] = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return seconds


def _host_seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second that a copy of ``size`` bytes reads and writes: the median of twenty."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = device_seconds([lambda: target.copy_(source)], 20, device)
    return 2 * size / float(np.median(seconds))


def card(device: torch.device) -> dict[str, Any]:
    """What results say of a card: its name, memory in bytes, kind, and the versions of what drives it."""
    if device.type != "cuda":
        return {"name": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory": found.total_memory,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cards": torch.cuda.device_count(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": installed(["triton"]).get("triton"),
    }


def _driver() -> str | None:
    """The driver's version, where nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.split("\n")[0].strip() or None
