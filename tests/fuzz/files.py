"""Readers of models, adapters, sounds, latents and tags."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from sa3_convert import convert, open_adapter, write_official_adapter

from sa3_mlx.cli.adapters import LoraFile, open_adapters
from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.latents.files import output_samples, read_latents, write_latents
from sa3_mlx.cli.output.provenance import Provenance, read_provenance
from sa3_mlx.common.adapters.format import AdapterConfig, write_adapter
from sa3_mlx.common.files.audio import read_audio, read_blocks, read_tags, write_audio
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.installed import open_model
from sa3_mlx.common.memory.prediction import predict
from sa3_mlx.common.model.checkpoint import (
    CLAP_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    all_parts,
    expected_tensors,
)
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.precision import Precision
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.affine import BITS
from sa3_mlx.common.quant.format import Grid, check_file
from sa3_mlx.common.quant.recipes import layers_of
from sa3_mlx.common.quant.writer import nearest, write_quantized
from sa3_mlx.common.tuning import table
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import SMALL, tone
from tests.support.foreign import official_checkpoint
from tests.support.tiny import TINY, with_clap
from tests.support.tiny_checkpoint import write_checkpoint

from .target import ROOT, Given, Target

_FILES = "sa3_mlx/common/files"
_MODEL = "sa3_mlx/common/model"
FIRST_TAGS = ROOT / "tests" / "cli" / "first_tags"
ITEM = Item(prompt="low kick", seconds=0.3, seed=1)


def _safetensors(folder: Path) -> dict[str, str]:
    random = np.random.default_rng(0)
    arrays = {"a": random.standard_normal((3, 4)).astype(np.float32), "b": np.arange(5, dtype=np.int64)}
    entries = [array_entry(name, array) for name, array in arrays.items()]
    entries += [array_entry("c", arrays["a"], "BF16"), array_entry("d", np.zeros((0, 2), np.float16))]
    write_tensors(folder / "x.safetensors", entries, {"format": "pt"})
    return {"x.safetensors": "safetensors"}


def _read_safetensors(given: Given) -> None:
    with TensorFile.open(given.folder / "x.safetensors") as file:
        for name in file.names():
            file.raw(name)
            if file.info(name)[0] in ("F32", "BF16", "F16"):
                file.read(name)


def _config(folder: Path) -> dict[str, str]:
    (folder / CONFIG_FILE).write_text(with_clap(SMALL).to_json())
    return {CONFIG_FILE: "json"}


def _read_config(given: Given) -> None:
    """And what is asked of a configuration before the weights are looked at."""
    config = ModelConfig.load(given.folder)
    expected_tensors(config, all_parts(config))
    if config.diffusion is None:
        return
    request = Request(items=(replace(ITEM, seconds=min(0.3, config.max_seconds)),), sampling=config.usual_sampling)
    try:
        validate(request, config)
        plan(request, config)
        predict(request, config, Precision(dtype="float32", text_dtype="float32"))
    except ValueError as error:  # it is about the request
        raise ValueError(f"{given.path}: {error}") from error


def _checkpoint(folder: Path) -> dict[str, str]:
    write_checkpoint(folder, with_clap(SMALL))
    files = dict.fromkeys((CONFIG_FILE, TOKENIZER_FILE), "json")
    return files | dict.fromkeys((WEIGHTS_FILE, CLAP_FILE), "safetensors")


def _read_checkpoint(given: Given) -> None:
    config = open_model(given.folder)
    with TensorFile.open(given.folder / WEIGHTS_FILE) as file:
        check_file(file, config)
    if config.diffusion is not None:
        tokenizer = open_tokenizer(given.folder, config)
        tokenizer.encode(["low kick", "", "é b"])
        tokenizer.unknown("low kick b")
        tokenizer.closed_vocabulary()


def _run_pipeline(given: Given) -> None:
    """Make a short sound with a configuration whose weights fit, and say how near it is to its prompt."""
    from sa3_mlx.pipeline import Pipeline

    pipeline = Pipeline.load(given.folder)
    request = Request(items=(replace(ITEM, seconds=0.1),), sampling=Sampling(sampler="euler", steps=1))
    made = pipeline.generate(request)
    assert np.isfinite(made.audio[0]).all()
    if pipeline.config.clap is not None:
        assert abs(pipeline.clap_cosines(made)[0]) < 1.001


def _quantized(folder: Path) -> dict[str, str]:
    config = TINY["tiny-l"]
    source = write_checkpoint(folder / "source", config)
    paths = [*layers_of(config, "dit"), *layers_of(config, "same")]
    grids = {path: Grid(bits=BITS[number % len(BITS)], group=32) for number, path in enumerate(paths)}
    write_quantized(
        source,
        folder / "quantized",
        recipe="test",
        grids=grids,
        velocity=None,
        force=False,
        quantizers={path: partial(nearest, grid=grid) for path, grid in grids.items()},
    )
    shutil.rmtree(source)
    return {f"quantized/{WEIGHTS_FILE}": "safetensors"}


def _fingerprints(folder: Path) -> dict[str, str]:
    write_checkpoint(folder, SMALL)
    (folder / "fingerprints.json").write_text(json.dumps({"/a/model.safetensors": [1, 2, "sha256:0"]}))
    return {"fingerprints.json": "json"}


def _read_fingerprints(given: Given) -> None:
    from unittest import mock

    with mock.patch("sa3_mlx.cli.fingerprint.home", return_value=given.folder):
        fingerprint(given.folder, SMALL)


def _tunings(folder: Path) -> dict[str, str]:
    key = table.Key(
        twin="mlx", device="cpu", chip="M4", cores=10, system="macOS 26.2", version="0.32.4", shape="0" * 16
    )
    found = {"key": key.to_dict(), "model": "little", "date": "2026-01-01", "sa3": "0.1", "ways": {"chunks": "half"}}
    entry = {**found, "environment": {"MLX_MAX_OPS_PER_BUFFER": "200"}, "before": 2.0, "after": 1.5}
    (folder / "tuning.json").write_text(json.dumps({"format": "sa3-tuning/1", "entries": [entry]}))
    return {"tuning.json": "json"}


def _read_tunings(given: Given) -> None:
    """A table is used or not; nothing else comes of it."""
    from unittest import mock

    with mock.patch("sa3_mlx.common.tuning.table.home", return_value=given.folder):
        for tuning in table.read_table():
            assert tuning.text() and all(name.startswith("MLX_") for name in tuning.environment)
        assert table.find("mlx", "cpu", SMALL) is None
        table.environment()


def _audio(folder: Path) -> dict[str, str]:
    sound = tone(0.1)
    write_audio(folder / "pcm16.wav", sound, 8000, comment="made")
    write_audio(folder / "float.wav", sound, 8000, "float")
    write_audio(folder / "pcm24.flac", sound, 8000, "pcm24", comment="made")
    for name, format_, subtype in (("x.ogg", "OGG", "VORBIS"), ("x.mp3", "MP3", "MPEG_LAYER_III")):
        soundfile.write(folder / name, sound, 8000, format=format_, subtype=subtype)
    soundfile.write(folder / "x.aiff", sound, 8000, format="AIFF", subtype="PCM_16")
    soundfile.write(folder / "ex.wav", sound[:, :1], 8000, format="WAVEX", subtype="PCM_U8")
    return {path.name: "bytes" for path in folder.iterdir()}


def _mp3(folder: Path) -> dict[str, str]:
    """Frames of one and of two channels, after the tags of another program, and two files of different rates as one."""
    frames = {}
    for name, rate, channels in (("mono", 22_050, 1), ("stereo", 44_100, 2)):
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(0.2, rate=rate, channels=channels), rate, format="MP3", subtype="MPEG_LAYER_III")
        frames[name] = buffer.getvalue()
    tags = b"ID3\x03\0\0\0\0\0\x18TIT2\0\0\0\x0e\0\0\x01" + "take".encode("utf-16") + b"\0" * 3
    (folder / "mono.mp3").write_bytes(frames["mono"])
    (folder / "tagged.mp3").write_bytes(tags + frames["stereo"])
    (folder / "joined.mp3").write_bytes(frames["stereo"] + frames["mono"] + frames["stereo"])
    return {path.name: "bytes" for path in folder.iterdir()}


def _read_audio(given: Given) -> None:
    path = given.path
    audio = read_audio(path, 8000, 2)
    assert audio.ndim == 2 and audio.dtype == np.float32 and np.isfinite(audio).all()
    for block in read_blocks(path, 44_100, 2):
        assert np.isfinite(block).all()
    read_tags(path)
    SourceFile.read(path, SMALL)


def _tags(folder: Path) -> dict[str, str]:
    made = read_provenance(FIRST_TAGS / "generate.wav")
    (folder / "new.json").write_text(made.to_json())
    (folder / "vary.json").write_text(read_provenance(FIRST_TAGS / "vary.flac").to_json())
    (folder / "inpaint.json").write_text(read_provenance(FIRST_TAGS / "inpaint.wav").to_json())
    (folder / "first.json").write_text(read_tags(FIRST_TAGS / "batch-2.flac"))
    return {path.name: "json" for path in folder.iterdir()}


def _read_tags(given: Given) -> None:
    """As ``rerun`` does before it makes anything."""
    text = given.path.read_bytes().decode("utf-8", "replace").replace("\0", "")
    sound = given.folder / "made.wav"
    write_audio(sound, tone(0.01), 8000, comment=text)
    made = read_provenance(sound)
    assert isinstance(made, Provenance)
    made.to_json()
    try:
        validate(replace(made.request, init=None, inpaint=None, schedule="official"), SMALL)
    except ValueError as error:  # it is about the request; the command says of which file
        raise ValueError(f"{sound}: {error}") from error


def _latents(folder: Path) -> dict[str, str]:
    random = np.random.default_rng(0)
    values = random.standard_normal((20, SMALL.same.latent_channels)).astype(np.float32)
    tags = {"model": "little", "model_hash": "sha256:0", "samples": str(20 * 64 - 3), "sample_rate": "8000"}
    for name in ("a.safetensors", "b.npy"):
        write_latents(folder / name, values, tags)
    return {"a.safetensors": "safetensors", "b.npy": "npy", "b.npy.json": "json"}


def _read_latents(given: Given) -> None:
    for name in ("a.safetensors", "b.npy"):
        latents, tags = read_latents(given.folder / name)
        assert np.isfinite(latents).all()
        assert 0 < output_samples(given.folder / name, latents, tags, SMALL) <= 64 * len(latents)


def _adapters(folder: Path) -> dict[str, str]:
    model = write_checkpoint(folder / "model", SMALL)
    adapter = random_adapter(model, adapter_config("dora-rows", rank=2, include=("dit.layers.0.self_attn",)))
    write_adapter(folder / "ours.safetensors", adapter)
    write_official_adapter(folder / "official.safetensors", adapter, SMALL)
    bases = random_adapter(model, adapter_config("lora-xs", rank=2, include=("dit.layers.0.self_attn",)))
    write_adapter(folder / "bases.safetensors", bases)
    return {f"{name}.safetensors": "safetensors" for name in ("ours", "official", "bases")}


def _read_adapters(given: Given) -> None:
    for name in ("ours", "official", "bases"):
        path = given.folder / f"{name}.safetensors"
        open_adapter(path, SMALL)
        open_adapters([LoraFile(path=path, name=name, strength=0.5, interval=(0.0, 1.0))], SMALL)


def _adapter_settings(folder: Path) -> dict[str, str]:
    config = AdapterConfig(type="bora", rank=4, alpha=4.0, include=("layers.[0-3].ff",), exclude=("norm",))
    (folder / "settings.json").write_text(json.dumps(config.to_dict()))
    return {"settings.json": "json"}


def _read_adapter_settings(given: Given) -> None:
    config = AdapterConfig.from_dict(read_object(given.path), where="settings.json")
    config.selects("dit.layers.2.ff.proj_in")
    config.shapes((64, 64))


def _official(folder: Path) -> dict[str, str]:
    official_checkpoint.write_official(folder / "official", official_checkpoint.TINY)
    text = "official/t5gemma-b-b-ul2"
    return {
        "official/model_config.json": "json",
        "official/model.safetensors": "safetensors",
        f"{text}/config.json": "json",
        f"{text}/tokenizer.json": "json",
        f"{text}/model.safetensors": "safetensors",
    }


def _read_official(given: Given) -> None:
    try:
        convert(given.folder / "official", given.folder / "out", name="x", force=False, progress=None)
        open_model(given.folder / "out")
    except ValueError as error:
        if "model_config" in str(error):  # it names the field by its path in the file
            raise ValueError(f"{given.folder}: {error}") from error
        raise
    finally:
        shutil.rmtree(given.folder / "out", ignore_errors=True)


TARGETS = (
    Target("safetensors", _safetensors, _read_safetensors, (f"{_FILES}/safetensors.py",)),
    Target("config", _config, _read_config, (f"{_MODEL}/config.py", "sa3_mlx/common/schema.py")),
    Target(
        "checkpoint",
        _checkpoint,
        _read_checkpoint,
        (f"{_MODEL}/checkpoint.py", "sa3_mlx/common/quant/format.py", "sa3_mlx/common/text/tokenizer.py"),
    ),
    Target(
        "pipeline",
        lambda folder: {name: kind for name, kind in _checkpoint(folder).items() if name == CONFIG_FILE},
        _run_pipeline,
        ("sa3_mlx/pipeline.py", "sa3_mlx/weights.py"),
        names_file=False,
        seconds=20.0,
        room=8 << 30,
        crashes=True,
    ),
    Target(
        "quantized",
        _quantized,
        lambda given: open_model(given.folder / "quantized"),
        ("sa3_mlx/common/quant/format.py",),
    ),
    Target("fingerprints", _fingerprints, _read_fingerprints, ("sa3_mlx/cli/fingerprint.py", f"{_FILES}/objects.py")),
    Target("tunings", _tunings, _read_tunings, ("sa3_mlx/common/tuning/table.py",), names_file=False),
    Target(
        "audio", _audio, _read_audio, (f"{_FILES}/audio_file.py", f"{_FILES}/wav.py", "sa3_mlx/cli/audio/source.py")
    ),
    Target("mp3", _mp3, _read_audio, (f"{_FILES}/audio_file.py", f"{_FILES}/audio.py"), crashes=True),
    Target(
        "tags",
        _tags,
        _read_tags,
        (
            "sa3_mlx/cli/output/provenance.py",
            "sa3_mlx/cli/output/first_tags.py",
            "sa3_mlx/common/generation/request.py",
            "sa3_mlx/common/generation/checks.py",
            "sa3_mlx/common/schema.py",
        ),
        names_file=False,
        forms=False,
    ),
    Target("latents", _latents, _read_latents, ("sa3_mlx/cli/latents/files.py", f"{_FILES}/arrays.py")),
    Target(
        "adapters",
        _adapters,
        _read_adapters,
        ("sa3_mlx/common/adapters/format.py", "sa3_mlx/cli/adapters.py", "convert/adapters.py"),
    ),
    Target(
        "adapter-settings",
        _adapter_settings,
        _read_adapter_settings,
        ("sa3_mlx/common/adapters/config.py",),
        names_file=False,
        forms=False,
    ),
    Target(
        "official",
        _official,
        _read_official,
        (
            "convert/model_config.py",
            "convert/fields.py",
            "convert/source.py",
            "convert/text_config.py",
            "convert/official.py",
        ),
    ),
)
