"""Tokens by colour in pages: how far a prior moved each, and on hover, tap or focus what else is known of it."""

from __future__ import annotations

from pathlib import Path


def head_of_page() -> str:
    """What a page's head needs, as HTML: ``.token`` elements within one of class ``tokens`` are coloured then."""
    return Path(__file__).with_name("coloured.html").read_text(encoding="utf-8")
