"""Pre-encoding: exact lengths, chunks equal to the whole, resumption to the bit, bad input, the public layout."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

import soundfile

from sa3_mlx.cli.app import run
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.chunks import halo
from sa3_torch.same import SAME
from sa3_torch.train.autoencoder.gate import check_latents
from sa3_torch.train.data.encode.encoder import encode_blocks
from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder, load_autoencoder
from sa3_torch.train.data.encode.public_latents import export_public, import_public
from sa3_torch.train.data.encode.sources import FolderSource, PartSource, open_source
from sa3_torch.train.data.latents import LatentSet
from tests.support.command import AUTOENCODER, RATE, snapshot
from tests.support.data.recordings import CONFIG, encoder_of, noise, write_recordings
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint

SIZE = AUTOENCODER.same.samples_per_latent  # 64
BATCHED = dataclasses.replace(CONFIG, batch=4, chunk_frames=32)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("autoencoder"), AUTOENCODER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_recordings(tmp_path / "sounds")


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (SIZE - 1, 1), (SIZE, 1), (SIZE + 1, 2)])
def test_a_frame_that_holds_any_audio_is_valid(tmp_path: Path, autoencoder: Path, samples: int, frames: int) -> None:
    """Upstream resizes the mask with nearest neighbours and loses the last partial frame [T16.6]."""
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", np.full((samples, 2), 9000, np.int16), RATE)
    (tmp_path / "in" / "a.txt").write_text("a\n")
    latents = encoder_of(tmp_path / "in", autoencoder, tmp_path / "out").run()
    item = latents.items[0]
    assert item.frames == frames and item.seconds == samples / RATE and latents.read(item).shape == (frames, 8)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (4095, 1), (4096, 1), (4097, 2)])
def test_the_ceil_rule_at_the_released_ratio(samples: int, frames: int) -> None:
    config = dataclasses.replace(AUTOENCODER.same, patch_size=256, stride=16)
    same = SAME(config, 2).eval()
    pieces = list(encode_blocks(same, iter([np.full((samples, 2), 0.1, np.float32)]), 8))
    assert sum(len(piece) for piece in pieces) == frames


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
@pytest.mark.parametrize("lead", [0, 17])
def test_chunked_encoding_equals_the_whole(name: str, lead: int, tmp_path: Path) -> None:
    """Away from the seams and at them; measured 5e-7."""
    model = TINY[name]
    same, _ = load_autoencoder(write_checkpoint(tmp_path, model))
    size, edge = model.same.samples_per_latent, halo(model.same, "encode")
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (61 * size + 33, 2)).astype(np.float32)
    chunk = 2 * edge + 6 * model.same.frame_multiple
    blocks = (audio[i : i + 5000] for i in range(0, len(audio), 5000))
    pieces = list(encode_blocks(same, blocks, chunk, lead))
    with torch.no_grad():
        whole = same.encode(torch.from_numpy(np.pad(audio, ((lead, 0), (0, 0))))[None])[0]
    assert len(pieces) > 3 and torch.cat(pieces).shape == whole.shape
    assert (torch.cat(pieces) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_memory_does_not_grow_with_the_length() -> None:
    """While an endless recording is encoded no more than one chunk and one block wait."""
    same = SAME(AUTOENCODER.same, 2).eval()
    taken = 0

    def blocks():
        nonlocal taken
        for _ in range(400):
            taken += 1
            yield np.zeros((SIZE, 2), np.float32)

    given = 0
    for piece in encode_blocks(same, blocks(), 8):
        given += len(piece)
        assert taken - given <= 8 + 1
    assert given == 400


def test_a_folder_becomes_latents_with_all_it_says(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    encoder = encoder_of(folder, autoencoder, tmp_path / "out")
    latents = encoder.run()
    assert encoder.progress.silent == ["quiet.wav"] and encoder.progress.duplicates == ["twin.wav"]
    first = latents.items[0]
    assert first.captions == ("noise 0", "sound 0") and first.licence == "CC0" and first.fields == {"bpm": 100}
    same, digest = load_autoencoder(autoencoder)
    for item in latents.items:
        if "+" in item.id:
            continue
        audio, _ = soundfile.read(folder / item.id, dtype="float32")
        with torch.no_grad():
            whole = same.encode(torch.from_numpy(audio)[None])[0]
        assert item.frames == -(-len(audio) // SIZE) and item.seconds == len(audio) / RATE
        assert (latents.read(item) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert max(item.shard for item in latents.items) >= 2
    details = json.loads((tmp_path / "out" / "details.json").read_text())
    assert details["autoencoder"] == digest and details["scale"] == 1.0 and details["silent"] == ["quiet.wav"]
    assert details["seconds"] == 36_000 / RATE and details["running_std"] == pytest.approx(1.3)
    mean, deviation = latents.statistics(None)
    rows = torch.cat([latents.read(item) for item in latents.items])
    assert torch.allclose(mean, rows.mean(0), atol=1e-6) and torch.allclose(deviation, rows.std(0), atol=1e-6)
    assert "0.wav\tCC0" in (tmp_path / "out" / "ATTRIBUTION.tsv").read_text()


@pytest.mark.parametrize("config", [CONFIG, BATCHED], ids=["single", "batched"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    config: EncodeConfig, folder: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder_of(folder, autoencoder, tmp_path / "whole", config).run()
    for stop in (3, 6):  # recordings after which it is interrupted, within a shard
        encoder = encoder_of(folder, autoencoder, tmp_path / "halves", config)
        inner = encoder._recording

        def recording(shard, number, inner=inner, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            inner(shard, number)

        monkeypatch.setattr(encoder, "_recording", recording)
        with pytest.raises(KeyboardInterrupt):
            encoder.run()
        assert not (tmp_path / "halves" / "index.json").exists()
    again = encoder_of(folder, autoencoder, tmp_path / "halves", config)
    assert 0 < again.progress.next <= 6
    again.run()
    whole, halves = (snapshot(tmp_path / name) for name in ("whole", "halves"))
    assert {Path(k).name: v for k, v in whole.items()} == {Path(k).name: v for k, v in halves.items()}
    before = snapshot(tmp_path / "halves")
    encoder_of(folder, autoencoder, tmp_path / "halves", config).run()  # finished: nothing is done again
    assert snapshot(tmp_path / "halves") == before


_COMMANDS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sa3_mlx.cli.app import run
from sa3_mlx.common.files.safetensors import file_hash
if sys.argv[2] == "slow":
    from sa3_torch.train.data.encode.pre_encode import PreEncoder
    inner = PreEncoder._recording
    PreEncoder._recording = lambda *arguments: (inner(*arguments), time.sleep(0.3))
for out in sys.argv[3].split(","):
    assert run([*sys.argv[4:], out]) == 0
"""


@pytest.mark.parametrize("batch", ["1", "4"])
def test_a_killed_process_leaves_what_the_next_one_needs(
    batch: str, folder: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """Both runs in processes of their own: which BLAS a process has loaded changes the last bits."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = [sys.executable, "-c", _COMMANDS, str(Path(__file__).resolve().parents[3])]
    arguments = ["pre-encode", "--data", folder, "--autoencoder", autoencoder, "--batch", batch]
    arguments += ["--shard-frames", "40", "--out"]
    process = subprocess.Popen([*code, "slow", killed, *arguments])
    while not (killed / "shard-00001.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*code, "fast", f"{killed},{whole}", *arguments], check=True)
    one, other = ({Path(name).name: value for name, value in snapshot(out).items()} for out in (killed, whole))
    assert one == other and len(one) > 10


def test_shards_are_encoded_as_the_folder_that_they_hold(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    from sa3_torch.train.data.packing import write_shards

    index = write_shards(folder, tmp_path / "shards", shard_bytes=60_000, captions_required=True)
    assert len(index.shards) > 1
    source = open_source(tmp_path / "shards", RATE, 2)
    packed = PreEncoder(source, autoencoder, tmp_path / "packed", CONFIG).run()
    loose = encoder_of(folder, autoencoder, tmp_path / "loose").run()
    assert packed.items[0].id == "audio-000000.tar/0" and packed.items[0].fields["id"] == "0.wav"
    for one, other in zip(packed.items, loose.items, strict=True):
        assert (one.captions, one.seconds, one.frames, one.source) == (
            other.captions,
            other.seconds,
            other.frames,
            other.source,
        )
        if "+" not in one.id:
            assert torch.equal(packed.read(one), loose.read(other))
    assert check_latents(tmp_path / "packed", source, autoencoder, items=3).good


def test_another_plan_is_refused(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    encoder_of(folder, autoencoder, tmp_path / "out").run()
    with pytest.raises(ValueError, match="begun with another copies"):
        encoder_of(folder, autoencoder, tmp_path / "out", dataclasses.replace(CONFIG, copies=3))
    (folder / "7.wav").unlink()
    with pytest.raises(ValueError, match="begun with another recordings"):
        encoder_of(folder, autoencoder, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", AUTOENCODER, variant="other")
    with pytest.raises(ValueError, match="begun with another autoencoder"):
        encoder_of(folder, other, tmp_path / "out")
    with pytest.raises(ValueError, match="encode it again"):
        LatentSet(tmp_path / "out", autoencoder=load_autoencoder(other)[1])


def test_more_than_one_percent_of_bad_files_stop_the_run(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    (folder / "3.wav").write_bytes((folder / "3.wav").read_bytes()[:3000])
    (folder / "5.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"1 of 10 files are unreadable, more than 1 %: 3\.wav: .*truncated"):
        encoder_of(folder, autoencoder, tmp_path / "out").run()
    assert not (tmp_path / "out" / "index.json").exists()
    (folder / "3.json").unlink()
    (folder / "3.wav").unlink()
    (folder / "0.json").unlink()
    with pytest.raises(ValueError, match=r"without a caption, more than 1 %: 0\.wav"):
        encoder_of(folder, autoencoder, tmp_path / "out2").run()


def test_one_bad_file_in_a_hundred_is_skipped_and_named(tmp_path: Path, autoencoder: Path) -> None:
    """The bad one breaks off in its middle: what was written of it is taken back."""
    for i in range(100):
        soundfile.write(tmp_path / f"{i:03d}.wav", noise(200, i), RATE)
        (tmp_path / f"{i:03d}.txt").write_text("noise\n")
    bad = np.full((3000, 2), 0.1, np.float32)
    bad[2500] = np.nan
    soundfile.write(tmp_path / "050.wav", bad, RATE, subtype="FLOAT")
    encoder = encoder_of(tmp_path, autoencoder, tmp_path / "out", dataclasses.replace(CONFIG, copies=1))
    latents = encoder.run()
    assert len(latents.items) == 99 and encoder.progress.failures[0].startswith("050.wav: ")
    assert sum(item.frames for item in latents.items) == 99 * 4
    assert [item.offset for item in latents.items[:3]] == [0, 4, 8]


def test_nothing_to_encode_is_refused(tmp_path: Path, autoencoder: Path) -> None:
    with pytest.raises(ValueError, match="no audio files"):
        encoder_of(tmp_path, autoencoder, tmp_path / "out")
    soundfile.write(tmp_path / "quiet.wav", np.zeros((500, 2), np.int16), RATE)
    (tmp_path / "quiet.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match="nothing could be encoded"):
        encoder_of(tmp_path, autoencoder, tmp_path / "out").run()
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_public_layout_round_trips(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    latents = encoder_of(folder, autoencoder, tmp_path / "out").run()
    count = export_public(latents, tmp_path / "public", RATE)
    assert count == len(latents.items) == len(list((tmp_path / "public").glob("0*.npy")))
    about = json.loads((tmp_path / "public" / "0000000000.json").read_text())
    array = np.load(tmp_path / "public" / "0000000000.npy")
    assert array.shape == (8, 16) and about["padding_mask"] == [1] * 16 and about["prompt"] == "noise 0"
    assert about["seconds_start"] == 0 and about["seconds_total"] == 1000 / RATE and about["sample_rate"] == RATE
    assert np.load(tmp_path / "public" / "silence.npy").shape == (1, 8, 64)
    again = import_public(tmp_path / "public", tmp_path / "again", autoencoder=latents.autoencoder)
    assert torch.equal(again.silence, latents.silence)
    for one, other in zip(latents.items, again.items, strict=True):
        place = {"shard": 0, "offset": 0}
        assert dataclasses.replace(one, **place) == dataclasses.replace(other, **place)
        assert torch.equal(latents.read(one), again.read(other))
    with pytest.raises(ValueError, match="encode it again"):
        import_public(tmp_path / "public", tmp_path / "third", autoencoder="sha256:other")


def test_public_latents_of_others_are_cut_at_their_mask(tmp_path: Path) -> None:
    """As upstream writes them: padded, with a mask and no more than the basic fields."""
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "000.npy", np.arange(24, dtype=np.float32).reshape(4, 6))
    np.save(source / "silence.npy", np.zeros((1, 4, 6), np.float32))
    about = {
        "prompt": "a",
        "seconds_start": 0,
        "seconds_total": 1.5,
        "padding_mask": [1, 1, 1, 1, 0, 0],
        "sample_rate": 8,
    }
    (source / "000.json").write_text(json.dumps(about))
    latents = import_public(source, tmp_path / "out", autoencoder="sha256:a")
    assert latents.items[0].frames == 4 and latents.items[0].seconds == 1.5 and latents.items[0].captions == ("a",)
    assert torch.equal(latents.read(latents.items[0])[:, 1], torch.tensor([6.0, 7, 8, 9]))
    (source / "000.json").write_text("{}")
    with pytest.raises(ValueError, match=r"000\.npy: not a pair of the public layout"):
        import_public(source, tmp_path / "out2", autoencoder="sha256:a")


def test_the_gate_passes_right_latents_and_stops_wrong_ones(
    folder: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["pre-encode", "--data", str(folder), "--autoencoder", str(autoencoder), "--out", str(out)]) == 0
    common = ["data", "gate", str(out), "--data", str(folder), "--autoencoder", str(autoencoder)]
    assert run(common) == 0 and "decode as they should" in capsys.readouterr().out
    report = check_latents(out, open_source(folder, RATE, 2), autoencoder, items=4)
    assert report.good and len(report.rows) == 4 and report.stored == pytest.approx(report.online, rel=1e-4)
    path = out / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    values = np.frombuffer(data, "<f4", offset=256).copy()
    path.write_bytes(data[:256] + (3 * values).tobytes())
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**about, "hash": file_hash(path)}))  # written wrongly, not damaged
    capsys.readouterr()
    latents = LatentSet(out, autoencoder=load_autoencoder(autoencoder)[1])
    assert run([*common, "--json"]) == 1 and json.loads(capsys.readouterr().out)["good"] is False
    with pytest.raises(ValueError, match=r"`sa3 data gate` failed: log-mel distance [\d.]+, of fresh latents"):
        latents.check_gate()


def test_a_byte_that_changed_is_noticed_when_all_are_looked_at(
    folder: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``data verify``, and by the gate that every folder passes before training; opening reads no latents."""
    out = tmp_path / "out"
    assert run(["pre-encode", "--data", str(folder), "--autoencoder", str(autoencoder), "--out", str(out)]) == 0
    gate = ["data", "gate", str(out), "--data", str(folder), "--autoencoder", str(autoencoder)]
    assert run(gate) == 0
    latents = LatentSet(out, autoencoder=load_autoencoder(autoencoder)[1])
    for name in ("shard-00000.safetensors", "silence.safetensors"):
        assert run(["data", "verify", str(out)]) == 0 and "1 shards as they were written" in capsys.readouterr().out
        latents.check_gate()
        good = (out / name).read_bytes()
        (out / name).write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
        for line in (["data", "verify", str(out)], gate):
            assert run(line) == 2
            said = capsys.readouterr().err
            assert f"{out / name}: has changed since it was written (sha256:" in said and said.count("\n") == 1
            with pytest.raises(ValueError, match="has not been run on these latents"):
                latents.check_gate()
        (out / name).write_bytes(good)
        assert run(gate) == 0
    index = json.loads((out / "index.json").read_text())
    del index["silence"]  # as an earlier version wrote it
    (out / "index.json").write_text(json.dumps(index))
    assert run(["data", "verify", str(out)]) == 0


def test_silence_is_constant_in_the_interior(autoencoder: Path) -> None:
    same, _ = load_autoencoder(autoencoder)
    with torch.no_grad():
        latents = same.encode(torch.zeros(1, 32 * SIZE, 2))[0]
    edge, step = halo(same.config, "encode"), same.config.frame_multiple
    inner = latents[edge:-edge].unflatten(0, (-1, step))
    assert (inner - inner[:1]).abs().max() < 1e-5


def test_parts_hold_what_the_whole_holds(folder: Path, autoencoder: Path, tmp_path: Path) -> None:
    """Three jobs, each with a folder of its own, to the same bits; parts that are not there are refused."""
    for name in ("quiet.wav", "twin.wav"):
        (folder / name).unlink()
    line = ["pre-encode", "--data", str(folder), "--autoencoder", str(autoencoder), "--copies", "2"]
    for part in ("1/1", "1/3", "2/3", "3/3"):
        assert run([*line, "--part", part, "--out", str(tmp_path / part.replace("/", "-"))]) == 0
    digest = load_autoencoder(autoencoder)[1]
    whole = LatentSet(tmp_path / "1-1", autoencoder=digest)
    parts = LatentSet(*(tmp_path / f"{number}-3" for number in (1, 2, 3)), autoencoder=digest)
    assert [item.id for item in parts.items] == [item.id for item in whole.items] and len(whole.items) > 8
    for one, other in zip(whole.items, parts.items, strict=True):
        assert torch.equal(whole.read(one), parts.read(other))
    source = FolderSource(folder, RATE, 2)
    with pytest.raises(ValueError, match="part 1 of 9 of 8 recordings"):
        PartSource(source, 0, 9)
    assert run([*line, "--part", "4/3", "--out", str(tmp_path / "none")]) == 2
