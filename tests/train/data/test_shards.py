"""WebDataset shards: written the same twice, read back whole, streamed as a function of (seed, step)."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch")
pytest.importorskip("webdataset", reason="the training extra is not installed")

from sa3_mlx.cli.app import run
from sa3_torch.train.data.augment import NO_AUGMENTATION, AugmentConfig
from sa3_torch.train.data.crops import ShardCrops
from sa3_torch.train.data.packing import write_shards
from sa3_torch.train.data.shards import ShardIndex, ShardStream, StaleIndexError, index_shards, open_index, read_shard
from tests.support.command import snapshot

RATE = 44_100
COUNT = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen recordings of different constant levels and rates."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(COUNT):
        audio = np.full((3000 + 100 * i, 2), 0.02 * (i + 1), np.float32)
        soundfile.write(folder / f"{i:02d}.{'flac' if i % 2 else 'wav'}", audio, 48_000 if i == 3 else RATE)
        (folder / f"{i:02d}.json").write_text(json.dumps({"prompt": [f"level {i}"], "licence": "CC0", "bpm": i}))
    return folder


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    write_shards(folder, out, shard_bytes=30_000, captions_required=True)
    return out


@pytest.fixture
def index(packed: Path) -> ShardIndex:
    return open_index(str(packed))


def _crops(index: ShardIndex, seed: int = 1, augment: AugmentConfig = NO_AUGMENTATION, batch: int = 4) -> ShardCrops:
    return ShardCrops(
        index, samples=1024, batch=batch, streams=2, window=3, seed=seed, quietest_db=0.0, augment=augment
    )


def test_shards_hold_the_files_and_what_is_said_of_them(folder: Path, packed: Path, index: ShardIndex) -> None:
    assert len(index.shards) >= 3 and index.samples == COUNT
    assert "00.wav\tCC0" in (packed / "ATTRIBUTION.tsv").read_text()
    samples = [sample for shard in index.shards for sample in read_shard(shard.name)]
    assert [sample.data for sample in samples] == [path.read_bytes() for path in sorted(folder.glob("*.[wf]*"))]
    third = samples[3]
    assert third.id == "03.flac" and third.sidecar.captions == ("level 3",) and third.sidecar.licence == "CC0"
    assert third.sidecar.fields["bpm"] == 3 and third.sidecar.seconds_total == pytest.approx(3300 / 48_000)
    assert third.facts() == (round(3300 * RATE / 48_000), 48_000)
    whole = third.read(0, 9000)
    assert whole.shape == (3032, 2) and third.read(3000, 9000).shape == (32, 2)
    piece = third.read(1200, 1300)
    assert piece.shape == (100, 2) and np.abs(piece - whole[1200:1300]).max() < 1e-4  # no ringing at its ends


def test_equal_files_give_equal_shards(folder: Path, packed: Path, tmp_path: Path) -> None:
    write_shards(folder, tmp_path / "again", shard_bytes=30_000, captions_required=True)
    one, other = ({Path(k).name: v for k, v in snapshot(where).items()} for where in (packed, tmp_path / "again"))
    assert one == other
    with pytest.raises(ValueError, match="holds shards already"):
        write_shards(folder, packed, shard_bytes=30_000, captions_required=True)


def test_an_epoch_of_a_stream_holds_each_of_its_samples_once(index: ShardIndex) -> None:
    streams = [ShardStream(index, seed=4, stream=i, streams=2, window=3) for i in range(2)]
    seen = [[stream.sample(i).id for i in range(2 * stream.samples)] for stream in streams]
    epochs = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in seen]
    for first, second in epochs:
        assert len(set(first)) == len(first) and sorted(first) == sorted(second) and first != second
    assert sorted(epochs[0][0] + epochs[1][0]) == sorted(f"{i:02d}.{'flac' if i % 2 else 'wav'}" for i in range(COUNT))


def test_any_place_of_a_stream_is_reached_directly(index: ShardIndex) -> None:
    stream = ShardStream(index, seed=4, stream=0, streams=1, window=4)
    run_through = [stream.sample(i).id for i in range(40)]
    for place in (39, 0, 17, 18, 5):
        assert ShardStream(index, seed=4, stream=0, streams=1, window=4).sample(place).id == run_through[place]
        assert stream.sample(place).id == run_through[place]
    other = ShardStream(index, seed=5, stream=0, streams=1, window=4)
    assert [other.sample(i).id for i in range(40)] != run_through


def test_crops_are_a_function_of_seed_and_step_and_rows(index: ShardIndex) -> None:
    crops = _crops(index)
    batches = [crops.batch(step) for step in range(6)]
    assert batches[0].audio.shape == (4, 1024, 2)
    assert np.array_equal(_crops(index).batch(4).audio, batches[4].audio)
    half = _crops(index)
    assert np.array_equal(half.batch(4, slice(2, 4)).audio, batches[4].audio[2:]) and list(half._streams) == [1]
    assert not np.array_equal(_crops(index, seed=2).batch(4).audio, batches[4].audio)
    for batch in batches:
        for crop, caption, name in zip(batch.audio.numpy(), batch.captions, batch.ids, strict=True):
            number = int(name.split(".")[0])
            assert caption == f"level {number}" and np.abs(crop).max() == pytest.approx(0.02 * (number + 1), rel=0.15)


def test_chirps_stand_behind_sixteen_crops(index: ShardIndex) -> None:
    chirps = AugmentConfig(chirps_per_16=1, silence=0.0, tail=0.0, tail_patches=1, pan=0.0)
    batch = _crops(index, augment=chirps, batch=16).batch(0)
    assert len(batch.ids) == 17 and batch.ids[16].startswith("chirp")


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_others_are_indexed_and_read(folder: Path, tmp_path: Path, capsys) -> None:
    for shard in range(2):
        members = {}
        for i in range(3):
            members[f"x/{shard}{i}.flac"] = (folder / "01.flac").read_bytes()
            members[f"x/{shard}{i}.json"] = json.dumps({"prompt": f"take {shard}{i}"}).encode()
        _tar(tmp_path / f"set-{shard:03d}.tar", members)
    pattern = str(tmp_path / "set-{000..001}.tar")
    assert run(["data", "index", pattern, str(tmp_path / "index.json")]) == 0
    assert "6 recordings in 2 shards" in capsys.readouterr().out
    index = open_index(str(tmp_path / "index.json"))
    assert [shard.samples for shard in index.shards] == [3, 3]
    stream = ShardStream(index, seed=0, stream=0, streams=1, window=10)
    assert Counter(stream.sample(i).sidecar.captions[0] for i in range(6)).total() == 6


def test_shards_in_a_bucket_are_read_through_its_program(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3:// goes through ``aws s3 cp URL -``; here a stand-in that copies from the local folder."""
    program = tmp_path / "aws"
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $5" = "s3 cp --quiet -" ] && exec cat "{packed}/${{4##*/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    index = open_index("s3://bucket/sounds")
    assert index.shards[0].name == "s3://bucket/sounds/audio-000000.tar"
    assert sum(1 for shard in index.shards for _ in read_shard(shard.name)) == COUNT


def test_samples_that_cannot_be_read_are_named_and_stop_the_run(folder: Path, tmp_path: Path) -> None:
    good = (folder / "01.flac").read_bytes()
    members = {f"{i:03d}.flac": b"no audio" if i == 7 else good for i in range(101)}
    index = index_shards(str(_tar(tmp_path / "a.tar", members)), tmp_path / "index.json")
    crops = ShardCrops(
        index, samples=512, batch=101, streams=1, window=101, seed=0, quietest_db=0.0, augment=NO_AUGMENTATION
    )
    batch = crops.batch(0)
    assert len(batch.ids) == 101 and next(iter(crops.failures)).endswith("a.tar: 007")
    few = index_shards(
        str(_tar(tmp_path / "b.tar", {"0.flac": good, "1.wav": good[:900], "2.wav": b""})), tmp_path / "few.json"
    )
    with pytest.raises(ValueError, match="more than 1 %"):
        ShardCrops(
            few, samples=512, batch=3, streams=1, window=3, seed=0, quietest_db=0.0, augment=NO_AUGMENTATION
        ).batch(0)


def test_bad_shards_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sa3 data index"):
        open_index(str(tmp_path))
    members = {"0.json": b"{}", "1.json": b"{", "1.wav": b"", "2.wav": b"", "3.txt": b"words"}
    problems = [sample.problem for sample in read_shard(str(_tar(tmp_path / "a.tar", members)))]
    assert problems[0] == "no audio among json" and problems[1].startswith("sidecar is not valid")
    assert problems[2] == "" and problems[3] == "no audio among txt"
    with pytest.raises(ValueError, match=r"a\.tar: 0: no audio among json"):
        next(read_shard(str(tmp_path / "a.tar"))).facts()
    data = json.loads((packed / "index.json").read_text())
    data["shards"][0]["name"] = "pipe:echo hello"
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises((ValueError, FileNotFoundError)):
        list(read_shard(open_index(str(tmp_path)).shards[0].name))
    data["shards"][0]["name"] = "pipe:curl https://example.invalid/x.tar"
    (tmp_path / "index.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="commands are not run"):
        open_index(str(tmp_path))
    with pytest.raises(ValueError, match="too few for 99 streams"):
        ShardStream(open_index(str(packed)), seed=0, stream=98, streams=99, window=1)


def test_an_index_that_does_not_fit_its_shards_is_named(packed: Path, tmp_path: Path) -> None:
    data = json.loads((packed / "index.json").read_text())
    for shard in data["shards"]:
        shard["name"], shard["samples"] = str(packed / shard["name"]), shard["samples"] - 1
    (tmp_path / "index.json").write_text(json.dumps(data))
    stream = ShardStream(open_index(str(tmp_path / "index.json")), seed=0, stream=0, streams=1, window=50)
    with pytest.raises(ValueError, match="index it again"):
        stream.sample(0)


def test_a_byte_of_a_shard_that_changed_is_noticed(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "shards"
    write_shards(folder, out, shard_bytes=60_000, captions_required=True)
    for place in (out, out / "index.json"):
        assert run(["data", "verify", str(place)]) == 0 and "shards as they were written" in capsys.readouterr().out
    tar = out / "audio-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:2000] + bytes([data[2000] ^ 4]) + data[2001:])
    assert run(["data", "verify", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"sa3: {tar}: has changed since it was indexed; get a good copy, or index it again\n"
    )


@pytest.mark.parametrize(("now", "found"), [(1, "fewer"), (3, "more")])
def test_a_shard_that_was_made_again_is_not_encoded_by_its_old_index(
    now: int, found: str, folder: Path, tmp_path: Path
) -> None:
    """The recordings that it has beyond those would be left out without a word."""
    from sa3_torch.train.data.encode.sources import ShardSource

    sound = (folder / "01.flac").read_bytes()
    index = index_shards(str(_tar(tmp_path / "a.tar", {"0.flac": sound, "1.flac": sound})), tmp_path / "index.json")
    source = ShardSource(index, 44_100, 2)
    assert len([source.recording(number) for number in range(2)]) == 2
    _tar(tmp_path / "a.tar", {f"{number}.flac": sound for number in range(now)})
    source = ShardSource(index, 44_100, 2)
    source.recording(0)
    with pytest.raises(StaleIndexError, match=rf"a\.tar: has {found} samples, its index says 2; index it again"):
        source.recording(1)


def test_unreadable_files_stop_the_packing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.wav").write_bytes(b"no audio")
    (source / "a.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"1 of 1 files are unreadable.*a\.wav"):
        write_shards(source, tmp_path / "out", shard_bytes=1000, captions_required=True)
    assert not (tmp_path / "out" / "index.json").exists()
