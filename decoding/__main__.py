"""``decoding`` and ``python -m decoding``."""

from __future__ import annotations

import io
import re
import sys
import warnings
from pathlib import Path

from decoding.neighbours import installed_neighbours

_NEEDED = ("decoding", "ngram", "chunkllm", "experiments", "click", "torch", "transformers")


def main() -> None:
    """Runs the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a console or file cannot show, λ first of all
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    for sentence in installed_neighbours():
        print(f"Warning: {sentence}", file=sys.stderr)  # noqa: T201  # click may not be there yet
        warnings.filterwarnings("ignore", message=re.escape(sentence))  # nor is it said again
    try:
        from decoding.cli import cli

        cli(prog_name="decoding")
    except ImportError as error:  # commands import what they need when they run
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        print(f"Error: the installation is broken ({error})", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _leave_the_working_folder_out() -> None:
    """As the command does: ``python -m`` would look for packages in the user's own folder first."""
    if sys.path and Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).parents[1]:
        del sys.path[0]


if __name__ == "__main__":
    _leave_the_working_folder_out()
    main()
