"""Makes the picture in docs/playground.md: ``python -m tests.playground.picture docs/playground.png``."""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from decoding.playground.local import LocalModel
from decoding.playground.page import Playground
from decoding.style.registered import registered_styles

WIDE = {"width": 1200, "height": 800}
MINUTES = 15


def picture(path: Path, **options) -> None:
    """The page with its defaults, once both texts are written; hovering over the token that was moved most."""
    local = LocalModel()
    local.prepare().join()
    page = Playground(local, {name: name for name in registered_styles()})
    address = page.launch("127.0.0.1", None, False, False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        shown = browser.new_page(**({"viewport": WIDE} | options))
        shown.goto(address)
        shown.get_by_role("button", name="Write").click()
        shown.locator(".status", has_text="Done.").wait_for(timeout=MINUTES * 60_000)
        tokens = shown.locator(".written").nth(1).locator(".token")
        moves = tokens.evaluate_all("all => all.map(each => Number(each.style.getPropertyValue('--shift')))")
        tokens.nth(max(range(len(moves)), key=moves.__getitem__)).hover()
        shown.screenshot(path=path, full_page=True)
        browser.close()
    page.close()


if __name__ == "__main__":
    picture(Path(sys.argv[1]))
