"""The house rules that no linter knows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("decoding", "ngram", "chunkllm", "experiments", "tests", "docs/figures", "notebooks")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_two_rooms(package):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json", ".html", ".txt")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert long == {}
