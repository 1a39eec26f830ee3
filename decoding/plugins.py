"""Entry points of other packages: found by name, loaded when used."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from decoding.errors import DecodingError


class Hook:
    """One kind of thing that packages can add.

    Args:
        group: of the entry points.
    """

    def __init__(self, group: str):
        self.group = group

    @cached_property
    def _found(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            known = found.setdefault(point.name, [])
            if all(point.value != other.value for other in known):  # one installation can be found twice
                known.append(point)
        return found

    @property
    def names(self) -> list[str]:
        """What is there, in the alphabet's order."""
        return sorted(self._found)

    def load(self, name: str) -> Any:
        """What an entry point names.

        Raises:
            DecodingError: it cannot be imported, or two packages have one of that name.
        """
        first, *others = self._found[name]
        if others:
            packages = " and ".join(_package(point) for point in (first, *others))
            raise DecodingError(f"{packages} both add {name!r} ({self.group}): uninstall one of them")
        try:
            return first.load()
        except Exception as error:  # noqa: BLE001  # whatever somebody else's module does
            raise DecodingError(
                f"{name!r} ({self.group}) of package {_package(first)} cannot be loaded: {error!r}"
            ) from error


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
