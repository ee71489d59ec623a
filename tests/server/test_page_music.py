"""What the page has for music: prompts over time, sounds near a sound, long pieces, and how a sound leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile

from tests.support.command import Run, ok, tone
from tests.support.server import Live

from .page import MARKS, Page, api, browser, page, studio

pytestmark = MARKS
__all__ = ["browser", "page", "studio"]  # fixtures


def test_prompts_over_time_are_made_and_told(page: Page, studio: Live) -> None:
    page.page.locator("#over-time summary").click()
    for prompt in ("violin note A4", "flute note D4", "snare drum"):
        page.page.click("#add-prompt")
        page.page.keyboard.type(prompt)
    page.page.get_by_label("Prompt 1, from this second on").fill("1.5")
    page.page.get_by_label("Prompt 2, from this second on").fill("0.5")
    page.page.get_by_label("Remove prompt 3").click()
    api.expect(page.page.locator("#add-prompt")).to_be_focused()
    page.page.fill("#fade", "0.4")
    page.make("piano note A4", "2", 41)
    made = studio.get("/api/sounds?limit=1").json[0]
    request = studio.get(f"/api/sounds/{made['id']}/provenance").json["request"]
    wanted = [{"start": 0.5, "prompt": "flute note D4"}, {"start": 1.5, "prompt": "violin note A4"}]
    assert request["items"][0]["prompts_over_time"] == wanted and request["prompt_fade_seconds"] == 0.4
    page.page.locator("#origin summary").click()
    api.expect(page.page.locator("#provenance")).to_contain_text("flute note D4 at 0.5 s, violin note A4 at 1.5 s")
    page.page.get_by_label("Prompt 1, from this second on").fill("3")
    page.page.click("#generate")
    api.expect(page.page.locator("#notice")).to_contain_text("The prompt at 3 s: allowed are times above 0")


def test_some_are_made_near_a_sound(page: Page, studio: Live) -> None:
    page.make("marimba note E4", "1", 42)
    first = studio.get("/api/sounds?limit=1").json[0]
    page.page.locator("#spread").fill("0.35")
    assert page.text("spread-text") == "0.35"
    page.page.fill("#near-count", "2")
    page.page.click("#near")
    api.expect(page.page.locator("#versions li")).to_have_count(3, timeout=60_000)
    page.page.locator("#versions li").nth(1).locator("[aria-current=true]").wait_for()
    near = studio.get("/api/sounds?limit=2").json
    assert [sound["parent"] for sound in near] == [first["id"]] * 2
    items = studio.get(f"/api/sounds/{near[0]['id']}/provenance").json["request"]["items"]
    assert [(item["seed"], item["toward"], item["spread"]) for item in items] == [(42, 43, 0.35), (42, 44, 0.35)]
    words = page.page.locator("#versions li").all_text_contents()
    assert [text.startswith("near it: marimba note E4") for text in words] == [False, True, True]


def test_a_sound_is_finished_on_its_way(page: Page, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyloudnorm")
    page.make("piano note A4", "1", 43)
    page.page.locator("#finish summary").click()
    for name, value in (("loudness", "-14"), ("ceiling", "-1"), ("fade-out", "0.3")):
        page.page.fill(f"#{name}", value)
    page.page.check("#limit")
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    words = ["generate", "piano note A4", "--seconds", "1", "--seed", "43", "--model", "demo", "--backend", "mlx", "-q"]
    words += ["--loudness", "-14", "--true-peak", "-1", "--fade-out", "0.3", "--limit"]
    for form in ("wav", "mp3"):
        ok(run(*words, "--out", f"command.{form}"))
        assert page.download(form, tmp_path).read_bytes() == Path(f"command.{form}").read_bytes(), form
    page.page.locator("#samples").select_option("float")
    assert soundfile.info(page.download("wav", tmp_path)).subtype == "FLOAT"


def test_what_cannot_be_finished_is_said(page: Page, tmp_path: Path) -> None:
    page.make("piano note A4", "1", 44)
    page.page.locator("#finish summary").click()
    page.page.fill("#fade-in", "2")
    page.page.locator("#downloads a", has_text="wav").click()
    api.expect(page.page.locator("#notice")).to_contain_text("do not fit into 1 s")
    page.page.fill("#fade-in", "")
    page.page.fill("#ceiling", "-20")
    page.page.fill("#loudness", "-3")
    page.download("wav", tmp_path)
    api.expect(page.page.locator("#notice")).to_contain_text("-3 LUFS cannot be reached below that ceiling")


def test_a_long_piece_is_made_in_windows(page: Page, studio: Live) -> None:
    api.expect(page.page.locator("#long")).to_be_hidden()
    page.page.fill("#seconds", "7")
    api.expect(page.page.locator("#long")).to_contain_text("made in windows")
    page.make("brown noise", "7", 45)
    made = studio.get("/api/sounds?limit=1").json[0]
    assert made["samples"] == 7 * 44100
    assert studio.get(f"/api/sounds/{made['id']}/provenance").json["request"]["long"]["anchor"] == 0


def test_a_sound_goes_on_beyond_a_clip(page: Page, studio: Live) -> None:
    page.make("brown noise", "2", 46)
    page.page.fill("#length", "7")
    page.page.click("#extend")
    page.versions(2)
    made = studio.get("/api/sounds?limit=1").json[0]
    assert (made["kind"], made["samples"], made["regions"]) == ("extend", 7 * 44100, [[2.0, 7.0]])


def test_what_is_too_long_to_be_held_is_fetched_while_it_plays(page: Page, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "an hour.flac", tone(601, rate=8000, channels=1), 8000)
    asked: list[str] = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.page.set_input_files("#file", tmp_path / "an hour.flac")
    page.opened("an hour")
    page.page.click("#play")
    page.page.wait_for_function("() => parseFloat(document.getElementById('time').value) > 0.2")
    page.page.click("#play")
    api.expect(page.page.locator("#play")).to_have_text("Play")
    stopped = float(page.text("time").split()[0])
    page.page.locator("#view").press("ArrowRight")
    assert float(page.text("time").split()[0]) == pytest.approx(stopped + 0.02 * 601, abs=0.01)
    assert not [url for url in asked if "samples=float" in url]
