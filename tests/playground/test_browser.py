"""The page as somebody with a browser has it: headless Chromium, a tiny model."""

import re
import shutil
from urllib.parse import urlparse

import pytest

from tests.conftest import TEXT
from tests.playground.test_served import ServedModel, Server, address  # noqa: F401  # a fixture

pytest.importorskip("gradio", reason="Gradio is not installed; the extra playground brings it")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra dev brings it")
Playground = pytest.importorskip("decoding.playground.page").Playground
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium"),
]

expect = sync_api.expect
expect.set_options(timeout=60_000)
LINES = " \n".join([TEXT, "rain rain rain sea sea sea " * 40])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def home(local, tmp_path_factory):
    style = tmp_path_factory.mktemp("styles") / "style.txt"
    style.write_text(TEXT)
    page = Playground(local, {"style": str(style)})
    yield page.launch("127.0.0.1", None, False, False)
    page.close()


@pytest.fixture
def visit(browser, home):
    """Opens the page, and keeps the hosts that it asked."""
    contexts = []

    def open_(where=home, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.hosts, page.wrong = set(), []
        page.on("request", lambda request: page.hosts.add(urlparse(request.url).hostname))
        page.on("websocket", lambda socket: page.hosts.add(urlparse(socket.url).hostname))
        page.on("pageerror", lambda error: page.wrong.append(error))
        page.goto(where)
        page.get_by_label("Prompt").fill("the captain said")
        # The prior of order 3 that mode "paper" needs is there at once, and no measured model.
        if page.get_by_label("paper").count():
            page.get_by_label("paper").check()
        return page

    yield open_
    for context in contexts:
        context.close()


def texts(page):
    return [pane.inner_text() for pane in page.locator(".written").all()]


def press_write(page):
    page.locator(".status").evaluate("element => element.textContent = 'of the run before'")
    page.get_by_role("button", name="Write").click()


def done(page):
    expect(page.locator(".status")).to_have_text("Done.")
    return texts(page)


def write(page):
    press_write(page)
    return done(page)


def settings(page):
    page.get_by_role("button", name="A style of your own").click()


def test_a_generation_runs_and_nothing_comes_from_elsewhere(visit):
    page = visit()
    plain, steered = write(page)
    assert plain.startswith("the captain said ") and steered.startswith("the captain said ") and plain != steered
    assert page.hosts <= {"127.0.0.1", None, ""} and not page.wrong
    page.get_by_role("button", name="The same elsewhere").click()
    expect(page.get_by_text("from decoding import Policy, generate")).to_be_visible()
    page.get_by_role("tab", name="curl").click()
    expect(page.get_by_text("vllm_xargs")).to_be_visible()


def test_the_keyboard_and_a_tap_show_what_hovering_shows(visit):
    page = visit(has_touch=True, viewport={"width": 390, "height": 844})
    write(page)
    tokens = page.locator(".written").nth(1).locator(".token")
    expect(tokens.nth(3)).to_have_css("content", "none", pseudo="after")
    tokens.nth(3).tap()
    expect(tokens.nth(3)).to_be_focused()
    told = re.compile(r"→.*nats.*order \d matched")
    expect(tokens.nth(3)).to_have_css("content", told, pseudo="after")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(4)).to_be_focused()
    expect(tokens.nth(4)).to_have_css("content", told, pseudo="after")
    for more in ("A style of your own", "The same elsewhere"):
        page.get_by_role("button", name=more).click()
    expect(page.get_by_text("from decoding import Policy, generate")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_slider_changes_the_text_and_not_the_one_beside(visit):
    page = visit()
    plain, steered = write(page)
    page.locator("#lambda input[type=range]").focus()
    page.keyboard.press("End")
    expect(page.locator(".pane").nth(1)).to_contain_text("λ 1,")
    after = done(page)
    assert after[0] == plain and after[1] != steered


def test_a_text_that_is_dropped_in_becomes_a_style(visit, tmp_path):
    (tmp_path / "mine.txt").write_text(LINES)
    (tmp_path / "bad.txt").write_bytes(b"\xff\x00\x81")
    page = visit()
    before = write(page)
    settings(page)
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.txt")
    expect(page.get_by_role("combobox", name="Style")).to_have_value("mine.txt (yours)")
    after = write(page)
    assert after[0] == before[0] and after[1] != before[1]
    page.get_by_label("Clear").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "bad.txt")
    expect(page.locator(".status[role=alert]")).to_contain_text("bad.txt")
    expect(page.get_by_role("combobox", name="Style")).to_have_value("mine.txt (yours)")


def test_an_error_is_a_sentence(visit):
    page = visit()
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".status[role=alert]")).to_contain_text("the prompt is empty")
    page.get_by_label("Prompt").fill("rain")
    settings(page)
    page.get_by_label("by phase").check()
    page.get_by_role("button", name="Write").click()
    expect(page.locator(".status[role=alert]")).to_contain_text("marker")


def test_a_second_visitor_waits_and_disturbs_nobody(visit):
    first, second = visit(), visit()
    second.get_by_label("Prompt").fill("rain with the sea")
    alone = write(first), write(second)
    for page in (first, second):
        press_write(page)
    assert (done(first), done(second)) == alone


def test_who_waits_is_told_and_a_stop_stops(visit, local):
    place = local.line.enter("somebody else's text is being written")
    try:
        page = visit()
        press_write(page)
        expect(page.locator(".status")).to_contain_text("You wait, number 1 in line")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".status")).to_have_text("Stopped.")
    finally:
        local.line.leave(place)


def test_dark_is_legible(visit):
    page = visit(color_scheme="dark")
    write(page)
    measure = """() => {
        const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const luminance = rgb => rgb.map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
            .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
        const text = luminance(numbers(getComputedStyle(document.querySelector(".written .token")).color));
        const ground = numbers(getComputedStyle(document.body).backgroundColor);
        return [[67, 147, 195], [214, 96, 77]].map(most => {
            const back = luminance(ground.map((x, i) => .3 * x + .7 * most[i]));
            return (Math.max(text, back) + .05) / (Math.min(text, back) + .05);
        });
    }"""
    assert min(page.evaluate(measure)) >= 4.5
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60


def test_a_server_and_what_it_does_not_tell(visit, address):  # noqa: F811
    served = ServedModel(address)
    playground = Playground(served, {name: name for name in served.styles})
    try:
        page = visit(playground.launch("127.0.0.1", None, False, False))
        assert write(page) == ["Oh no.", "Lo!\n<b>"]  # a chat
        expect(page.locator(".legend")).to_contain_text("it does not tell")
        assert page.get_by_label("Mode").count() == 0
        assert [body.get("vllm_xargs") for _, body in Server.asked].count(None) == 1
    finally:
        playground.close()
