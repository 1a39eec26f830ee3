"""``model.generate`` under the policy of a folder or a repository on the hub, where decoding is not installed.

`Policy.save_pretrained(…, custom_generate=True)` writes this file to ``custom_generate/generate.py``, where
transformers looks for what ``model.generate(custom_generate="OWNER/NAME", trust_remote_code=True)`` is to run, and the
packages that it needs beside it. It stands by itself: it imports nothing of decoding's but by name, once that can be
found.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

_DISTRIBUTION = "decoding-middleware"
_FILES = ["policy.json", "style/*", "selector/*", "adapters/*", "custom_generate/*"]
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def generate(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    """What ``model.generate`` does, under the policy that lies beside this file.

    Args:
        model: the model; transformers gives it.
        tokenizer: the model's: ``model.generate(…, tokenizer=tokenizer)``.
        options: anything else that ``model.generate`` takes, the inputs among it. ``revision``, ``token`` and the like
            choose the policy's repository.

    Returns:
        What ``model.generate`` returns.

    Raises:
        ValueError: no tokenizer, or as `decoding.generate`.
        ImportError: another package called ``decoding`` stands in the way.
    """
    hub = {name: value for name in _HUB_OPTIONS if (value := options.pop(name, None)) is not None}
    if tokenizer is None:
        raise ValueError("a policy needs the model's tokenizer: model.generate(…, tokenizer=tokenizer)")
    folder = _folder(_source(), hub)
    run = _function(folder / "custom_generate" / "packages")
    policy = _opened(str(folder), (folder / "policy.json").stat().st_mtime_ns)
    return run(model, tokenizer, policy, **{name: value for name, value in options.items() if value is not None})


def _source() -> str:
    """What ``custom_generate`` was. transformers does not pass it on: it is looked up in the call that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        named = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(named, str):
            return named
        frame = frame.f_back
    raise ValueError('call this as model.generate(custom_generate="OWNER/NAME", trust_remote_code=True, …)')


def _folder(source: str, hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=_FILES, **hub))


def _function(packages: Path) -> Any:
    """`decoding.generation.generate_ids`: the installed one, else the one that came along."""
    try:
        version(_DISTRIBUTION)
    except PackageNotFoundError:
        if "decoding" not in sys.modules:
            sys.path.insert(0, str(packages))
    try:
        return importlib.import_module("decoding.generation").generate_ids
    except (ImportError, AttributeError) as error:
        found = getattr(sys.modules.get("decoding"), "__file__", packages)
        raise ImportError(
            f"the package decoding at {found} cannot run this policy ({error}): if it is another project's, leave it "
            f"out of the environment; if it is {_DISTRIBUTION}, upgrade it"
        ) from error


@lru_cache(maxsize=4)
def _opened(folder: str, changed: int) -> Any:
    """The policy of a folder, opened once, and again when its file changes."""
    return importlib.import_module("decoding.policy").Policy.from_pretrained(folder)
