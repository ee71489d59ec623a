"""Compare single calls of every network, and the samplers, with reference outputs ([Bn]: docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.chunks import Chunk, official_plan
from sa3_mlx.common.model.config import ModelConfig, SAMEConfig, ShiftConfig
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.model.sampling import Guidance

from .golden import CaseResult, Golden, absolute_error, relative_error
from .official_run import guidance_of
from .twin import Twin

NETWORK = 1e-4
ABSOLUTE = 1e-6
_LONG = 40  # frames beyond which rounding of the rotary angles shows in a sliding window
_RATE1 = ShiftConfig(type="logsnr", start=-6.2, end=2.0, rate=1.0)
_FULL = ShiftConfig(type="full", start=0.5, end=1.15, rate=0.0)
_FLUX = ShiftConfig(type="flux", start=1.0, end=6.93, rate=0.0)
_SHIFTS = {
    "logsnr rate0": LOGSNR,
    "logsnr rate0 per-element": LOGSNR,
    "logsnr rate1": _RATE1,
    "logsnr1": _RATE1,
    "full": _FULL,
    "full sine": ShiftConfig(type="full", start=0.5, end=1.15, rate=1.0),
    "flux": _FLUX,
    "flux 1..6.93": _FLUX,
    None: ShiftConfig(type="none", start=0.0, end=0.0, rate=0.0),
}
_BATCH_LENGTHS = (100, 323, 3000)


def same_limit(config: SAMEConfig, frames: int) -> float:
    """Return the accepted relative L2: 1e-4 for chunked attention; a sliding window amplifies rounding."""
    if config.attention == "chunked":
        return NETWORK
    return 5e-4 if frames <= _LONG else 2e-3


def schedule(golden: Golden) -> Iterator[CaseResult]:
    """Compare the noise levels of the schedules [B22-B25]."""
    for case in golden.names("schedule"):
        entry = golden.cases[f"schedule:{case}"]
        if case.endswith("COLLISION"):
            yield CaseResult(area="schedule", case=case, skipped="official quirk: warped element by element [B25]")
        elif entry["shift"] not in _SHIFTS:
            yield CaseResult(area="schedule", case=case, skipped=f"shift {entry['shift']} has no configuration")
        else:
            lengths = _BATCH_LENGTHS if "batch" in case else (entry.get("L", 500),)
            wanted = golden.get("schedule", case, "sigmas")
            found = sigmas(_SHIFTS[entry["shift"]], entry["steps"], entry["sigma_max"], lengths)
            yield absolute_error("schedule", case, found.reshape(wanted.shape), wanted, ABSOLUTE)


def text(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare the text encoder [B2]."""
    encoder = twin.load(folder, "text_encoder")
    for case in golden.names("text"):
        ids, mask = golden.get("text", case, "input_ids"), golden.get("text", case, "attention_mask").astype(bool)
        found = twin.numpy(encoder(twin.array(ids.astype(np.int32)), twin.array(mask)))
        yield relative_error("text", case, found, golden.get("text", case, "last_hidden_state"), NETWORK)


def cond(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare learned padding, the duration and the order of the context [B4-B6]."""
    conditioner, get = twin.load(folder, "conditioner"), partial(golden.get, "cond")
    mask = twin.array(get("prompt", "mask").astype(bool))
    found = twin.numpy(conditioner.embed_prompt(twin.array(get("prompt", "hidden")), mask))
    yield absolute_error("cond", "prompt", found, get("prompt", "out"), ABSOLUTE)
    found = twin.numpy(conditioner.embed_seconds(get("seconds_total", "seconds")))
    yield absolute_error("cond", "seconds_total", found, get("seconds_total", "out")[:, 0], ABSOLUTE)
    found = np.concatenate([get("inputs", "prompt"), get("inputs", "seconds")], axis=1)
    yield absolute_error("cond", "inputs", found, get("inputs", "cross_attn_cond"), ABSOLUTE)


def dit(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare velocities of the diffusion transformer [B8-B16], of padded clips the valid frames."""
    network, module = twin.load(folder, "dit"), twin.module("dit")
    for case in golden.names("dit"):
        t = golden.get("dit", case, "t")
        if case.startswith("timestep_"):
            found = twin.numpy(module.timestep_features(twin.times(t)))
            yield absolute_error("dit", case, found, golden.get("dit", case, "features"), ABSOLUTE)
            continue
        local = golden.last("dit", case, "local") if golden.has("dit", case, "local") else None
        valid = golden.get("dit", case, "padding_mask").astype(bool) if case == "pad" else None
        given = module.Conditioning(
            context=twin.array(golden.get("dit", case, "cross")),
            seconds=twin.array(golden.get("dit", case, "glob")),
            local=None if local is None else twin.array(local),
            valid=None if valid is None else twin.array(valid),
        )
        found = twin.numpy(network(twin.array(golden.last("dit", case, "x")), twin.times(t), network.prepare(given)))
        wanted = golden.last("dit", case, "out" if valid is None else "out_true_mask")
        keep = np.ones(found.shape[:2], bool) if valid is None else valid
        yield relative_error("dit", case, found[keep], wanted[keep], NETWORK)


def guidance(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare guided velocities [B18-B21]."""
    network, module = twin.load(folder, "dit"), twin.module("guidance")
    get, last = partial(golden.get, "guidance"), partial(golden.last, "guidance")
    padding = get("inputs", "padding_mask").astype(bool)
    for case in golden.names("guidance"):
        entry = golden.cases[f"guidance:{case}"]
        if case == "inputs":
            continue
        if case.startswith("apg"):
            valid = twin.array(padding) if case == "apg_mask" else None
            parts = module.project(twin.array(last(case, "v0")), twin.array(last(case, "v1")), valid)
            for part, name in zip(parts, ("parallel", "orthogonal"), strict=True):
                yield relative_error("guidance", f"{case} {name}", twin.numpy(part), last(case, name), NETWORK)
            continue
        padded = "padding_mask" in entry
        given = twin.module("dit").Conditioning(
            context=twin.array(get("inputs", "cross")),
            seconds=twin.array(get("inputs", "glob")),
            local=twin.array(last("inputs", "local")),
            valid=twin.array(padding) if padded else None,
        )
        null = _negative(golden, twin, given, case) if case.startswith("neg") else given.unconditional()
        velocity = module.GuidedVelocity(
            dit=network, cond=network.prepare(given), null=network.prepare(null), guidance=guidance_of(entry)
        )
        found = twin.numpy(velocity(twin.array(last("inputs", "x")), get("inputs", "t")))
        keep = padding if padded else np.ones(found.shape[:2], bool)
        wanted = last(case, "out_true_mask" if padded else "out")
        yield relative_error("guidance", case, found[keep], wanted[keep], NETWORK)


def _negative(golden: Golden, twin: Twin, given: Any, case: str) -> Any:
    """Return the negative prompt with its own duration token [B19]."""
    tokens = golden.get("guidance", "inputs", "neg")
    mask = np.ones(tokens.shape[:2], bool)
    if case == "neg_mask":
        mask = golden.get("guidance", "inputs", "neg_mask").astype(bool)
    own = type(given)(context=twin.array(tokens), seconds=given.seconds, local=given.local, valid=given.valid)
    return twin.module("guidance").negative(own, twin.array(tokens[:, :-1]), twin.array(mask[:, :-1]))


def same(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare encodings and decodings, whole and in chunks [B38-B48], of odd lengths the frames that were asked for."""
    config, last = ModelConfig.load(folder).same, partial(golden.last, "same")
    network, ratio = twin.load(folder, "same"), config.samples_per_latent

    def encode(audio: np.ndarray) -> np.ndarray:
        return twin.numpy(network.encode(twin.array(audio)))

    def decode(latents: np.ndarray) -> np.ndarray:
        return twin.numpy(network.decode(twin.array(latents)))

    for case in golden.names("same"):
        entry = golden.cases[f"same:{case}"]
        if case.startswith("enc_"):
            found = encode(last(case, "audio"))
            wanted = last(case, "latents")[:, : found.shape[1]]
        elif case.startswith("dec_") and "stochastic" not in case:
            found = decode(last(case, "latents"))
            wanted = last(case, "audio")[:, : found.shape[1]]
        elif case == "dec_stochastic":
            latents, tokens = last(case, "latents"), golden.get("same", case, "noise1")
            tokens = tokens.reshape(len(latents), -1, *tokens.shape[1:])  # the padding of an odd length too [B47]
            noise = (twin.array(last(case, "noise0")), twin.array(tokens))
            found = twin.numpy(network.decode(twin.array(latents), *noise))
            wanted = last(case, "audio")[:, : found.shape[1]]
        elif case.startswith("chunk_dec_"):
            latents = last(case, "latents")
            plan = official_plan(latents.shape[1], entry["chunk_size"], entry["overlap"])
            found = _in_chunks(plan, 1, ratio, decode, latents)
            wanted = last(case, "audio")[:, : found.shape[1]]
        elif case.startswith("chunk_enc_") and entry["samples"] % ratio == 0:
            plan = official_plan(entry["samples"] // ratio, entry["chunk_size"], entry["overlap"])
            found, wanted = _in_chunks(plan, ratio, 1, encode, last(case, "audio")), last(case, "latents")
        else:
            reason = "official slots do not line up [B48]" if case == "chunk_enc_ragged" else "not a single call"
            yield CaseResult(area="same", case=case, skipped=reason)
            continue
        frames = max(found.shape[1], wanted.shape[1]) // (1 if "enc" in case else ratio)
        yield relative_error("same", case, found, wanted, same_limit(config, frames))


def _in_chunks(plan: list[Chunk], rows: int, kept: int, run: Any, values: np.ndarray) -> np.ndarray:
    """Run every chunk by itself and join the kept parts; ``rows`` of input and ``kept`` of output per frame."""
    parts = []
    for chunk in plan:
        out = run(values[:, chunk.start * rows : chunk.stop * rows])
        parts.append(out[:, (chunk.keep_start - chunk.start) * kept : (chunk.keep_stop - chunk.start) * kept])
    return np.concatenate(parts, axis=1)


def samplers(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare free runs of the samplers [B26-B29] from the stored start with the stored noise."""
    network, module = twin.load(folder, "dit"), twin.module("guidance")
    last = partial(golden.last, "samplers")
    for case in golden.names("samplers"):
        if case.startswith("rk4_2d"):
            yield CaseResult(area="samplers", case=case, skipped="official quirk: returns the initial noise [B29]")
            continue
        x0, times = last(case, "x0"), golden.get("samplers", case, "sigmas")
        given = twin.module("dit").Conditioning(
            context=twin.array(golden.get("samplers", case, "cross")),
            seconds=twin.array(golden.get("samplers", case, "glob")),
            local=twin.array(np.zeros((len(x0), 1, x0.shape[2] + 1), np.float32)),
            valid=None,
        )
        velocity = module.GuidedVelocity(
            dit=network,
            cond=network.prepare(given),
            null=network.prepare(given.unconditional()),
            guidance=Guidance(scale=golden.cases[f"samplers:{case}"]["cfg"]),
        )
        rows = np.array(np.broadcast_to(times, (len(x0), times.shape[-1])))

        def noise(index: int, name: str = case) -> Any:
            return twin.array(last(name, f"noise{index}"))

        run = twin.module("samplers").SAMPLERS[case.split("_")[0]]
        *_, final = run(velocity, twin.array(x0), rows, noise)
        yield relative_error("samplers", case, twin.numpy(final.x), last(case, "out"), NETWORK)
