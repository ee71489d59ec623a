"""Define the settings of both families of discriminators [T1.5]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sa3_mlx.common.model.config import ROTARY_SIZE
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.run.settings import check


@dataclass(frozen=True, kw_only=True)
class ConvolutionalConfig(Config):
    """Choose the convolutional family; an empty list or zero bins leave that kind out."""

    width: int  # channels of the first layer
    stft_sizes: tuple[int, ...]  # FFT windows of the complex spectrograms, samples; hop size / 4
    pqmf_bands: tuple[int, ...]
    chroma_bins: int
    chroma_size: int  # FFT window of the chromagram, samples; hop size / 4

    def __post_init__(self) -> None:
        check(self, 4, 4096, "width")
        check(self, 0, 1024, "chroma_bins")
        if self.width % 4:
            raise ConfigError(f"convolutional.width is {self.width}: expected a multiple of 4")
        for size in (*self.stft_sizes, *([self.chroma_size] if self.chroma_bins else [])):
            if size < 16 or size % 4:
                raise ConfigError(f"convolutional: window of {size} samples, expected multiples of 4 from 16")
        if any(bands < 1 for bands in self.pqmf_bands):
            raise ConfigError(f"convolutional.pqmf_bands {self.pqmf_bands}: expected at least 1 each")


@dataclass(frozen=True, kw_only=True)
class View(Config):
    """Choose one transformer discriminator: what it looks at, and how far it sees."""

    kind: Literal["patch", "stft", "wavelet"]
    size: int  # samples of a patch or FFT window (hop size / 4), or levels of the wavelet
    stride: int  # steps of the transform per logit
    window: int  # logits to each side that attention reaches

    def __post_init__(self) -> None:
        check(self, 1, 1 << 16, "size", "stride", "window")
        if self.kind == "stft" and (self.size < 8 or self.size % 4):
            raise ConfigError(f"view.size is {self.size}: an STFT needs a multiple of 4 from 8")
        if self.kind == "wavelet" and self.size > 14:
            raise ConfigError(f"view.size is {self.size}: a wavelet has at most 14 levels")


@dataclass(frozen=True, kw_only=True)
class ChromaView(Config):
    """Choose a transformer discriminator of the pitch classes around one octave above 27.5 Hz."""

    octave: float
    width: float  # octaves
    stride: int
    window: int

    def __post_init__(self) -> None:
        check(self, 0, 12, "octave")
        check(self, 1e-3, 12, "width")
        check(self, 1, 1 << 16, "stride", "window")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Choose the transformer-resampling family: one discriminator per view. Width is 16 sqrt(inputs) between two
    limits."""

    depth: int
    min_width: int
    max_width: int
    head_size: int
    views: tuple[View, ...]
    chroma_views: tuple[ChromaView, ...]
    chroma_bins: int
    chroma_size: int  # FFT window, samples
    chroma_hop: int

    def __post_init__(self) -> None:
        check(self, 1, 64, "depth")
        check(self, ROTARY_SIZE, 1024, "head_size")
        check(self, self.head_size, self.max_width, "min_width")
        if self.min_width % self.head_size or self.max_width % self.head_size:
            raise ConfigError(
                f"transformer: widths {self.min_width} and {self.max_width} must be multiples of head_size "
                f"({self.head_size})"
            )
        if self.chroma_views:
            check(self, 12, 1024, "chroma_bins")
            check(self, 2, self.chroma_size // 2, "chroma_hop")
            if self.chroma_size % self.chroma_hop:
                raise ConfigError(
                    f"transformer.chroma_size is {self.chroma_size}: no multiple of {self.chroma_hop}, the hop"
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
        if not (
            conv.stft_sizes or conv.pqmf_bands or conv.chroma_bins or transformer.views or transformer.chroma_views
        ):
            raise ConfigError("discriminators: none is chosen; give stft_sizes, pqmf_bands, chroma_bins or views")
        views = [(view.kind, view.size) for view in transformer.views]
        octaves = [view.octave for view in transformer.chroma_views]
        for seen in (conv.stft_sizes, conv.pqmf_bands, views, octaves):
            if len(set(seen)) < len(seen):
                raise ConfigError(f"discriminators: {seen} names one twice")


def _views(kind: Literal["patch", "stft", "wavelet"], sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[View]:
    return [
        View(kind=kind, size=size, stride=stride, window=window)
        for size, stride, window in zip(sizes, strides, (4, 8, 1), strict=False)
    ]


PATCHED = tuple(_views("patch", (29, 443, 953), (2, 16, 2)))  # primes avoid harmonic aliasing
STFT = tuple(_views("stft", (4096, 1024, 128), (2, 32, 2)))
WAVELET = tuple(_views("wavelet", (4, 8, 10), (16, 4, 2)))  # strides are ours
CHROMA = tuple(
    ChromaView(octave=octave, width=width, stride=stride, window=window)
    for octave, width, stride, window in ((1.0, 1.0, 16, 4), (5.0, 1.5, 8, 8), (9.0, 1.0, 2, 1))
)
# Every member of both families, as in the official code; which of them trained the released models is unknown.
WHOLE = DiscriminatorsConfig(
    convolutional=ConvolutionalConfig(
        width=32,
        stft_sizes=(2048, 1024, 512, 256, 128),
        pqmf_bands=(1, 2, 3, 5, 7, 11),
        chroma_bins=48,
        chroma_size=4096,
    ),
    transformer=TransformerConfig(
        depth=3,
        min_width=192,
        max_width=512,
        head_size=64,
        views=PATCHED + STFT + WAVELET,
        chroma_views=CHROMA,
        chroma_bins=64,
        chroma_size=4096,
        chroma_hop=256,
    ),
)
FULL = DiscriminatorsConfig(
    convolutional=replace(WHOLE.convolutional, pqmf_bands=(), chroma_bins=0),
    transformer=replace(WHOLE.transformer, views=PATCHED, chroma_views=()),
)
TINY = DiscriminatorsConfig(
    convolutional=ConvolutionalConfig(width=8, stft_sizes=(), pqmf_bands=(), chroma_bins=0, chroma_size=4096),
    transformer=replace(
        WHOLE.transformer,
        depth=2,
        min_width=96,
        max_width=96,
        head_size=48,
        chroma_views=(),
        views=tuple(_views("patch", (29, 97), (2, 16)) + _views("stft", (1024, 256), (2, 32))),
    ),
)
