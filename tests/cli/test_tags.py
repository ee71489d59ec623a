"""Tags are a request and what carried it out, and those of the first layout are still read.

The files in ``first_tags`` were made by the last version with that layout, with the model "little" of these tests.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.cli.output.first_tags import upgrade
from sa3_mlx.cli.output.provenance import Provenance, read_provenance
from sa3_mlx.common.adapters.format import write_adapter
from sa3_mlx.common.files.audio import read_tags, write_audio
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import ConfigError
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import RATE, Run, ok, read, tone, write_tone

FIRST = Path(__file__).with_name("first_tags")
FILES = ("generate.wav", "batch-2.flac", "vary.flac", "inpaint.wav", "renoise.wav")


@pytest.mark.parametrize("name", FILES)
def test_files_with_the_first_tags_are_made_again(run: Run, name: str):
    """On the machine that made them samples are equal; elsewhere they may differ in the last of their 16 bits."""
    pytest.importorskip("mlx.core")
    shutil.copy(FIRST / name, name)
    write_tone(Path("in.wav"), 0.1)
    result = run("rerun", name, "--out", f"again-{name}")
    assert result.code in (0, 1) and result.err.count("\n") == 1, result
    np.testing.assert_allclose(read(f"again-{name}"), read(name), atol=1e-3)
    old, new = read_provenance(Path(name)), read_provenance(Path(f"again-{name}"))
    assert new.to_dict() == old.to_dict()
    assert "byte for byte" in ok(run("rerun", f"again-{name}")).out


def test_a_continuation_with_the_first_tags_is_made_as_it_is_now(run: Run):
    """It has other samples since the model hears the end of a file go on without a corner; what was given stays."""
    pytest.importorskip("mlx.core")
    shutil.copy(FIRST / "extend.flac", "extend.flac")
    write_tone(Path("in.wav"), 0.1)
    result = run("rerun", "extend.flac", "--out", "again.flac")
    assert result.code == 1 and result.err.count("\n") == 1, result
    given, made, before = read("in.wav"), read("again.flac"), read("extend.flac")
    np.testing.assert_array_equal(made[: len(given)], before[: len(given)])
    assert made.shape == before.shape and np.abs(made - before).max() > 0.1
    assert read_provenance(Path("again.flac")).to_dict() == read_provenance(Path("extend.flac")).to_dict()
    assert "byte for byte" in ok(run("rerun", "again.flac")).out


def test_every_field_of_the_first_tags_is_kept():
    batch = read_provenance(FIRST / "batch-2.flac")
    guidance = Guidance(scale=3.0, apg=0.5, interval=(0.2, 0.9))
    assert batch.request.sampling == Sampling(sampler="pingpong", steps=2, guidance=guidance)
    assert batch.clip == Item(prompt="low kick", seconds=0.1, seed=4, negative_prompt="bell")
    assert [item.seed for item in batch.request.items] == [3, 4, 5] and batch.request.head_room_seconds == 0.05
    varied = read_provenance(FIRST / "vary.flac")
    assert isinstance(varied.request.init, InitAudio) and varied.request.init.noise_level == 0.5
    assert varied.request.schedule == "monotone" and varied.output.peak_db == -3 and varied.request.inpaint is None
    assert varied.input is not None and varied.input.name == "in.wav" and varied.input.hash.startswith("sha256:")
    filled = read_provenance(FIRST / "inpaint.wav")
    assert isinstance(filled.request.inpaint, Inpaint) and filled.request.inpaint.regions == ((0.04, 0.07),)
    assert filled.request.crossfade_ms == 5 and filled.request.init is None
    renoised = read_provenance(FIRST / "renoise.wav")
    assert renoised.request.crossfade_ms is None and renoised.request.decode_noise
    assert isinstance(renoised.request.init, InitAudio) and renoised.request.init.noise_level == 0.8
    torch = Provenance.from_dict(upgrade(first("torch")))
    assert (torch.runtime.backend, torch.runtime.device) == ("torch", "cpu") and torch.model.adapters_merged


def first(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FIRST / f"{name}.json").read_text())
    return data


def test_adapters_in_the_first_tags_are_applied(run: Run, shared_home: Path):
    adapter = random_adapter(shared_home / "models" / "little", adapter_config("dora-rows"), seed=0)
    write_adapter(Path("bell.safetensors"), adapter)
    write_audio("lora.wav", tone(0.1), RATE, comment=json.dumps(first("lora")))
    result = run("rerun", "lora.wav", "--force")
    assert result.code == 1 and "strength 0.5, on from t = 1 to 0.3" in result.err
    assert read_provenance(Path("lora-rerun.wav")).model.adapters[0].interval == (0.3, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("noise_level", "x", "noise_level"),
        ("batch_seeds", 3, "batch_seeds"),
        ("batch_seeds", ["1"], "batch_index"),
        ("batch_index", 1, "batch_index"),
        ("batch_index", "x", "batch_index"),
        ("regions", [[1]], "regions"),
        ("regions", None, "regions"),
        ("seconds", None, "seconds"),
        ("steps", 2.5, "steps"),
        ("guidance", "x", "guidance"),
        ("input", 3, "input"),
        ("format", 2, "format"),
        ("model_hash", "md5:", "sha256"),
        ("adapters", [1], "adapters"),
        ("speed", 1, "differing: speed"),
    ],
)
def test_damaged_first_tags_are_refused(run: Run, name: str, value: object, message: str):
    write_audio("w.wav", tone(0.1), RATE, comment=json.dumps(first("lora") | {name: value}))
    result = run("rerun", "w.wav", "--force")
    assert result.code == 2 and "its tags are damaged" in result.err and message in result.err


def test_tags_are_a_request_with_its_circumstances(run: Run):
    write_tone(Path("in.wav"), 0.3)
    ok(run("inpaint", "in.wav", "bell", "--region", "0.1:0.2", "--batch", "2", "--seed", "4", "--out", "i.wav"))
    tags = json.loads(read_tags("i-2.wav"))
    assert list(tags) == ["format", "sa3", "command", "item", "request", "model", "runtime", "output", "input"]
    assert (tags["format"], tags["item"], tags["request"]["inpaint"]) == (
        "sa3-sound/2",
        1,
        {"regions": [[0.1, 0.2]], "feather_seconds": 0.0},
    )
    made = read_provenance(Path("i-2.wav"))
    assert made.clip.seed == 5 and Provenance.from_dict(made.to_dict()).to_json() == made.to_json()
    with pytest.raises(ConfigError, match="no such clip"):
        replace(made, item=2)
