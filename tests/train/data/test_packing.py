"""Recordings cut into pieces: their samples, where their crops lie, which shard they are in, what refuses them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

pytest.importorskip("torch")
pytest.importorskip("webdataset", reason="the training extra is not installed")

from sa3_mlx.cli.app import run
from sa3_mlx.common import terminal
from sa3_mlx.common.files.audio_file import open_audio_file
from sa3_torch.train.data import shards as shards_module
from sa3_torch.train.data.audio_data import open_audio
from sa3_torch.train.data.augment import NO_AUGMENTATION
from sa3_torch.train.data.clip_cache import SAMPLE_RATE
from sa3_torch.train.data.crops import ShardCrops, _starts
from sa3_torch.train.data.encode.sources import open_source
from sa3_torch.train.data.packing import Cut, write_shards
from sa3_torch.train.data.shards import Piece, ShardIndex, ShardSample, ShardStream, index_shards, read_shard
from tests.support.command import snapshot

CUT = Cut(seconds=1.0, overlap=0.5)
LENGTHS = {"a": 100_000, "b": 41_001, "c": 170_003, "d": 66_150, "e": 66_151}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recordings of noise, of which b and d are no longer than a piece with its overlap."""
    folder = tmp_path_factory.mktemp("sounds")
    for number, (name, samples) in enumerate(LENGTHS.items()):
        audio = np.random.default_rng(number).integers(-9000, 9000, (samples, 2)).astype(np.int16)
        soundfile.write(folder / f"{name}.wav", audio, SAMPLE_RATE)
        (folder / f"{name}.json").write_text(json.dumps({"prompt": name, "seconds_start": 2.0, "licence": "CC0"}))
    return folder


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(folder, out, shard_bytes=250_000, captions_required=True, cut=CUT)
    return out


def _samples(index: ShardIndex) -> list[ShardSample]:
    return [sample for shard in index.shards for sample in read_shard(shard.name)]


def _joined(samples: list[ShardSample]) -> np.ndarray:
    """Put the pieces of a recording together, each up to where the next one begins."""
    audio = []
    for sample in samples:
        length, _ = sample.facts()
        last = sample.piece is None or sample.piece.number + 1 == sample.piece.of
        audio.append(sample.read(0, length if last else round(sample.piece.seconds * SAMPLE_RATE)))
    return np.concatenate(audio)


def test_pieces_are_the_recording_with_all_that_is_said_of_it(folder: Path, packed: Path) -> None:
    index = shards_module.open_index(str(packed))
    assert index.overlap_seconds == 0.5
    samples = _samples(index)
    by_name = {name: [s for s in samples if s.sidecar.fields["id"] == f"{name}.wav"] for name in LENGTHS}
    assert {name: len(found) for name, found in by_name.items()} == {"a": 2, "b": 1, "c": 4, "d": 1, "e": 2}
    for name, found in by_name.items():
        whole, _ = soundfile.read(folder / f"{name}.wav", dtype="float32")
        assert np.array_equal(_joined(found), whole)
        assert len({sample.sidecar.fields["source"] for sample in found}) == 1
        assert {sample.sidecar.captions for sample in found} == {(name,)}
        assert {sample.sidecar.seconds_total for sample in found} == {LENGTHS[name] / SAMPLE_RATE}
    assert by_name["b"][0].piece is None and by_name["b"][0].data == (folder / "b.wav").read_bytes()
    assert [sample.id for sample in by_name["c"]] == ["c.wav#1", "c.wav#2", "c.wav#3", "c.wav#4"]
    begins = [sample.sidecar.seconds_start for sample in by_name["c"]]
    lengths = [sample.piece.seconds for sample in by_name["c"]]
    assert begins[0] == 2.0 and np.allclose(np.diff(begins), lengths[:-1]) and max(lengths) <= 1
    assert np.ptp(lengths) <= 1.5 / SAMPLE_RATE
    overlaps = [one.facts()[0] / SAMPLE_RATE - one.piece.seconds for one in by_name["c"]]
    assert np.allclose(overlaps, 0.5, atol=1 / SAMPLE_RATE)
    assert (packed / "ATTRIBUTION.tsv").read_text().count("CC0") == 5


def test_equal_files_give_equal_pieces(folder: Path, packed: Path, tmp_path: Path) -> None:
    write_shards(folder, tmp_path / "again", shard_bytes=250_000, captions_required=True, cut=CUT)
    one, other = ({Path(k).name: v for k, v in snapshot(where).items()} for where in (packed, tmp_path / "again"))
    assert one == other


@pytest.mark.parametrize("length", [66_151, 100_000, 170_003, 441_000])
@pytest.mark.parametrize("crop", [1, 1024, 22_050])
def test_crops_of_the_pieces_are_those_of_the_recording(length: int, crop: int) -> None:
    """Every place at which a crop of the whole may start belongs to exactly one piece."""
    edges = CUT.edges(length, SAMPLE_RATE)
    begins = []
    for number, (start, stop) in enumerate(pairwise(edges)):
        piece = Piece(number=number, of=len(edges) - 1, seconds=(stop - start) / SAMPLE_RATE)
        starts = _starts(stop - start + 22_050, crop, piece)
        begins += [start + at for at in starts]
        assert number == 0 or starts.start == 0
    assert begins == list(_starts(length, crop, None)) and len(edges) > 2


def test_a_recording_lies_in_one_shard(packed: Path, tmp_path: Path) -> None:
    """What is held out with the last shard is not trained on; of each recording its beginning is measured."""
    index = shards_module.open_index(str(packed))
    names = [{s.sidecar.fields["id"] for s in read_shard(shard.name)} for shard in index.shards]
    assert len(names) >= 3 and sum(map(len, names)) == len(set.union(*names)) == len(LENGTHS)
    assert max(shard.samples for shard in index.shards) >= 4  # a shard grows until its recording ends
    data = open_audio(str(packed), tmp_path / "run")
    held = [clip.id.split("#")[0] for clip in data.clips.clips]
    assert len(held) == len(set(held)) and set(held) == names[-1]


def test_pieces_of_any_file_hold_its_samples(tmp_path: Path) -> None:
    """24 bits and float, beyond full scale, too; a lossy one to 16 bits, at most at full scale."""
    source = tmp_path / "in"
    source.mkdir()
    audio = np.random.default_rng(1).uniform(-1, 1, (120_000, 1)).astype(np.float32)
    soundfile.write(source / "bits24.flac", audio, 48_000, subtype="PCM_24")
    soundfile.write(source / "float.wav", 1.5 * audio, 48_000, subtype="FLOAT")
    soundfile.write(source / "many.wav", np.repeat(audio, 12, axis=1), 48_000, subtype="PCM_16")
    soundfile.write(source / "lossy.ogg", 1.3 * audio, 48_000)
    index = write_shards(source, tmp_path / "out", shard_bytes=1 << 30, captions_required=False, cut=CUT)
    for name, kind, error in (
        ("bits24.flac", "FLAC", 0),
        ("float.wav", "WAV", 0),
        ("many.wav", "WAV", 0),
        ("lossy.ogg", "FLAC", 2.0**-16),
    ):
        with open_audio_file(source / name) as file:
            whole = np.concatenate(list(file.blocks()))
        at = 0
        for sample in (s for s in _samples(index) if s.sidecar.fields["id"] == name):
            with sample._open() as file:
                assert (file.format, file.samplerate) == (kind, 48_000)
                part = np.concatenate(list(file.blocks()))
            wanted = whole[at : at + len(part)] if error == 0 else np.clip(whole[at : at + len(part)], -1, 1 - 2.0**-15)
            assert len(part) > 60_000 and np.abs(part - wanted).max() <= error
            at += round(sample.piece.seconds * 48_000)


def _crops(index: ShardIndex, samples: int = 22_050) -> ShardCrops:
    return ShardCrops(
        index, samples=samples, batch=2, streams=1, window=4, seed=1, quietest_db=0.0, augment=NO_AUGMENTATION
    )


def test_pieces_are_trained_on_as_a_function_of_the_step(packed: Path, tmp_path: Path) -> None:
    index = shards_module.open_index(str(packed))
    crops = _crops(index)
    batches = [crops.batch(step) for step in range(10)]
    assert np.array_equal(_crops(index).batch(7).audio, batches[7].audio)
    seen = Counter(name for batch in batches[: index.samples // 2] for name in batch.ids)
    assert len(seen) == index.samples and set(seen.values()) == {1}
    with pytest.raises(ValueError, match=r"a crop has 0\.501 s, the pieces .* overlap by 0\.5 s.*--overlap-seconds"):
        _crops(index, samples=22_100)
    for number, shard in enumerate(index.shards):  # by others, as the program that indexes them knows no overlap
        (tmp_path / f"x-{number}.tar").write_bytes(Path(shard.name).read_bytes())
    pattern = f"{tmp_path}/x-{{0..{len(index.shards) - 1}}}.tar"
    again = _crops(index_shards(pattern, tmp_path / "index.json"))
    assert np.array_equal(again.batch(7).audio, batches[7].audio)


def test_pieces_are_not_encoded_as_if_they_were_recordings(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds pieces of recordings, for an autoencoder"):
        open_source(packed, SAMPLE_RATE, 2)
    index = shards_module.open_index(str(packed))
    index_shards(index.shards[0].name, tmp_path / "index.json")
    with pytest.raises(ValueError, match="is a piece of a recording"):
        open_source(tmp_path, SAMPLE_RATE, 2).recording(0)


def test_the_command_cuts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["data", "shards", str(folder), str(tmp_path / "out")]
    assert run([*line, "--overlap-seconds", "1"]) == 2 and "give --piece-seconds" in capsys.readouterr().err
    assert run([*line, "--piece-seconds", "1", "--overlap-seconds", "0.5"]) == 0
    assert "10 pieces in 1 shards" in capsys.readouterr().out


@pytest.mark.parametrize("piece", [{}, [1], {"number": 0, "of": 0, "seconds": 1.0}, {"number": 0, "of": 2}])
def test_a_piece_that_cannot_be_is_named(piece: object) -> None:
    found = {"__key__": "k", "wav": b"", "json": json.dumps({"sa3-piece": piece}).encode()}
    assert shards_module._sample("x.tar", found).problem.startswith("sidecar is not valid: sa3-piece: ")


def test_the_next_window_is_read_while_this_one_is_used(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, one sample for each that was taken; what was taken is let go, and is read again if needed."""
    monkeypatch.setattr(shards_module, "_KEPT", 1)
    index = shards_module.open_index(str(packed))
    readers: list[str] = []

    def watched(url: str):
        for sample in read_shard(url):
            readers.append(threading.current_thread().name)
            yield sample

    monkeypatch.setattr(shards_module, "read_shard", watched)
    stream = ShardStream(index, seed=3, stream=0, streams=1, window=4)
    plain = ShardStream(index, seed=3, stream=0, streams=1, window=4)
    expected = [plain.sample(number).id for number in range(3 * index.samples)]
    readers.clear()
    found = []
    for number in range(3 * index.samples):
        found.append(stream.sample(number).id)
        for future in stream._ahead:
            future.result()
        within = number % index.samples % 4
        assert len(stream._ahead) <= within and len(readers) <= number // 4 * 4 + 8
        if within == 3:
            assert len(stream._ahead) >= 2 and stream._samples.count(None) == 2
    assert found == expected and {name.split("_")[0] for name in readers} == {"shards"}
    stream.sample(8)
    assert stream.sample(11).id == expected[11] and stream.sample(8).id == expected[8]


def test_sounds_are_decoded_while_another_thread_is_hushed(folder: Path) -> None:
    """One decoder at a time would not feed a GPU."""
    with open_audio_file(folder / "a.wav") as file, terminal.hushed():
        decoder = threading.Thread(target=file.take, args=(100,), daemon=True)
        decoder.start()
        decoder.join(20)
        assert not decoder.is_alive()
