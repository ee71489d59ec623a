"""Define the settings of both families of discriminators [T1.5]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sa3_mlx.common.model.config import ROTARY_SIZE
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.run.settings import check


@dataclass(frozen=True, kw_only=True)
class ConvolutionalConfig(Config):
    """Choose the convolutional family; an empty list leaves it out."""

    width: int  # channels of the first layer
    stft_sizes: tuple[int, ...]  # FFT windows of the complex spectrograms, samples; hop size / 4

    def __post_init__(self) -> None:
        check(self, 4, 4096, "width")
        if self.width % 4:
            raise ConfigError(f"convolutional.width is {self.width}: expected a multiple of 4")
        for size in self.stft_sizes:
            if size < 16 or size % 4:
                raise ConfigError(f"convolutional: window of {size} samples, expected multiples of 4 from 16")


@dataclass(frozen=True, kw_only=True)
class View(Config):
    """Choose one transformer discriminator: what it looks at, and how far it sees."""

    kind: Literal["patch", "stft"]
    size: int  # samples of a patch or FFT window (hop size / 4)
    stride: int  # steps of the transform per logit
    window: int  # logits to each side that attention reaches

    def __post_init__(self) -> None:
        check(self, 1, 1 << 16, "size", "stride", "window")
        if self.kind == "stft" and (self.size < 8 or self.size % 4):
            raise ConfigError(f"view.size is {self.size}: an STFT needs a multiple of 4 from 8")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Choose the transformer-resampling family: one discriminator per view. Width is 16 sqrt(inputs) between two
    limits."""

    depth: int
    min_width: int
    max_width: int
    head_size: int
    views: tuple[View, ...]

    def __post_init__(self) -> None:
        check(self, 1, 64, "depth")
        check(self, ROTARY_SIZE, 1024, "head_size")
        check(self, self.head_size, self.max_width, "min_width")
        if self.min_width % self.head_size or self.max_width % self.head_size:
            raise ConfigError(
                f"transformer: widths {self.min_width} and {self.max_width} must be multiples of head_size "
                f"({self.head_size})"
            )

    def width(self, inputs: int) -> int:
        """Return the width of a discriminator with so many values per step."""
        rounded = round(16 * inputs**0.5 / self.head_size) * self.head_size
        return min(max(rounded, self.min_width), self.max_width)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorsConfig(Config):
    """Choose both families at once; at least one discriminator."""

    convolutional: ConvolutionalConfig
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        conv, transformer = self.convolutional, self.transformer
        if not (conv.stft_sizes or transformer.views):
            raise ConfigError("discriminators: none is chosen; give stft_sizes or views")
        for seen in (conv.stft_sizes, [(view.kind, view.size) for view in transformer.views]):
            if len(set(seen)) < len(seen):
                raise ConfigError(f"discriminators: {seen} names one twice")
