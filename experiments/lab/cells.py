"""`Cell`: what a run measures in one go, and the key that its record is kept under."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import astuple, dataclass

_UNSAFE = re.compile(r"[^\w. -]")


@dataclass(frozen=True)
class Cell:
    """The settings in which a cell differs from the run's others: the fields of a subclass, values of JSON."""

    @property
    def label(self) -> str:
        """For people who look at the folder. Versions up to 0.1.0 kept some records under it alone."""
        return "-".join(map(str, astuple(self)))

    @property
    def key(self) -> str:
        """File name of the record, without its ending: the label and a hash, since labels can be alike."""
        digest = hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()[:8]
        return _UNSAFE.sub("_", self.label) + f"-{digest}"
