"""Write a model as exported MLX functions, which need none of our code: ``sa3 export``.

Three functions with the weights in them: the text and its duration, one sampling step, one chunk of the decoder. Shapes
are fixed by the longest sound asked for; ``docs/mlxfn.md`` has the calls in order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.output import CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.generation.plan import Plan, plan
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.chunks import chunk_plan, default_chunk_frames
from sa3_mlx.common.model.features import FREQUENCIES, fourier_features
from sa3_mlx.common.model.precision import DTYPES, choose_precision
from sa3_mlx.common.terminal import report
from sa3_mlx.common.version import version

MANIFEST_FILE, CONSTANTS_FILE = "manifest.json", "constants.safetensors"
FORMAT = "sa3-mlxfn/1"
_SAMPLERS = ("pingpong", "euler")  # a step of which needs nothing of the steps before
Signature = Sequence[tuple[str, tuple[int, ...], str]]  # name, shape, type of every input


@click.command(cls=TypedCommand)
@click.argument("model", metavar="MODEL")
@click.option("--mlxfn", "out", type=click.Path(path_type=Path), required=True, metavar="OUT", help="Folder to write.")
@click.option("--seconds", type=float, default=30.0, show_default=True, help="Longest sound; it fixes the shapes.")
@click.option("--steps", type=int, help="Steps of the schedule that is written. Default: the model's usual ones.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the DiT.")
def export(model: str, out: Path, seconds: float, steps: int | None, dtype: str, common: CommonOptions) -> None:
    """Write MODEL to the folder OUT as functions that any program with MLX can call, without sa3.

    docs/mlxfn.md has the calls in order, as a program of a page.

    \b
    sa3 export demo --mlxfn demo-functions --seconds 3
    """
    choose("mlx")
    found = find_model(model, generates=True)
    sampling = found.config.usual_sampling
    if sampling.sampler not in _SAMPLERS:
        sampling = replace(sampling, sampler="euler")
    sampling = sampling if steps is None else replace(sampling, steps=steps)
    planned = plan(Request(items=(Item(prompt="", seconds=seconds, seed=0),), sampling=sampling), found.config)
    if out.exists() and not (common.force and (out / MANIFEST_FILE).is_file()):
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace exported functions")
    digest = fingerprint(found.folder, found.config, quiet=common.quiet)
    with new_folder(out.absolute()) as new:
        manifest = write_functions(found, planned, seconds, dtype, digest, new, Progress(quiet=common.quiet))
    names = ", ".join(entry["file"] for entry in manifest["functions"].values())
    report(f"{out}: {names} for up to {seconds:g} s of {found.label}")
    report("  next        docs/mlxfn.md has the calls in order")


def write_functions(
    model: Model, planned: Plan, seconds: float, dtype: str, digest: str, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Export the functions of a model into a folder with what they need beside; return the manifest."""
    from sa3_mlx.runtime import mx, on_gpu

    config, same = model.config, model.config.same
    diffusion = config.require_diffusion()
    kind = choose_precision(dtype, "auto", on_gpu=on_gpu()).dtype
    frames, width, slots = planned.frames, diffusion.text_encoder.width, diffusion.text_encoder.max_length
    chunk = min(frames, default_chunk_frames(same, "decode"))
    state = ("x", (1, frames, same.latent_channels), "float32")
    signatures: dict[str, Signature] = {
        "text": (("ids", (1, slots), "int32"), ("mask", (1, slots), "bool"), ("features", (1, 256), "float32")),
        "step": (
            state,
            ("features", (1, 256), "float32"),
            ("time", (1,), "float32"),
            ("next_time", (1,), "float32"),
            ("context", (1, slots + 1, width), "float32"),
            ("duration", (1, width), "float32"),
            ("valid", (1, frames), "bool"),
            ("noise", state[1], "float32"),
        ),
        "decode": (("latents", (1, chunk, same.latent_channels), "float32"),),
    }
    makers = {"text": _text, "step": _step, "decode": _decode}
    functions: dict[str, Any] = {}
    for name, signature in signatures.items():
        progress.line(f"exporting {name}")
        function = makers[name](model, planned, getattr(mx, kind))
        examples = [mx.zeros(shape, getattr(mx, "bool_" if t == "bool" else t)) for _, shape, t in signature]
        path = folder / f"{name}.mlxfn"
        mx.export_function(str(path), function, *examples)
        outputs = cast(Any, mx).import_function(str(path))(*examples)
        functions[name] = {
            "file": path.name,
            "hash": file_hash(path),
            "inputs": [{"name": n, "shape": list(s), "dtype": k} for n, s, k in signature],
            "outputs": [{"shape": list(array.shape), "dtype": str(array.dtype).split(".")[-1]} for array in outputs],
        }
        mx.clear_cache()
    times = planned.sigmas[0]
    constants = {"sigmas": times, "time_features": fourier_features(times[:-1]), "frequencies": np.array(FREQUENCIES)}
    write_tensors(folder / CONSTANTS_FILE, [array_entry(name, array) for name, array in constants.items()], {})
    shutil.copyfile(model.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    chunks = [(min(found.start, frames - chunk), found) for found in chunk_plan(frames, chunk, same, "decode")]
    manifest = {
        "format": FORMAT,
        "model": model.name,
        "hash": digest,
        "versions": {"sa3": version(), "mlx": installed_version("mlx")},
        "dtype": kind,
        "sampling": planned.sampling.to_dict(),
        "longest_seconds": seconds,
        "frames": frames,
        "head_room_frames": int(planned.head_room_seconds * config.sample_rate / same.samples_per_latent),
        "seconds_max": diffusion.seconds_max,
        "sample_rate": config.sample_rate,
        "audio_channels": config.audio_channels,
        "samples_per_latent": same.samples_per_latent,
        "chunks": [{"start": start, "keep": [found.keep_start, found.keep_stop]} for start, found in chunks],
        "functions": functions,
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


Function = Callable[..., Any]


def _text(model: Model, planned: Plan, dtype: Any) -> Function:  # noqa: ARG001
    """Return ids (1, S), mask (1, S), features of the duration (1, 256) -> context (1, S + 1, D), duration (1, D)."""
    from sa3_mlx.conditioner import Conditioner
    from sa3_mlx.runtime import mx, nn
    from sa3_mlx.t5gemma import T5GemmaEncoder
    from sa3_mlx.weights import EMBEDDING, load_part

    encoder = cast(T5GemmaEncoder, load_part(model.folder, model.config, "text_encoder", mx.float32))
    conditioner = cast(Conditioner, load_part(model.folder, model.config, "conditioner", mx.float32))
    with TensorFile.open(model.folder / WEIGHTS_FILE) as file:
        table = mx.array(file.read(EMBEDDING))
    encoder.embed_tokens = nn.Embedding(1, 1)
    encoder.embed_tokens.weight = table
    mx.eval(encoder.parameters(), conditioner.parameters())

    def text(ids: mx.array, mask: mx.array, features: mx.array) -> tuple[mx.array, mx.array]:
        duration = conditioner.seconds_embed(features)
        prompt = conditioner.embed_prompt(encoder(ids, mask), mask)
        return mx.concatenate([prompt, duration[:, None]], axis=1), duration

    return text


def _step(model: Model, planned: Plan, dtype: Any) -> Function:
    """Return a step of the sampler, with the guidance of the model's usual sampling in it."""
    from sa3_mlx.common.generation.conditioning import Conditioning
    from sa3_mlx.dit import DiT
    from sa3_mlx.guidance import guide
    from sa3_mlx.runtime import mx
    from sa3_mlx.weights import load_part

    dit = cast(DiT, load_part(model.folder, model.config, "dit", dtype))
    mx.eval(dit.parameters())
    local = mx.zeros((1, 1, 1 + model.config.same.latent_channels), dtype)
    guidance, pingpong = planned.sampling.guidance, planned.sampling.sampler == "pingpong"

    def velocity(x: mx.array, features: mx.array, time: mx.array, given: Conditioning[mx.array]) -> mx.array:
        prepared = dit.prepare(given)
        modulation = dit.to_modulation(prepared.seconds + dit.to_timestep_embed(features.astype(dtype)))
        found = dit.velocity(x.astype(dtype), modulation, prepared)
        if guidance.scale != 1:
            away = dit.velocity(x.astype(dtype), modulation, dit.prepare(given.unconditional()))
            found = guide(x, time, found, away, guidance, given.valid)  # type: ignore[arg-type]
        return found.astype(mx.float32)

    def step(
        x: mx.array,
        features: mx.array,
        time: mx.array,
        next_time: mx.array,
        context: mx.array,
        duration: mx.array,
        valid: mx.array,
        noise: mx.array,
    ) -> mx.array:
        given = Conditioning(
            context=context.astype(dtype), seconds=duration.astype(dtype), local=local, valid=valid, repeats=None
        )
        v, t, t_next = velocity(x, features, time, given), time[:, None, None], next_time[:, None, None]
        if pingpong:
            return (1 - t_next) * (x - t * v) + t_next * noise
        return x + (t_next - t) * v + 0 * noise

    return step


def _decode(model: Model, planned: Plan, dtype: Any) -> Function:  # noqa: ARG001
    """Return latents (1, F, C) -> audio (1, F R, channels)."""
    from sa3_mlx.runtime import mx
    from sa3_mlx.same import SAME
    from sa3_mlx.weights import load_part

    same = cast(SAME, load_part(model.folder, model.config, "same", mx.float32))
    mx.eval(same.decoder.parameters(), same.bottleneck.parameters())
    return lambda latents: same.decode(latents)
