"""The page in a real browser, at phone and desktop width: whole, quiet, and without a request."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from job.report.render import render_html
from job.results import Results
from tests.report import EVIL_FLIPS, FLIPS, HISTORY, evil, full

pytestmark = pytest.mark.slow
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium, which is not a Python package: apt-get install chromium")
    sandbox = os.geteuid() != 0  # it cannot be used by root
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, chromium_sandbox=sandbox)
        yield found
        found.close()


class Watched:
    """A page, and all that it asked for or complained of."""

    def __init__(self, browser: Browser, html: str, path: Path, width: int) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        path.write_text(html, encoding="utf-8")
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("request", self._asked)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state("networkidle")

    def _asked(self, request: Request) -> None:
        self.requests.append(request.url)

    def _said(self, message: ConsoleMessage) -> None:
        self.complaints.append(message.text)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_and_quiet(browser: Browser, tmp_path: Path, width: int) -> None:
    html = render_html(Results.model_validate(full()), HISTORY, FLIPS)
    watched = Watched(browser, html, tmp_path / "report.html", width)
    assert watched.requests == [(tmp_path / "report.html").as_uri()]
    assert watched.complaints == []
    text = watched.page.inner_text("main")
    for figure in ("31.0% → 35.1%", "0.109 → 0.153", "2.9134 → 1.4981", "13,593 tokens/s"):
        assert figure in text
    # Wide tables scroll within themselves, so the page never does.
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    shown = watched.page.locator("figure svg:visible")
    assert shown.count() == 2
    for number in range(shown.count()):
        box = shown.nth(number).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_text_does_nothing(browser: Browser, tmp_path: Path, width: int) -> None:
    html = render_html(Results.model_validate(evil(full())), HISTORY, EVIL_FLIPS)
    watched = Watched(browser, html, tmp_path / "report.html", width)
    assert watched.requests == [(tmp_path / "report.html").as_uri()]
    assert watched.complaints == []
    assert watched.page.locator("script, img, iframe, a[href^='http']").count() == 0
    assert "<script>alert(1)</script>" in watched.page.inner_text("main")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_dark_where_the_reader_wants_that(browser: Browser, tmp_path: Path) -> None:
    html = render_html(Results.model_validate(full()), HISTORY, FLIPS)
    watched = Watched(browser, html, tmp_path / "report.html", 1280)
    backgrounds = []
    for scheme in ("light", "dark"):
        watched.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        backgrounds.append(watched.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds[0] != backgrounds[1]
