"""matplotlib without a screen, and figures as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

from ngram.storage import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["literal", "plt", "png", "save"]


def literal(text: str) -> str:
    """A user's text as it stands: matplotlib would read $ as mathematics, and hide labels that begin with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def png(figure: Any, dpi: int = 110) -> bytes:
    """A figure as the content of a PNG file. Closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> None:
    """Writes a figure, and closes it."""
    write_atomically(path, png(figure))
