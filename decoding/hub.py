"""Folders that the Hugging Face hub also holds: ``from_pretrained`` and ``push_to_hub`` of what this package saves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
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
    try:
        return Path(hf_hub_download(str(name_or_path), file, **hub))
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
