"""The page without a mouse, without eyes, and with its sounds dragged out of it."""

from __future__ import annotations

import urllib.parse
import urllib.request
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.support.command import read
from tests.support.server import Live

from .page import MARKS, Page, api, browser, page, studio

pytestmark = MARKS
__all__ = ["browser", "page", "studio"]  # fixtures

CONTROLS = {
    "button",
    "checkbox",
    "textbox",
    "searchbox",
    "spinbutton",
    "combobox",
    "slider",
    "link",
    "DisclosureTriangle",
}
CONTRAST = 4.5  # of texts, by WCAG 2.2, 1.4.3
_TEXTS = """() => [...document.querySelectorAll("body *")].filter((found) => {
    const own = [...found.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    return own && found.checkVisibility() && !found.closest(".unseen, :disabled, option");
}).map((found) => {
    const grounds = [];
    for (let at = found; at; at = at.parentElement) grounds.push(getComputedStyle(at).backgroundColor);
    return [found.textContent.trim().slice(0, 40), getComputedStyle(found).color, grounds];
})"""
_PLACEHOLDERS = """() => [...document.querySelectorAll("[placeholder]:not(:disabled)")].map((found) => {
    const grounds = [];
    for (let at = found; at; at = at.parentElement) grounds.push(getComputedStyle(at).backgroundColor);
    return [found.placeholder, getComputedStyle(found, "::placeholder").color, grounds];
})"""
_DRAG = """(link) => {
    const transfer = new DataTransfer();
    link.dispatchEvent(new DragEvent("dragstart", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    return Object.fromEntries([...transfer.types].map((type) => [type, transfer.getData(type)]));
}"""


def nodes(page: Page) -> list[dict[str, Any]]:
    """What a screen reader is given of the page."""
    session = page.context.new_cdp_session(page.page)
    return [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]


def test_a_sound_is_dragged_out_as_the_file_that_is_downloaded(page: Page, studio: Live, tmp_path: Any) -> None:
    page.make("piano note A4", "1", 31)
    for form in ("wav", "flac", "mp3"):
        given = page.page.locator("#downloads a", has_text=form).evaluate(_DRAG)
        kind, name, address = given["downloadurl"].split(":", 2)
        assert (kind, name) == (f"audio/{form}", f"piano note A4 31.{form}")
        assert given["text/uri-list"] == address
        assert urllib.parse.urlparse(address).port == studio.port
        with urllib.request.urlopen(address) as reply:
            assert reply.read() == page.download(form, tmp_path).read_bytes(), form


def test_every_control_has_a_role_and_a_name(page: Page) -> None:
    page.make("violin note G3", "1.5", 32)
    for name in ("more", "over-time", "finish"):
        page.page.locator(f"#{name} summary").click()
    page.page.click("#add")
    page.page.click("#add-prompt")
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes(page) if "name" in node]
    named = [(role, name) for role, name in found if role in CONTROLS]
    assert len(named) > 60
    assert not [role for role, name in named if not name.strip()]
    focusable = page.page.locator("a[href], button, input, select, textarea, summary, [tabindex='0']").count()
    assert focusable <= len(named) + 5  # hidden ones, such as those of the dialog
    headings = [name for role, name in found if role == "heading"]
    assert {"sa3 studio", "Make", "Under way", "Versions", "History", "violin note G3 32"} <= set(headings)


def test_what_happens_is_spoken(page: Page) -> None:
    page.page.evaluate("""() => {
        window.heard = [];
        new MutationObserver(() => window.heard.push(document.getElementById("spoken").textContent))
            .observe(document.getElementById("spoken"), { childList: true });
    }""")
    page.make("flute note D4", "1", 33)
    heard = page.page.evaluate("() => window.heard")
    assert any(text.startswith("step ") for text in heard)
    assert sum(text.startswith("step ") for text in heard) <= 4  # a reader is not talked to death
    assert heard[-1] == "Made: flute note D4, one sound."
    page.page.locator("#more summary").click()
    page.page.fill("#negative", "drums")
    page.page.click("#generate")
    api.expect(page.page.locator("[role=status]", has_text="negative prompt has no effect")).to_be_visible()


def test_the_whole_way_by_keyboard(page: Page, studio: Live) -> None:
    """Make, select two regions, make them again, extend, vary, undo, compare, take along: no mouse."""
    keyboard = page.page.keyboard

    def reach(selector: str) -> None:
        """Press tab until the focus is there."""
        for _ in range(150):
            if page.page.evaluate("(wanted) => document.activeElement?.matches(wanted) ?? false", selector):
                return
            keyboard.press("Tab")
        pytest.fail(f"tab does not reach {selector}")

    def place() -> tuple[float, str]:
        view = page.page.locator("#view")
        return float(view.get_attribute("aria-valuenow") or "nan"), view.get_attribute("aria-valuetext") or ""

    def go(times: int) -> None:
        for _ in range(times):
            keyboard.press("ArrowRight")

    reach("#prompt")
    keyboard.press("Control+A")
    keyboard.type("organ chord C major")
    reach("#seconds")
    keyboard.press("Control+A")
    keyboard.type("2")
    reach("#seed")
    keyboard.type("34")
    keyboard.press("Tab")
    keyboard.press("Space")
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    page.opened("organ chord C major 34")

    reach("#view")
    assert place() == (0.0, "0.000 s of 2.000 s")
    for _ in range(2):
        go(10)
        keyboard.press("r")
        go(5)
        keyboard.press("r")
    assert page.page.locator("#regions li").count() == 2
    assert "Region from" in page.text("spoken")
    keyboard.press("ArrowLeft")
    assert place()[1].endswith("in region 2")
    reach("#inpaint")
    keyboard.press("Enter")
    page.versions(2)
    made = studio.get("/api/sounds?limit=1").json[0]
    assert np.allclose(made["regions"], [[0.4, 0.6], [1.0, 1.2]], atol=0.02)

    reach("#length")
    keyboard.press("Control+A")
    keyboard.type("2.5")
    reach("#extend")
    keyboard.press("Enter")
    page.versions(3)
    reach("#strength")
    keyboard.press("ArrowLeft")
    reach("#vary")
    keyboard.press("Enter")
    page.versions(4)
    reach("#view")
    keyboard.press("z")
    api.expect(page.page.locator("#versions li").nth(2).locator("[aria-current=true]")).to_be_visible()
    reach("#versions li:nth-child(1) button.other")
    keyboard.press("Enter")
    reach("#compare")
    keyboard.press("Space")
    api.expect(page.page.locator("#compare")).to_have_text("B", timeout=30_000)
    reach("#downloads a")
    with page.page.expect_download() as found:
        keyboard.press("Enter")
    assert read(found.value.path()).shape == (round(2.5 * 44100), 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(browser: Any, studio: Live, scheme: str) -> None:
    found = Page(browser, studio.port, scheme=scheme)
    found.make("snare drum", "0.5", 35)
    for box in found.page.locator("summary").all():
        if box.is_visible():
            box.click()
    texts = found.page.evaluate(_TEXTS) + found.page.evaluate(_PLACEHOLDERS)
    assert len(texts) > 80
    assert not [(text, ratio) for text, color, grounds in texts if (ratio := contrast(color, grounds)) < CONTRAST]
    found.close()


def contrast(color: str, grounds: list[str]) -> float:
    """The ratio of a text's luminance to that of the first opaque ground below it."""
    ground = next((found for found in map(numbers, grounds) if len(found) == 3 or found[3] == 1), [255.0] * 3)
    light, dark = sorted((luminance(numbers(color)), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def numbers(color: str) -> list[float]:
    return [float(part) for part in color[color.index("(") + 1 : -1].split(",")]


def luminance(color: list[float]) -> float:
    shares = [part / 255 for part in color[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("rgb(0, 0, 0)", ["rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"]) == pytest.approx(21)
    ratios = [contrast(f"rgb({grey}, {grey}, {grey})", ["rgb(255, 255, 255)"]) for grey in (0x76, 0x77)]
    assert all(one > other for one, other in pairwise([ratios[0], CONTRAST, ratios[1]]))
