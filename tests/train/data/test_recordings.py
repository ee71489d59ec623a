"""Folders of recordings: sidecars, what a file holds, lint, and reading block by block."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli.app import run
from sa3_mlx.common.files.audio import read_audio, read_blocks
from sa3_torch.train.data.lint import FileReport, LintReport, figure_of, lint_folder
from sa3_torch.train.data.recordings import (
    Facts,
    clipped_samples,
    find_audio,
    inspect,
    parse_sidecar,
    read_sidecar,
    refuse_failures,
)
from sa3_torch.train.data.user_folder import import_folder

RATE = 44_100


def _noise(samples: int, channels: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, (samples, channels)).astype(np.int16)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """One file for everything that can be wrong."""
    folder = tmp_path / "messy"
    (folder / "deep").mkdir(parents=True)
    loud = np.clip(_noise(20_000).astype(np.float32) / 3000, -1, 1)
    sounds = {
        "good.wav": (_noise(20_000), RATE),
        "mono.wav": (_noise(20_000, 1), RATE),
        "low.wav": (_noise(20_000), 22_050),
        "high.flac": (_noise(20_000, seed=4), 48_000),
        "loud.wav": (loud, RATE),
        "short.wav": (_noise(50), RATE),
        "silent.wav": (np.zeros((20_000, 2), np.int16), RATE),
        "deep/lossy.ogg": (_noise(20_000, seed=5), RATE),
        "deep/lossy2.mp3": (_noise(20_000, seed=6), RATE),
        "cut.wav": (_noise(20_000, seed=7), RATE),
        "deep/said.wav": (_noise(20_000, seed=8), RATE),
        "unsaid.wav": (_noise(20_000, seed=9), RATE),
    }
    for name, (audio, rate) in sounds.items():
        soundfile.write(folder / name, audio, rate)
        (folder / name).with_suffix(".txt").write_text("a sound\n")
    (folder / "unsaid.txt").unlink()
    (folder / "deep" / "said.json").write_text('{"prompt": ')
    (folder / "twin.wav").write_bytes((folder / "good.wav").read_bytes())
    (folder / "twin.txt").write_text("again\n")
    (folder / "text.wav").write_text("this is no audio")
    (folder / "text.txt").write_text("a text file\n")
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:30_000])
    return folder


def test_lint_finds_everything_that_is_wrong(messy: Path) -> None:
    report = lint_folder(messy, minimum_seconds=0.1)
    found = {file.path: set(file.found) for file in report.files}
    assert found == {
        "good.wav": set(),
        "mono.wav": {"mono"},
        "low.wav": {"low rate"},
        "high.flac": {"other rate"},
        "loud.wav": {"clipping"},
        "short.wav": {"too short"},
        "silent.wav": {"silent", "equal channels"},
        "deep/lossy.ogg": set(),
        "deep/lossy2.mp3": set(),
        "cut.wav": {"unreadable"},
        "deep/said.wav": {"bad sidecar"},
        "unsaid.wav": {"no caption"},
        "twin.wav": {"duplicate"},
        "text.wav": {"unreadable"},
    }
    assert not report.good and "as good.wav" in str(report) and "9 of 14 files need a look" in str(report)


def test_words_in_the_picture_do_not_overlap() -> None:
    """With sounds of nearly one length, of lengths far apart, and of more formats than are shown."""

    def report(*sounds: tuple[float, int]) -> LintReport:
        facts = [
            Facts(
                digest="",
                sample_rate=rate,
                channels=1,
                samples=round(seconds * rate),
                peak=0.5,
                rms_db=-20.0,
                clipped_samples=0,
                equal_channels=False,
            )
            for seconds, rate in sounds
        ]
        files = [FileReport(path=f"{number}.wav", facts=fact, found=(), detail="") for number, fact in enumerate(facts)]
        return LintReport(folder="ピアノ $x$", files=tuple(files))

    reports = (
        report(*((1.0 + 0.02 * number, 8000 + 1000 * number) for number in range(12))),
        report((0.1, 44100), (380.0, 44100), (3600.0, 44100)),
        report((2.0, 44100)),
        report(),
    )
    for found in reports:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = figure_of(found)
            figure.draw_without_rendering()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
                boxes = [label.get_window_extent() for label in labels]
                pairs = [(one, other) for number, one in enumerate(boxes) for other in boxes[:number]]
                assert not [pair for pair in pairs if pair[0].overlaps(pair[1])], [label.get_text() for label in labels]
    formats = figure_of(reports[0]).axes[2].get_yticklabels()
    assert formats[0].get_text() == "4 others", "no format is left out silently"


def test_lint_command_writes_table_picture_and_json(messy: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "lint.png"
    assert run(["data", "lint", str(messy), "--picture", str(picture), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["counts"]["unreadable"] == 2 and len(data["rows"]) == data["files"] == 14
    assert next(row for row in data["rows"] if row["path"] == "silent.wav")["rms_db"] is None
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000
    for path in list(messy.rglob("*")):
        if path.is_file() and path.stem not in ("good", "mono"):
            path.unlink()
    assert run(["data", "lint", str(messy)]) == 0 and "nothing is wrong" in capsys.readouterr().out


def test_lint_refuses_a_folder_without_audio(tmp_path: Path, capsys) -> None:
    assert run(["data", "lint", str(tmp_path)]) == 2 and "no audio files" in capsys.readouterr().err
    assert run(["data", "lint", str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [RATE, 22_050, 48_000])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_blocks_are_the_whole_file_to_the_bit(tmp_path: Path, rate: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, _noise(9000, 1), rate)
    whole = read_audio(path, RATE, 2)
    assert np.array_equal(np.concatenate(list(read_blocks(path, RATE, 2, 1000))), whole)


def test_block_reading_refuses_what_whole_reading_refuses(messy: Path) -> None:
    for name, message in (("cut.wav", "truncated"), ("text.wav", "cannot be read as audio")):
        with pytest.raises(ValueError, match=message):
            list(read_blocks(messy / name, RATE, 2))
    with pytest.raises(FileNotFoundError):
        list(read_blocks(messy / "none.wav", RATE, 2))


def test_facts_are_measured(tmp_path: Path) -> None:
    audio = np.full((44_100, 2), 0.5, np.float32)
    audio[100:110] = 1.0
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    facts = inspect(tmp_path / "a.wav")
    assert (facts.sample_rate, facts.channels, facts.samples, facts.clipped_samples) == (RATE, 2, 44_100, 20)
    assert facts.equal_channels and facts.seconds == 1 and facts.peak == 1.0
    assert facts.rms_db == pytest.approx(10 * math.log10(0.25 + 0.75 * 10 / 44_100), abs=1e-6)


def test_clipping_is_three_in_a_row() -> None:
    audio = np.zeros((12, 1), np.float32)
    audio[[0, 1, 4, 5, 6, 11]] = 1
    assert clipped_samples(audio) == 3 and clipped_samples(np.ones((2, 1), np.float32)) == 0


def test_json_wins_over_text_and_fields_make_a_caption(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    (tmp_path / "a.txt").write_text("from text\n\n other  words \n")
    assert read_sidecar(path).captions == ("from text", "other words")
    fields = {
        "genre": "techno",
        "mood": ["dark", "slow"],
        "bpm": 120,
        "key": "A minor",
        "licence": "CC0",
        "artist": "x",
    }
    (tmp_path / "a.json").write_text(json.dumps(fields))
    sidecar = read_sidecar(path)
    assert sidecar.captions == ("techno, dark, slow, 120 BPM, A minor",) and sidecar.licence == "CC0"
    assert sidecar.fields["artist"] == "x" and sidecar.seconds_total is None
    excerpt = parse_sidecar({"prompt": ["one", "two"], "seconds_start": 3, "seconds_total": 60})
    assert excerpt.captions == ("one", "two") and (excerpt.seconds_start, excerpt.seconds_total) == (3.0, 60.0)
    assert read_sidecar(tmp_path / "b.wav").captions == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object"),
        ({"prompt": 3}, "prompt is 3"),
        ({"seconds_total": -1}, "seconds_total is -1"),
        ({"bpm": [1]}, "bpm is"),
        ({"licence": 5}, "licence is 5"),
        ({"seconds_start": "x"}, "seconds_start is 'x'"),
    ],
)
def test_sidecars_that_are_not_valid_are_named(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sidecar(data)


def test_one_percent_is_tolerated_and_more_is_not() -> None:
    refuse_failures(["a"], 100, "unreadable")
    with pytest.raises(ValueError, match="2 of 199 files are unreadable, more than 1 %: a; b"):
        refuse_failures(["a", "b"], 199, "unreadable")


def test_import_carries_sidecars_licences_and_durations(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.mp3", _noise(30_000, seed=i), RATE)
        about = {"prompt": f"noise {i}", "licence": "CC-BY", "author": "me", "seconds_total": 90, "bpm": 99}
        (folder / f"{i}.json").write_text(json.dumps(about))
    clips, report = import_folder(folder, tmp_path / "out", captions_required=True)
    assert report.imported == 3 and clips.clips[0].licence == "CC-BY" and clips.clips[0].seconds == 90
    assert clips.clips[0].fields["bpm"] == 99 and clips.clips[0].source.startswith("sha256:")
    credits = (tmp_path / "out" / "ATTRIBUTION.tsv").read_text().splitlines()
    assert credits[1].startswith("0.mp3\tCC-BY\tme\tsha256:") and len(credits) == 4


def test_a_bad_sidecar_counts_as_a_failure(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _noise(3000), RATE)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"1 of 1 files are unreadable.*sidecar is not valid"):
        import_folder(tmp_path, tmp_path / "out", captions_required=True)


def test_files_are_found_at_any_depth_in_order(messy: Path) -> None:
    names = [path.relative_to(messy).as_posix() for path in find_audio(messy)]
    assert names == sorted(names) and "deep/lossy2.mp3" in names and len(names) == 14
