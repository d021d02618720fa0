"""The report in a real browser: no error, no request, no overflow, the pictures open, the colours change.

Needs Chromium and Playwright. In CI their absence is a failure; elsewhere a skip with the reason.
"""

import os
import shutil

import pytest
from compare_values import full_comparison
from report_values import full_report

from clearwing.show.compare import write_comparison
from clearwing.show.report import Report, write_report

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


def missing(what):
    """Skip with the reason, but fail in CI, where nothing may go unseen."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI needs it")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("Chromium (apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the Python package playwright")
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "report.html", full_report()).as_uri()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("compare") / "compare.html", full_comparison()).as_uri()


@pytest.fixture
def visit(browser):
    """Open an address and watch it: console errors and requests fail the test at its end."""
    opened, wrong = [], []

    def go(address, **context):
        kept = browser.new_context(reduced_motion="reduce", **context)
        page = kept.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
        )
        opened.append(kept)
        page.goto(address)
        return page

    yield go
    for context in opened:
        context.close()
    assert wrong == []


def ground(page):
    """Brightness of the page's ground, 0 to 255."""
    return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")


def test_light_and_dark_follow_the_system_and_the_button(visit, address):
    assert ground(visit(address, color_scheme="light")) > 200
    page = visit(address, color_scheme="dark")
    assert ground(page) < 60
    button = page.locator("button.theme")
    button.click()
    assert button.inner_text() == "Light"
    assert ground(page) > 200
    page.reload()
    assert ground(page) > 200  # the choice is remembered
    button.click()
    assert ground(page) < 60
    button.click()
    assert button.inner_text() == "Auto"


def test_paper_is_light(visit, address):
    page = visit(address, color_scheme="dark")
    page.emulate_media(media="print")
    assert ground(page) == 255
    assert not page.locator(".bar nav").is_visible()


CONTRAST = """() => {
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = text;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const low = [];
  for (const node of document.querySelectorAll("main *, header *, footer *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest("svg")) continue;
    let back = node;
    while (back && rgba(getComputedStyle(back).backgroundColor)[3] < 255) back = back.parentElement;
    const [a, b] = [rgba(getComputedStyle(node).color), rgba(getComputedStyle(back).backgroundColor)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([node.tagName, node.className, node.textContent.trim(), ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, address, scheme):
    assert visit(address, color_scheme=scheme).evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_overflows_the_window(visit, address, width):
    page = visit(address, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_picture_is_decoded(visit, address):
    page = visit(address)
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.locator("img").count() == 33 + 2 + 6 + 3


def test_a_picture_opens_moves_on_and_closes(visit, address):
    page = visit(address, viewport={"width": 1280, "height": 900})
    small = page.locator("#mistake-1 img").first.bounding_box()["width"]
    page.locator("#mistake-1 .zoom").click()
    viewer = page.locator("dialog#viewer")
    assert viewer.is_visible()
    assert viewer.locator("img").first.bounding_box()["width"] > 1.5 * small
    assert viewer.locator(".previous").is_disabled()
    page.keyboard.press("ArrowRight")
    assert not viewer.locator(".previous").is_disabled()
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    page.locator("#mask-2 .zoom").click()
    viewer.get_by_text("Close").click()
    assert not viewer.is_visible()


def test_a_picture_opens_without_scripts(visit, address):
    page = visit(address, java_script_enabled=False, viewport={"width": 1280, "height": 900})
    small = page.locator("#mask-1").bounding_box()["width"]
    page.locator("#mask-1 .zoom").click()
    assert page.locator("#mask-1").bounding_box()["width"] > 3 * small
    page.locator("#mask-1 .shut").click()
    assert page.locator("#mask-1").bounding_box()["width"] == small


def test_the_navigation_leads_to_each_section_and_marks_it(visit, address):
    page = visit(address, viewport={"width": 1280, "height": 800})
    for name in ("Training", "Masks"):
        link = page.locator(".bar nav").get_by_text(name, exact=True)
        link.click()
        page.wait_for_function("(a) => a.getAttribute('aria-current') === 'true'", arg=link.element_handle())
        top = page.locator(f"#{name.lower()}").bounding_box()["y"]
        assert 0 <= top < 200


def test_an_empty_report_opens_too(visit, tmp_path):
    page = visit(write_report(tmp_path / "empty.html", Report("Nothing yet")).as_uri())
    assert page.locator("h1").inner_text() == "Nothing yet"
    assert page.locator(".empty").count() == 7


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_of_a_comparison_stands_out(visit, compared, scheme):
    page = visit(compared, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    strokes = page.evaluate(
        "[...document.querySelectorAll('.chart:first-child polyline')].map((line) => getComputedStyle(line).stroke)"
    )
    assert len(set(strokes)) == 3


@pytest.mark.parametrize("width", [360, 1280])
def test_a_comparison_fits_the_window(visit, compared, width):
    page = visit(compared, viewport={"width": width, "height": 800}, java_script_enabled=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")


def test_a_comparison_needs_no_scripts(visit, compared):
    page = visit(compared, java_script_enabled=False, viewport={"width": 1280, "height": 900})
    assert page.locator(".chart polyline").first.is_visible()
    small = page.locator("#pair-1-1").bounding_box()["width"]
    page.locator("#pair-1-1 .zoom").click()
    assert page.locator("#pair-1-1").bounding_box()["width"] > 3 * small
