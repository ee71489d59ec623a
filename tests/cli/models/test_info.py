"""``sa3 info`` of everything that sa3 writes, for people and as JSON; what others wrote is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sa3_mlx.cli.home import find_model
from sa3_mlx.common.adapters.format import write_adapter
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio import write_audio
from sa3_mlx.common.files.safetensors import array_entry, write_tensors
from sa3_mlx.common.installed import DEMO_FOLDER
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import Run, ok, tone, write_tone

Info = Callable[[str | Path], dict[str, Any]]


@pytest.fixture
def info(run: Run) -> Info:
    """Both forms of the command: what JSON says is in the lines for people too."""

    def shown(what: str | Path) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(ok(run("info", what, "--json")).out)
        lines = ok(run("info", what)).out.splitlines()
        for label in facts:
            if facts[label] not in (None, "", [], {}) and label not in ("config", "settings"):
                assert any(line.startswith(label) for line in lines), label
        return facts

    return shown


def test_of_models(run: Run, info: Info, shared_home: Path) -> None:
    facts = info("little")
    assert (facts["kind"], facts["model"], facts["sample rate"]) == ("model", "little", 8000)
    assert facts["config"]["same"]["latent_channels"] == 8 and sum(facts["parts"].values()) == facts["parameters"]
    assert facts["hash"].startswith("sha256:") and info(shared_home / "models" / "little") == facts
    assert info("only-autoencoder")["kind"] == "autoencoder"
    assert info("demo")["usual sampling"] == "euler:8:1" and "piano" in info("demo")["knows the words"]
    pytest.importorskip("mlx.core")
    ok(run("quantize", "little", "small", "--recipe", "8bit"))
    facts = info("small")
    assert facts["quantized"]["recipe"] == "8bit" and facts["stored as"]["8 bits"] > 0
    assert info(find_model("small", generates=True).folder / "quantization.json") == facts


def test_of_the_files_of_a_model(info: Info, shared_home: Path) -> None:
    folder = shared_home / "models" / "little"
    assert info(folder / "config.json") == info(folder / "model.safetensors") == info(folder)
    assert info(folder / "tokenizer.json") == info(folder)


def test_of_results_and_pictures(run: Run, info: Info) -> None:
    pytest.importorskip("mlx.core")
    args = ("--seconds", "0.2", "--steps", "1", "--out", "a.wav")
    ok(run("generate", "rain", *args, "--spectrogram", "a.png"))
    assert info("a.png") == {"kind": "picture", "file": "a.png", "width": 1430, "height": 780}
    rows = [{"model": "little", "setting": setting} for setting in ("euler:8:1", "euler:50:3")]
    results = {"format": "sa3-evaluation/2", "date": "2026-01-01", "seeds": 3, "options": {"clips": 9}, "rows": rows}
    write_json(Path("results.json"), results)
    assert info("results.json")["models"] == ["little euler:8:1", "little euler:50:3"]
    write_json(Path("results.json"), results | {"rows": 3})
    assert "results.json: damaged, or of another version" in run("info", "results.json").err
    write_json(Path("tuning.json"), {"format": "sa3-tuning/1", "entries": [{"model": "little", "date": "2026-01-01"}]})
    assert info("tuning.json")["models"] == ["little 2026-01-01"]
    write_json(Path("other.json"), {"format": "x" * 9999})
    refused = run("info", "other.json").err
    assert "expected one that sa3 writes" in refused and len(refused) < 400


def test_of_sounds(run: Run, info: Info) -> None:
    pytest.importorskip("mlx.core")
    args = ("--seconds", "0.2", "--steps", "1", "--seed", "3", "--batch", "2")
    ok(run("generate", "soft rain", *args, "--out", "a.wav", "--format", "float"))
    facts = info("a-2.wav")
    assert (facts["kind"], facts["prompt"], facts["seed"]) == ("sound", "soft rain", 4)
    assert (facts["samples"], facts["length"], facts["format"]) == (1600, 0.2, "FLOAT")
    assert (
        facts["seeds of the batch"] == [3, 4] and facts["sampler"] == "pingpong" and isinstance(facts["peak dB"], float)
    )
    write_tone(Path("plain.wav"))
    assert info("plain.wav")["tags"].startswith("none")
    write_audio(Path("silent.wav"), tone(0.1) * 0, 8000)
    assert info("silent.wav")["level"] == "silent"


def test_of_latents_and_adapters(run: Run, info: Info, shared_home: Path) -> None:
    pytest.importorskip("mlx.core")
    write_tone(Path("in.wav"), 0.33)
    for name in ("z.safetensors", "z.npy"):
        ok(run("encode", "in.wav", name))
        facts = info(name)
        assert (facts["kind"], facts["frames"], facts["channels"]) == ("encoded sound", 42, 8)
        assert facts["model"] == "little" and facts["samples"] == "2640"
    assert info("z.npy.json") == facts | {"file": "z.npy.json"}
    adapter = random_adapter(shared_home / "models" / "little", adapter_config("dora-rows"), seed=0)
    write_adapter(Path("bell.safetensors"), adapter)
    facts = info("bell.safetensors")
    assert (facts["kind"], facts["type"], facts["rank"]) == ("adapter", "dora-rows", adapter.config.rank)
    assert facts["layers"] == len(adapter.layers) and facts["parameters"] == adapter.bytes // 4
    ok(run("lora", "convert", "bell.safetensors", "official.safetensors", "--to-official"))
    assert info("official.safetensors")["kind"] == "adapter of the official layout"
    write_tensors(Path("other.safetensors"), [array_entry("x", tone(0.1))], {"made": "elsewhere"})
    assert info("other.safetensors")["tensors"] == 1 and info("other.safetensors")["made"] == "elsewhere"


def test_of_what_is_trained_on_and_of_runs(info: Info, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("scipy", reason="the training extra is not installed")
    workspace: Path = request.getfixturevalue("workspace")
    clips = info(workspace / "clips")
    assert (clips["kind"], clips["clips"], clips["kinds"]) == ("clip cache", 16, {"note": 8, "noise": 8})
    assert clips["splits"] == {"train": 12, "validation": 4} and clips["with captions"] == 16
    assert info(workspace / "clips" / "index.json") == clips
    latents = info(workspace / "latents")
    assert (latents["kind"], latents["recordings"], latents["copies"]) == ("latents", 16, 2)
    assert latents["items"] == 28 and latents["autoencoder"].startswith("sha256:")
    run = info(workspace / "run")
    assert (run["kind"], run["step"], run["steps"]) == ("run", 2, 2)
    assert run["checkpoints"] == ["step-00000002"] and run["settings"]["train"]["steps"] == 2
    assert info(workspace / "run" / "settings.json") == run
    shutil.copytree(workspace / "latents", tmp_path / "begun")
    (tmp_path / "begun" / "index.json").unlink()
    begun = info(tmp_path / "begun")
    assert begun["kind"] == "latents, not finished" and "goes on where it was stopped" in begun["next"]


def test_of_shards(info: Info, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    from sa3_torch.train.data.packing import Cut, write_shards

    (tmp_path / "folder").mkdir()
    for number in range(3):
        write_tone(tmp_path / "folder" / f"{number}.wav", 0.1)
        (tmp_path / "folder" / f"{number}.txt").write_text("a tone")
    write_shards(tmp_path / "folder", tmp_path / "shards", shard_bytes=1000, captions_required=True)
    facts = info(tmp_path / "shards")
    assert (facts["kind"], facts["recordings"]) == ("shards of recordings", 3) and facts["shards"] > 1
    tar = info(next((tmp_path / "shards").glob("*.tar")))
    assert tar["kind"] == "shard of recordings" and tar["files"] == {
        "wav": tar["recordings"],
        "json": tar["recordings"],
    }
    shutil.copy(tmp_path / "shards" / "index.json", tmp_path / "mine.json")
    assert info(tmp_path / "mine.json")["recordings"] == 3
    cut = Cut(seconds=1.0, overlap=0.0)
    write_tone(tmp_path / "folder" / "0.wav", 2.5)
    write_shards(tmp_path / "folder", tmp_path / "cut", shard_bytes=1000, captions_required=True, cut=cut)
    facts = info(tmp_path / "cut")
    assert (facts["kind"], facts["pieces"]) == ("shards of pieces of recordings", 5)


BROKEN: dict[str, object] = {
    "no clips": {"format": "sa3-clips/1", "sample_rate": 44100, "about": {}},
    "clips of another type": {"format": "sa3-clips/1", "sample_rate": 44100, "about": {}, "clips": [1]},
    "no sample rate": {"format": "sa3-clips/1", "sample_rate": 0, "about": {}, "clips": []},
    "another format": {"format": "sa3-clips/9"},
    "shards beyond count": {"format": "sa3-latents/2", "autoencoder": "", "shards": 10**18},
    "shards of text": {"format": "sa3-shards/1", "shards": "abc", "left_out": {}},
    "a list": [1],
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_indexes_are_refused_in_one_line(run: Run, case: str) -> None:
    Path("set").mkdir()
    write_json(Path("set") / "index.json", BROKEN[case])
    result = run("info", "set")
    assert result.code == 2 and result.out == "" and "set/" in result.err and "unexpected" not in result.err


def test_what_sa3_did_not_write_is_said(run: Run) -> None:
    Path("folder").mkdir()
    assert "nothing that sa3 wrote; for a folder of recordings there is 'sa3 data lint'" in run("info", "folder").err
    (Path("folder") / "settings.json").write_text('{"theme": "dark"}')
    assert "damaged, or of another version" in run("info", "folder").err
    Path("torn.tar").write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 300)
    assert "torn.tar: cannot be read as a shard" in run("info", "torn.tar").err
    Path("x.json").write_text("{")
    assert "x.json: not valid JSON" in run("info", "x.json").err
    assert "/dev/null: neither a file nor a folder" in run("info", "/dev/null").err
    shutil.copy(DEMO_FOLDER / "config.json", "config.json")
    assert "model.safetensors: no such file" in run("info", "config.json").err
