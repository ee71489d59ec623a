"""Values in sidecars, latents and their descriptions that no training can use are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sa3_torch.train.data.recordings import caption_parts, parse_sidecar, read_sidecar
from sa3_torch.train.data.user_folder import split_of

HUGE = 10**400  # JSON can hold it, a float cannot
SOUND = {"prompt": "a", "seconds_start": 0, "seconds_total": 1, "padding_mask": [1, 1], "sample_rate": 8}


@pytest.mark.parametrize("name", ["seconds_start", "seconds_total", "bpm"])
@pytest.mark.parametrize("value", [HUGE, float("nan"), float("inf"), True, [1]])
def test_numbers_of_a_sidecar_that_cannot_be_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*: expected a number") as caught:
        parse_sidecar({"prompt": "piano", name: value})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [HUGE, float("nan"), [1], {}, None])
def test_fields_of_latents_that_cannot_be_said_are_left_out_of_captions(value: object) -> None:
    assert caption_parts({"genre": "house", "bpm": value, "key": value}) == ["house"]
    assert caption_parts({"bpm": 120.0, "key": "A minor"}) == ["120 BPM", "A minor"]


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfpiano note\r\npiano\r\n")
    assert read_sidecar(tmp_path / "a.wav").captions == ("piano note", "piano")
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"prompt": "kick"}')
    assert read_sidecar(tmp_path / "b.wav").captions == ("kick",)


@pytest.mark.parametrize("text", ["[1]", "{", '{"prompt": "\\ud800"}', "[" * 100_000, '"' + "x" * 5000])
def test_a_sidecar_that_is_no_object_is_one_short_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^sidecar is not valid: ") as caught:
        read_sidecar(tmp_path / "a.wav")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_the_split_of_a_source_that_is_no_hash_is_for_training() -> None:
    assert split_of("sha256:" + "00" * 32) == "validation" and split_of("sha256:" + "ff" * 32) == "train"
    assert {split_of(text) for text in ("", "freesound 123", "sha256:zz", "sha256:00")} == {"train"}


def _public(folder: Path, change: dict[str, object], silence: float = 0.0) -> Path:
    folder.mkdir()
    np.save(folder / "0.npy", np.zeros((4, 2), np.float32))
    np.save(folder / "silence.npy", np.full((1, 4, 2), silence, np.float32))
    (folder / "0.json").write_text(json.dumps(SOUND | change))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": 5}, "source is 5; expected a text"),
        ({"source": [1]}, r"source is \[1\]; expected a text"),
        ({"split": "test"}, "split is 'test'; expected train or validation"),
        ({"seconds_total": HUGE}, "seconds_total is 1000"),
        ({"bpm": HUGE}, "bpm is 1000"),
        ({"padding_mask": ["a", "b"]}, "padding_mask is no list of 0 and 1 with a 1"),
        ({"padding_mask": [HUGE, 1]}, "padding_mask is no list"),
        ({"padding_mask": [[1], [1, 2]]}, "padding_mask is no list"),
        ({"padding_mask": [0, 0]}, "padding_mask is no list"),
        ({"padding_mask": 1}, "padding_mask is no list"),
        ({"padding_mask": [1]}, r"padding_mask \(1,\) do not belong together"),
    ],
)
def test_public_latents_that_cannot_be_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training twin needs torch")
    from sa3_torch.train.data.encode.public_latents import import_public

    with pytest.raises(ValueError, match=rf"0\.npy: not a pair of the public layout \(.*{message}") as caught:
        import_public(_public(tmp_path / "in", change), tmp_path / "out", autoencoder="sha256:a")
    assert len(str(caught.value)) < 600 and not (tmp_path / "out").exists()


def test_public_latents_of_other_programs_may_name_any_source(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the training twin needs torch")
    from sa3_torch.train.data.encode.public_latents import import_public

    (item,) = import_public(
        _public(tmp_path / "in", {"source": "freesound 123", "padding_mask": [True, False]}),
        tmp_path / "out",
        autoencoder="sha256:a",
    ).items
    assert (item.source, item.split, item.frames) == ("freesound 123", "train", 1)


def test_silence_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    """It pads every batch, so one such value would make every loss not finite."""
    torch = pytest.importorskip("torch", reason="the training twin needs torch")
    from sa3_torch.train.data.encode.public_latents import import_public
    from sa3_torch.train.data.latents import LatentSet, write_silence

    folder = _public(tmp_path / "bad", {}, float("nan"))
    with pytest.raises(ValueError, match=r"silence\.npy: the latent of silence is not finite"):
        import_public(folder, tmp_path / "out", autoencoder="sha256:a")
    import_public(_public(tmp_path / "good", {}), tmp_path / "latents", autoencoder="sha256:a")
    write_silence(tmp_path / "latents", torch.tensor([0.0, 0.0, float("inf"), 0.0]))
    with pytest.raises(ValueError, match=r"silence\.safetensors: the latent of silence is not finite; encode"):
        LatentSet(tmp_path / "latents", autoencoder="sha256:a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next": None}, "next: expected int, got None"),
        ({"failures": 5}, "failures: expected a list, got 5"),
        ({"items": [5]}, r"items\[0\]: expected dict, got 5"),
        ({"items": [{"id": "a"}]}, "items: entry 0: captions is missing"),
        ({"colour": 1}, r"unknown field\(s\) colour"),
    ],
)
def test_a_damaged_shard_of_an_unfinished_encoding_is_named(
    change: dict[str, object], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="the training twin needs torch")
    import soundfile

    from sa3_mlx.cli.app import run
    from tests.support.command import AUTOENCODER, RATE
    from tests.support.tiny_checkpoint import write_checkpoint

    folder, model = tmp_path / "in", write_checkpoint(tmp_path / "autoencoder", AUTOENCODER)
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2)), RATE)
    (folder / "a.txt").write_text("noise\n")
    words = ["pre-encode", "--data", folder, "--autoencoder", model, "--out", tmp_path / "out"]
    assert run([str(word) for word in words]) == 0
    (tmp_path / "out" / "index.json").unlink()
    path = tmp_path / "out" / "shard-00000.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | change))
    capfd.readouterr()
    assert run([str(word) for word in words]) == 2
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sa3: ")]
    assert str(path) in said and re.search(message, said)
    path.write_text(json.dumps(about))
    assert run([str(word) for word in words]) == 0
    shutil.rmtree(tmp_path / "out")


def test_latents_without_a_hash_are_named(tmp_path: Path) -> None:
    """Of the autoencoder in the index, and of a shard beside it."""
    pytest.importorskip("torch", reason="the training twin needs torch")
    from sa3_torch.evaluate.stored import open_latents
    from sa3_torch.train.data.encode.public_latents import import_public

    folder = tmp_path / "latents"
    import_public(_public(tmp_path / "in", {}), folder, autoencoder="sha256:a")
    whole = {name: json.loads((folder / name).read_text()) for name in ("index.json", "shard-00000.json")}
    for value in (None, 5, ["sha256:a"]):
        (folder / "index.json").write_text(json.dumps(whole["index.json"] | {"autoencoder": value}))
        with pytest.raises(ValueError, match=r"index\.json: autoencoder is .*; expected a hash"):
            open_latents(folder)
    (folder / "index.json").write_text(json.dumps(whole["index.json"]))
    assert open_latents(folder).identity().startswith("sha256:")
    (folder / "shard-00000.json").write_text(json.dumps(whole["shard-00000.json"] | {"hash": None}))
    with pytest.raises(ValueError, match=r"shard-00000\.json: hash is None; encode the recordings again"):
        open_latents(folder).identity()


@pytest.mark.parametrize("name", ["film.partial", ".notes.partial", ".a.wav.x.partial"])
def test_files_of_others_that_are_called_partial_are_never_replaced(name: str, tmp_path: Path) -> None:
    """Only what this program left unfinished makes room."""
    from sa3_torch.train.data.clip_cache import check_place
    from sa3_torch.train.data.recordings import check_empty

    (tmp_path / ".index.json.123.partial").touch()
    check_place(tmp_path, overwrite=True)
    check_empty(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which is no part of a cache"):
        check_place(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is not empty"):
        check_empty(tmp_path)
