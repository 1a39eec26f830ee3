"""What a policy's folder carries so that ``model.generate(custom_generate=…)`` needs no installation of decoding."""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGES = ("decoding", "ngram", "chunkllm")
_HERE = Path(__file__).parent
# Rooms above `decoding.generation`, what trains adapters, and what serves them.
_LEFT_OUT = {
    *("__main__.py", "__pycache__", "cli", "coloured.html", "coloured.py", "doctor", "evaluation", "paged"),
    *("playground", "training", "vllm"),
}


def write_custom_generate(folder: Path) -> None:
    """Writes ``generate.py``, ``requirements.txt`` and ``packages``, where transformers and ``generate.py`` look.

    Raises:
        OSError: as copying files.
    """
    for package in PACKAGES:
        shutil.copytree(_HERE.parents[1] / package, folder / "packages" / package, ignore=_left_out)
    shutil.copyfile(_HERE / "custom_generate.py", folder / "generate.py")
    shutil.copyfile(_HERE / "custom_generate.txt", folder / "requirements.txt")


def _left_out(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _LEFT_OUT or name.startswith(".")}
