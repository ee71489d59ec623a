"""Convert files of the official MLX port at real size and compare both programs: ``python -m benchmarks conversion``.

The port's own modules get random weights and are saved as its files are named and typed. A process of its own converts
them, whose time and peak memory are kept; then both programs run from their files on the same inputs. At last ours is
written back and the port runs from that.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
from sa3_convert import export_port
from sa3_convert.port.npz import ArrayFile
from sa3_convert.port.sentencepiece import SPACE, sentencepiece_model
from sa3_convert.text_config import official_text_config

from benchmarks.options import RESULTS_FOLDER
from benchmarks.speed.machine import describe
from benchmarks.speed.models import PROMPT
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_mlx.conditioner import Conditioner
from sa3_mlx.dit import DiT
from sa3_mlx.runtime import mx
from sa3_mlx.same import SAME
from sa3_mlx.t5gemma import T5GemmaEncoder
from sa3_mlx.weights import load_part

from .networks import HostFeatures, RandomPrompt, Samplers
from .sides import MODELS, Checkout, config_of
from .weights import for_conditioner, for_dit, for_same, for_text, random_weights

ALLOWED = 2e-5  # relative, of latents and audio in single precision
NAMES = {"small": "sm-music", "medium": "medium"}
_CONVERT = """
import json, resource, sys, time
from pathlib import Path
from sa3_convert import convert
start = time.perf_counter()
report = convert(sys.argv[1], Path(sys.argv[2]), name=None, force=True, progress=None)
status = Path("/proc/self/status")
if status.exists():  # not of getrusage, which counts what the process that started this one had
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
print(json.dumps({**found, "peak_bytes": peak, "bytes": report.bytes}))
"""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Hold a comparison: relative L2 between the outputs, ours beside the port's."""

    what: str
    files: str  # "the port's" or "ours, written for it"
    difference: float


def synthetic_tokenizer(size: int) -> bytes:
    """Return a SentencePiece model of Gemma's kind with so many pieces, joined at random."""
    draw = random.Random(0)
    known = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    parts = [SPACE, *map(chr, range(33, 127)), *map(chr, range(0x3B1, 0x3CA))]
    found, merges = dict.fromkeys(parts), []
    while len(known) + len(found) < size:
        left, right = draw.choice(parts), draw.choice(parts[:2000])
        if left + right not in found and len(left + right) <= 16:
            found[left + right] = None
            parts.append(left + right)
            merges.append([left, right])
    special = [{"id": number, "content": known[number], "special": True} for number in range(4)]
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {text: number for number, text in enumerate((*known, *found))},
        "merges": merges,
    }
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return sentencepiece_model({"model": model, "normalizer": normalizer, "added_tokens": special}, "made")


def write_port_files(checkout: Checkout, model: str, folder: Path) -> None:
    """Save the port's own modules with random weights, once; later calls find the files."""
    from mlx.utils import tree_flatten

    config, kind = config_of(model, None), "s" if model == "small" else "l"
    if (folder / "done").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, arrays: dict[str, mx.array], dtype: mx.Dtype) -> None:
        mx.savez(str(folder / name), **{key: value.astype(dtype) for key, value in arrays.items()})
        mx.clear_cache()

    weights = random_weights(config, ["dit", "conditioner"], seed=1)
    network = checkout.dit(model, weights, 16, config.require_diffusion().dit.depth)
    own = dict(cast(list[tuple[str, mx.array]], tree_flatten(network.parameters())))
    assert for_dit(weights).keys() <= own.keys()
    save(f"dit_{NAMES[model]}_f16.npz", own | for_conditioner(weights), mx.float16)
    del network, own, weights
    for half in ("encoder", "decoder"):
        weights = random_weights(config, ["same"], seed=2)
        network = checkout.same(model, half, weights, config)
        own = dict(cast(list[tuple[str, mx.array]], tree_flatten(network.parameters())))
        assert own.keys() == for_same(weights, half, config).keys()
        if half == "decoder" and kind == "s":  # its file has the order of PyTorch
            own["mapping.weight"] = own["mapping.weight"].transpose(0, 2, 1)
        save(f"same_{kind}_{half}_f32.npz", own, mx.float32)
        del network, own, weights
    text = config.require_diffusion().text_encoder
    weights = random_weights(config, ["text_encoder"], seed=3)
    arrays = {name: np.array(array.astype(mx.float16)) for name, array in for_text(weights).items()}
    meta = json.dumps(official_text_config(text)["encoder"]).encode()
    blobs = {"META": np.frombuffer(meta, np.uint8)}
    blobs["TOKENIZER_MODEL"] = np.frombuffer(synthetic_tokenizer(text.vocab_size), np.uint8)
    np.savez(folder / "t5gemma_f16.npz", **arrays, **blobs)  # type: ignore[arg-type]
    (folder / "done").touch()


def convert_apart(dit: Path, out: Path) -> dict[str, float]:
    """Convert in a process of its own; return its seconds, peak bytes and the bytes written."""
    done = subprocess.run([sys.executable, "-c", _CONVERT, str(dit), str(out)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@dataclass(frozen=True, kw_only=True)
class BothPrograms:
    """Run both programs from their files on the same inputs."""

    checkout: Checkout
    model: str
    config: ModelConfig
    ours: Path
    port: Path
    frames: int
    steps: int

    def outputs(self) -> Iterator[tuple[str, Callable[[], tuple[mx.array, mx.array]]]]:
        """Yield what is compared and how it is made: the port's output, then ours."""
        yield "tokens", self._tokens
        yield "text states in half precision", self._text
        yield "duration", self._duration
        yield "latents", self._latents
        yield "audio of latents", self._decoded
        yield "latents of audio", self._encoded

    def _file(self, name: str) -> str:
        (path,) = (path for path in self.port.glob(f"*{name}*.npz"))
        return str(path)

    def _tokens(self) -> tuple[mx.array, mx.array]:
        texts = _texts(2000)
        text = self.checkout.module("t5gemma_mlx").T5Gemma.from_npz(self._file("t5gemma"))
        return text.tokenize(texts)[0].astype(mx.float32), mx.array(self._tokenizer().encode(texts)[0], mx.float32)

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.ours / TOKENIZER_FILE, self.config.require_diffusion().text_encoder.max_length)

    def _text(self) -> tuple[mx.array, mx.array]:
        text = self.checkout.module("t5gemma_mlx").T5Gemma.from_npz(self._file("t5gemma"))
        ids, mask = self._tokenizer().encode([PROMPT])
        encoder = cast(T5GemmaEncoder, load_part(self.ours, self.config, "text_encoder", mx.float16))
        count = int(mask.sum())
        states = encoder(mx.array(ids), mx.array(mask))
        return text.encode([PROMPT])[0][:, :count].astype(mx.float32), states[:, :count].astype(mx.float32)

    def _duration(self) -> tuple[mx.array, mx.array]:
        module: Any = self.checkout.module("sa3_pipeline")
        module.expo_fourier_features = lambda t, **_: HostFeatures()(t)
        padding, embed = module.load_conditioner_from_npz(self._file("dit_"), prefix="cond.")
        ours = cast(Conditioner, load_part(self.ours, self.config, "conditioner", mx.float32))
        seconds = [0.5, 30.0, 200.0]
        mask = mx.zeros((3, 1), mx.bool_)
        context, vector = ours(mx.zeros((3, 1, padding.size)), mask, np.array(seconds))
        theirs = mx.concatenate([mx.broadcast_to(padding, (3, padding.size)), embed(seconds)[:, 0]])
        return theirs, mx.concatenate([context[:, 0], vector])

    def _latents(self) -> tuple[mx.array, mx.array]:
        diffusion, module = self.config.require_diffusion(), self.checkout.module("sa3_pipeline")
        loader = self.checkout.module("dit_mlx" if self.model == "small" else "dit_mlx_medium").load_dit
        network: Any = loader(self._file("dit_"), T_lat=self.frames, dtype=mx.float32)
        network.timestep_features = HostFeatures()
        channels = self.config.same.latent_channels
        both = Samplers(
            dit=cast(DiT, load_part(self.ours, self.config, "dit", mx.float32)),
            network=network,
            port=module,
            prompt=RandomPrompt.draw(diffusion.text_encoder.width, diffusion.text_encoder.max_length, channels),
            levels=module.build_pingpong_schedule(self.steps),
            shape=(1, channels, self.frames),
        )
        theirs = both.peer_steps(0)
        mx.eval(theirs)
        return theirs, both.our_steps(0)

    def _same(self) -> SAME:
        return cast(SAME, load_part(self.ours, self.config, "same", mx.float32))

    def _half(self, half: str) -> Any:
        kind = "s" if self.model == "small" else "l"
        return self.checkout.module(f"same_{kind}_{half}").load_model(self._file(f"same_{kind}_{half}"), mx.float32)

    def _decoded(self) -> tuple[mx.array, mx.array]:
        latents = mx.random.normal((1, self.frames, self.config.same.latent_channels), key=mx.random.key(7))
        patches = self._half("decoder")(latents.transpose(0, 2, 1))
        theirs = self.checkout.module("sa3_pipeline").patched_decode(patches).transpose(0, 2, 1)
        mx.eval(theirs)
        return theirs, self._same().decode(latents)

    def _encoded(self) -> tuple[mx.array, mx.array]:
        same = self.config.same
        audio = 0.3 * mx.random.normal((1, self.frames * same.samples_per_latent, 2), key=mx.random.key(9))
        patches = audio.reshape(1, -1, same.patch_size, 2).transpose(0, 3, 2, 1).flatten(1, 2)
        theirs = self._half("encoder")(patches)
        mx.eval(theirs)
        return theirs.transpose(0, 2, 1), self._same().encode(audio)


def _texts(count: int) -> list[str]:
    draw = random.Random(5)
    letters = [*map(chr, range(32, 127)), *"αβγλ é世🎵\n\t", SPACE]
    return ["".join(draw.choices(letters, k=draw.randint(0, 120))) for _ in range(count)]


def rows_of(compared: BothPrograms, files: str) -> Iterator[Agreement]:
    """Compare output by output; each network leaves before the next comes."""
    for what, make in compared.outputs():
        theirs, ours = make()
        difference = float(mx.linalg.norm((ours - theirs).reshape(-1)) / mx.linalg.norm(theirs.reshape(-1)))
        yield Agreement(what=what, files=files, difference=difference)
        del theirs, ours
        mx.clear_cache()


def equal_arrays(before: Path, after: Path) -> tuple[int, list[str]]:
    """Count arrays of two sets of files that are the same bit for bit, and name those of the second that are not."""
    same, other = 0, []
    for path in sorted(after.glob("*.npz")):
        with ArrayFile.open(path) as new, ArrayFile.open(before / path.name) as old:
            for name in set(new.names()) - {"META", "TOKENIZER_MODEL"}:
                equal = np.array_equal(old.read(name).squeeze(), new.read(name).squeeze())
                same += equal
                other += [] if equal else [name]
    return same, other


@click.command()
@click.option(
    "--port",
    "path",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Checkout of Stability-AI/stable-audio-3, or of its folder optimized/mlx.",
)
@click.option("--model", type=click.Choice(list(MODELS)), default="small", show_default=True)
@click.option("--frames", type=click.IntRange(2), default=16, show_default=True, help="Latent frames; even for small.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("port-files"),
    show_default=True,
    help="Folder for the files, three times: 6 GB for small, 21 GB for medium.",
)
@RESULTS_FOLDER
def conversion(path: Path, model: str, frames: int, steps: int, work: Path, results: Path) -> int:
    """Convert the official MLX port's files in and out at their real size; compare outputs, time, peak memory.

    Exit code 1 when latents or audio differ by more than 2e-5 relative, or a token at all.
    """
    checkout, config = Checkout(path), config_of(model, None)
    port, ours, back = (work / f"{model}-{name}" for name in ("port", "ours", "back"))
    write_port_files(checkout, model, port)
    apart = convert_apart(port / f"dit_{NAMES[model]}_f16.npz", ours)
    click.echo(
        f"in   {apart['bytes'] / 1e9:.2f} GB in {apart['seconds']:.1f} s ({apart['cpu_seconds']:.1f} s of CPU), "
        f"peak {apart['peak_bytes'] / 1e6:.0f} MB"
    )
    rows = []
    start = time.perf_counter()
    out = export_port(ours, back, force=True)
    click.echo(f"out  {out.bytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")
    same, other = equal_arrays(port, back)
    click.echo(f"out  {same} arrays are the same bit for bit, {len(other)} are not {other[:3]}")
    for files, folder in (("the port's", port), ("ours, written for it", back)):
        compared = BothPrograms(
            checkout=checkout, model=model, config=config, ours=ours, port=folder, frames=frames, steps=steps
        )
        for row in rows_of(compared, files):
            rows.append(row)
            click.echo(f"{row.what:32} {row.files:22} {row.difference:.1e}")
    machine = describe("mlx")
    result = {
        "machine": machine.to_dict(),
        "model": model,
        "frames": frames,
        "steps": steps,
        "allowed": ALLOWED,
        "conversion": apart,
        "equal_arrays": same,
        "other_arrays": other,
        "rows": [asdict(row) for row in rows],
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"conversion-{model}-{machine.slug()}-{date.today().isoformat()}.json", result)
    click.echo(json.dumps(result))
    limits = {"tokens": 0.0, "text states in half precision": 1e-2}
    return int(bool(other) or any(row.difference > limits.get(row.what, ALLOWED) for row in rows))
