"""``sa3 verify``: a converted model against reference outputs, or the two backends against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from sa3_mlx.cli import backend, fingerprint
from sa3_mlx.cli.audio.generate import default_seconds
from sa3_mlx.cli.home import Model, find_model
from sa3_mlx.cli.models.listing import table
from sa3_mlx.cli.models.measure import snr_db
from sa3_mlx.cli.options import debug_option, given
from sa3_mlx.common.generation.events import Conditioned, Finished, Stepped
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import seconds_to_samples

from .golden import AREAS, Golden, Row
from .twin import Twin

TWIN_SNR_DB = 40.0
_STEPS = 8
_PROMPT = "a drum loop and a warm piano"


@click.command()
@click.argument("model")
@click.argument("golden", required=False, type=click.Path(path_type=Path), metavar="[GOLDEN_FOLDER]")
@click.option("--backend", "wanted", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--area", "areas", multiple=True, type=click.Choice(AREAS), help="Only these; can be repeated.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="For the comparison of the backends.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--seconds", type=float, help="Default: at most 4.")
@click.option("--failures", is_flag=True, help="List failed cases alone.")
@debug_option
@click.pass_context
def verify(
    ctx: click.Context,
    model: str,
    golden: Path | None,
    wanted: str,
    areas: tuple[str, ...],
    prompt: str,
    seed: int,
    seconds: float | None,
    failures: bool,
) -> int:
    """Check MODEL case by case against GOLDEN_FOLDER, reference outputs made with the same weights.

    Without a folder both backends make the same seed and prompt in 8 steps, with the sampler and guidance that are
    usual for MODEL, and must agree to 40 dB; an autoencoder alone encodes noise and decodes it again. Exit code 1 when
    something does not agree.
    """
    found = find_model(model, generates=False)
    _refuse_unused(ctx, golden, found)
    if golden is None:
        compare = _twins if found.config.diffusion is not None else _autoencoder_twins
        return _print(list(compare(found, prompt, seed, seconds)), failures=failures)
    with Golden.open(golden) as reference:
        reference.check_weights(found.folder, found.config)
        fingerprint.fingerprint(found.folder, found.config)
        twin = Twin(backend.choose(wanted))
        click.echo(f"{found.label} on {twin.name} against {golden}")
        return _print(list(_areas(reference, twin, found.folder, found.config, areas or AREAS)), failures=failures)


def _refuse_unused(ctx: click.Context, golden: Path | None, model: Model) -> None:
    """Raises click.UsageError for an option of the other way to verify."""
    names = {"wanted": "--backend", "areas": "--area"}
    reason = "compares outputs with GOLDEN_FOLDER; without one both backends run whole"
    if golden is not None:
        names = {"prompt": "--prompt", "seed": "--seed", "seconds": "--seconds"}
        reason = "is for the comparison of the backends; GOLDEN_FOLDER has its own cases"
    elif model.config.diffusion is None and given(ctx, "prompt"):
        names, reason = {"prompt": "--prompt"}, f"is not for {model.name}, an autoencoder alone"
    for name, option in names.items():
        if given(ctx, name):
            raise click.UsageError(f"{option} {reason}", ctx)


def _areas(golden: Golden, twin: Twin, folder: Path, config: ModelConfig, areas: tuple[str, ...]) -> Iterator[Row]:
    from . import networks as networks
    from .runs import runs

    checks = {
        "text": networks.text,
        "cond": networks.cond,
        "dit": networks.dit,
        "guidance": networks.guidance,
        "same": networks.same,
        "samplers": networks.samplers,
        "e2e": runs,
    }
    for area in AREAS:
        if area not in areas or not any(golden.names(area)):
            continue
        if area == "schedule":
            yield from networks.schedule(golden)
        elif config.diffusion is None and area != "same":
            yield Row(area=area, case="all", skipped=f"{config.name} is an autoencoder alone")
        else:
            yield from checks[area](golden, twin, folder, config)


def _twins(model: Model, prompt: str, seed: int, seconds: float | None) -> Iterator[Row]:
    """The same request on both backends in fp32: schedule, every step's estimate, latents, audio."""
    config = model.config
    length = min(4.0, default_seconds(config)) if seconds is None else seconds
    sampling = replace(config.usual_sampling, steps=_STEPS)
    request = Request(items=(Item(prompt=prompt, seconds=length, seed=seed),), sampling=sampling)
    _check_twins(model)
    click.echo(
        f"{model.label}: mlx against torch, {prompt!r}, seed {seed}, {length:g} s, {_STEPS} steps of "
        f"{sampling.sampler}, guidance {sampling.guidance.scale:g}, fp32"
    )
    yield from _compared(*(_record(model.folder, name, request) for name in backend.BACKENDS))


def _autoencoder_twins(model: Model, _prompt: str, seed: int, seconds: float | None) -> Iterator[Row]:
    """The same noise on both backends in fp32: its latents, and what they decode to."""
    config, length = model.config, 4.0 if seconds is None else seconds
    _check_twins(model)
    click.echo(f"{model.label}: mlx against torch, noise of seed {seed}, {length:g} s, fp32")
    shape = (seconds_to_samples(length, config.sample_rate), config.audio_channels)
    audio = 0.1 * np.random.default_rng(seed).standard_normal(shape, np.float32)
    found: list[dict[str, np.ndarray]] = []
    for name in backend.BACKENDS:
        pipeline = backend.load(model.folder, name, "float32", "float32")
        latents = pipeline.encode(audio)
        found.append({"latents": latents, "audio": pipeline.decode(found[0]["latents"] if found else latents)})
    yield from _compared(*found)


def _check_twins(model: Model) -> None:
    for name in backend.BACKENDS:
        backend.choose(name)
    fingerprint.fingerprint(model.folder, model.config)


def _compared(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> Iterator[Row]:
    for case, values in first.items():
        yield Row(area="twins", case=case, error=-snr_db(values, second[case]), limit=-TWIN_SNR_DB, unit="dB")


def _record(folder: Path, name: backend.Backend, request: Request) -> dict[str, np.ndarray]:
    twin, found = Twin(name), dict[str, np.ndarray]()
    pipeline = backend.load(folder, name, "float32", "float32")
    valid = 0
    for event in pipeline.stream(request):
        if isinstance(event, Conditioned):
            found["schedule"], valid = event.sigmas, event.valid[0]
        elif isinstance(event, Stepped):
            found[f"step {event.index + 1}"] = twin.numpy(event.denoised)[0, :valid]
        elif isinstance(event, Finished):
            found["latents"] = event.generation.latents[0]
            found["audio"] = event.generation.audio[0]
    return found


def _print(rows: list[Row], *, failures: bool) -> int:
    shown = [row for row in rows if not failures or not row.passed]
    lines = [("area", "case", "error", "accepted", "result")]
    for row in shown:
        if row.skipped:
            lines.append((row.area, row.case, "", "", f"skipped: {row.skipped}"))
        elif row.unit == "dB":
            lines.append((row.area, row.case, f"SNR {-row.error:.1f} dB", f">= {-row.limit:.0f} dB", _verdict(row)))
        else:
            lines.append((row.area, row.case, f"{row.error:.1e} {row.unit}", f"{row.limit:.0e}", _verdict(row)))
    if shown:
        click.echo(table(lines))
    failed = sum(not row.passed for row in rows)
    skipped = sum(bool(row.skipped) for row in rows)
    click.echo(f"{len(rows) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or len(rows) == skipped else 0


def _verdict(row: Row) -> str:
    return "ok" if row.passed else "FAILED"
