"""Whole runs against whole official ones: schedule, masks, every step's estimate, latents and audio.

The reference ran on a CPU, where padded frames only lose their values in self-attention [B16]; its runs have one to
three padded frames. ``_cpu_rule`` puts that rule in place of true masking, so that everything else can be compared;
``t2a_batch2_true_mask`` is compared with the pipeline as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.files.audio import fit_channels, resample
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.clips import encode_sources, local_input
from sa3_mlx.common.generation.events import Conditioned, Event, Finished, Generation, Stepped
from sa3_mlx.common.generation.noise import DECODER_LATENT, DECODER_TOKENS, INITIAL, NoiseStream, step
from sa3_mlx.common.generation.plan import Plan, plan
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.requests import sampled
from tests.support.twins import TINY, Cases, Twin, load_cases, relative

STEP = {"tiny-s": 3e-5, "tiny-l": 3e-4}  # measured 5.6e-6 and 5.4e-5 with given audio, 2.9e-6 without, both twins
FORCED = {"tiny-s": 1e-4, "tiny-l": 2e-3}  # measured 1.7e-5 and 3.5e-4
FREE = {
    "tiny-s": 2e-3,
    "tiny-l": 0.15,
}  # measured 4.3e-4 and 3.1e-2: SAME-L amplifies a change of its latents 600 times
CPU_RULE = (
    "t2a",
    "t2a_notrunc_unchunked",
    "t2a_long_chunked",
    "t2a_base_cfg_neg",
    "t2a_base_cfg_null",
    "t2a_base_cfg_apg0",
    "t2a_base_dpmpp",
    "a2a",
    "a2a_mono_short",
    "a2a_b2",
    "inpaint",
    "inpaint_multi",
    "continue",
    "inpaint_nomask",
    "inpaint_prebuilt_mask",
    "inpaint_plus_init",
    "inpaint_cfg_neg",
    "t2a_stochastic_decode",
)
PREBUILT_REGION = ((1.0, 2.0),)  # what ``arg_inpaint_mask`` of that case says, checked there


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cases(golden: Path, model: str) -> Cases:
    return load_cases(golden, model, "e2e")


@pytest.fixture
def manifest(golden: Path, model: str) -> dict[str, Any]:
    return json.loads((golden / model / "manifest.json").read_text())["cases"]


@dataclass(frozen=True)
class Replay:
    """The official draws: noise0 is the start, then one per pingpong step, then the decoder's two."""

    cases: Cases
    case: str
    steps: int

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> np.ndarray:
        draws = {INITIAL: 0, DECODER_LATENT: self.steps + 1, DECODER_TOKENS: self.steps + 2}
        draws |= {step(index): index + 1 for index in range(self.steps)}
        noise = self.cases[f"{self.case}.noise{draws[purpose]}"]
        if purpose == DECODER_TOKENS:
            return noise.reshape(-1, channels)[start : start + frames]
        return np.ascontiguousarray(noise[item].T)[start : start + frames]


def _given(cases: Cases, case: str, kwargs: dict[str, Any], name: str) -> Audio:
    audio = fit_channels(np.ascontiguousarray(cases[f"{case}.arg_{name}"].T), 2)
    return resample(audio, kwargs[name][0], 8000)


def _regions(kwargs: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    if "inpaint_mask" in kwargs:
        return PREBUILT_REGION
    starts, ends = (kwargs.get(f"inpaint_mask_{side}_seconds") for side in ("start", "end"))
    if starts is None:
        return ((0.0, kwargs["duration"]),)
    return tuple(zip(starts, ends, strict=True)) if isinstance(starts, list) else ((starts, ends),)


def _request(cases: Cases, case: str, entry: dict[str, Any]) -> Request:
    """The arguments of an official run as a request of ours; the noise is replayed, so seeds mean nothing."""
    kwargs = entry["kwargs"]
    items = kwargs.get("batch_size", 1)
    prompts, seconds = (
        value if isinstance(value, list) else [value] * items for value in (kwargs["prompt"], kwargs["duration"])
    )
    init = inpaint = None
    if "init_audio" in kwargs:
        init = InitAudio(audio=_given(cases, case, kwargs, "init_audio"), noise_level=kwargs["init_noise_level"])
    if "inpaint_audio" in kwargs:
        inpaint = Inpaint(audio=_given(cases, case, kwargs, "inpaint_audio"), regions=_regions(kwargs))
    return Request(
        items=tuple(
            Item(prompt=prompt, seconds=length, seed=0, negative_prompt=kwargs.get("negative_prompt"))
            for prompt, length in zip(prompts, seconds, strict=True)
        ),
        sampling=Sampling(
            sampler=kwargs.get("sampler_type", "pingpong" if entry["objective"] == "rf_denoiser" else "euler"),
            steps=kwargs["steps"],
            guidance=Guidance(scale=kwargs.get("cfg_scale", 1.0), apg=kwargs.get("apg_scale", 1.0)),
        ),
        init=init,
        inpaint=inpaint,
        crossfade_ms=None,
        decode_noise=case.endswith("stochastic_decode"),
    )


def _cpu_rule(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """[B16] as without flash-attn: values of padded frames are zeroed, their keys stay."""
    dit, attend = twin.module("dit"), twin.module("attention").attend

    def zero_values(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return attend(q, k, v if mask is None else v * mask.swapaxes(-1, -2))

    def zero_values_of(real: Any, _like: Any) -> Callable[..., Any]:
        return partial(zero_values, mask=None if real is None else real[:, None, None])

    monkeypatch.setattr(dit, *(("attend_to", zero_values_of) if twin.name == "torch" else ("attend", zero_values)))


def _stored_times(cases: Cases, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule with the last bits of the reference, whose network turns 6e-8 in t into 5e-4 [B8]."""

    def stored(request: Request, config: ModelConfig) -> Plan:
        planned, sigmas = plan(request, config), cases[f"{case}.sigmas"]
        np.testing.assert_allclose(planned.sigmas, sigmas, rtol=0, atol=1e-6)
        return replace(planned, sigmas=sigmas)

    monkeypatch.setattr("sa3_mlx.common.generation.pipeline.plan", stored)


def _compare(twin: Twin, pipeline: Any, cases: Cases, case: str, request: Request) -> Generation:
    """Everything the reference stores, over valid frames and audible samples.

    The decoder amplifies the rounding of free latents, so audio is compared twice: free, and from the stored latents.
    """
    model = pipeline.config.name
    events: list[Event] = list(pipeline.stream(request, noise=Replay(cases, case, request.sampling.steps)))
    conditioned, finished = events[0], events[-1]
    assert isinstance(conditioned, Conditioned) and isinstance(finished, Finished)
    mask = cases[f"{case}.padding_mask"].astype(bool)
    assert (conditioned.frames, conditioned.valid) == (mask.shape[1], tuple(mask.sum(1)))
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [event.index for event in steps] == list(range(steps[0].steps))
    errors: dict[str, float] = {}
    for event in steps:
        wanted = cases.channels_last(f"{case}.step{event.index}_denoised")
        errors[f"step {event.index}"] = relative(twin.numpy(event.denoised)[mask], wanted[mask])
    generation = finished.generation
    for item, audio in enumerate(generation.audio):
        official = cases.channels_last(f"{case}.out")[item, : len(audio)]
        assert len(audio) == int(request.items[item].seconds * 8000)
        errors[f"free {item}"] = relative(np.clip(audio, -1, 1), official)
        if not request.decode_noise:
            latents = np.where(mask[item][:, None], wanted[item], twin.numpy(steps[-1].denoised)[item])
            forced = pipeline.decode(latents)[: len(audio)]
            errors[f"forced {item}"] = relative(np.clip(forced, -1, 1), official)
    limits = {"step": STEP[model], "free": FREE[model], "forced": FORCED[model]}
    assert all(error < limits[name.split()[0]] for name, error in errors.items()), errors
    return generation


@pytest.mark.parametrize("case", CPU_RULE)
def test_runs_equal_the_official_ones(
    twin: Twin,
    checkpoints: dict[str, Path],
    model: str,
    cases: Cases,
    manifest: dict[str, Any],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[B18] to [B36], decoder noise [B47]; without regions an inpaint audio has no effect [B34]."""
    _cpu_rule(twin, monkeypatch)
    _stored_times(cases, case, monkeypatch)
    _compare(twin, twin.pipeline(checkpoints[model]), cases, case, _request(cases, case, manifest[f"e2e:{case}"]))


def test_padded_frames_are_masked_as_on_a_gpu(
    twin: Twin,
    checkpoints: dict[str, Path],
    model: str,
    cases: Cases,
    manifest: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[B16, A15.1, A15.2]: two durations in one batch; the pipeline as it is, each item cut to its own length."""
    case = "t2a_batch2_true_mask"
    _stored_times(cases, case, monkeypatch)
    generation = _compare(
        twin, twin.pipeline(checkpoints[model]), cases, case, _request(cases, case, manifest[f"e2e:{case}"])
    )
    assert cases[f"{case}.out"].shape[2] == 92160  # [B36]: the official code returns the whole length
    assert [len(audio) for audio in generation.audio] == [16000, 44000]


def test_latents_are_those_of_the_official_run(
    twin: Twin,
    checkpoints: dict[str, Path],
    model: str,
    cases: Cases,
    manifest: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Final latents over the valid frames; the official ``return_latents``."""
    case = "t2a_latents"
    _cpu_rule(twin, monkeypatch)
    _stored_times(cases, case, monkeypatch)
    pipeline, request = twin.pipeline(checkpoints[model]), _request(cases, case, manifest[f"e2e:{case}"])
    *_, last = pipeline.stream(request, noise=Replay(cases, case, request.sampling.steps))
    assert relative(last.generation.latents[0], cases.channels_last(f"{case}.out")[0, :125]) < STEP[model]


def _official_resample(audio: Audio, rate: int) -> Audio:
    """To 8000 Hz by the reference's Hann-windowed sinc, width 6, roll-off 0.99: polyphase, one filter per phase."""
    divisor = np.gcd(rate, 8000)
    old, new = rate // divisor, 8000 // divisor
    cutoff = min(old, new) * 0.99
    width = int(np.ceil(6 * old / cutoff))
    taps = np.arange(-width, width + old)[None] / old - np.arange(new)[:, None] / new  # (new, taps)
    t = np.clip(taps * cutoff, -6, 6)
    kernel = np.sinc(t) * np.cos(t * np.pi / 12) ** 2 * cutoff / old
    padded = np.pad(audio.astype(np.float64), ((width, width + old), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1], axis=0)[::old]  # (m, channels, taps)
    result = np.einsum("mct,nt->mnc", windows, kernel).reshape(-1, audio.shape[1])
    return result[: int(np.ceil(new * len(audio) / old))].astype(np.float32)


def test_init_audio_of_another_rate(
    twin: Twin,
    checkpoints: dict[str, Path],
    model: str,
    cases: Cases,
    manifest: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[B35]: with the reference's resampler the run is the official one; ours (soxr) keeps more of the high end."""
    case, entry = "a2a_resample", manifest["e2e:a2a_resample"]
    _cpu_rule(twin, monkeypatch)
    _stored_times(cases, case, monkeypatch)
    request = _request(cases, case, entry)
    audio = _official_resample(
        np.ascontiguousarray(cases[f"{case}.arg_init_audio"].T), entry["kwargs"]["init_audio"][0]
    )
    assert isinstance(request.init, InitAudio) and request.init.audio.shape == audio.shape
    assert relative(request.init.audio, audio) < 0.3  # measured 0.087, white noise
    _compare(
        twin, twin.pipeline(checkpoints[model]), cases, case, replace(request, init=replace(request.init, audio=audio))
    )


def test_init_latents_are_the_official_ones(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, manifest: dict[str, Any]
) -> None:
    """[B30, B35]: stereo, short mono, and a batch."""
    pipeline = twin.pipeline(checkpoints[model])
    for case in ("a2a", "a2a_mono_short", "a2a_b2"):
        request, wanted = _request(cases, case, manifest[f"e2e:{case}"]), cases.channels_last(f"{case}.in_init_data")
        init, inpaint = encode_sources(request, plan(request, pipeline.config), pipeline.config, pipeline.encode)
        assert init is not None and inpaint is None
        assert relative(init, wanted) < {"tiny-s": 1e-4, "tiny-l": 5e-4}[model]


def test_inpainting_input_is_the_official_one(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, manifest: dict[str, Any]
) -> None:
    """[B7, B34]: mask exactly, masked latents within the encoder's rounding; the prebuilt mask is a region of ours."""
    pipeline = twin.pipeline(checkpoints[model])
    silent = np.flatnonzero(cases["inpaint_prebuilt_mask.arg_inpaint_mask"][0] == 0)
    assert (silent[0] / 8000, (silent[-1] + 1) / 8000) == PREBUILT_REGION[0] and len(silent) == 8000
    for case in ("inpaint_multi", "continue", "inpaint_nomask", "inpaint_prebuilt_mask"):
        request, wanted = (
            _request(cases, case, manifest[f"e2e:{case}"]),
            cases.channels_last(f"{case}.in_local_add_cond"),
        )
        planned = plan(request, pipeline.config)
        _, latents = encode_sources(request, planned, pipeline.config, pipeline.encode)
        local = local_input(planned, latents, 16)
        np.testing.assert_array_equal(local[..., 0], wanted[..., 0])
        if case == "inpaint_nomask":
            assert not local.any() and not wanted.any()
        else:
            assert relative(local, wanted) < {"tiny-s": 1e-4, "tiny-l": 5e-4}[model]


def test_rk4_and_batched_inpainting_work(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, manifest: dict[str, Any]
) -> None:
    """[B29, B34, A15.6, A15.7]: the official code returns its noise, or raises; here a batch equals its items."""
    assert {"error"} <= set(manifest["e2e:inpaint_b2"]) and {"error"} <= set(manifest["e2e:t2a_base_rk4_b2"])
    np.testing.assert_array_equal(cases["t2a_base_rk4_b1.out"], cases["t2a_base_rk4_b1.noise0"])
    pipeline = twin.pipeline(checkpoints[model])
    request = _request(cases, "inpaint", manifest["e2e:inpaint"])
    request = sampled(replace(request, head_room_seconds=0.5), sampler="rk4", steps=2)
    both = replace(request, items=tuple(replace(request.items[0], seed=seed) for seed in (1, 2)))
    together = pipeline.generate(both).latents
    for item, latents in zip(both.items, together, strict=True):
        alone = pipeline.generate(replace(request, items=(item,))).latents[0]
        assert relative(latents, alone) < STEP[model]
    assert relative(together[0], together[1]) > 0.1


def test_both_twins_make_the_same_audio(
    checkpoints: dict[str, Path], model: str, cases: Cases, manifest: dict[str, Any]
) -> None:
    """Eight free steps with init, region and a negative prompt through the deliberately sensitive weights."""
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    request = _request(cases, "inpaint_plus_init", manifest["e2e:inpaint_plus_init"])
    items = tuple(Item(prompt=f"w{seed} w5", seconds=2.0, seed=seed, negative_prompt="w7") for seed in (1, 2))
    request = sampled(replace(request, items=items), steps=8, guidance=Guidance(scale=3.0), sampler="pingpong")
    ours, theirs = (Twin(name).pipeline(checkpoints[model]).generate(request) for name in ("mlx", "torch"))
    for a, b in zip(ours.latents, theirs.latents, strict=True):
        assert relative(a, b) < STEP[model]
    for a, b in zip(ours.audio, theirs.audio, strict=True):  # measured 73 and 44 dB
        assert -20 * np.log10(relative(a, b)) > {"tiny-s": 40, "tiny-l": 30}[model]
