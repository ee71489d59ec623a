"""Compare single networks with those of the official MLX port: sampling, decoding, encoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sa3_mlx.common.generation.schedule import sigmas as make_sigmas
from sa3_mlx.common.model.chunks import chunk_plan, default_chunk_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.features import fourier_features
from sa3_mlx.common.model.sampling import Guidance
from sa3_mlx.common.text.tokenizer import collapse_padding
from sa3_mlx.dit import Conditioning, DiT
from sa3_mlx.guidance import GuidedVelocity, guide
from sa3_mlx.runtime import mx
from sa3_mlx.same import SAME
from sa3_mlx.samplers import SAMPLERS
from sa3_mlx.weights import build_part

from .sides import STEPS, Checkout, Sides, config_of
from .weights import Weights, random_weights

REAL_TOKENS = 24  # of a prompt
GUIDED = Guidance(scale=7.0, apg=1.0)


def ours_of(config: ModelConfig, part: str, weights: Weights) -> Any:
    """Build our own network with these weights."""
    module = build_part(config, part)  # type: ignore[arg-type]
    module.load_weights([(n.removeprefix(part + "."), a) for n, a in weights.items() if n.startswith(part + ".")])
    return module


@dataclass(frozen=True, kw_only=True)
class RandomPrompt:
    """Hold the same conditioning as either side takes it: random text states, padding and duration."""

    full: mx.array  # (1, 257, Dc): the slots of the prompt and the duration token
    collapsed: Conditioning

    @classmethod
    def draw(cls, width: int, slots: int, channels: int) -> RandomPrompt:
        """Draw one of ``REAL_TOKENS`` tokens in so many slots."""
        keys = mx.random.split(mx.random.key(11), 3)
        text, padding, duration = (
            mx.random.normal((1, n, width), key=key) for n, key in zip((REAL_TOKENS, 1, 1), keys, strict=True)
        )
        kept, repeats = collapse_padding(np.arange(slots)[None] < REAL_TOKENS)
        assert kept == REAL_TOKENS + 1
        return cls(
            full=mx.concatenate([text, mx.repeat(padding, slots - REAL_TOKENS, axis=1), duration], axis=1),
            collapsed=Conditioning(
                context=mx.concatenate([text, padding, duration], axis=1),
                repeats=mx.array(repeats),
                seconds=duration[:, 0],
                local=mx.zeros((1, 1, 1 + channels)),
                valid=None,
            ),
        )


class _HostFeatures:
    """Give the port's network time features as ours: its own lose the last digits of angles of 60,000 radians."""

    def __call__(self, t: mx.array) -> mx.array:
        return mx.array(fourier_features(np.array(t)))


def sampling(checkout: Checkout, model: str, frames: int, depth: int | None, *, guided: bool) -> Sides:
    """Run eight steps with all that is prepared once per prompt, or one guided step, not the first, without a negative
    prompt."""
    config = config_of(model, depth)
    diffusion = config.require_diffusion()
    channels, text = config.same.latent_channels, diffusion.text_encoder
    weights = random_weights(config, ["dit"], seed=1)
    dit: DiT = ours_of(config, "dit", weights)
    network = checkout.dit(model, weights, frames, diffusion.dit.depth)
    own_features, steps = network.timestep_features, checkout.module("sa3_pipeline")
    prompt = RandomPrompt.draw(text.width, text.max_length, channels)
    peer_sigmas = steps.build_pingpong_schedule(STEPS)  # one ulp of t is 0.004 radians in its time features,
    sigmas = np.array(peer_sigmas)[None]  # so both sides take the same
    assert np.allclose(sigmas, make_sigmas(diffusion.shift, STEPS, 1.0, [frames]), atol=1e-6)

    def start(number: int) -> mx.array:
        return mx.random.normal((1, channels, frames), key=mx.random.key(100 + number))

    times = np.ascontiguousarray(sigmas[:, :-1].T)

    def prepare() -> GuidedVelocity:
        null = dit.prepare(replace(prompt.collapsed, local=None).unconditional()) if guided else None
        settings = GUIDED if guided else Guidance()
        return GuidedVelocity(dit=dit, cond=dit.prepare(prompt.collapsed), null=null, guidance=settings, times=times)

    once = prepare()

    def ours(number: int) -> mx.array:
        x = start(number).transpose(0, 2, 1)
        if guided:  # the same arrays in every round: a later step of a prompt
            return once(x, times[3]).transpose(0, 2, 1)
        velocity = prepare()
        key = [mx.random.key(number)]

        def noise(_step: int) -> mx.array:  # the port's own draws
            key[0], sub = mx.random.split(key[0])
            return mx.random.normal((1, channels, frames), key=sub).transpose(0, 2, 1)

        for done in SAMPLERS["pingpong"](velocity, x, sigmas, noise):
            x = done.x
            mx.async_eval(x)
        return x.transpose(0, 2, 1)

    def peer(number: int) -> mx.array:
        x, seconds = start(number), prompt.collapsed.seconds
        if not guided:
            return steps.sample_flow_pingpong(
                lambda x, t: network(x, t, prompt.full, seconds), x, peer_sigmas, seed=number
            )
        t = mx.array(sigmas[:, 3])
        context = mx.concatenate([prompt.full, mx.zeros_like(prompt.full)])
        both = network(
            mx.concatenate([x, x]), mx.concatenate([t, t]), context, mx.concatenate([seconds, seconds])
        ).transpose(0, 2, 1)
        return guide(x.transpose(0, 2, 1), sigmas[:, 3], both[:1], both[1:], GUIDED, None).transpose(0, 2, 1)

    def check() -> tuple[mx.array, mx.array]:
        network.timestep_features = _HostFeatures()
        wanted, found = peer(0), ours(0)
        mx.eval(wanted, found)
        network.timestep_features = own_features
        return wanted, found

    whole = "" if depth is None else f"{depth} of {config_of(model, None).require_diffusion().dit.depth} blocks; "
    return Sides(ours=ours, peer=peer, check=check, note=f"{whole}difference with equal time features")


def decoding(checkout: Checkout, model: str, frames: int) -> Sides:
    """Decode latents to audio, each side in its own chunks."""
    config = config_of(model, None)
    weights = random_weights(config, ["same"], seed=2)
    same: SAME = ours_of(config, "same", weights)
    network = checkout.same(model, "decoder", weights, config)
    chunked = checkout.module(f"same_{'s' if model == 'small' else 'l'}_decoder").decode_chunked
    size, overlap = (8, 2) if model == "small" else (128, 8)
    unpatch = checkout.module("sa3_pipeline").patched_decode

    def latents(number: int) -> mx.array:
        return mx.random.normal((1, frames, config.same.latent_channels), key=mx.random.key(number + 7))

    def ours(number: int) -> mx.array:
        z, ratio, parts = latents(number), config.same.samples_per_latent, []
        for chunk in chunk_plan(frames, default_chunk_frames(config.same, "decode"), config.same, "decode"):
            first, last = chunk.keep_start - chunk.start, chunk.keep_stop - chunk.start
            parts.append(same.decode(z[:, chunk.start : chunk.stop])[:, first * ratio : last * ratio])
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=1)

    def peer(number: int) -> mx.array:
        return unpatch(chunked(network, latents(number).transpose(0, 2, 1), size, overlap))

    return Sides(ours=ours, peer=peer, check=lambda: (peer(0).transpose(0, 2, 1), ours(0)))


def encoding(checkout: Checkout, model: str, frames: int) -> Sides:
    """Encode audio to latents; the port takes patches, whose making is not timed."""
    config = config_of(model, None)
    weights = random_weights(config, ["same"], seed=3)
    same: SAME = ours_of(config, "same", weights)
    network = checkout.same(model, "encoder", weights, config)
    ratio, patch = config.same.samples_per_latent, config.same.patch_size
    plan = chunk_plan(frames, default_chunk_frames(config.same, "encode"), config.same, "encode")
    audios = {
        number: 0.3 * mx.random.normal((1, frames * ratio, 2), key=mx.random.key(number + 9)) for number in range(3)
    }
    patches = {
        n: mx.contiguous(a.reshape(1, -1, patch, 2).transpose(0, 3, 2, 1).flatten(1, 2)) for n, a in audios.items()
    }
    mx.eval(audios, patches)

    def ours(number: int) -> mx.array:
        audio, parts = audios[number % 3], []
        for chunk in plan:
            z = same.encode(audio[:, chunk.start * ratio : chunk.stop * ratio])
            parts.append(z[:, chunk.keep_start - chunk.start : chunk.keep_stop - chunk.start])
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=1).transpose(0, 2, 1)

    return Sides(ours=ours, peer=lambda n: network(patches[n % 3]), check=lambda: (network(patches[0]), ours(0)))
