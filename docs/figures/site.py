"""What the site has beside the pages in docs/: the changelog, and the notebooks as pages. A hook of MkDocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages whose text lies elsewhere."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for script in sorted((ROOT / "notebooks").glob("*.py")):
        page = as_page(script.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"notebooks/{script.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leads links to notebooks, which lie beside docs/ in the repository, to their pages."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.py\)", r"](notebooks/\1.md)", markdown)


def as_page(script: str) -> str:
    """A script in the percent format as Markdown: its prose as it is, its code in blocks."""
    pages = []
    for cell in re.split(r"^(?=# %%)", script, flags=re.MULTILINE):
        head, _, body = cell.partition("\n")
        if head.startswith("# %% [markdown]"):
            pages.append("\n".join(re.sub(r"^# ?", "", line) for line in body.strip().splitlines()))
        elif head.startswith("# %%") and body.strip():
            pages.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(pages) + "\n"
