"""``python -m figures -r`` writes the tables in the pages anew; ``--check`` says whether they are those of the data."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cogapp import Cog

from figures.data import DOCS

PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
IMPORT = "from figures import cost, front, gpu, long_context, lossless, models, style, temperature, vllm"


def run(*options: str, pages: Sequence[Path] = PAGES) -> int:
    """Runs cog over pages.

    Args:
        options: cog's own.
        pages: by default README.md and those in docs.

    Returns:
        cog's exit status: 0 if all went well, 5 if ``--check`` found a page that differs from its data.
    """
    return Cog().main(["cog", "-P", "-U", "-n", "utf-8", "-p", IMPORT, "-I", str(DOCS), *options, *map(str, pages)])


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
