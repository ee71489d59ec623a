"""What training reads: random crops of a clip cache, and batches of pre-encoded latents.

Both are functions of (seed, step) alone: a resumed run sees exactly the batches that an uninterrupted one sees.

Shapes: B batch, N audio samples, T latent frames, C latent channels, S text tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sa3_mlx.spec.config import Config
from sa3_torch.train.clips import Clip, ClipSet, generator, read_index

LATENT_FORMAT = "sa3-latents/1"
_SILENCE = 1e-3  # a crop whose peak is below -60 dBFS is drawn again
_TRIES = 8
_CROPS, _BATCH = 101, 102  # purposes of the random generators


@dataclass(frozen=True, kw_only=True)
class SharesConfig(Config):
    """How often each kind of clip is drawn, whatever its number of clips; kinds without clips do not count."""

    note: float
    chord: float
    drum: float
    noise: float
    sample: float  # one-shots without captions
    user: float  # imported recordings


def draw_weights(kinds: Sequence[str], shares: Mapping[str, float] | None) -> NDArray[np.float64]:
    """Probability of each item: its kind's share over the items of that kind; ``shares`` None: all items alike.

    Raises ValueError when the items have a kind that ``shares`` does not name; a share without items is ignored.
    """
    if not kinds:
        raise ValueError("no items to draw from")
    if shares is None:
        return np.full(len(kinds), 1 / len(kinds))
    unknown = sorted(set(kinds) - set(shares))
    if unknown:
        raise ValueError(f"no share given for kind(s) {', '.join(unknown)}; given: {', '.join(sorted(shares))}")
    weights = np.array([shares[kind] / kinds.count(kind) for kind in kinds])
    return np.asarray(weights / weights.sum())


class AudioCrops:
    """Endless crops of a clip cache for training an autoencoder.

    A crop starts anywhere from a quarter of its length before the onset to where a quarter of it lies behind the end;
    a third start at the onset. Outside the clip is silence. Gain falls from 0 to ``quietest_db`` (mostly near 0),
    polarity is random, mono becomes two equal channels. Crops below -60 dBFS are drawn again.
    """

    def __init__(
        self, clips: ClipSet, *, split: str, samples: int, batch: int, seed: int,
        quietest_db: float, shares: Mapping[str, float] | None,
    ) -> None:  # fmt: skip
        if samples < 1 or batch < 1 or quietest_db > 0:
            raise ValueError(
                f"samples and batch must be positive, quietest_db <= 0; got {samples}, {batch}, {quietest_db}"
            )
        self.set, self.samples, self.batch_size, self.seed, self.quietest_db = clips, samples, batch, seed, quietest_db
        self.clips = clips.select(split)
        self._cumulative = np.cumsum(draw_weights([clip.kind for clip in self.clips], shares))

    def batch(self, step: int) -> Tensor:
        """The crops of a step -> (B, N, 2) float32 on the CPU."""
        rng = generator(self.seed, _CROPS, step)
        return torch.from_numpy(np.stack([self._crop(rng) for _ in range(self.batch_size)]))

    def _crop(self, rng: np.random.Generator) -> NDArray[np.float32]:
        clip = self.clips[min(int(np.searchsorted(self._cumulative, rng.random())), len(self.clips) - 1)]
        margin = self.samples // 4
        for attempt in range(_TRIES + 1):
            start = int(rng.integers(-margin, max(clip.samples - self.samples, 0) + margin + 1))
            if attempt == _TRIES or rng.random() < 1 / 3:
                start = 0
            crop = self._read(clip, start)
            if np.abs(crop).max() >= _SILENCE:
                break
        gain = 10 ** (self.quietest_db * rng.random() ** 2 / 20) * (1.0 if rng.random() < 0.5 else -1.0)
        return crop * np.float32(gain)

    def _read(self, clip: Clip, start: int) -> NDArray[np.float32]:
        audio = self.set.read(clip, max(start, 0), max(start + self.samples, 0))
        lead = min(max(-start, 0), self.samples)
        padded = np.pad(audio, ((lead, self.samples - lead - len(audio)), (0, 0)))
        return np.repeat(padded, 2, axis=1) if padded.shape[1] == 1 else padded


class TextEncoding(Protocol):
    """What LatentSet needs of a tokenizer: texts -> ids (B, S) int32 and mask (B, S) bool, True for a real token."""

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...


@dataclass(frozen=True, kw_only=True)
class LatentItem:
    """One encoded clip: rows [offset, offset + frames) of the shard. ``seconds`` is the full length of the clip."""

    id: str
    captions: tuple[str, ...]
    seconds: float
    offset: int
    frames: int
    kind: str
    label: str
    midi: int | None
    split: str


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` (B, T, C) float32, padded with the latent of silence; ``valid`` (B, T); text ids and mask (B, S)."""

    latents: Tensor
    valid: Tensor
    ids: Tensor
    mask: Tensor
    seconds: Tensor
    items: tuple[LatentItem, ...]

    def __getitem__(self, rows: slice) -> LatentBatch:
        return LatentBatch(
            latents=self.latents[rows], valid=self.valid[rows], ids=self.ids[rows], mask=self.mask[rows],
            seconds=self.seconds[rows], items=self.items[rows],
        )  # fmt: skip


def write_latents(
    folder: Path, encoded: Iterable[tuple[Clip, Tensor]], *, silence: Tensor, autoencoder: str
) -> LatentSet:
    """Write a shard and open it. ``encoded`` yields clips with latents (T, C), ``silence`` (C,) is the latent of zeros.

    ``autoencoder`` is the hash of the autoencoder's weights. Latents are kept as float32: max |dz| is 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    pieces: list[Tensor] = []
    items: list[LatentItem] = []
    offset = 0
    for clip, latents in encoded:
        if latents.ndim != 2 or latents.shape[1:] != silence.shape:
            raise ValueError(f"{clip.id}: latents must be (T, {len(silence)}), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError(f"{clip.id}: latents are not finite")
        pieces.append(latents.detach().float().cpu())
        items.append(
            LatentItem(
                id=clip.id, captions=clip.captions, seconds=clip.seconds, offset=offset, frames=len(latents),
                kind=clip.kind, label=clip.label, midi=clip.midi, split=clip.split,
            )
        )  # fmt: skip
        offset += len(latents)
    if not pieces:
        raise ValueError(f"no latents for {folder}")
    tensors = {"latents": torch.cat(pieces), "silence": silence.detach().float().cpu().contiguous()}
    save_file(tensors, folder / "latents.safetensors")
    index = {"format": LATENT_FORMAT, "autoencoder": autoencoder, "items": [asdict(item) for item in items]}
    (folder / "index.json").write_text(json.dumps(index, indent=0) + "\n")
    return LatentSet(folder, autoencoder=autoencoder)


class LatentSet:
    """An opened shard; refuses to open when it was encoded by another autoencoder than ``autoencoder`` (a hash)."""

    def __init__(self, folder: Path, *, autoencoder: str) -> None:
        index = read_index(folder, LATENT_FORMAT)
        if index["autoencoder"] != autoencoder:
            raise ValueError(
                f"{folder} was encoded by autoencoder {index['autoencoder']}, not by {autoencoder}; encode it again"
            )
        self.items = [LatentItem(**{**item, "captions": tuple(item["captions"])}) for item in index["items"]]
        file: Any = safe_open(folder / "latents.safetensors", framework="pt")  # memory-mapped; the library is untyped
        self._latents = file.get_slice("latents")
        self.silence: Tensor = file.get_tensor("silence")
        rows, self.channels = self._latents.get_shape()
        needed = max(item.offset + item.frames for item in self.items)
        if needed > rows:
            raise ValueError(f"{folder}: the shard has {rows} frames, its index needs {needed}")

    def read(self, item: LatentItem) -> Tensor:
        """Latents of an item -> (T, C) float32."""
        rows: Tensor = self._latents[item.offset : item.offset + item.frames]
        return rows.float()

    def statistics(self, split: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over one split -> two (C,) tensors, float64 inside."""
        rows = torch.cat([self.read(item) for item in self.items if item.split == split]).double()
        return rows.mean(0).float(), rows.std(0).float()


class LatentBatches:
    """Endless batches of a shard, of similar lengths, padded to a multiple of ``multiple`` frames.

    ``head_room_frames`` more frames of silence follow the longest item; they are not valid. The canonical caption is
    drawn 60 % of the time, an alternative otherwise. Items without a caption, or longer than ``max_frames``, are left
    out and counted in ``skipped``.
    """

    def __init__(
        self, latents: LatentSet, tokenizer: TextEncoding, *, split: str, batch: int, seed: int, max_frames: int,
        head_room_frames: int, buckets: int, multiple: int, shares: Mapping[str, float] | None,
    ) -> None:  # fmt: skip
        self.latents, self.batch_size, self.seed = latents, batch, seed
        self.head_room_frames, self.multiple, self.max_frames = head_room_frames, multiple, max_frames
        mine = [item for item in latents.items if item.split == split]
        usable = [item for item in mine if item.captions and item.frames <= max_frames]
        self.skipped = len(mine) - len(usable)
        usable.sort(key=lambda item: (item.frames, item.id))
        weights = draw_weights([item.kind for item in usable], shares)
        parts = np.array_split(np.arange(len(usable)), min(buckets, len(usable)))
        self._buckets = [([usable[i] for i in part], weights[part] / weights[part].sum()) for part in parts]
        self._shares = np.array([weights[part].sum() for part in parts])
        texts = sorted({caption for item in usable for caption in item.captions})
        ids, mask = tokenizer.encode(texts)
        self._text = {text: (ids[i], mask[i]) for i, text in enumerate(texts)}

    def batch(self, step: int) -> LatentBatch:
        """The batch of a step, on the CPU."""
        rng = generator(self.seed, _BATCH, step)
        members, weights = self._buckets[int(rng.choice(len(self._buckets), p=self._shares))]
        items = [members[i] for i in rng.choice(len(members), size=self.batch_size, p=weights)]
        texts = [self._text[self._caption(item, rng)] for item in items]
        longest = max(item.frames for item in items) + self.head_room_frames
        frames = min(-(-longest // self.multiple) * self.multiple, self.max_frames)
        z = self.latents.silence.expand(len(items), frames, -1).clone()  # (B, T, C)
        valid = torch.zeros(len(items), frames, dtype=torch.bool)
        for row, item in enumerate(items):
            z[row, : item.frames] = self.latents.read(item)
            valid[row, : item.frames] = True
        return LatentBatch(
            latents=z, valid=valid,
            ids=torch.from_numpy(np.stack([ids for ids, _ in texts])).long(),
            mask=torch.from_numpy(np.stack([mask for _, mask in texts])),
            seconds=torch.tensor([item.seconds for item in items], dtype=torch.float32), items=tuple(items),
        )  # fmt: skip

    @staticmethod
    def _caption(item: LatentItem, rng: np.random.Generator) -> str:
        pick = int(rng.integers(1, max(len(item.captions), 2)))
        return item.captions[0] if rng.random() < 0.6 or len(item.captions) == 1 else item.captions[pick]
