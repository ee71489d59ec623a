"""Configure models, strictly: every size of every model is data in these frozen dataclasses.

Source: [A1] and [A3]. ``config.json`` of a checkpoint folder is ``ModelConfig.to_dict()``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, ConfigError, quoted, require

from .dial import Dial, Schedule
from .sampling import Guidance, Sampling

FORMAT = "sa3/1"
HEAD_SIZE = 64  # of every attention in the DiT and in SAME
ROTARY_SIZE = 32  # rotated dimensions of a head of 64 [B12]
TIMESTEP_FEATURES = 256  # [B5], [B8]

# The most that a field may say, far beyond every model and what hardware holds: what is read before the weights, and
# does not have to fit them, cannot make anything large.
WIDTH_MAX = 2**16
DEPTH_MAX = 2**8
VOCABULARY_MAX = 2**24
TOKENS_MAX = 2**14  # of a prompt, of the memory of the DiT, of a chunk of SAME
SAMPLES_MAX = 2**20  # per latent
FRAMES_MAX = 2**20
RATE_MAX = 2**20  # Hz
CHANNELS_MAX = 64
EXAMPLES_MAX = 32  # prompts of at most so many characters each
EXAMPLE_MAX = 200


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Config):
    """Size the encoder half of T5Gemma [B1, B2]. Head size is ``width // heads``."""

    vocab_size: int
    width: int
    intermediate: int
    depth: int
    heads: int
    max_length: int  # tokens, padding included

    def __post_init__(self) -> None:
        _bounded(self, VOCABULARY_MAX, "vocab_size", "intermediate")
        _bounded(self, WIDTH_MAX, "width", "heads")
        _bounded(self, DEPTH_MAX, "depth")
        _bounded(self, TOKENS_MAX, "max_length")
        require(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0,
            f"text_encoder: width {self.width} must be heads ({self.heads}) times an even head size",
        )


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Config):
    """Size the diffusion transformer [A6]. Heads are ``width // 64``."""

    width: int
    depth: int
    memory_tokens: int
    differential: bool
    ff_mult: int = 4  # inner width of the feed-forward over width

    def __post_init__(self) -> None:
        _bounded(self, WIDTH_MAX, "width")
        _bounded(self, DEPTH_MAX, "depth", "ff_mult")
        _bounded(self, TOKENS_MAX, "memory_tokens")
        require(self.width % HEAD_SIZE == 0, f"dit.width: must be a multiple of {HEAD_SIZE}, got {self.width}")

    @property
    def heads(self) -> int:
        """Count the heads of every attention."""
        return self.width // HEAD_SIZE


@dataclass(frozen=True, kw_only=True)
class SAMEConfig(Config):
    """Size the SAME autoencoder [A11].

    ``attention`` "chunked" is SAME-S: full attention inside chunks of ``span`` latents, later layers shifted by half
    a chunk [B41]. "sliding" is SAME-L: a band that reaches ``span`` latents to each side [B42].
    """

    patch_size: int  # audio samples per patch and channel
    stride: int  # patches per latent
    latent_channels: int
    width: int
    encoder_depth: int
    decoder_depth: int
    attention: Literal["chunked", "sliding"]
    span: int  # latents
    decoder_kernel: Literal[1, 3]
    sine_gate_layers: int  # last layers of the decoder whose feed-forward gate is a sine [B44]
    token_noise: float  # standard deviation of the optional decoder noise on new tokens [B47]
    ff_mult: int = 3  # inner width of the feed-forward over width

    def __post_init__(self) -> None:
        _bounded(self, WIDTH_MAX, "patch_size", "latent_channels", "width")
        _bounded(self, DEPTH_MAX, "encoder_depth", "decoder_depth", "ff_mult")
        _bounded(self, TOKENS_MAX, "stride", "span")
        require(
            self.span * (self.stride + 1) <= TOKENS_MAX,
            f"same.span: {self.span} latents of {self.stride + 1} tokens are more than {TOKENS_MAX} tokens of a chunk",
        )
        require(
            self.samples_per_latent <= SAMPLES_MAX,
            f"same.stride: {self.stride} patches of {self.patch_size} samples are more than {SAMPLES_MAX} per latent",
        )
        require(self.width % HEAD_SIZE == 0, f"same.width: must be a multiple of {HEAD_SIZE}, got {self.width}")
        require(
            0 <= self.sine_gate_layers <= self.decoder_depth,
            f"same.sine_gate_layers: allowed 0..{self.decoder_depth}, got {self.sine_gate_layers}",
        )
        require(self.token_noise >= 0, f"same.token_noise: must be >= 0, got {self.token_noise}")
        require(
            self.attention == "chunked" or self.span == 1,
            f"same.span: a sliding window of 1 latent to each side is the only one supported, got {self.span}",
        )
        require(
            self.attention == "sliding" or self.span * (self.stride + 1) % 2 == 0,
            f"same.span: {self.span} latents of {self.stride + 1} tokens cannot be halved for the shifted chunks",
        )

    @property
    def heads(self) -> int:
        """Count the heads of every attention."""
        return self.width // HEAD_SIZE

    @property
    def samples_per_latent(self) -> int:
        """Return R, audio samples per latent frame (4096 in the released models)."""
        return self.patch_size * self.stride

    @property
    def frame_multiple(self) -> int:
        """Return how many latents the transformer runs on a multiple of: the chunk for SAME-S, 1 for SAME-L."""
        return self.span if self.attention == "chunked" else 1


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(Config):
    """Set the sampling-time warp of the schedule [B24]; ``type`` picks the formula, the other fields its constants.

    logsnr: (start, end, rate) = anchor log-SNR, end log-SNR, rate per octave of length over 2000 frames.
    full:   (start, end, rate) = base shift, max shift, 1.0 with the optional sine warp else 0.0.
    flux:   (start, end, rate) = alpha_min, alpha_max, unused (0.0).
    none:   all 0.0.
    """

    type: Literal["logsnr", "full", "flux", "none"]
    start: float
    end: float
    rate: float

    def __post_init__(self) -> None:
        low = 0.0 if self.type == "flux" else -100.0
        for name, value in (("start", self.start), ("end", self.end)):
            if not low < value <= 100 and self.type != "none":
                raise ConfigError(f"shift.{name}: allowed for {self.type} is above {low:g} to 100, got {value:g}")
        require(abs(self.rate) <= 100, f"shift.rate: allowed is -100 to 100, got {self.rate:g}")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """Describe everything beside the autoencoder."""

    objective: Literal["rf_denoiser", "rectified_flow"]
    max_frames: int  # longest clip in latent frames, head-room included [B31]
    head_room_seconds: float  # generated beyond the asked length, then trimmed [B31, B32]
    shift: ShiftConfig
    text_encoder: TextEncoderConfig
    dit: DiTConfig
    seconds_max: float = 384.0  # the duration embedding saturates here [B5]

    def __post_init__(self) -> None:
        _bounded(self, FRAMES_MAX, "max_frames", "seconds_max")
        require(
            0 <= self.head_room_seconds <= 60,
            f"diffusion.head_room_seconds: allowed 0..60, got {self.head_room_seconds}",
        )


@dataclass(frozen=True, kw_only=True)
class TowerConfig(Config):
    """Size the two towers of a latent CLAP [T6]. Heads are ``width // 64``."""

    width: int  # of the audio tower and of the hidden layer of both projections
    depth: int
    frames_per_token: int  # of the audio tower
    embedding: int  # E, of the vectors that both towers give

    def __post_init__(self) -> None:
        for name, low, high in (("depth", 1, 64), ("frames_per_token", 1, 64), ("embedding", 2, 2**14)):
            value = getattr(self, name)
            require(low <= value <= high, f"tower.{name} is {quoted(value)}: allowed is {low} to {high}")
        require(
            0 < self.width <= WIDTH_MAX and self.width % HEAD_SIZE == 0,
            f"tower.width is {quoted(self.width)}: expected a multiple of {HEAD_SIZE} up to {WIDTH_MAX}",
        )


@dataclass(frozen=True, kw_only=True)
class LatentClapConfig(Config):
    """Describe one trained latent CLAP, and what it belongs to: hashes of ``tensors_hash``."""

    tower: TowerConfig
    latent_channels: int
    text: TextEncoderConfig
    autoencoder: str
    text_encoder: str
    max_frames: int | None = None  # that it was trained on at once; None in files of earlier versions: any number

    def __post_init__(self) -> None:
        _bounded(self, WIDTH_MAX, "latent_channels")
        if self.max_frames is not None:
            low = self.tower.frames_per_token
            require(
                low <= self.max_frames <= FRAMES_MAX,
                f"max_frames is {quoted(self.max_frames)}: allowed is {low} to {FRAMES_MAX}",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Describe one checkpoint. ``diffusion`` is None in a checkpoint that holds only an autoencoder."""

    name: str
    sample_rate: int  # Hz
    audio_channels: int
    same: SAMEConfig
    diffusion: DiffusionConfig | None
    sampling: Sampling | None = None  # the usual one; None: the official one of the objective [B26]
    dial: Dial | None = None  # noise levels by strength; None: not calibrated
    clap: LatentClapConfig | None = None  # which ranks what was made, beside the weights; None: there is none
    examples: tuple[str, ...] = ()  # prompts that it does well, which are suggested to who asks for none

    def __post_init__(self) -> None:
        _bounded(self, RATE_MAX, "sample_rate")
        _bounded(self, CHANNELS_MAX, "audio_channels")
        require(len(self.examples) <= EXAMPLES_MAX, f"examples: {len(self.examples)} prompts, at most {EXAMPLES_MAX}")
        for example in self.examples:
            require(
                0 < len(example) <= EXAMPLE_MAX and example.isprintable(),
                f"examples: {quoted(example)} must be a line of 1 to {EXAMPLE_MAX} characters",
            )
        if self.clap is not None:
            text, channels = self.diffusion and self.diffusion.text_encoder, self.same.latent_channels
            require(self.clap.text == text, "clap.text: is not the text encoder of the model")
            require(
                self.clap.latent_channels == channels,
                f"clap.latent_channels: must be {channels}, those of the model, got {self.clap.latent_channels}",
            )

    @property
    def usual_sampling(self) -> Sampling:
        """Return the sampling that suits the model: its own, else the official one of its objective [B26].

        Raises ConfigError for an autoencoder without a diffusion model.
        """
        if self.sampling is not None:
            return self.sampling
        if self.require_diffusion().objective == "rf_denoiser":
            return Sampling(sampler="pingpong", steps=8)
        return Sampling(sampler="euler", steps=50, guidance=Guidance(scale=7.0))

    def noise_level(self, strength: float, schedule: Schedule = "official") -> float:
        """Return the noise level at which audio-to-audio changes its source with this strength, above 0 and up to 1.

        Raises ValueError for any other strength, and ConfigError for a model that was not calibrated.
        """
        if self.dial is None:
            raise ConfigError(f"{self.name} has no dial for strength: run 'sa3 calibrate', or give a noise level")
        return self.dial.noise_level(strength, schedule)

    def require_diffusion(self) -> DiffusionConfig:
        """Return ``diffusion``. Raises ConfigError for an autoencoder without one."""
        if self.diffusion is None:
            raise ConfigError(f"{self.name} is an autoencoder alone and cannot generate; choose a model with a DiT")
        return self.diffusion

    @property
    def frames_per_second(self) -> float:
        """Return latent frames per second of audio."""
        return self.sample_rate / self.same.samples_per_latent

    @property
    def max_seconds(self) -> float:
        """Return the longest clip that can be asked for, in seconds; 0.0 for an autoencoder by itself."""
        if self.diffusion is None:
            return 0.0
        return self.diffusion.max_frames * self.same.samples_per_latent / self.sample_rate

    def to_json(self) -> str:
        """Return the text of ``config.json``, without the fields that have the value of the released models."""
        return json.dumps({"format": FORMAT, **self.to_dict(defaults=False)}, indent=2) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Read ``folder/config.json``. Raises FileNotFoundError or ConfigError."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no config.json there; expected a folder made by 'sa3 convert'")
        data = read_object(path)
        found = data.pop("format", None)
        require(
            found == FORMAT,
            f"{path}: format is {quoted(found)}, this version reads {FORMAT!r}; convert the checkpoint again",
        )
        return cls.from_dict(data, where=str(path))


def _bounded(config: Config, most: int, *names: str) -> None:
    for name in names:
        value, where = getattr(config, name), f"{type(config).__name__}.{name}"
        require(value > 0, f"{where}: must be positive, got {quoted(value)}")
        require(value <= most, f"{where}: must be at most {most}, got {quoted(value)}")
