"""Which path a step takes: tensor operations of PyTorch, or kernels of Triton, which is only imported where it runs.

The environment variable `SWITCH` says which, and is read at every call, so that one process can compare both:

- auto: kernels on NVIDIA cards that Triton compiles for, where it is installed and a first step is right; else PyTorch.
- torch: PyTorch.
- triton: kernels; on a CPU Triton's interpreter runs them, slowly, if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module

import torch

from ngram.errors import NGramError

SWITCH = "DECODING_KERNELS"
CHOICES = ("auto", "torch", "triton")
_LEAST_VERSION = (3, 6)
_LEAST_CAPABILITY = (8, 0)


def uses_triton(device: torch.device) -> bool:
    """Whether what runs on ``device`` runs as kernels of Triton.

    Raises:
        NGramError: the switch has no such value, or asks for kernels that cannot run here.
    """
    choice = _choice()
    if choice == "torch":
        return False
    if choice == "auto":
        return device.type == "cuda" and _is_compiled_for(device)
    if not is_interpreted() and device.type != "cuda":
        raise NGramError(
            f"{SWITCH}=triton, but Triton has no kernels for a device of type {device.type}: set {SWITCH}=auto, or "
            "TRITON_INTERPRET=1 before Python starts to run them slowly on the host"
        )
    if not _has_triton():
        least = ".".join(map(str, _LEAST_VERSION))
        raise NGramError(f"{SWITCH}=triton needs Triton {least} or newer: pip install -U triton, or set {SWITCH}=auto")
    return True


def asks_for_triton(device: torch.device) -> bool:
    """Whether the switch says so in a word: for kernels that no card has been seen to run, which "auto" leaves alone.

    Raises:
        NGramError: as `uses_triton`.
    """
    return _choice() == "triton" and uses_triton(device)


def _choice() -> str:
    choice = os.environ.get(SWITCH) or "auto"
    if choice not in CHOICES:
        raise NGramError(f"{SWITCH} must be one of {', '.join(CHOICES)}, not {choice!r}")
    return choice


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the host, one operation after the other."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _is_compiled_for(device: torch.device) -> bool:
    if torch.version.hip or is_interpreted() or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    if not _has_triton():
        return False
    from ngram import kernel_trial

    try:
        kernel_trial.try_on(device)
    except Exception as error:  # such as: no C compiler, which Triton needs for its launches
        reason = f"Triton cannot run kernels on {device} ({error}): PyTorch's operations add the priors, more slowly"
        warnings.warn(f"{reason}. {SWITCH}=torch does without this message", stacklevel=2)
        return False
    return True


@cache
def _has_triton() -> bool:
    try:
        version = import_module("triton").__version__
        import_module("triton.language")
    except ImportError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= _LEAST_VERSION
