"""Runs that are refused change nothing: of other data, of another process, in a folder of something else. Nor does
writing the model of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.files.atomic import locked
from tests.support import stages
from tests.support.command import refused_line, sa3, snapshot

pytestmark = pytest.mark.usefixtures("no_pictures")
ARC = ("weights.clap=0.0", "weights.frechet=0.0", "taps=[0]", "head.width=16", "head.groups=4")
SETS = ("train.steps=1", "train.batch=4", "train.precision='fp32'", "train.compile=false", "clips.buckets=1")


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Train where it is to be refused, with the tiny model under the name of the demo; return its one line."""
    from sa3_torch.train.flow import pretrain

    monkeypatch.setattr(pretrain, "PRESETS", {**pretrain.PRESETS, "first": stages.MODEL})
    return lambda *words: refused_line(capfd, tmp_path, "train", *words)


def _lora(workspace: Path, latents: Path, out: Path) -> list[str]:
    sets = [f"--set={change}" for change in (*SETS, "demo.steps=1")]
    return ["lora", "--model", str(workspace / "base"), "--latents", str(latents), *sets, "--out", str(out)]


def _pretrain(workspace: Path, out: Path) -> list[str]:
    folders = ("--latents", str(workspace / "latents"), "--autoencoder", str(workspace / "run" / "model"))
    return ["pretrain", *folders, *(f"--set={change}" for change in SETS), "--out", str(out)]


def test_a_run_does_not_go_on_with_other_latents(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    latents, out = tmp_path / "latents", tmp_path / "run"
    assert sa3(capfd, "train", *_lora(workspace, workspace / "latents", out)).code == 0
    before = snapshot(out)
    shutil.copytree(workspace / "latents", latents)
    described = latents / "shard-00000.json"
    about = json.loads(described.read_text())
    about["items"][0]["captions"] = ["piano note C4"]
    described.write_text(json.dumps(about))
    assert "holds a run with latents = 'sha256:" in refused(*_lora(workspace, latents, out))
    assert snapshot(out) == before


def test_what_began_with_a_model_goes_on(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    words, out = _pretrain(workspace, tmp_path / "run"), tmp_path / "run"
    begun = (*words, "--start", str(workspace / "random"))
    assert sa3(capfd, "train", *begun).code == 0
    assert sa3(capfd, "train", *begun, "--set=train.steps=2").code == 0
    assert (out / "checkpoints" / "step-00000002").is_dir()
    assert "holds a run with words from elsewhere: give its --start or --tokenizer" in refused(*words)
    assert "holds a run with start_weights = 'sha256:" in refused(*words, "--start", str(workspace / "base"))


def test_an_autoencoder_does_not_go_on_with_other_sounds(
    workspace: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name of the cache and everything but one sample in it are the same."""
    monkeypatch.setattr("sa3_torch.train.autoencoder.stage.PRESETS", {"first": stages.MODEL})
    clips, out = tmp_path / "clips", tmp_path / "run"
    shutil.copytree(workspace / "clips", clips)
    sets = ("train.steps=1", "train.batch=4", "train.compile=false", "crop_samples=8192", "spectral.sizes=[128]")
    words = ("autoencoder", "--data", str(clips), *(f"--set={change}" for change in sets), "--out", str(out))
    assert sa3(capfd, "train", *words).code == 0
    before = snapshot(out)
    with (clips / "audio.npy").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x12\x34")
    assert "holds a run with data = " in refused(*words)
    assert snapshot(out) == before


@pytest.mark.parametrize("command", ["lora", "pretrain"])
@pytest.mark.parametrize("found", ["other settings", "another process"])
def test_a_folder_that_is_not_free_stays_as_it_is(
    found: str, command: str, workspace: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Neither a tokenizer nor an index nor a log appears in it."""
    out = tmp_path / "run"
    out.mkdir()
    words = _pretrain(workspace, out) if command == "pretrain" else _lora(workspace, workspace / "latents", out)
    if found == "another process":
        with locked(out):
            assert "another process works in this folder" in refused(*words)
        assert not any(out.iterdir())
    else:
        (out / "settings.json").write_text('{"editor.fontSize": 12}')
        assert "these are not the settings of a run" in refused(*words)
        assert [path.name for path in out.iterdir()] == ["settings.json"]
        assert (out / "settings.json").read_text() == '{"editor.fontSize": 12}'


def test_the_model_of_a_checkpoint_is_written_while_the_run_goes_on(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    words = (*_pretrain(workspace, out), "--set=train.save_every=1", "--set=train.steps=2")
    missing = refused(*words, "--export", "1")
    assert f"{out / 'checkpoints'}: no checkpoint of step 1; there is none of any" in missing and not out.exists()
    assert sa3(capfd, "train", *words).code == 0
    before = snapshot(out)
    with locked(out):
        for step in (1, 2):
            done = sa3(capfd, "train", *words, "--export", step, "--set=train.compile=true")
            assert done.code == 0 and done.out == f"model: {out / f'model-{step}'}\n"
    after = snapshot(out)
    assert {name: content for name, content in after.items() if "/model-" not in name} == before
    weights = [(out / name / "model.safetensors").read_bytes() for name in ("model-1", "model-2", "model")]
    assert weights[0] != weights[1] == weights[2]
    assert "no checkpoint of step 7; there are 1, 2" in refused(*words, "--export", "7")
    assert "train.seed = 0, now it is 1" in refused(*words, "--export", "1", "--set=train.seed=1")
    assert "give one of them" in refused(*words, "--export", "1", "--dry-run")


def test_two_encodings_do_not_share_a_folder(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "latents", workspace / "run" / "model"
    words = ["pre-encode", "--data", workspace / "clips", "--autoencoder", model, "--copies", "1", "--out", out]
    out.mkdir()
    with locked(out):
        result = sa3(capfd, *words)
    assert result.code == 2 and f"sa3: {out}: another process works in this folder" in result.err
    assert not any(out.iterdir())
    assert sa3(capfd, *words).code == 0


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("stage", ["pretrain", "clap", "ode-warmup", "posttrain"])
def test_latents_that_have_not_passed_the_gate_are_refused(
    stage: str, workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    latents, base = tmp_path / "latents", str(workspace / "base")
    models = {
        "pretrain": ("--autoencoder", str(workspace / "run" / "model")),
        "posttrain": ("--model", base, "--base", base, *(f"--set={change}" for change in ARC)),
    }
    batch = ("--set=train.compile=false", "--set=train.batch=4")
    line = (stage, "--latents", str(latents), *models.get(stage, ("--model", base)), *batch, "--dry-run")
    shutil.copytree(workspace / "latents", latents)
    record, described = latents / "gate.json", latents / "shard-00000.json"
    passed = json.loads(record.read_text())
    assert sa3(capfd, "train", *line).code == 0

    record.write_text(json.dumps({**passed, "good": False, "wrong_lengths": 1}))
    said = refused(*line)
    assert f"{latents}: `sa3 data gate` failed: log-mel distance" in said and "1 of 2 lengths are wrong" in said

    record.write_text(json.dumps({**passed, "autoencoder": "sha256:0"}))
    assert "looked at other latents than the folder holds now" in refused(*line)
    record.write_text(json.dumps(passed))
    described.write_text(described.read_text().replace("A3", "B3"))
    assert "looked at other latents than the folder holds now" in refused(*line)

    record.unlink()
    said = refused(*line)
    assert "has not been run on these latents" in said and f"run `sa3 data gate {latents} --data" in said
    assert sa3(capfd, "train", *line, "--ungated").code == 0
