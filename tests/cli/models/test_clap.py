"""A latent CLAP goes into a model, stays with it, and ranks what it makes; bad ones are refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.cli import backend as backends
from sa3_mlx.cli import choosing
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.adapters.format import write_adapter
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.generation.request import Item, Request, TimedPrompt
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import check_folder
from sa3_mlx.common.tuning.table import shape_of
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import SMALL, Run, ok, read
from tests.support.tiny import with_clap
from tests.support.tiny_checkpoint import weight, write_trained_clap

QUICK = ("--seconds", "0.5", "--seed", "7", "--steps", "2")


@pytest.fixture
def little(own_home: Path) -> Path:
    return own_home / "models" / "little"


@pytest.fixture
def trained(little: Path, tmp_path: Path) -> Path:
    return write_trained_clap(tmp_path / "trained", little)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the tensors of a file, or the object in it, after a change."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return
    with TensorFile.open(path) as file:
        arrays, metadata = {name: file.read(name) for name in file.names()}, dict(file.metadata)
    change(arrays)
    write_tensors(path, [array_entry(name, array) for name, array in arrays.items()], metadata)


def test_it_goes_in_and_the_weights_stay(run: Run, little: Path, trained: Path) -> None:
    before, digest = ModelConfig.load(little), file_hash(little / WEIGHTS_FILE)
    done = ok(run("add-clap", little, trained))
    assert f"{CLAP_FILE}, {file_hash(little / CLAP_FILE)}" in done.out
    config = ModelConfig.load(little)
    assert replace(config, clap=None) == before and file_hash(little / WEIGHTS_FILE) == digest
    check_folder(little, config)
    with TensorFile.open(little / CLAP_FILE) as file:
        assert file.shapes() == expected_tensors(config, ["clap"])
        for name in file.names():
            np.testing.assert_array_equal(file.read(name), weight(name, file.info(name)[1]))
    facts = json.loads(ok(run("info", little, "--json")).out)
    assert facts["latent CLAP"] == file_hash(little / CLAP_FILE) and facts["hash"] == digest
    assert sum(facts["stored as"].values()) == facts["parameters"] == sum(facts["parts"].values())
    assert facts["parts"]["clap"] == sum(int(np.prod(shape)) for shape in expected_tensors(config, ["clap"]).values())
    assert shape_of(config) == shape_of(before)  # what was tuned for the model still holds


def test_it_is_replaced_by_force_only(run: Run, refused: Callable[..., str], little: Path, trained: Path) -> None:
    ok(run("add-clap", little, trained))
    assert "has a latent CLAP already; --force replaces it" in refused("add-clap", little, trained)
    changed(trained / WEIGHTS_FILE, lambda arrays: arrays.update({"text.fc2.bias": arrays["text.fc2.bias"] + 1}))
    ok(run("add-clap", little, trained, "--force"))
    with TensorFile.open(little / CLAP_FILE) as file:
        np.testing.assert_array_equal(file.read("clap.text.fc2.bias"), weight("clap.text.fc2.bias", (16,)) + 1)


def test_a_model_is_whole_after_every_step_of_a_replacement(
    run: Run, little: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at each write: what is there then opens, with the old one, with none or with the new one."""
    ok(run("add-clap", little, trained))
    changed(trained / CONFIG_FILE, lambda data: data["tower"].update(depth=1))
    changed(trained / WEIGHTS_FILE, lambda arrays: [arrays.pop(name) for name in list(arrays) if ".layers.1." in name])
    for stop in range(3):
        calls = iter(range(10))

        def until(write: Callable[..., Any], stop: int = stop, calls: Any = calls) -> Callable[..., Any]:
            def written(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == stop:
                    raise OSError("the disk is full")
                return write(*args, **kwargs)

            return written

        copy = shutil.copytree(little, little.with_name(f"copy{stop}"))
        with monkeypatch.context() as patched:
            for name in ("write_text", "write_tensors"):
                place = f"sa3_mlx.common.model.clap.{name}"
                module = __import__("sa3_mlx.common.model.clap", fromlist=[name])
                patched.setattr(place, until(getattr(module, name)))
            assert run("add-clap", copy, trained, "--force").code == 2
        check_folder(copy, ModelConfig.load(copy))
    ok(run("add-clap", little, trained, "--force"))
    assert ModelConfig.load(little).clap is not None and ModelConfig.load(little).clap.tower.depth == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG_FILE, lambda d: d["tower"].update(width=96), "tower.width is 96: expected a multiple of 64"),
        (CONFIG_FILE, lambda d: d["tower"].update(width=2**40), "expected a multiple of 64 up to 65536"),
        (CONFIG_FILE, lambda d: d["tower"].update(depth=10**9), "tower.depth is 1000000000: allowed is 1 to 64"),
        (
            CONFIG_FILE,
            lambda d: d["tower"].update(embedding=8),
            "wrong shape: audio.projection.fc2.bias is (16",
        ),
        (CONFIG_FILE, lambda d: d.update(max_frames=2), "max_frames is 2: allowed is 3 to 1048576"),
        (
            CONFIG_FILE,
            lambda d: d.update(latent_channels=9),
            "clap.latent_channels: must be 8, those of the model",
        ),
        (CONFIG_FILE, lambda d: d["text"].update(depth=2), "clap.text: is not the text encoder of the model"),
        (CONFIG_FILE, lambda d: d.update(autoencoder="sha256:0"), "was trained with another same, sha256:0, than"),
        (CONFIG_FILE, lambda d: d.update(text_encoder="sha256:0"), "was trained with another text_encoder, sha256:0, "),
        (CONFIG_FILE, lambda d: d.update(format="sa3/1"), "format is 'sa3/1', expected 'sa3-clap/1'"),
        (CONFIG_FILE, lambda d: d.pop("tower"), "missing field(s) tower"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(kick=9), "its tokenizer is not that of"),
        (
            WEIGHTS_FILE,
            lambda a: a.pop("audio.norm.gamma"),
            "1 tensor(s) do not fit the configuration: missing: audio.",
        ),
        (WEIGHTS_FILE, lambda a: a.update(more=np.ones(2, np.float32)), "unexpected: more (2,)"),
        (
            WEIGHTS_FILE,
            lambda a: a["text.fc1.weight"].__setitem__((3, 3), np.nan),
            "text.fc1.weight has values that",
        ),
        (
            WEIGHTS_FILE,
            lambda a: a.update({"text.fc2.bias": np.ones(16, np.int32)}),
            "text.fc2.bias has values that",
        ),
    ],
)
def test_bad_ones_are_refused_and_the_model_stays(
    refused: Callable[..., str],
    little: Path,
    trained: Path,
    file: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    changed(trained / file, change)
    assert message in refused("add-clap", little, trained)
    assert not (little / CLAP_FILE).exists() and ModelConfig.load(little).clap is None


def test_models_that_take_none(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    assert "copy its folder, and give the copy" in refused("add-clap", "demo", trained)
    assert "is an autoencoder alone" in refused("add-clap", "only-autoencoder", trained)
    assert "no config.json there; expected a folder made by 'sa3 train clap'" in refused("add-clap", "little", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("clap.audio.norm.gamma"), "missing: clap.audio.norm.gamma (128,)"),
        (
            lambda a: a.update({"clap.text.fc2.bias": np.ones(15, np.float32)}),
            "wrong shape: clap.text.fc2.bias is (1",
        ),
        (
            lambda a: a["clap.text.fc2.bias"].fill(np.inf),
            "tensor clap.text.fc2.bias has NaN or infinite values",
        ),
        (None, f"{CLAP_FILE}: no such file"),
    ],
)
def test_a_damaged_one_in_a_model_is_refused(
    run: Run, refused: Callable[..., str], little: Path, trained: Path, change: Any, message: str
) -> None:
    ok(run("add-clap", little, trained))
    if change is None:
        (little / CLAP_FILE).unlink()
    else:
        changed(little / CLAP_FILE, change)
    for command in (("info", little), ("generate", "bell", "--model", little, "--out", "a.wav", *QUICK)):
        assert message in refused(*command)


def test_it_stays_where_a_model_is_copied(run: Run, little: Path, trained: Path, tmp_path: Path) -> None:
    ok(run("add-clap", little, trained))
    ok(run("quantize", little, tmp_path / "small", "--recipe", "8bit"))
    write_adapter(Path("a.safetensors"), random_adapter(little, adapter_config("lora")))
    ok(run("lora", "merge", little, "a.safetensors", tmp_path / "merged"))
    for copy in (tmp_path / "small", tmp_path / "merged"):
        config = ModelConfig.load(copy)
        assert config.clap is not None and config.clap == ModelConfig.load(little).clap
        check_folder(copy, config)
        assert (copy / CLAP_FILE).read_bytes() == (little / CLAP_FILE).read_bytes()
    ok(run("convert", little, "official", "--to-official"))  # which has no place for it
    ok(run("convert", "official", "again", "--name", "little"))
    assert ModelConfig.load(Path("again")) == replace(ModelConfig.load(little), clap=None)


def test_old_models_are_written_as_they_were() -> None:
    assert "clap" not in SMALL.to_json() and "clap" in with_clap(SMALL).to_json()


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_best_of_ranks_by_it(run: Run, little: Path, trained: Path, backend: str) -> None:
    """Compare the chosen seed and its cosine with those of every sound by itself; the tags make it again."""
    pytest.importorskip("mlx.core" if backend == "mlx" else "torch")
    ok(run("add-clap", little, trained))
    words = ("--model", little, "--seconds", "0.5", "--steps", "2", "--backend", backend)
    done = ok(run("generate", "bell", *words, "--seed", "7", "--best-of", "4", "--out", "a.wav"))
    assert "best   of 4 by the model's latent CLAP, among those that passed the checks" in done.out
    made = read_provenance(Path("a.wav"))
    assert made.grade is not None and made.grade.clap is not None
    assert f"CLAP {made.grade.clap:.3f}" in done.out and done.err.count("CLAP ") == 4
    pipeline = backends.load(little, backend)  # type: ignore[arg-type]
    sampling = made.request.sampling
    cosines = {}
    for seed in (7, 8, 9, 10):
        request = Request(items=(Item(prompt="bell", seconds=0.5, seed=seed),), sampling=sampling)
        cosines[seed] = pipeline.clap_cosines(pipeline.generate(request))[0]
    assert made.clip.seed == max(cosines, key=cosines.__getitem__)
    assert made.grade.clap == pytest.approx(cosines[made.clip.seed], abs=1e-5)
    assert "byte for byte" in ok(run("rerun", "a.wav", "--model", little)).out
    assert Path("a-rerun.wav").read_bytes() == Path("a.wav").read_bytes()
    assert "clap" in ok(run("info", "a.wav")).out


def test_what_fails_a_check_is_left_out_and_no_prompt_is_ranked_by_checks(
    run: Run, little: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok(run("add-clap", little, trained))
    plain, failing = choosing.grade, iter((True, False, True))
    monkeypatch.setattr(
        choosing, "grade", lambda *a: replace(plain(*a), total=0.0) if next(failing, False) else plain(*a)
    )
    ok(run("generate", "bell", "--model", little, "--best-of", "3", "--out", "a.wav", *QUICK))
    assert read_provenance(Path("a.wav")).clip.seed == 8
    done = ok(run("generate", "", "--model", little, "--best-of", "2", "--out", "b.wav", *QUICK))
    assert "best   of 2 by the checks" in done.out
    grade = read_provenance(Path("b.wav")).grade
    assert grade is not None and grade.clap is None


def test_loops_are_ranked_too(run: Run, little: Path, trained: Path) -> None:
    ok(run("add-clap", little, trained))
    words = ("--bpm", "240", "--bars", "1", "--tries", "2", "--seed", "7", "--steps", "2")
    done = ok(run("loop", "bell", *words, "--model", little, "--out", "a.wav"))
    assert "latent CLAP" in done.out and len(read("a.wav")) == 8000
    assert "byte for byte" in ok(run("rerun", "a.wav", "--model", little)).out


def test_prompts_share_a_clip(little: Path, trained: Path, run: Run) -> None:
    """A blend and two prompts in equal times have the vector in the middle; a weight changes nothing."""
    ok(run("add-clap", little, trained))
    pipeline = backends.load(little, "mlx")
    made = pipeline.generate(Request(items=(Item(prompt="bell", seconds=0.512, seed=1),)))

    def cosine(prompt: str, *later: TimedPrompt) -> float:
        item = Item(prompt=prompt, seconds=0.512, seed=1, prompts_over_time=later)
        return pipeline.clap_cosines(replace(made, request=Request(items=(item,), prompt_fade_seconds=0)))[0]

    bell, rain = cosine("bell"), cosine("rain")
    assert bell != rain and cosine("(bell:1.5)") == bell
    middle = cosine("bell | rain : 0.5")
    assert middle == pytest.approx(cosine("bell", TimedPrompt(start=0.256, prompt="rain")), abs=1e-6)
    assert (middle > 0) == (bell + rain > 0) and abs(middle) >= abs(bell + rain) / 2 - 1e-6
    assert cosine("bell | rain : 1") == pytest.approx(rain, abs=1e-6)
