"""Compare single networks with those of the official MLX port: sampling, decoding, encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
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
GUIDED_STEP = 3


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


class HostFeatures:
    """Give the port's network time features as ours: its own lose the last digits of angles of 60,000 radians."""

    def __call__(self, t: mx.array) -> mx.array:
        return mx.array(fourier_features(np.array(t)))


@dataclass(frozen=True, kw_only=True)
class Samplers:
    """Sample from the same noise on either side; a guided step is not the first one, without a negative prompt."""

    dit: DiT
    network: Any  # the port's
    port: ModuleType  # its samplers
    prompt: RandomPrompt
    levels: mx.array  # (STEPS + 1,), of both sides: one ulp is 0.004 radians in the time features
    shape: tuple[int, int, int]  # (1, C, T)

    @property
    def sigmas(self) -> np.ndarray:
        """Return the noise levels as ours takes them, (1, STEPS + 1)."""
        return np.array(self.levels)[None]

    def start(self, number: int) -> mx.array:
        """Draw the noise of a round, (1, C, T)."""
        return mx.random.normal(self.shape, key=mx.random.key(100 + number))

    def prepare(self, guidance: Guidance, *, guided: bool) -> GuidedVelocity:
        """Prepare ours for a prompt."""
        dit, given = self.dit, self.prompt.collapsed
        null = dit.prepare(replace(given, local=None).unconditional()) if guided else None
        times = np.ascontiguousarray(self.sigmas[:, :-1].T)
        return GuidedVelocity(dit=dit, cond=dit.prepare(given), null=null, guidance=guidance, times=times)

    def our_steps(self, number: int) -> mx.array:
        """Take all steps with ours, with the port's own draws."""
        velocity, x = self.prepare(Guidance(), guided=False), self.start(number).transpose(0, 2, 1)
        keys = [mx.random.key(number)]

        def noise(_step: int) -> mx.array:
            keys[0], sub = mx.random.split(keys[0])
            return mx.random.normal(self.shape, key=sub).transpose(0, 2, 1)

        for done in SAMPLERS["pingpong"](velocity, x, self.sigmas, noise):
            x = done.x
            mx.async_eval(x)
        return x.transpose(0, 2, 1)

    def peer_steps(self, number: int) -> mx.array:
        """Take all steps with the port."""
        given, seconds = self.prompt.full, self.prompt.collapsed.seconds
        return self.port.sample_flow_pingpong(
            lambda x, t: self.network(x, t, given, seconds), self.start(number), self.levels, seed=number
        )

    def our_step(self, once: GuidedVelocity, number: int) -> mx.array:
        """Take one guided step with ours; ``once`` is prepared, as in a later step of a prompt."""
        return once(self.start(number).transpose(0, 2, 1), self.sigmas[:, GUIDED_STEP]).transpose(0, 2, 1)

    def peer_step(self, number: int) -> mx.array:
        """Take one guided step with the port's network and our formula of guidance."""
        x, t, given = self.start(number), self.sigmas[:, GUIDED_STEP], self.prompt.full
        pairs = ((x, x), (mx.array(t),) * 2, (given, mx.zeros_like(given)), (self.prompt.collapsed.seconds,) * 2)
        both = self.network(*(mx.concatenate(list(pair)) for pair in pairs)).transpose(0, 2, 1)
        return guide(x.transpose(0, 2, 1), t, both[:1], both[1:], GUIDED, None).transpose(0, 2, 1)


def sampling(checkout: Checkout, model: str, frames: int, depth: int | None, *, guided: bool) -> Sides:
    """Run eight steps with all that is prepared once per prompt, or one guided step."""
    config = config_of(model, depth)
    diffusion, channels = config.require_diffusion(), config.same.latent_channels
    weights, port = random_weights(config, ["dit"], seed=1), checkout.module("sa3_pipeline")
    network = checkout.dit(model, weights, frames, diffusion.dit.depth)
    both = Samplers(
        dit=ours_of(config, "dit", weights),
        network=network,
        port=port,
        prompt=RandomPrompt.draw(diffusion.text_encoder.width, diffusion.text_encoder.max_length, channels),
        levels=port.build_pingpong_schedule(STEPS),
        shape=(1, channels, frames),
    )
    assert np.allclose(both.sigmas, make_sigmas(diffusion.shift, STEPS, 1.0, [frames]), atol=1e-6)
    ours: Callable[[int], mx.array] = both.our_steps
    peer: Callable[[int], mx.array] = both.peer_steps
    if guided:
        ours, peer = partial(both.our_step, both.prepare(GUIDED, guided=True)), both.peer_step
    own_features = network.timestep_features

    def check() -> tuple[mx.array, mx.array]:
        network.timestep_features = HostFeatures()
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
