"""The site: it builds without a warning, has no dead link, and fetches nothing from elsewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.page, self.links, self.fetched, self.ids = page, [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src"):
                self.links.append(value)
                if (tag, name) in FETCHED:
                    self.fetched.append(value)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return {page.relative_to(site): Links(page) for page in site.rglob("*.html")}


def is_elsewhere(link):
    parts = urlsplit(link)
    return bool(parts.scheme or parts.netloc)


@pytest.mark.slow
def test_no_link_is_dead(pages):
    assert Path("index.html") in pages and Path("changelog.html") in pages
    at = {found.page.resolve(): found for found in pages.values()}
    dead = []
    for name, found in pages.items():
        if name.name == "404.html":
            continue  # its links are for the root of a server
        for link in filter(lambda link: not is_elsewhere(link), found.links):
            parts = urlsplit(link)
            target = (found.page.parent / unquote(parts.path)).resolve() if parts.path else found.page.resolve()
            target = target / "index.html" if target.is_dir() else target
            is_there = target.exists() and (target not in at or unquote(parts.fragment) in {"", *at[target].ids})
            dead += [] if is_there else [(str(name), link)]
    assert dead == []


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(pages):
    assert {link for found in pages.values() for link in found.fetched if is_elsewhere(link)} == set()
