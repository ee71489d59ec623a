"""Sounds go out as they were asked for, say in their tags how, and are made again from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.output.provenance import OutputRecord, read_provenance
from sa3_mlx.common.delivery.loudness import loudness_lufs, true_peak_db
from sa3_mlx.common.files import ffmpeg
from sa3_mlx.common.files.audio import peak_db, read_audio, read_tags
from sa3_mlx.common.files.audio_file import open_audio_file
from tests.support.command import RATE, Run, ok, read, tone, write_tone

needs_ffmpeg = pytest.mark.skipif(not ffmpeg.available(), reason="needs ffmpeg")
GENERATE = ("generate", "rain", "--seconds", "0.5", "--steps", "1", "--seed", "1")
NAMES = ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", pytest.param("a.m4a", marks=needs_ffmpeg)]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_made_again_from_its_tags(run: Run, name: str):
    pytest.importorskip("mlx.core")
    pytest.importorskip("pyloudnorm")
    wishes = ("--rate", "24000", "--fade-in", "0.01", "--fade-out", "0.2", "--loudness", "-20", "--true-peak", "-3")
    made = ok(run(*GENERATE, "--out", name, *wishes, "--limit"))
    assert "0.50 s, 24000 Hz, 2 channels" in made.out and "LUFS, true peak" in made.out
    with open_audio_file(Path(name)) as file:
        assert (file.samplerate, sum(map(len, file.blocks()))) == (24_000, 12_000)
    output = read_provenance(Path(name)).output
    assert (output.rate, output.loudness_lufs, output.true_peak_db, output.limit) == (24_000, -20, -3, True)
    again = ok(run("rerun", name))
    assert "byte for byte" in again.out or (name.endswith((".ogg", ".opus")) and "audio equal" in again.out)
    shown = ok(run("info", name)).out
    assert "rain" in shown and "-20" in shown and "24000" in shown and "fade_out" in shown


@needs_ffmpeg
def test_an_m4a_is_edited_and_keeps_its_prompt(run: Run):
    ok(run(*GENERATE, "--out", "a.m4a"))
    varied = ok(run("vary", "a.m4a", "--steps", "1", "--out", "v.wav"))
    assert "that in the tags of a.m4a is taken, 'rain'" in varied.err
    longer = ok(run("extend", "a.m4a", "bell", "--seconds", "1", "--steps", "1", "--out", "e.wav"))
    assert "AAC" not in longer.err
    np.testing.assert_array_equal(read("e.wav")[:3000], read_audio("a.m4a", RATE, 2)[:3000])
    assert "byte for byte" in ok(run("rerun", "e.wav")).out
    ok(run("encode", "a.m4a", "z.safetensors"))


def test_opus_gets_a_rate_that_it_has(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.common.files.encoders._RATES", {"opus": (24_000, 48_000)})
    assert "48000 Hz" in ok(run(*GENERATE, "--out", "a.opus")).out
    assert read_provenance(Path("a.opus")).output == OutputRecord(format="opus", rate=48_000)


def test_plain_tags_are_what_they_were(run: Run):
    ok(run(*GENERATE, "--out", "a.wav"))
    assert json.loads(read_tags("a.wav"))["output"] == {"format": "pcm16", "peak_db": None}
    ok(run(*GENERATE, "--out", "b.wav", "--fade-out", "0.1"))
    assert json.loads(read_tags("b.wav"))["output"] == {"format": "pcm16", "peak_db": None, "fade_out": 0.1}


def test_a_pipe_gets_what_can_be_done_piece_by_piece(run: Run):
    wishes = ("--rate", "16000", "--fade-in", "0.1", "--fade-out", "0.1", "--model", "little")
    ok(run(*GENERATE, "--out", "a.wav", *wishes))
    command = [sys.executable, "-m", "sa3_mlx", *GENERATE, "--out", "-", *wishes]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    Path("p.wav").write_bytes(done.stdout)
    piped, filed = read("p.wav"), read("a.wav")
    assert len(piped) == 8000 == len(filed)
    np.testing.assert_allclose(piped, filed, atol=2e-4)  # chunks are shorter on a pipe, which may round otherwise


def test_levels_are_those_that_were_asked_for(run: Run):
    pytest.importorskip("pyloudnorm")
    ok(run(*GENERATE, "--format", "float", "--out", "l.wav", "--loudness", "-30"))
    assert loudness_lufs(read("l.wav"), RATE) == pytest.approx(-30, abs=0.05)
    ok(run(*GENERATE, "--format", "float", "--out", "t.wav", "--true-peak", "-40"))
    assert true_peak_db(read("t.wav")) == pytest.approx(-40, abs=0.02)
    ok(run(*GENERATE, "--format", "float", "--out", "p.wav", "--peak", "-40", "--limit"))
    assert peak_db(read("p.wav")) == pytest.approx(-40, abs=0.01)


def test_edits_say_that_kept_samples_may_change(run: Run):
    write_tone(Path("in.wav"), 0.5)
    edit = ("inpaint", "in.wav", "bell", "--region", "0.1:0.2", "--steps", "1")
    said = ok(run(*edit, "--out", "a.wav", "--fade-in", "0.1", "--limit")).err
    assert "note: --fade-in, --limit may change kept samples too; without, they stay as they are" in said
    assert "kept samples" not in ok(run(*edit, "--out", "b.wav")).err


def test_latents_are_decoded_to_what_was_asked_for(run: Run):
    write_tone(Path("in.wav"), 0.5)
    ok(run("encode", "in.wav", "z.safetensors", "--model", "little"))
    ok(run("decode", "z.safetensors", "o.flac", "--model", "little", "--rate", "16000", "--peak", "-40"))
    with open_audio_file(Path("o.flac")) as file:
        assert (file.samplerate, file.samples) == (16_000, 8000)
    assert peak_db(read("o.flac")) <= -39.99
    assert json.loads(read_tags("o.flac"))["output"] == {"format": "pcm16", "peak_db": -40, "rate": 16_000}
    ok(run("decode", "z.safetensors", "p.wav", "--model", "little"))
    assert "output" not in json.loads(read_tags("p.wav"))


def test_silence_is_trimmed_and_the_tags_make_it_again(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.common.delivery.chain._SILENT", 0.2)  # noise of random weights has no silent end
    ok(run(*GENERATE, "--out", "whole.wav"))
    monkeypatch.setattr("sa3_mlx.common.delivery.chain._SILENT", float(np.abs(read("whole.wav")).max()) * 0.98)
    ok(run(*GENERATE, "--out", "a.wav", "--trim-silence"))
    assert 0 < len(read("a.wav")) < 4000 and read_provenance(Path("a.wav")).output.trim_silence
    assert "byte for byte" in ok(run("rerun", "a.wav")).out


BAD = {
    "peak and true peak": (["--peak", "-1", "--true-peak", "-1"], "--peak and --true-peak: give one ceiling"),
    "true peak above 0": (["--true-peak", "1"], "true peak is 1 dB: allowed are -60 to 0"),
    "true peak of nothing": (["--true-peak", "-inf"], "true peak is -inf dB"),
    "true peak in words": (["--true-peak", "loud"], "'loud' is not a valid float"),
    "loudness above 0": (["--loudness", "14"], "loudness is 14 LUFS: allowed are -60 to 0"),
    "loudness nan": (["--loudness", "nan"], "loudness is nan LUFS"),
    "loudness of a moment": (["--loudness", "-14", "--seconds", "0.3"], "a sound of 0.3 s has none"),
    "fade before the start": (["--fade-in", "-1"], "fade in is -1.0 s: allowed are 0 to 3600"),
    "fade without end": (["--fade-out", "inf"], "fade out is inf s"),
    "fade nan": (["--fade-out", "nan"], "fade out is nan s"),
    "fades beyond the sound": (
        ["--fade-in", "0.3", "--fade-out", "0.3"],
        "fades of 0.3 s and 0.3 s do not fit into 0.5 s",
    ),
    "rate too low": (["--rate", "10"], "rate is 10 Hz: allowed are 1000 to 768000"),
    "rate too high": (["--rate", "9" * 30], "Hz: allowed are 1000 to 768000"),
    "rate not whole": (["--rate", "44.1"], "not a valid integer"),
    "rate of mp3": (["--rate", "96000", "--out", "a.mp3"], "sample rate is 96000 Hz: mp3 takes 8000, 11025"),
    "rate of opus": (["--rate", "44100", "--out", "a.opus"], "sample rate is 44100 Hz: opus takes 8000, 12000"),
    "rate of vorbis": (["--rate", "300000", "--out", "a.ogg"], "sample rate is 300000 Hz: vorbis takes 1000 to 200000"),
    "opus in wav": (["--out", "a.wav", "--format", "opus"], "cannot hold 'opus'; allowed: pcm16, pcm24, float"),
    "vorbis in opus": (["--out", "a.opus", "--format", "vorbis"], "cannot hold 'vorbis'; allowed: opus"),
    "flac samples in m4a": (["--out", "a.m4a", "--format", "pcm24"], "cannot hold 'pcm24'; allowed: aac"),
    "aac on a pipe": (["--out", "-", "--format", "aac"], "a WAV cannot hold 'aac'"),
    "safe beside a limiter": (["--safe", "--limit"], "--safe has no effect beside --limit"),
    "safe beside a peak": (["--safe", "--peak", "-1"], "--safe has no effect beside --peak"),
    "safe in a float file": (["--safe", "--format", "float"], "--safe has no effect in a float file"),
    "loudness on a pipe": (["--loudness", "-14", "--out", "-"], "--loudness needs the whole audio"),
    "true peak on a pipe": (["--true-peak", "-1", "--out", "-"], "--true-peak needs the whole audio"),
    "limiter on a pipe": (["--limit", "--out", "-"], "--limit needs the whole audio"),
    "safe on a pipe": (["--safe", "--out", "-"], "--safe needs the whole audio"),
    "trimming on a pipe": (["--trim-silence", "--out", "-"], "--trim-silence needs the whole audio"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(refused: Callable[..., str], case: str):
    args, message = BAD[case]
    assert message in refused("generate", "rain", "--seconds", "0.5", *args)


def test_what_cannot_be_done_to_an_edit_or_without_a_program_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    write_tone(Path("in.wav"), 1.0)
    edit = ("inpaint", "in.wav", "--region", "0.1:0.2", "--out", "o.wav")
    assert "--trim-silence cuts kept samples off" in refused(*edit, "--trim-silence")
    assert "--trim-silence cuts" in refused("extend", "in.wav", "--seconds", "2", "--trim-silence")
    assert "needs the whole audio" in refused("vary", "in.wav", "rain", "--limit", "--out", "-")
    monkeypatch.setattr("shutil.which", lambda _name: None)
    assert "a.m4a: .m4a is written by ffmpeg, which is not here; install" in refused("generate", "a", "--out", "a.m4a")
    Path("in.m4a").write_bytes(b"\0\0\0\x1cftypM4A \0\0\x02\0M4A isomiso2")
    for args in (("vary", "in.m4a"), ("info", "in.m4a"), ("rerun", "in.m4a"), ("encode", "in.m4a", "z.npy")):
        assert "in.m4a: cannot be read as audio (it needs ffmpeg, which is not here" in refused(*args)
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    assert "pip install 'sa3[loudness]'" in refused("generate", "rain", "--loudness", "-14")


def test_tags_cannot_ask_for_what_options_cannot(run: Run):
    from sa3_mlx.common.files.audio import write_audio

    ok(run(*GENERATE, "--out", "a.wav"))
    tags = json.loads(read_tags("a.wav"))
    for field, value, message in (
        ("loudness_lufs", 5, "loudness is 5 LUFS"),
        ("rate", 1, "rate is 1 Hz"),
        ("fade_in", "long", "fade_in: expected float"),
        ("limit", 1, "limit: expected bool"),
        ("gain", 1, "unknown field(s) gain"),
    ):
        changed = tags | {"output": tags["output"] | {field: value}}
        write_audio("b.wav", tone(0.1), RATE, comment=json.dumps(changed))
        result = run("rerun", "b.wav")
        assert result.code == 2 and "its tags are damaged" in result.err and message in result.err, result
