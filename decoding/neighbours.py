"""Distributions on the registry that are other people's and install modules of our names. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

_NEIGHBOURS = {
    "decoding": "puts its files among decoding-middleware's: uninstall both, and install decoding-middleware again",
    "ngram": "installs a module that `import ngram` no longer finds, since decoding-middleware has a package ngram",
}


def installed_neighbours() -> Iterator[str]:
    """A sentence about each that is installed."""
    for name, what in _NEIGHBOURS.items():
        try:
            yield f"the distribution {name} {version(name)} is another project's and {what}"
        except PackageNotFoundError:
            continue
