"""Compare loading and whole runs with the official MLX port, from files of the same random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from benchmarks.speed.models import PROMPT, write_tokenizer
from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.files.safetensors import array_entry, write_tensors
from sa3_mlx.common.generation.noise import INITIAL, NoiseStream
from sa3_mlx.common.generation.request import Item, Request, Residency
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, PARTS, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.model.precision import Precision
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.recipes import RECIPES, layers_of
from sa3_mlx.common.quant.writer import nearest, write_quantized
from sa3_mlx.pipeline import Pipeline
from sa3_mlx.runtime import mx
from sa3_mlx.weights import load_part

from .sides import Checkout, Sides
from .weights import Weights, for_conditioner, for_dit, for_same, for_text, random_weights

SEED = 5


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Say how a whole run is made; the port's is the same but for what its command cannot do."""

    dtype: str  # "float32" or "float16", of the text encoder and the DiT
    steps: int
    packed: bool = False  # ours: the 8-bit recipe, states in float32: 16-bit ones are 40 times slower on a CPU
    chunk_frames: int | None = None  # ours: latent frames that SAME decodes at once
    residency: Residency = "phase"  # ours


@dataclass(frozen=True, kw_only=True)
class Files:
    """Locate the same weights for either side; ``dtype`` is that of text encoder and DiT, SAME is float32."""

    ours: Path  # a folder
    port: Path  # a folder with text.npz, dit.npz and decoder.npz
    dtype: str


def write_files(work: Path, config: ModelConfig, dtype: str) -> Files:
    """Write the files of both sides once; later calls find them."""
    files = Files(ours=work / f"{config.name}-{dtype}", port=work / f"{config.name}-{dtype}-port", dtype=dtype)
    if (files.port / "done").is_file():
        return files
    for folder in (files.ours, files.port):
        folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config, PARTS, seed=4)
    half = "F16" if dtype == "float16" else "F32"
    entries = [
        array_entry(name, np.array(array), half if name.startswith(("text_encoder.", "dit.")) else "F32")
        for name, array in weights.items()
    ]
    write_tensors(files.ours / WEIGHTS_FILE, entries, {"format": FORMAT})
    write_text(files.ours / CONFIG_FILE, config.to_json())
    write_tokenizer(files.ours / TOKENIZER_FILE)
    blobs = {name: np.frombuffer(b"{}", np.uint8) for name in ("META", "TOKENIZER_MODEL")}
    _save(files.port / "text.npz", for_text(weights), dtype, blobs)
    _save(files.port / "dit.npz", for_dit(weights) | for_conditioner(weights), dtype, {})
    _save(files.port / "decoder.npz", for_same(weights, "decoder", config), "float32", {})
    (files.port / "done").touch()
    return files


def write_8bit(work: Path, files: Files, config: ModelConfig) -> Files:
    """Quantize ours by the recipe "8bit"; the port has nothing like it and keeps its files."""
    out = work / f"{config.name}-8bit"
    if not out.is_dir():
        grids = {path: part.grid for name, part in RECIPES["8bit"].parts().items() for path in layers_of(config, name)}
        quantizers = {path: partial(nearest, grid=grid) for path, grid in grids.items()}
        write_quantized(files.ours, out, recipe="8bit", grids=grids, quantizers=quantizers, velocity=None, force=False)
    return replace(files, ours=out)


def _save(path: Path, weights: Weights, dtype: str, blobs: dict[str, np.ndarray]) -> None:
    arrays = {name: np.array(array).astype(dtype) for name, array in weights.items()}
    if "mapping.weight" in arrays and arrays["mapping.weight"].ndim == 3:  # the file has the order of PyTorch
        arrays["mapping.weight"] = arrays["mapping.weight"].transpose(0, 2, 1)
    np.savez(path, **(arrays | blobs))  # type: ignore[arg-type]


class _Words:
    """Stand for the tokenizer of the port, which is not free to copy, with the ids that ours gives for ``PROMPT``."""

    def LoadFromSerializedProto(self, blob: bytes) -> None:
        pass

    def Encode(self, text: str) -> list[int]:
        words = list(dict.fromkeys(PROMPT.split()))
        return [2 + words.index(word) for word in text.split()]


@dataclass(frozen=True, kw_only=True)
class Port:
    """Run the stages of the port's command, in its order."""

    checkout: Checkout
    files: Files
    kind: str  # "s" or "l"
    frames: int

    def text(self) -> Any:
        """Load the text encoder."""
        stub = ModuleType("sentencepiece")
        stub.SentencePieceProcessor = _Words  # type: ignore[attr-defined]
        sys.modules["sentencepiece"] = stub
        return self.checkout.module("t5gemma_mlx").T5Gemma.from_npz(str(self.files.port / "text.npz"))

    def conditioner(self) -> Any:
        """Load the padding and the duration embedding."""
        path = str(self.files.port / "dit.npz")
        return self.checkout.module("sa3_pipeline").load_conditioner_from_npz(path, prefix="cond.")

    def dit(self) -> Any:
        """Load the DiT."""
        module = self.checkout.module("dit_mlx" if self.kind == "s" else "dit_mlx_medium")
        dtype = getattr(mx, self.files.dtype)
        return module.load_dit(str(self.files.port / "dit.npz"), T_lat=self.frames, dtype=dtype)

    def decoder(self) -> Any:
        """Load the decoder."""
        module = self.checkout.module(f"same_{self.kind}_decoder")
        return module.load_model(weights_path=str(self.files.port / "decoder.npz"), dtype=mx.float32)

    def generate(self, seconds: float, steps: int) -> mx.array:
        """Make audio (L, 2), each network dropped once it has done its part."""
        module, dtype = self.checkout.module("sa3_pipeline"), getattr(mx, self.files.dtype)
        states, mask = (text := self.text()).encode([PROMPT], max_len=256)
        mx.eval(states, mask)
        padding, embed = self.conditioner()
        states = module.apply_prompt_padding(states.astype(dtype), mask, padding.astype(dtype))
        duration = embed(seconds).astype(dtype)
        context, vector = mx.concatenate([states, duration], axis=1), duration[:, 0]
        mx.eval(context, vector)
        del text
        mx.clear_cache()
        network = self.dit()
        noise = mx.random.normal((1, 256, self.frames), dtype=dtype, key=mx.random.key(SEED))
        velocity = partial(network, cross_attn_cond_raw=context, global_cond_raw=vector)
        latents = module.sample_flow_pingpong(velocity, noise, module.build_pingpong_schedule(steps), seed=SEED + 1)
        mx.eval(latents)
        del network, velocity
        mx.clear_cache()
        decoder, chunked = self.decoder(), self.checkout.module(f"same_{self.kind}_decoder").decode_chunked
        size, overlap = (8, 2) if self.kind == "s" else (128, 8)
        audio = module.patched_decode(chunked(decoder, latents.astype(mx.float32), size, overlap))
        mx.eval(audio)
        return audio[0, :, : int(seconds * 44_100)].T


class _PortNoise:
    """Give our sampler the port's draws."""

    def __init__(self, frames: int, dtype: str) -> None:
        self._dtype = getattr(mx, dtype)
        self._frames = frames
        self._key = mx.random.key(SEED + 1)

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> np.ndarray:  # noqa: ARG002
        key = mx.random.key(SEED)
        if purpose != INITIAL:
            self._key, key = mx.random.split(self._key)
        drawn = mx.random.normal((1, channels, self._frames), dtype=self._dtype, key=key)
        return np.array(drawn.astype(mx.float32))[0].T


def generating(checkout: Checkout, config: ModelConfig, files: Files, frames: int, seconds: float, run: Whole) -> Sides:
    """Run from nothing in memory to audio: the steps of the port's command beside ``sa3_mlx.Pipeline``."""
    port = Port(checkout=checkout, files=files, kind=_kind(config), frames=frames)
    dtype = "float32" if run.packed else files.dtype
    request = Request(
        items=(Item(prompt=PROMPT, seconds=seconds, seed=SEED),),
        sampling=Sampling(sampler="pingpong", steps=run.steps),
        chunk_frames=run.chunk_frames,
        head_room_seconds=max(0.0, frames * 4096 / 44_100 - seconds - 0.01),
    )

    def ours() -> mx.array:
        pipeline = Pipeline(files.ours, config, Precision(dtype=dtype, text_dtype=None))  # the text encoder too
        *_, last = pipeline.stream(request, noise=_PortNoise(frames, files.dtype), residency=run.residency)
        return mx.array(last.generation.audio[0])  # type: ignore[union-attr]

    def theirs() -> mx.array:
        return port.generate(seconds, run.steps)

    chunks = f", decoded by {run.chunk_frames} frames" if run.chunk_frames else ""
    kind = f"8 bits with float32 states{chunks}, beside {files.dtype}" if run.packed else f"{files.dtype}{chunks}"
    how = ", our DiT read in every step" if run.residency == "step" else ""
    return _sides(ours, theirs, f"{run.steps} steps, {kind}{how}")


def loading(checkout: Checkout, config: ModelConfig, files: Files) -> Sides:
    """Load all that text-to-audio needs, from files that the system has at hand. Outputs are some of every part; of the
    conditioner, which the port keeps in 16 bits, zeros of its shape."""
    port = Port(checkout=checkout, files=files, kind=_kind(config), frames=54)

    def ours() -> mx.array:
        dtype = getattr(mx, files.dtype)
        kinds = zip(PARTS, (dtype, mx.float32, dtype, mx.float32), strict=True)
        text, conditioner, dit, same = (cast(Any, load_part(files.ours, config, part, kind)) for part, kind in kinds)
        mx.eval([part.parameters() for part in (text, conditioner, dit, same.decoder, same.bottleneck)])
        some = (
            text.norm.weight,
            dit.layers[7].self_attn.to_qkv.weight,
            conditioner.seconds_embed.bias * 0,
            same.decoder.layers[2].ff.proj_in.weight,
        )
        return mx.concatenate([array.reshape(-1).astype(mx.float32) for array in some])

    def theirs() -> mx.array:
        text, (_, seconds), dit, decoder = port.text(), port.conditioner(), port.dit(), port.decoder()
        some = (
            text.encoder.norm,
            dit.transformer.layers[7].self_attn.to_qkv.weight,
            seconds.b * 0,
            decoder.blocks[2].ff.glu_proj.weight,
        )
        return mx.concatenate([array.reshape(-1).astype(mx.float32) for array in some])

    return _sides(ours, theirs, f"text encoder and DiT in {files.dtype}, files at hand")


def _kind(config: ModelConfig) -> str:
    return "s" if config.same.attention == "chunked" else "l"


def _sides(ours: Callable[[], mx.array], theirs: Callable[[], mx.array], note: str) -> Sides:
    return Sides(ours=lambda _: ours(), peer=lambda _: theirs(), check=lambda: (theirs(), ours()), note=note)
