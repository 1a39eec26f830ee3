"""Saved temperature selectors: settings in JSON, heads in safetensors. Checked when written and when read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from decoding.errors import DecodingError
from decoding.hub import find_file, find_folder
from decoding.models import model_fingerprint
from decoding.temperature.abilities import ABILITIES
from decoding.temperature.encoder import LEAST_WINDOW, Encoder, Reading, load_encoder
from decoding.temperature.heads import AbilityHead, CurveHead
from ngram.storage import write_atomically

CONFIG_FILE = "temperature_selector.json"
HEADS_FILE = "temperature_selector.safetensors"
ENCODER_FOLDER = "encoder"
_WHAT = "temperature selector"
_REMEDY = "take a whole copy of its folder, or make it again with `decoding temperature train`"
# Format 1 is that of version 0.1.0: texts are read whole, and whatever their language.
_READING: dict[int, Reading] = {1: "whole", 2: "parts"}
_WIDEST_WINDOW = 1 << 16


class SavedSelector(NamedTuple):
    """What a folder holds, but for the encoder."""

    encoder: str  # a name, or `ENCODER_FOLDER` for one that lies in the folder
    encoder_fingerprint: str
    window: int
    reading: Reading
    multilingual: bool
    tolerance: float
    caution: float
    about: dict[str, Any]
    ability: AbilityHead
    curve: CurveHead | None = None
    curve_ability: AbilityHead | None = None

    def heads_on(self, device: str) -> list[Any]:
        """`ability`, `curve` and `curve_ability`, on a device."""
        heads: tuple[Any, ...] = (self.ability, self.curve, self.curve_ability)
        return [
            head and head._make(tensor if tensor is None else tensor.to(device) for tensor in head) for head in heads
        ]


_HEADS = {"ability": AbilityHead, "curve": CurveHead, "curve_ability": AbilityHead}
_SETTINGS = ("encoder", "encoder_fingerprint", "window", "multilingual", "tolerance", "caution", "about")


def write_folder(saved: SavedSelector, folder: str | PathLike) -> None:
    """Writes settings and heads.

    Raises:
        DecodingError: some that `read_folder` would refuse, before anything is written.
    """
    heads = {name: head._asdict() for name in _HEADS if (head := getattr(saved, name)) is not None}
    tensors = {f"{part}.{name}": t for part, head in heads.items() for name, t in head.items() if t is not None}
    config = {
        "format": next(number for number, reading in _READING.items() if reading == saved.reading),
        "abilities": list(ABILITIES),
        **{name: getattr(saved, name) for name in _SETTINGS},
    }
    try:
        _check_settings(config)
        _check_tensors(tensors)
        settings = json.dumps(config, indent=1, ensure_ascii=False).encode()
    except (_UnfitError, TypeError, ValueError) as error:
        raise DecodingError(f"this temperature selector cannot be saved: {error}") from error
    write_atomically(Path(folder) / HEADS_FILE, save({name: value.contiguous() for name, value in tensors.items()}))
    write_atomically(Path(folder) / CONFIG_FILE, settings)


def read_folder(name_or_path: str | PathLike, hub: dict[str, Any]) -> SavedSelector:
    """Reads settings and heads, on the host, from a folder or a repository on the hub.

    Raises:
        DecodingError: nothing there, damaged, or of a newer version.
    """
    config_path, heads_path = (find_file(name_or_path, file, _WHAT, hub) for file in (CONFIG_FILE, HEADS_FILE))
    config = _read(config_path, lambda path: json.loads(path.read_bytes()), name_or_path)
    _check_is_not_newer(config_path, config)
    _with_errors_of(config_path, lambda: _check_settings(config))
    tensors = _read(heads_path, load_file, name_or_path)
    _with_errors_of(heads_path, lambda: _check_tensors(tensors))
    settings = {name: config[name] for name in _SETTINGS if name in config}
    heads = {part: _part(tensors, part) for part in _HEADS}
    made = {part: kind(**heads[part]) for part, kind in _HEADS.items() if heads[part]}
    return SavedSelector(reading=_READING[config["format"]], **({"multilingual": True} | settings), **made)


def read_encoder(where: str | PathLike, saved: SavedSelector, device: str, hub: dict[str, Any]) -> Encoder:
    """The encoder that a selector names, or that lies in its folder.

    Raises:
        DecodingError: none there, a damaged one, or another than the heads were trained on.
    """
    path, name, is_carried = Path(where) / CONFIG_FILE, saved.encoder, saved.encoder == ENCODER_FOLDER
    if is_carried:
        name = str(find_folder(where, ENCODER_FOLDER, "encoder", hub))
    try:
        encoder = load_encoder(name, saved.window, device, saved.reading, saved.multilingual)
    except DecodingError as error:
        hint = "`decoding temperature train` makes a selector with another"
        raise DecodingError(f"the encoder of {path}: {error} ({hint})") from error
    if saved.encoder_fingerprint != model_fingerprint(encoder.model) or saved.ability.width != encoder.width:
        raise DecodingError(f"the heads beside {path} were trained on another encoder than this {name}: {_REMEDY}")
    return encoder.named(ENCODER_FOLDER) if is_carried else encoder


class _UnfitError(Exception):
    """Says which field is wrong, and what it must be."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _UnfitError(message)


def _damaged(path: Path, reason: object) -> DecodingError:
    return DecodingError(f"{path} is damaged: {reason}: {_REMEDY}")


def _with_errors_of(path: Path, check: Callable[[], None]) -> None:
    """Runs a check; what it finds wrong is the file's damage."""
    try:
        check()
    except _UnfitError as error:
        raise _damaged(path, error) from error


def _read(path: Path, read: Callable[[Path], Any], where: str | PathLike) -> Any:
    if not path.is_file():
        raise DecodingError(f"no {_WHAT} at {where}: there is no {path.name}")
    try:
        return read(path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error


def _is_number(value: Any, most: float = math.inf) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= most and value < math.inf


# What each setting must be.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "abilities": (f"the list {', '.join(ABILITIES)}", lambda value: value == list(ABILITIES)),
    "encoder": ("a name", lambda value: isinstance(value, str) and bool(value.strip())),
    "encoder_fingerprint": ("a text", lambda value: isinstance(value, str)),
    "window": (
        f"a whole number from {LEAST_WINDOW} to {_WIDEST_WINDOW}",
        lambda value: type(value) is int and LEAST_WINDOW <= value <= _WIDEST_WINDOW,
    ),
    "multilingual": ("true or false", lambda value: isinstance(value, bool)),
    "tolerance": ("a number from 0 to 1", lambda value: _is_number(value, 1)),
    "caution": ("a number of at least 0", _is_number),
    "about": ("an object", lambda value: isinstance(value, dict)),
}


def _check_is_not_newer(path: Path, config: Any) -> None:
    number = config.get("format") if isinstance(config, dict) else None
    if type(number) is int and number > max(_READING):
        raise DecodingError(f"{path} has format {number}, which a newer version made: upgrade decoding-middleware")


def _check_settings(config: Any) -> None:
    _require(isinstance(config, dict), "it holds no object of settings")
    number = config.get("format")
    _require(type(number) is int and number in _READING, f"format must be 1 to {max(_READING)}, not {_shown(number)}")
    for name, (what, holds) in _FIELDS.items():
        if name == "multilingual" and number == 1:
            continue
        _require(name in config, f"{name} is missing")
        _require(holds(config[name]), f"{name} must be {what}, not {_shown(config[name])}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


# The sizes of each tensor's dimensions, by name.
_Shapes = Mapping[str, tuple[str, ...]]
_LINEAR: _Shapes = {"weight": ("abilities", "width"), "bias": ("abilities",)}
_LAYERS: _Shapes = {
    "hidden": ("units", "width"),
    "hidden_bias": ("units",),
    "weight": ("abilities", "units"),
    "bias": ("abilities",),
}
_CURVE: _Shapes = {
    "temperatures": ("temperatures",),
    "fixed": ("one",),
    "centre": ("width",),
    "components": ("components", "width"),
    "coefficients": ("features", "temperatures"),
    "errors": ("temperatures", "features", "features"),
}


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    width = _check_classifier(tensors, "ability")
    if _part(tensors, "curve_ability"):
        _require(bool(_part(tensors, "curve")), "curve is missing, whose classifier curve_ability is")
        own = _check_classifier(tensors, "curve_ability")
        _require(own <= width, f"curve_ability reads vectors of {own} numbers, and ability of {width}")
        width = own
    if curve := _part(tensors, "curve"):
        _check_curve(curve, width)
    unknown = [name for name in tensors if name.partition(".")[0] not in _HEADS]
    _require(not unknown, f"{', '.join(unknown)} is no part of a selector")


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _check_classifier(tensors: Mapping[str, Tensor], part: str) -> int:
    """The length of the vectors that it reads."""
    held = _part(tensors, part)
    shapes = _LAYERS if held.keys() & _LAYERS.keys() - _LINEAR.keys() else _LINEAR
    return _check_shapes(held, part, shapes, {"abilities": len(ABILITIES)})["width"]


def _check_curve(held: Mapping[str, Tensor], width: int) -> None:
    sizes = {"one": 1, "width": width}
    if "components" in held and held["components"].ndim:
        sizes["features"] = len(ABILITIES) + len(held["components"]) + 1
    _check_shapes(held, "curve", _CURVE, sizes)
    temperatures, fixed = held["temperatures"], int(held["fixed"])
    are_fine = len(temperatures) > 0 and bool((temperatures > 0).all() and (temperatures.diff() > 0).all())
    _require(are_fine, "curve.temperatures must be positive numbers that ascend")
    last = len(temperatures) - 1
    _require(0 <= fixed <= last, f"curve.fixed must be from 0 to {last}, the place of a temperature, not {fixed}")


def _check_shapes(held: Mapping[str, Tensor], part: str, shapes: _Shapes, sizes: dict[str, int]) -> dict[str, int]:
    """Checks all tensors of a part against each other, and returns the sizes of the dimensions."""
    for name, dimensions in shapes.items():
        _require(name in held, f"{part}.{name} is missing")
        tensor, dtype = held[name], torch.int64 if name == "fixed" else torch.float32
        wanted = [sizes.get(dimension, dimension) for dimension in dimensions]
        fits = tensor.dtype == dtype and tensor.ndim == len(dimensions)
        for dimension, size in zip(dimensions, tensor.shape, strict=False):
            fits = fits and sizes.setdefault(dimension, size) == size
        _require(fits, f"{part}.{name} must be {_named(dtype, wanted)}, not {_named(tensor.dtype, tensor.shape)}")
        _require(bool(tensor.isfinite().all()), f"{part}.{name} holds numbers that are not finite")
    unknown = [f"{part}.{name}" for name in held if name not in shapes]
    _require(not unknown, f"{', '.join(unknown)} is no part of a selector")
    return sizes


def _named(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"
