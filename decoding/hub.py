"""Folders that the Hugging Face hub also holds: ``from_pretrained`` and ``push_to_hub`` of what this package saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from decoding.errors import DecodingError
from decoding.files import exists


def find_file(name_or_path: str | PathLike, file: str, what: str, hub: dict[str, Any]) -> Path:
    """A file of a saved object.

    Args:
        name_or_path: a folder, or a repository on the hub.
        file: its name there.
        what: the object, for the error.
        hub: options of ``hf_hub_download``.

    Raises:
        DecodingError: neither a folder nor a repository with that file.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / file
    return _downloaded(lambda: hf_hub_download(str(name_or_path), file, **hub), name_or_path, what)


def find_folder(name_or_path: str | PathLike, folder: str, what: str, hub: dict[str, Any]) -> Path:
    """As `find_file`, a folder with all of its files.

    Raises:
        DecodingError: neither a folder nor a repository, or one without that folder.
    """
    if Path(name_or_path).is_dir():
        found = Path(name_or_path) / folder
    else:
        pattern = f"{folder}/*"
        snapshot = _downloaded(
            lambda: snapshot_download(str(name_or_path), allow_patterns=pattern, **hub), name_or_path, what
        )
        found = snapshot / folder
    if not found.is_dir():
        raise DecodingError(f"no {what} at {name_or_path}: there is no folder {folder}")
    return found


def _downloaded(download: Callable[[], str], name_or_path: str | PathLike, what: str) -> Path:
    try:
        return Path(download())
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())  # without its line ends
        raise DecodingError(f"no {what} at {name_or_path}, neither a folder nor on the hub: {reason}") from error


def upload(save: Callable[[str], None], what: str, repo_id: str, private: bool | None, token: str | None) -> str:
    """Uploads what ``save`` writes to a folder to a repository, made if needed, and returns its address."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {what}")
    return str(address)


def may_be_hub_id(source: str) -> bool:
    """Whether a text that names nothing here has the form of a repository on the hub, OWNER/NAME."""
    is_like_one = source.count("/") == 1 and not source.startswith((".", "/")) and "#" not in source
    return is_like_one and not exists(source)
