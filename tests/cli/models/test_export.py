"""Exported functions give the numbers of the model, called as the documentation says by a program without sa3."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.noise import INITIAL
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.command import SMALL, Run, ok
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint

mx = pytest.importorskip("mlx.core")

DOCS = Path(__file__).resolve().parents[3] / "docs" / "mlxfn.md"
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sa3_mlx", "sa3_torch", "sa3_convert"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import mlx.core
mlx.core.set_default_device(mlx.core.cpu)
"""
EULER = Sampling(sampler="euler", steps=5, guidance=Guidance(scale=3.0, apg=0.5))
MODELS = {
    "ping-pong": SMALL,
    "chunks and a mask": replace(TINY["tiny-s"], sampling=Sampling(sampler="euler", steps=4)),
    "guidance": replace(TINY["tiny-l"], sampling=EULER),
}
SECONDS = {"ping-pong": 3.0, "chunks and a mask": 3.0, "guidance": 1.0}


class Drawn:
    """The noise of the program, in its order."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)

    def __call__(self, item: int, purpose: object, frames: int, channels: int, start: int) -> np.ndarray:
        assert (item, start) == (0, 0) and (purpose == INITIAL or frames)
        return self._draw.standard_normal((1, frames, channels), np.float32)[0]


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program of the page."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert code is not None
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code[1], *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("case", MODELS)
def test_the_program_of_the_documentation_makes_the_sound_of_the_model(case, run: Run, tmp_path: Path) -> None:
    """Also where the sound is shorter than the functions allow; measured: 1e-6 of the largest sample."""
    from sa3_mlx.pipeline import Pipeline

    config: ModelConfig = MODELS[case]
    folder = write_checkpoint(tmp_path / "model", config)
    ok(run("export", str(folder), "--mlxfn", "functions", "--seconds", f"{SECONDS[case]:g}", "--dtype", "float32"))
    pipeline = Pipeline.load(folder, dtype="float32", text_dtype="float32")
    # with as many frames as the functions have
    longest = json.loads(Path("functions/manifest.json").read_text())["frames"]
    for seconds, noise in ((SECONDS[case], Drawn(7)), (0.57 * SECONDS[case], Longer(7, longest))):
        done = program("functions", "kick bell", str(seconds), "7", "out.npy")
        assert done.returncode == 0, done.stderr
        request = Request(items=(Item(prompt="kick bell", seconds=seconds, seed=0),), sampling=config.usual_sampling)
        *_, last = pipeline.stream(request, noise=noise)
        wanted, found = last.generation.audio[0], np.load("out.npy")
        assert found.shape == wanted.shape, seconds
        assert np.abs(found - wanted).max() < 5e-6 * np.abs(wanted).max(), seconds


class Longer(Drawn):
    """The noise of a longer state, cut."""

    def __init__(self, seed: int, frames: int) -> None:
        super().__init__(seed)
        self._frames = frames

    def __call__(self, item: int, purpose: object, frames: int, channels: int, start: int) -> np.ndarray:
        return super().__call__(item, purpose, self._frames, channels, start)[:frames]


def test_the_manifest_says_what_is_there(run: Run) -> None:
    ok(run("export", "little", "--mlxfn", "out", "--seconds", "1", "--steps", "3"))
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["format"] == "sa3-mlxfn/1" and manifest["sampling"]["steps"] == 3
    assert set(manifest["functions"]) == {"text", "step", "decode"}
    for entry in manifest["functions"].values():
        assert file_hash(Path("out") / entry["file"]) == entry["hash"]
        function = mx.import_function(str(Path("out") / entry["file"]))
        types = {"int32": mx.int32, "bool": mx.bool_, "float32": mx.float32}
        outputs = function(*(mx.zeros(given["shape"], types[given["dtype"]]) for given in entry["inputs"]))
        assert [list(array.shape) for array in outputs] == [output["shape"] for output in entry["outputs"]]
    assert run("export", "little", "--mlxfn", "out", "--seconds", "1").code == 2
    ok(run("export", "little", "--mlxfn", "out", "--seconds", "0.5", "--force"))
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    assert run("export", "little", "--mlxfn", "other", "--force").code == 2
    assert "autoencoder alone" in run("export", "only-autoencoder", "--mlxfn", "x").err
    assert run("export", "little", "--mlxfn", "x", "--seconds", "1e9").code == 2 and not Path("x").exists()
