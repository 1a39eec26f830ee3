"""Saved policies: one file of JSON, and beside it what lay on the machine that wrote it. Checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from chunkllm.adapters import CONFIG_FILE as ADAPTERS_CONFIG
from chunkllm.adapters import WEIGHTS_FILE as ADAPTERS_WEIGHTS
from chunkllm.calibration import is_calibration
from decoding.errors import DecodingError
from decoding.files import exists
from decoding.hub import find_file, find_folder, may_be_hub_id
from decoding.policy.carried import write_custom_generate
from decoding.policy.values import EMBEDDED, FIELDS, check_field, check_together
from decoding.style.files import CONFIG_FILE, PRIOR_FILE, RATIO_FILE
from decoding.style.readers import files_of, has_known_suffix, is_text_file
from decoding.style.registered import registered_styles
from decoding.style.source import StyleSource
from decoding.temperature.selector import TemperatureSelector
from ngram import NGramError
from ngram.storage import write_atomically

POLICY_FILE = "policy.json"
STYLE, SELECTOR, ADAPTERS, CUSTOM_GENERATE = _PARTS = ("style", "selector", "adapters", "custom_generate")
_HERE = "./"  # How a reference begins that leads to the policy's own folder.
_FORMAT = 1
_WHAT = "policy"
_REMEDY = "take a whole copy of its folder, or save it again"


def write_folder(
    values: dict[str, Any],
    folder: str | PathLike,
    source: StyleSource | None,
    selector: Callable[[], TemperatureSelector],
    custom_generate: bool,
) -> None:
    """Writes the file, and what lies on this machine into folders beside it.

    Args:
        values: a policy's fields by their names in files, without those that are None.
        folder: where to.
        source: its style.
        selector: opens its selector.
        custom_generate: whether to carry what ``model.generate`` finds there.

    Raises:
        DecodingError: nothing can be written there, a part cannot be read any more, the folder is among the style's
            texts, or one that stands where a part should was put there by no policy.
    """
    folder = Path(folder)
    is_ours = exists(folder / POLICY_FILE)
    if not is_ours and (theirs := [part for part in _PARTS if exists(folder / part)]):
        raise DecodingError(f"{folder} has something called {theirs[0]} that no policy put there: save to another")
    if (
        source is not None
        and source.is_text
        and Path(source.where).resolve() in (folder / POLICY_FILE).resolve().parents
    ):
        raise DecodingError(f"{folder} is among the style's own texts, which a copy would join: save to another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as beside:
            carried = _carry(values, source, selector, Path(beside))
            if custom_generate:
                write_custom_generate(Path(beside) / CUSTOM_GENERATE)
            for part in _PARTS:
                _put(Path(beside) / part, folder / part)
        config = {"format": _FORMAT, **values, **carried}
        write_atomically(folder / POLICY_FILE, json.dumps(config, indent=1, ensure_ascii=False).encode())
    except (OSError, NGramError) as error:
        raise DecodingError(f"the policy cannot be saved to {folder}: {error}") from error


def _put(new: Path, place: Path) -> None:
    """Moves a part to its place. One that was there goes, also if there is none now."""
    if place.exists():
        shutil.rmtree(place)
    if new.exists():
        os.replace(new, place)


def _carry(
    values: dict[str, Any], source: StyleSource | None, selector: Callable[[], TemperatureSelector], folder: Path
) -> dict[str, Any]:
    """Copies what lies on this machine, and returns the fields that refer to it, as they are to be written."""
    fields: dict[str, Any] = {}
    if source is not None:
        fields["style"] = _carry_style(source, folder / STYLE)
    if _is_folder(values.get("selector")):
        selector().save_pretrained(folder / SELECTOR)  # with its encoder, which may lie elsewhere
        fields["selector"] = f"{_HERE}{SELECTOR}"
    chunks = values.get("chunks")
    if isinstance(chunks, dict) and _is_folder(chunks.get("adapters")):
        config, weights = (Path(chunks["adapters"], name) for name in (ADAPTERS_CONFIG, ADAPTERS_WEIGHTS))
        _copy([config] if is_calibration(config) else [config, weights], folder / ADAPTERS)
        fields["chunks"] = chunks | {"adapters": f"{_HERE}{ADAPTERS}"}
    return fields


def _is_folder(name: str | None) -> bool:
    return name not in (None, EMBEDDED) and Path(str(name)).is_dir()


def _carry_style(source: StyleSource, folder: Path) -> str:
    """Copies a style's files, if it has any, and returns what it is then called."""
    if source.kind in ("registered", "hub"):
        return source.where
    path = Path(os.path.abspath(source.where))  # follows no link: the hub's cache would take the name away
    name = path.name
    if not path.is_dir():
        _copy([path], folder)
    elif source.kind == "prior":
        name = PRIOR_FILE
        _copy([path / PRIOR_FILE], folder)
    elif source.kind == "style":
        _copy([path / file for file in (PRIOR_FILE, CONFIG_FILE, RATIO_FILE) if exists(path / file)], folder / name)
    else:
        for each in filter(is_text_file, files_of(path)):
            _copy([each], (folder / name / each.relative_to(path)).parent)
    field = "" if source.field is None else f"#{source.field}"
    return f"{_HERE}{STYLE}/{name}{field}"


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def read_folder(name_or_path: str | PathLike, hub: dict[str, Any]) -> dict[str, Any]:
    """The fields of a policy, those that refer to its folder as paths.

    Args:
        name_or_path: a folder, or a repository on the hub.
        hub: options of ``hf_hub_download``.

    Raises:
        DecodingError: nothing there, damaged, or of a newer version.
    """
    path = find_file(name_or_path, POLICY_FILE, _WHAT, hub)
    if not path.is_file():
        raise DecodingError(f"no {_WHAT} at {name_or_path}: there is no {POLICY_FILE}")
    values = _checked(path)

    def opened(part: str) -> Path:
        return find_folder(name_or_path, part, f"{part} of the {_WHAT}", hub)

    if "style" in values:
        values["style"] = _style(path, values["style"], opened)
    if "selector" in values:
        values["selector"] = _reference(path, "selector", values["selector"], SELECTOR, opened)
    chunks = values.get("chunks")
    if isinstance(chunks, dict) and chunks.get("adapters") is not None:
        adapters = _reference(path, "adapters of chunks", chunks["adapters"], ADAPTERS, opened)
        values["chunks"] = chunks | {"adapters": adapters}
    return values


def _checked(path: Path) -> dict[str, Any]:
    """What a file holds, each field by itself as it must be; the format and what is null left out."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(config, dict):
        raise _damaged(path, "it holds no object of fields")
    number = config.pop("format", None)
    if type(number) is int and number > _FORMAT:
        raise DecodingError(f"{path} has format {number}, which a newer version made: upgrade decoding-middleware")
    if type(number) is not int or number != _FORMAT:
        raise _damaged(path, f"format must be {_FORMAT}, not {number!r}")
    if unknown := [name for name in config if name not in FIELDS]:
        raise _damaged(path, f"{', '.join(unknown)} is no field of a policy")
    for name, value in config.items():
        try:
            check_field(name, value)
        except DecodingError as error:
            raise _damaged(path, error if str(error).startswith(name) else f"{name}: {error}") from error
    try:
        check_together(config)
    except DecodingError as error:
        raise _damaged(path, error) from error
    return {name: value for name, value in config.items() if value is not None}


def _damaged(path: Path, reason: object) -> DecodingError:
    return DecodingError(f"{path} is damaged: {reason}: {_REMEDY}")


def _style(path: Path, name: str, opened: Callable[[str], Path]) -> str:
    """A style as `StylePrior` takes it. A file leads to its own folder alone: nothing else here is its to read."""
    begin = f"{_HERE}{STYLE}/"
    if not name.startswith(begin):
        if name in registered_styles() or (may_be_hub_id(name) and not has_known_suffix(name)):
            return name
        raise DecodingError(
            f"{path} cannot be used: style must be {begin}NAME, a name that is registered here or a hub id, not "
            f"{name!r}: install the package that adds it, or save the policy again"
        )
    file, field = name.removeprefix(begin), ""
    folder = opened(STYLE)
    if not exists(folder / file):
        file, hash_, field = file.rpartition("#")
        field = hash_ + field
    if file in ("", ".", "..") or "/" in file or "\\" in file or not exists(folder / file):
        raise _damaged(path, f"style names {name!r}, which is not in its folder")
    return f"{folder / file}{field}"


def _reference(path: Path, field: str, name: str, part: str, opened: Callable[[str], Path]) -> str:
    """As `_style`, of a part that is a folder."""
    if name == f"{_HERE}{part}":
        return str(opened(part))
    if name == EMBEDDED or may_be_hub_id(name):
        return name
    raise _damaged(path, f'{field} must be {_HERE}{part}, "{EMBEDDED}" or a hub id, not {name!r}')
