"""Check a converted model against reference outputs, or the two backends against each other: ``sa3 verify``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from sa3_mlx.cli import backend, fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.models.listing import table
from sa3_mlx.cli.typed import TypedCommand, given
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.terminal import show

from .backends import compare_autoencoders, compare_backends
from .golden import AREAS, CaseResult, Golden
from .twin import Twin

_PROMPT = "a drum loop and a warm piano"


@click.command(cls=TypedCommand)
@click.argument("model")
@click.argument("golden", required=False, type=click.Path(path_type=Path), metavar="[GOLDEN_FOLDER]")
@click.option("--backend", "wanted", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--area", "areas", multiple=True, type=click.Choice(AREAS), help="Only these; can be repeated.")
@click.option("--prompt", default=_PROMPT, show_default=True, help="For the comparison of the backends.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--seconds", type=float, help="Default: at most 4.")
@click.option("--failures", is_flag=True, help="List only failed cases.")
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
        if found.config.diffusion is None:
            return _print(list(compare_autoencoders(found, seed, seconds)), failures=failures)
        return _print(list(compare_backends(found, prompt, seed, seconds)), failures=failures)
    with Golden.open(golden) as reference:
        reference.check_weights(found.folder, found.config)
        fingerprint.fingerprint(found.folder, found.config)
        twin = Twin(backend.choose(wanted))
        show(f"{found.label} on {twin.name} against {golden}")
        return _print(list(_areas(reference, twin, found.folder, found.config, areas or AREAS)), failures=failures)


def _refuse_unused(ctx: click.Context, golden: Path | None, model: Model) -> None:
    """Raise click.UsageError for an option of the other way to verify."""
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


def _areas(
    golden: Golden, twin: Twin, folder: Path, config: ModelConfig, areas: tuple[str, ...]
) -> Iterator[CaseResult]:
    """Compare the cases of these areas, in the order of ``AREAS``."""
    from . import networks
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
            yield CaseResult(area=area, case="all", skipped=f"{config.name} is an autoencoder alone")
        else:
            yield from checks[area](golden, twin, folder)


def _print(results: list[CaseResult], *, failures: bool) -> int:
    """Print a table, or the failures in it; return the exit code."""
    lines = [("area", "case", "error", "accepted", "result")]
    for found in results:
        verdict = "ok" if found.passed else "FAILED"
        if failures and found.passed:
            continue
        if found.skipped:
            lines.append((found.area, found.case, "", "", f"skipped: {found.skipped}"))
        elif found.unit == "dB":
            lines.append((found.area, found.case, f"SNR {-found.error:.1f} dB", f">= {-found.limit:.0f} dB", verdict))
        else:
            lines.append((found.area, found.case, f"{found.error:.1e} {found.unit}", f"{found.limit:.0e}", verdict))
    if len(lines) > 1:
        show(table(lines))
    failed = sum(not found.passed for found in results)
    skipped = sum(bool(found.skipped) for found in results)
    show(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or len(results) == skipped else 0
