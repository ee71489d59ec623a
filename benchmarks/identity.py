"""Prove that two checkouts compute the same bits, through the command line alone, so that modules may move.

python -m benchmarks.identity --checkout OLD --write old.json
python -m benchmarks.identity --checkout NEW --write new.json
python -m benchmarks.identity --compare old.json new.json

Where trainings differ, --keep FOLDER with both and ``--losses OLD_FOLDER NEW_FOLDER`` say by how much.

Everything runs on one thread of a CPU and needs no network. Samples and tensors are hashed, never tags or metadata. A
name is a job, see ``jobs``, and a file that it made. Only names that begin with "default/" leave settings to defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sa3_mlx.common.files.atomic import write_json

# Words of a command, or what stands before their "=", that differ between checkouts. Spellings are tried in this order;
# the first with which a command succeeds is taken.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "--ungated": ("--ungated", "--threads=1"),  # checkouts without a gate get a word that changes nothing
    "warmup": ("warmup", "ode-warmup"),
    "--monotone": ("--monotone", "--schedule=monotone"),
    "teacher.steps": ("teacher.steps", "teacher.sampling.steps"),
    "demo.guidance": ("demo.guidance", "demo.guidance.scale"),
}
USUAL = "train.steps=3 train.batch=4 train.precision=fp32 train.compile=false train.seed=1"  # those below win
CROPS = "crop_samples=8192 generator.warmup_steps=1"
GAN = f"{CROPS} train.batch=2 discriminator.warmup_steps=1 spectral_start=0 spectral_full=0 adversarial.start_step=0"
FLOW = "clips.buckets=1 optimizer.warmup_steps=1"
SHOWN = f"{FLOW} demo.steps=2 demo.sampler=euler demo.guidance=3 coupling=off"
TEXT = "start=text train_text=false train.batch=16"
ARC = "clips.buckets=1 generator.warmup_steps=1 discriminator.warmup_steps=1"
QAT = "optimizer.warmup_steps=1 recipe=4bit rounds=1"
STAGES: dict[str, tuple[str, str]] = {  # a name -> the stage with its options, what is set
    "autoencoder": ("autoencoder SOUNDS", CROPS),
    "autoencoder-complete": ("autoencoder SOUNDS --settings tiny", f"{GAN} semantics.detached_steps=1"),
    "autoencoder-shards": (
        "autoencoder --data <data/shards>/shards --start demo",
        f"{CROPS} shards.streams=1",
    ),
    "distill-autoencoder": ("distill-autoencoder SOUNDS --teacher demo --settings tiny", GAN),
    "pretrain": ("pretrain LATENTS --ungated --autoencoder demo", SHOWN),
    "pretrain-text": ("pretrain LATENTS --ungated --autoencoder demo --start demo", f"{SHOWN} {TEXT}"),
    "warmup": ("warmup LATENTS --ungated", f"{FLOW} teacher.steps=3"),
    "clap": ("clap LATENTS --ungated", "buckets=1 optimizer.warmup_steps=1"),
    "posttrain": ("posttrain LATENTS --ungated --base demo --clap <train/clap>/run/model", ARC),
    "lora": ("lora LATENTS --type dora-rows --rank 4", SHOWN),
    "lora-xs": ("lora LATENTS --type bora-xs --rank 4", SHOWN),
    "quantize": ("quantize --calibration <inputs>/prompts.txt", QAT),
}
PIANO, SNARE = '"piano note A4" --seconds 1.5', '"snare drum" --seconds 1'
EULER, PINGPONG, DPMPP = (f"--steps 6 --sampler {sampler}" for sampler in ("euler", "pingpong", "dpmpp"))
ON, OFF = "--guidance 3", "--guidance 1"
SOUNDS: dict[str, str] = {  # a name -> the command; its seed is its place
    "euler": f"generate {PIANO} {EULER} {ON}",
    "euler-plain": f"generate {SNARE} {EULER} {OFF}",
    "pingpong": f"generate {SNARE} {PINGPONG} {OFF}",
    "pingpong-guided": f"generate {PIANO} {PINGPONG} {ON}",
    "dpmpp": f"generate {PIANO} {DPMPP} {ON} --apg 0.5 --rescale 0.3",
    "dpmpp-plain": f"generate {SNARE} {DPMPP} {OFF}",
    "rk4": f"generate {PIANO} --steps 3 --sampler rk4 {ON} --interval 0.2 0.9 --norm-threshold 2",
    "negative": f'generate {PIANO} {EULER} {ON} --negative "white noise"',
    "batch": f"generate {SNARE} {PINGPONG} {ON} --batch 2",
    "long": f'generate "organ chord C major" --seconds 4 {EULER} {ON}',
    "noisy-decoder": f"generate {SNARE} {EULER} {ON} --decode-noise",
    "bfloat16": f"generate {SNARE} {EULER} {ON} --dtype bfloat16",
    "vary": f'vary SOURCE "violin note A4" {EULER} {ON} --noise-level 0.7',
    "vary-pingpong": f'vary SOURCE "violin note A4" {PINGPONG} {OFF} --noise-level 0.5',
    "vary-monotone": f'vary SOURCE "violin note A4" {EULER} {ON} --noise-level 0.6 --monotone',
    "inpaint": f'inpaint SOURCE "snare drum" {EULER} {ON} --region 0.2:0.5 --region 1:',
    "inpaint-level": f'inpaint SOURCE "snare drum" {DPMPP} {ON} --region 0.3:0.9 --noise-level 0.8 --no-paste',
    "extend": f'extend SOURCE "violin note A4" {EULER} {ON} --seconds 2.5',
}
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")
NOT_COMPARED = (  # in a training log: what is timed or told, and what is measured no more
    *("steps_per_second", "items_per_second", "precision/", "revision", "alarm"),
    *("masks/spans", "measured/discriminator_mean"),
)
GONE = "noise.loss_mean"  # a tensor of training checkpoints that served a setting that went
NAMES, ERROR = re.compile("<(.+?)>"), re.compile(r" \S+ (absolute|relative) ")  # in a command; in what verify prints
PRINTED, JSON = "errors.txt", ("config.json", "model_config.json", "tokenizer.json")
Jobs = Iterator[tuple[str, str]]  # names and commands


def jobs() -> dict[str, str]:
    """Return the ``sa3`` commands of all jobs by name, in the order in which they run.

    In a command <out> is the job's own folder, <inputs>, <golden> and <NAME of a job> are others.
    """
    return dict(itertools.chain(conversions(), sounds("mlx"), sounds("torch"), trainings(), uses()))


def conversions() -> Jobs:
    """Yield jobs on the official golden checkpoints: to our format, back, and our errors."""
    for model in ("tiny-s", "tiny-l"):
        name = f"golden/{model}"
        yield name, f"convert <golden>/{model}/weights.safetensors <out>/model"
        yield f"{name}-official", f"convert <{name}>/model <out>/model --to-official"
        for backend in ("mlx", "torch"):
            yield f"{name}-verify-{backend}", f"verify <{name}>/model <golden>/{model} --backend {backend}"


def sounds(backend: str) -> Jobs:
    """Yield jobs that make sounds and latents with the demo model."""
    options, source = f"--model demo --backend {backend}", f"<{backend}/euler>/sound.wav"
    out = "--format float --out <out>/sound.wav"
    for seed, (name, command) in enumerate(SOUNDS.items(), 1):
        yield f"{backend}/{name}", f"{command.replace('SOURCE', source)} --seed {seed} {out} {options}"
    yield f"{backend}/encode", f"encode {source} <out>/latents.safetensors {options}"
    yield f"{backend}/decode", f"decode <{backend}/encode>/latents.safetensors <out>/sound.wav --format float {options}"
    yield f"{backend}/rerun", f"rerun <{backend}/vary>/sound.wav --input {source} --out <out>/sound.wav"
    yield f"default/{backend}", f"generate {PIANO} --seed 1 --backend {backend} --out <out>/sound.wav"


def trainings() -> Jobs:
    """Yield jobs that make training data, and three steps of every stage, in single precision, on small batches."""
    encode = "--autoencoder demo --seed 0 --out <out>/latents"
    yield "data/sounds", "data import <inputs>/recordings <out>/sounds"
    yield "data/shards", "data shards <inputs>/recordings <out>/shards --shard-megabytes 1"
    yield "data/latents", f"pre-encode --data <data/sounds>/sounds --copies 2 {encode}"
    yield "data/latents-of-recordings", f"pre-encode --data <inputs>/recordings --copies 1 {encode}"
    yield "data/public-latents", "data export-latents <data/latents>/latents <out>/latents --autoencoder demo"
    data = {"SOUNDS": "--data <data/sounds>/sounds", "LATENTS": "--latents <data/latents>/latents"}
    for name, (stage, settings) in STAGES.items():
        command = " ".join(data.get(word, word) for word in stage.split())
        changes = " ".join(f"--set {shlex.quote(change)}" for change in shlex.split(f"{USUAL} {settings}"))
        yield f"train/{name}", f"train {command} --model demo {changes} --threads 1 --out <out>/run"


def uses() -> Jobs:
    """Yield jobs on quantized, adapted and trained models."""
    sound = f"generate {SNARE} --seed 1 {EULER} {ON} --format float --out <out>/sound.wav"
    adapter = "<train/lora>/run/model/adapter.safetensors"
    yield "mlx/max-memory", f"{sound} --model demo --backend mlx --dtype float32 --max-memory 9MB"
    yield "quantized/8bit", "quantize demo <out>/model --recipe 8bit"
    yield "quantized/8bit-sound", f"{sound} --model <quantized/8bit>/model --backend mlx"
    yield "adapted/merged", f"lora merge demo {adapter} <out>/model"
    yield "trained/posttrain", f"{sound} --model <train/posttrain>/run/model --backend mlx"
    for backend in ("mlx", "torch"):
        yield f"adapted/sound-{backend}", f"{sound} --model demo --lora {adapter}:0.8 --backend {backend}"
        yield f"trained/quantize-{backend}", f"{sound} --model <train/quantize>/run/model --backend {backend}"


def write_inputs(folder: Path) -> None:
    """Write a dozen captioned recordings, of which numbers 2, 3 and 9 are held out by their hashes, and prompts."""
    random = np.random.default_rng(3)
    (folder / "recordings").mkdir(parents=True, exist_ok=True)
    for number in range(12):
        seconds = np.arange(30_000 + 1_000 * number) / 44_100
        noise = number % 2
        tone = random.standard_normal(len(seconds)) if noise else np.sin(2 * np.pi * 131 * 2 ** (number / 12) * seconds)
        audio = 0.3 * np.exp(-2 * seconds)[:, None] * tone[:, None] * np.array([1.0, 0.7])
        audio += 0.01 * random.standard_normal(audio.shape)
        path = folder / "recordings" / f"{number:02}.wav"
        soundfile.write(path, audio, 44_100, subtype="PCM_16")
        path.with_suffix(".txt").write_text("white noise\n" if noise else f"piano note {'CDEFGA'[number // 2]}3\n")
    (folder / "prompts.txt").write_text("0.5 kick drum\n0.5 snare drum\n0.5 white noise\n0.5 piano note A4\n")


def digest(parts: Iterable[bytes | str]) -> str:
    """Return the SHA-256 of parts, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()


def samples_of(path: Path) -> Iterator[bytes | str]:
    """Yield rate, type, shape and bytes of a sound, or of an array, which has no rate."""
    sound = path.suffix == ".wav"
    samples, rate = soundfile.read(path, dtype="float64", always_2d=True) if sound else (np.load(path), 0)
    yield from (str(rate), samples.dtype.str, str(samples.shape), samples.tobytes())


def tensors_of(path: Path) -> Iterator[bytes | str]:
    """Yield name, type, shape and bytes of every tensor of a safetensors file, whatever their order there."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name in sorted(header.keys() - {"__metadata__"}):
        first, last = header[name]["data_offsets"]
        yield from (name, header[name]["dtype"], str(header[name]["shape"]), data[start + first : start + last])


def checkpoint_of(path: Path) -> Iterator[bytes | str]:
    """Yield the same of the training checkpoint whose ``progress.json`` this is."""
    import torch
    import torch.distributed.checkpoint as dcp

    from sa3_torch.train.run.checkpoint_index import PICKLED, IndexReader

    reader = (dcp.FileSystemReader if (path.parent / PICKLED).is_file() else IndexReader)(path.parent)
    tensors: dict[str, Any] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in sorted(reader.read_metadata().state_dict_metadata.items())
        if isinstance(about, dcp.metadata.TensorStorageMetadata) and GONE not in name
    }
    with warnings.catch_warnings(action="ignore"):  # it tells that there is one process
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        yield from (name, str(tensor.dtype), str(tuple(tensor.shape)), data.tobytes())


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a training log without what is timed or told."""
    for line in path.read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if not name.startswith(NOT_COMPARED)}
        if row.keys() - {"step"}:
            yield row


def losses_of(path: Path) -> Iterator[str]:
    """Yield these rows as texts."""
    for row in rows_of(path):
        yield json.dumps(row, sort_keys=True)


def errors_of(path: Path) -> list[str]:
    """Return the lines with an error of what ``verify`` printed."""
    return [" ".join(line.split()) for line in path.read_text().splitlines() if ERROR.search(line)]


READERS: dict[str, Callable[[Path], Iterable[bytes | str]]] = {
    ".wav": samples_of,
    ".npy": samples_of,
    ".safetensors": tensors_of,
    "progress.json": checkpoint_of,
    ".tar": lambda path: [path.read_bytes()],  # they hold no time
    "log.jsonl": losses_of,
    PRINTED: errors_of,
    **dict.fromkeys(JSON, lambda path: [json.dumps(json.loads(path.read_text()), sort_keys=True)]),
}


@dataclass
class Runner:
    """Runs jobs of a checkout in ``folder`` and keeps their ``results`` in a file."""

    checkout: Path
    folder: Path
    file: Path
    results: dict[str, str]
    jobs: dict[str, str] = field(default_factory=jobs)
    done: dict[str, bool] = field(default_factory=dict)  # by job, whether it succeeded

    def run(self, name: str) -> bool:
        """Run a job, once, after those whose files it needs; return whether all succeeded."""
        if name not in self.done:
            self._store(name, {})
            ready = [self.run(other) for other in NAMES.findall(self.jobs[name]) if other in self.jobs]
            self.done[name] = all(ready) and self._make(name)
        return self.done[name]

    def _store(self, name: str, found: dict[str, str]) -> None:
        """Replace the results of a job, and write all of them or nothing."""
        kept = {file: value for file, value in self.results.items() if not file.startswith(f"{name}/")}
        self.results = {**kept, **found}
        write_json(self.file, dict(sorted(self.results.items())))

    def _make(self, name: str) -> bool:
        begun, folder, errors = time.perf_counter(), self.folder / name, ""
        own = {"PYTHONPATH": str(self.checkout), "SA3_HOME": str(self.folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **ENVIRONMENT, **own}
        for words in self._spelled(name):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            command = [sys.executable, "-m", "sa3_mlx", *words]
            made = subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True)
            if made.returncode == 0:
                break
            errors += f"sa3 {shlex.join(words)}\n{made.stderr[-2000:]}\n"
        if words[0] == "verify":
            (folder / PRINTED).write_text(made.stdout)
        found = self._hashes(folder) if made.returncode == 0 else {}
        self._store(name, found)
        print(f"{name}: {len(found)} results, {time.perf_counter() - begun:.1f} s", flush=True)
        if not found:
            print(errors or "it made nothing to compare", file=sys.stderr, flush=True)
        return bool(found)

    def _spelled(self, name: str) -> Iterator[list[str]]:
        """Yield the words of the command with every choice of spellings."""
        places = {"inputs": self.folder / "inputs", "golden": self.checkout.parent / "shared" / "golden"}
        places["out"], command = self.folder / name, self.jobs[name]
        for place in NAMES.findall(command):
            command = command.replace(f"<{place}>", shlex.quote(str(places.get(place, self.folder / place))))
        words = [word.partition("=") for word in shlex.split(command)]
        changing = sorted({key for key, _, _ in words} & SPELLINGS.keys())
        for chosen in itertools.product(*(SPELLINGS[key] for key in changing)):
            spelling = dict(zip(changing, chosen, strict=True))
            yield [spelling.get(key, key) + equals + value for key, equals, value in words]

    def _hashes(self, folder: Path) -> dict[str, str]:
        """Return the hash of every file of a job's folder that has a reader."""
        found = {}
        for path in sorted(folder.rglob("*")):
            reader = READERS.get(path.name) or READERS.get(path.suffix)
            if reader is not None and path.is_file():
                found[path.relative_to(self.folder).as_posix()] = digest(reader(path))
        return found


def write(checkout: Path, file: Path, only: str, keep: Path | None) -> int:
    """Run the jobs whose names match, and those that they need; return the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if keep is None else keep.resolve()
        write_inputs(folder / "inputs")
        known = json.loads(file.read_text()) if only and file.is_file() else {}
        runner = Runner(checkout.resolve(), folder, file, known)
        failed = [name for name in runner.jobs if re.search(only, name) and not runner.run(name)]
    print(f"{len(runner.results)} results in {file}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def compare(first: Path, second: Path, *, only: str) -> int:
    """Print every matching name that differs or is missing; return the exit code."""
    a, b = json.loads(first.read_text()), json.loads(second.read_text())
    names = [name for name in sorted(a | b) if re.search(only, name)]
    different = [name for name in names if a.get(name) != b.get(name)]
    for name in different:
        print(f"{name}: " + ("differs" if name in a and name in b else f"only in {first if name in a else second}"))
    print(f"{len(names) - len(different)} of {len(names)} results are the same")
    return 1 if different or not names else 0


def distances(first: Path, second: Path) -> dict[str, float]:
    """Return the relative difference of each value that two training logs have of the same step."""
    a, b = (
        {(row["step"], name): value for row in rows_of(path) for name, value in row.items() if name != "step"}
        for path in (first, second)
    )
    both = {key: (a[key], b[key]) for key in a.keys() & b.keys() if isinstance(a[key], int | float)}
    return {
        f"{name} of step {step}": abs(x - y) / (max(abs(x), abs(y)) or 1.0) for (step, name), (x, y) in both.items()
    }


def losses(first: Path, second: Path, *, only: str) -> int:
    """Print how far each training that two folders keep differs; return the exit code."""
    logs = sorted(path.relative_to(first) for path in first.glob("train/*/run/log.jsonl"))
    logs = [log for log in logs if (second / log).is_file() and re.search(only, log.parts[1])]
    for log in logs:
        found = distances(first / log, second / log)
        terms = {name: value for name, value in found.items() if "/" not in name}
        worst = (f"{max(each.values()):.1e} ({max(each, key=each.__getitem__)})" for each in (terms, found) if each)
        print(f"{log.parts[1]}: {len(found)} values, largest relative difference of terms {', of all '.join(worst)}")
    return 0 if logs else 1


def main() -> int:
    """Read the command line and do what it asks for."""
    parser = argparse.ArgumentParser(description="Prove that two checkouts give bit-identical results.")
    parser.add_argument("--checkout", type=Path, metavar="DIR", help="checkout to run, with --write")
    parser.add_argument("--write", type=Path, metavar="FILE", help="its hashes; with --only others in it stay")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two such files")
    parser.add_argument("--losses", type=Path, nargs=2, metavar="FOLDER", help="two kept ones: distances of logs")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression that occurs in names")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to keep what was made")
    asked = parser.parse_args()
    if asked.compare is not None:
        return compare(*asked.compare, only=asked.only)
    if asked.losses is not None:
        return losses(*asked.losses, only=asked.only)
    if asked.checkout is None or asked.write is None:
        parser.error("give --checkout DIR --write FILE, --compare FILE FILE, or --losses FOLDER FOLDER")
    return write(asked.checkout, asked.write, asked.only, asked.keep)


if __name__ == "__main__":
    sys.exit(main())
