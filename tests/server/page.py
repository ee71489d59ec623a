"""The page of a server as a person uses it, in headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import Live, live, settings

api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright, and Chromium")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MARKS = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
OPTIONS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(settings(tmp_path_factory.mktemp("page"), "demo")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: Any, port: int, *, width: int = 1440, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._foreign(request.url, port))
        self.page.goto(f"http://127.0.0.1:{port}/")
        self.page.locator("body[data-ready]").wait_for()

    def _foreign(self, url: str, port: int) -> None:
        if not url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:")):
            self.problems.append(f"asked {url}")

    def text(self, name: str) -> str:
        return str(self.page.locator(f"#{name}").text_content())

    def make(self, prompt: str, seconds: str, seed: int) -> None:
        """Fill the form in and press return in the prompt."""
        self.page.fill("#seconds", seconds)
        self.page.fill("#seed", str(seed))
        self.page.check("#lock")
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")
        self.opened(f"{prompt} {seed}")

    def opened(self, name: str) -> None:
        api.expect(self.page.locator("#edit-title")).to_have_text(name, timeout=60_000)
        api.expect(self.page.locator("#jobs li")).to_have_count(0, timeout=60_000)
        self.page.locator("#provenance dt").first.wait_for(state="attached")

    def versions(self, count: int) -> None:
        api.expect(self.page.locator("#versions li")).to_have_count(count, timeout=60_000)
        api.expect(self.page.locator("#jobs li")).to_have_count(0, timeout=60_000)
        self.page.locator("#versions li").last.locator("[aria-current=true]").wait_for()

    def drag(self, start: float, end: float) -> None:
        """Draw over the picture, from one share of its width to another."""
        self.page.locator("#view").scroll_into_view_if_needed()
        box = self.page.locator("#view").bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] * start, y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * end, y, steps=6)
        self.page.mouse.up()

    def download(self, form: str, folder: Path) -> Path:
        with self.page.expect_download() as found:
            self.page.locator("#downloads a", has_text=form).click()
        path = folder / f"download.{form}"
        found.value.save_as(path)
        return path

    def close(self) -> None:
        self.context.close()
        assert self.problems == []


@pytest.fixture
def page(browser: Any, studio: Live) -> Iterator[Page]:
    found = Page(browser, studio.port)
    yield found
    found.close()
