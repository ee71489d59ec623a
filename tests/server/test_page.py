"""The page itself, in headless Chromium, against the whole server and the demo model."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.command import Run, ok, read, write_tone
from tests.support.server import Live, live, settings

from .page import MARKS, Page, api, browser, page, studio

pytestmark = MARKS
__all__ = ["browser", "page", "studio"]  # fixtures

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
WIDTHS = {"phone": 390, "tablet": 1000, "desk": 1440}


def test_what_is_made_on_the_page_is_the_command_s_file(
    page: Page, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.make("piano note A4", "1.5", 11)
    assert "1.50 s" in page.text("facts") and "seed 11" in page.text("facts")
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    for form in ("wav", "flac", "mp3"):
        words = ["generate", "piano note A4", "--seconds", "1.5", "--seed", "11", "--model", "demo", "--backend", "mlx"]
        ok(run(*words, "--out", f"command.{form}", "-q"))
        assert page.download(form, tmp_path).read_bytes() == Path(f"command.{form}").read_bytes(), form


def test_a_sound_is_played_and_shown_while_it_is_made(page: Page) -> None:
    page.page.locator("#more summary").click()
    page.page.check("#early")
    page.page.fill("#steps", "150")
    page.page.fill("#prompt", "organ chord C major")
    page.page.fill("#seconds", "4")
    page.page.click("#generate")
    api.expect(page.page.locator("#jobs li")).to_contain_text("step", timeout=60_000)
    api.expect(page.page.locator("#facts")).to_have_text("being made", timeout=60_000)
    api.expect(page.page.locator("#jobs li")).to_have_count(0, timeout=120_000)
    assert page.text("edit-title").startswith("organ chord C major")
    page.page.locator("#view").focus()
    page.page.keyboard.press(" ")
    api.expect(page.page.locator("#play")).to_have_text("Stop")
    page.page.keyboard.press(" ")
    api.expect(page.page.locator("#play")).to_have_text("Play")


def test_several_variations_are_followed_to_their_end(page: Page) -> None:
    page.page.fill("#variations", "2")
    page.make("snare drum", "0.5", 22)
    api.expect(page.page.locator("#spoken")).to_have_text("Made: snare drum, 2 sounds.")


def test_escape_cancels(page: Page, studio: Live) -> None:
    page.page.locator("#more summary").click()
    page.page.fill("#steps", "1000")
    page.page.fill("#prompt", "pink noise")
    page.page.click("#generate")
    api.expect(page.page.locator("#jobs li")).to_contain_text("step", timeout=60_000)
    page.page.keyboard.press("Escape")
    api.expect(page.page.locator("#jobs li")).to_have_count(0, timeout=30_000)
    assert studio.get("/api/jobs?limit=1").json[0]["state"] == "cancelled"
    assert "Cancelled" in page.text("notice")


def test_regions_extension_variation_undo_and_comparison(page: Page, studio: Live) -> None:
    page.make("violin note G3", "2", 5)
    first = studio.get("/api/sounds?limit=1").json[0]
    page.drag(0.2, 0.35)
    page.drag(0.6, 0.7)
    assert page.page.locator("#regions li").count() == 2
    page.page.click("#inpaint")
    page.versions(2)
    second = studio.get("/api/sounds?limit=1").json[0]
    assert second["parent"] == first["id"] and len(second["regions"]) == 2 and len(second["seams"]) == 4
    assert np.allclose(second["regions"], [[0.4, 0.7], [1.2, 1.4]], atol=0.02)
    store = studio.studio.store
    before, after = (store.audio(studio.studio.sound(sound["id"])) for sound in (first, second))
    kept = np.ones(len(before), bool)
    for start, end in second["regions"]:
        kept[int(start * 44100) : int(end * 44100)] = False
    assert np.array_equal(before[kept], after[kept]) and not np.array_equal(before, after)
    assert page.page.locator("#legend").is_visible() and page.page.locator("#seams li").count() == 4

    page.page.fill("#length", "3")
    page.page.click("#extend")
    page.versions(3)
    third = studio.get("/api/sounds?limit=1").json[0]
    assert third["kind"] == "extend" and third["seconds"] == 3.0

    page.page.locator("#strength").fill("0.4")
    assert page.text("strength-text") == "0.40"
    page.page.click("#vary")
    page.versions(4)
    fourth = studio.get("/api/sounds?limit=1").json[0]
    level = studio.studio.default.config.noise_level(0.4, "official")
    assert studio.get(f"/api/sounds/{fourth['id']}/provenance").json["request"]["init"] == {"noise_level": level}

    page.page.locator("#view").focus()
    page.page.keyboard.press("z")
    api.expect(page.page.locator("#versions li").nth(2).locator("[aria-current=true]")).to_be_visible()
    assert page.page.locator("#versions li").count() == 4  # what was undone is still there
    page.page.locator("#versions li").nth(0).get_by_role("button", name="Compare with").click()
    page.page.click("#compare")
    api.expect(page.page.locator("#compare")).to_have_text("B", timeout=30_000)
    page.page.click("#compare")
    api.expect(page.page.locator("#compare")).to_have_text("A")


def test_the_end_is_dragged_to_extend(page: Page, studio: Live) -> None:
    page.make("flute note D4", "1", 6)
    box = page.page.locator("#view").bounding_box()
    page.drag(1.0 - 2 / box["width"], 1.6)
    assert 1.3 < float(page.page.input_value("#length")) < 1.8
    page.page.click("#extend")
    page.versions(2)
    assert 1.3 < studio.get("/api/sounds?limit=1").json[0]["seconds"] < 1.8


def test_regions_with_other_prompts_are_one_job(page: Page, studio: Live) -> None:
    page.make("trumpet note C4", "1.5", 8)
    for _ in range(2):
        page.page.click("#add")
        box = page.page.locator("#view").bounding_box()
        page.page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 40)
    page.page.get_by_label("Region 2, its own prompt").fill("snare drum")
    page.page.click("#inpaint")
    page.versions(2)
    made = studio.get("/api/sounds?limit=1").json[0]
    asked = studio.get(f"/api/sounds/{made['id']}/provenance").json["request"]
    first, second = asked["inpaint"]["regions"]
    assert asked["items"][0]["prompt"] == "trumpet note C4" and len(made["regions"]) == 2
    assert isinstance(first, list) and second["prompt"] == "snare drum"


def test_a_loop_is_made_and_plays_round(page: Page, studio: Live) -> None:
    page.page.check("#ring")
    page.page.fill("#bpm", "150")
    page.page.fill("#bars", "1")
    page.page.fill("#prompt", "snare drum")
    page.page.press("#prompt", "Enter")
    api.expect(page.page.locator("#edit-title")).to_contain_text("snare drum", timeout=60_000)
    api.expect(page.page.locator("#jobs li")).to_have_count(0, timeout=60_000)
    made = studio.get("/api/sounds?limit=1").json[0]
    assert made["samples"] == round(4 * 60 / 150 * 44100)
    asked = studio.get(f"/api/sounds/{made['id']}/provenance").json["request"]
    assert asked["loop"] == {"bpm": 150.0, "beats": 4, "way": "seam"}
    assert asked["items"][0]["prompt"] == "snare drum"  # the demo knows no bpm
    api.expect(page.page.locator("#loop")).to_be_checked()


def test_a_dropped_recording_is_opened_and_edited(page: Page, tmp_path: Path) -> None:
    take = write_tone(tmp_path / "my take.wav", 1.0, rate=44100)
    page.page.set_input_files("#file", take)
    page.opened("my take")
    drop = """async ([name, data]) => {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: "audio/wav" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }"""
    other = write_tone(tmp_path / "other.wav", 0.5, rate=44100)
    page.page.evaluate(drop, ["dropped one.wav", base64.b64encode(other.read_bytes()).decode()])
    page.opened("dropped one")
    page.page.fill("#prompt", "marimba note E4")
    page.page.fill("#length", "1.2")
    page.page.click("#extend")
    page.versions(2)
    assert np.array_equal(read(page.download("wav", tmp_path))[:22050], read(other))


def test_settings_are_copied_and_history_is_searched(page: Page, studio: Live) -> None:
    page.make("snare drum", "0.5", 21)
    page.page.click("#copy")
    api.expect(page.page.locator("#notice")).to_contain_text("copied")
    assert '"seed": 21' in page.page.evaluate("() => navigator.clipboard.readText()")
    page.page.click("#star")
    api.expect(page.page.locator("#star")).to_have_attribute("aria-pressed", "true")
    page.page.check("#starred")
    api.expect(page.page.locator("#history li")).to_have_count(1)
    page.page.uncheck("#starred")
    page.page.fill("#search", "nothing like it")
    api.expect(page.page.locator("#history li")).to_have_count(0)
    page.page.fill("#search", "snare")
    api.expect(page.page.locator("#history li").first).to_contain_text("snare drum 21")
    page.page.on("dialog", lambda dialog: dialog.accept())
    page.page.get_by_label("Delete snare drum 21").first.click()
    api.expect(page.page.get_by_label("Delete snare drum 21")).to_have_count(0)
    assert [sound for sound in studio.get("/api/sounds").json if sound["seed"] == 21] == []


def test_many_jobs_leave_the_page_its_connections(page: Page, studio: Live) -> None:
    before = len(studio.get("/api/sounds?kind=generate&limit=500").json)
    page.page.fill("#prompt", "closed hihat flugelhorn")
    page.page.fill("#seconds", "0.3")
    for _ in range(9):  # a browser opens six connections at most
        page.page.click("#generate")
    api.expect(page.page.locator("#notice")).to_contain_text("does not know 'flugelhorn'", timeout=30_000)
    api.expect(page.page.locator("#jobs li")).to_have_count(0, timeout=60_000)
    assert len(studio.get("/api/sounds?kind=generate&limit=500").json) == before + 9


def test_errors_are_sentences(page: Page) -> None:
    page.page.locator("#more summary").click()
    page.page.fill("#negative", "drums")
    page.page.fill("#prompt", "piano note A4")
    page.page.click("#generate")
    api.expect(page.page.locator("#notice")).to_contain_text("A negative prompt has no effect at guidance scale 1")


def test_a_lost_server_is_noticed_and_the_page_goes_on(browser: Any, tmp_path: Path) -> None:
    wanted = settings(tmp_path, "demo")
    with live(wanted) as first:
        port = first.port
        page = Page(browser, port)
        page.make("kick drum", "0.5", 3)
    page.page.fill("#search", "k")
    api.expect(page.page.locator("#lost")).to_be_visible(timeout=30_000)
    with live(wanted, port):
        api.expect(page.page.locator("#lost")).to_be_hidden(timeout=30_000)
        page.page.fill("#search", "")
        page.make("kick drum", "0.5", 4)
    page.context.close()


def test_a_token_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    token = "a token of thirty two characters!"
    with live(replace(settings(tmp_path, "demo"), token=token)) as found:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{found.port}/")
        page.fill("#token", token)
        page.press("#token", "Enter")
        page.locator("body[data-ready]").wait_for()
        page.reload()
        page.locator("body[data-ready]").wait_for()
        context.close()


def test_the_list_of_the_interface_is_shown(browser: Any, studio: Live) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{studio.port}/docs")
    page.get_by_text("POST /api/jobs", exact=True).wait_for()
    assert page.locator("details").count() > 25
    page.close()


@pytest.mark.parametrize("size", list(WIDTHS))
def test_fields_of_a_row_stand_beside_each_other(browser: Any, studio: Live, size: str) -> None:
    page = Page(browser, studio.port, width=WIDTHS[size])
    for row in (("seconds", "variations"), ("bpm", "bars")):
        boxes = [page.page.locator(f"#{name}").bounding_box() for name in row]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"], row
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(WIDTHS))
def test_pictures(browser: Any, studio: Live, size: str, scheme: str, tmp_path: Path) -> None:
    """Nothing is wider than the window; with SA3_PICTURES the pictures of the docs are made anew."""
    page = Page(browser, studio.port, width=WIDTHS[size], scheme=scheme)
    if page.page.locator("#history button.open", has_text="vibraphone").count() == 0:
        page.make("vibraphone note B3", "3", 2)
        page.drag(0.4, 0.6)
        page.page.click("#inpaint")
        page.versions(2)
    else:
        page.page.locator("#history button.open", has_text="vibraphone").first.click()
        page.versions(2)
    page.page.wait_for_timeout(3000)  # until waveform and spectrogram are drawn
    page.drag(0.7, 0.85)
    wide = page.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    page.page.evaluate("() => scrollTo(0, 0)")
    folder = PICTURES if os.environ.get("SA3_PICTURES") else tmp_path
    page.page.screenshot(path=folder / f"studio-{size}-{scheme}.png", full_page=size == "phone")
    page.close()
