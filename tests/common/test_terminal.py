"""What others wrote cannot control the terminal, and no stream that fails takes work with it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sa3_mlx.common import terminal

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b]0;title\x07b\x9b31mc\r\x00\x7f\u202ed\u2066e\ud83d"


def test_control_characters_become_visible() -> None:
    assert terminal.clean(HOSTILE) == r"a\x1b]0;title\x07b\x9b31mc\x0d\x00\x7f\u202ed\u2066e" + "\ud83d"
    assert terminal.clean("piano\tnote\nA♭4 ピアノ é") == "piano\tnote\nA♭4 ピアノ é"
    assert terminal.one_line(" a\nb\t c  d\r\n") == "a b  c  d"
    assert terminal.labelled("seed", "1\nseed 2", 6) == "seed   1 seed 2"


def test_every_way_to_print_cleans(capfd: pytest.CaptureFixture[str]) -> None:
    for write in (terminal.say, terminal.report, terminal.show):
        write(HOSTILE)
        out, err = capfd.readouterr()
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + err) and (out + err).endswith("\\ud83d\n")


def test_what_is_said_is_bounded_and_keeps_its_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """The file and the remedy are read, whatever stands between them; what a command is for is never cut."""
    name = f"/home/{'a' * 240}/x.wav"
    assert terminal.bounded(f"{name}: no such file") == f"{name}: no such file", "whole as far as there is room"
    for middle in ("y" * 10**6, "word " * 10**6):
        line = terminal.bounded(f"sa3: in.wav: its value is {middle}: allowed are 1 to 3; use --steps 3")
        assert len(line) <= terminal.LONGEST
        assert line.startswith("sa3: in.wav: its value is ") and line.endswith(": allowed are 1 to 3; use --steps 3")
    terminal.say(f"first {'x' * 5000} end\nsecond")
    said = capfd.readouterr().err.splitlines()
    assert len(said[0]) < 200 and said[0].endswith("xxx end") and said[1] == "second"
    terminal.show("x" * 5000)
    assert capfd.readouterr().out == "x" * 5000 + "\n"


def test_libraries_are_hushed_and_what_is_said_meanwhile_waits(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.hushed():
        os.write(2, b"a note of a library\n")
        with terminal.hushed():
            os.write(2, b"another\n")
        other = threading.Thread(target=terminal.say, args=["of another thread"])
        other.start()
        other.join(0.1)
        assert other.is_alive(), "it waits"
    other.join()
    os.write(2, b"heard again\n")
    assert capfd.readouterr().err == "of another thread\nheard again\n"


def test_hushing_a_closed_stream_does_no_harm() -> None:
    script = "import os; os.close(2); from sa3_mlx.common.terminal import hushed\nwith hushed(): print('done')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    terminal.show("A♭4")
    assert data.getvalue() == b"A\\u266d4\n"


class Failing(io.StringIO):
    """A stream that raises when it is written to."""

    encoding = "utf-8"

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error


@pytest.mark.parametrize("closed", [True, False])
def test_notes_are_dropped_and_reports_cost_a_note(
    closed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None if closed else Failing(full))
        terminal.report("done")
        assert capfd.readouterr().err == (
            "" if closed else "note: standard output cannot be written (No space left on device)\n"
        )
        reason = "it is closed" if closed else "No space left on device"
        with pytest.raises(OSError, match=f"standard output cannot be written \\({reason}\\)"):
            terminal.show("the product")
        with pytest.raises(OSError, match="standard output"):
            terminal.write_stdout(b"RIFF") if closed else terminal.show("x")
    monkeypatch.setattr(sys, "stderr", None if closed else Failing(full))
    terminal.say("a note")


def test_a_reader_that_went_away_is_no_error_to_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(BrokenPipeError(32, "Broken pipe")))
    terminal.report("done")
    with pytest.raises(terminal.ReaderGone):
        terminal.show("the product")


def test_nothing_else_prints() -> None:
    """Commands and training print through this place; bars get their words cleaned in ``Progress``."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for top in ("sa3_mlx", "sa3_torch", "convert")
        for path in sorted((ROOT / top).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bclick\.s?echo\(|(?<![\w.])print\(|sys\.std(out|err)\.write", line)
    ]
    assert not found
