"""Define latent CLAP: how well a text describes latents, at any noise level [T6].

    clap = LatentClap.load(folder, autoencoder=model_folder)
    a = clap.embed_audio(latents, valid, t)          # gradients reach the latents
    u = clap.embed_text(*clap.encode(["piano note A4"]))
    cosine = (a * u).sum(1)

A folder of format "sa3-clap/1" holds ``config.json``, ``model.safetensors`` and ``tokenizer.json``. It carries the
frozen text encoder that it was trained on, so it needs no model beside it.

Shapes: B batch, T latent frames, C latent channels, N tokens of P frames, D width, S text tokens, Dt text width, E size
of the shared vectors. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, tensors_hash, write_tensors
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, check_tensors
from sa3_mlx.common.model.config import HEAD_SIZE, TIMESTEP_FEATURES, ModelConfig, TextEncoderConfig
from sa3_mlx.common.schema import Config, ConfigError, quoted
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.attention import attend
from sa3_torch.dit import BLOCK_EPS, timestep_features
from sa3_torch.layers import MLP, RMSNorm, rope
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.networks.blocks import ModulatedBlock
from sa3_torch.train.run.settings import check
from sa3_torch.weights import EMBEDDING, load_part

CLAP_FORMAT = "sa3-clap/1"
FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0
_TEXT = "text_encoder."  # of the frozen encoder's tensors in the file


@dataclass(frozen=True, kw_only=True)
class TowerConfig(Config):
    """Hold the sizes of the networks that are trained."""

    width: int  # of the audio tower and of the hidden layer of both projections
    depth: int
    frames_per_token: int  # of the audio tower
    embedding: int  # E

    def __post_init__(self) -> None:
        check(self, 1, 64, "depth", "frames_per_token")
        check(self, 2, 1 << 14, "embedding")
        if self.width < HEAD_SIZE or self.width % HEAD_SIZE:
            raise ConfigError(f"tower.width is {self.width}: expected a multiple of {HEAD_SIZE}")


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
        if self.max_frames is not None:
            check(self, self.tower.frames_per_token, math.inf, "max_frames")


class AudioTower(nn.Module):
    """Run a transformer over latents, told their noise level; the mean of its tokens is projected.

    Of longer latents than ``max_frames`` it sees one window of so many frames after the other.
    """

    def __init__(self, config: TowerConfig, latent_channels: int, max_frames: int | None) -> None:
        super().__init__()
        width = config.width
        self.frames_per_token = config.frames_per_token
        self.max_tokens = None if max_frames is None else max_frames // config.frames_per_token
        self.to_timestep_embed = MLP(TIMESTEP_FEATURES, width, width, bias=True)
        self.to_modulation = MLP(width, width, 6 * width, bias=True)
        self.project_in = nn.Linear(config.frames_per_token * latent_channels, width)
        self.layers = nn.ModuleList(ModulatedBlock(width) for _ in range(config.depth))
        self.norm = RMSNorm(width, BLOCK_EPS)
        self.projection = MLP(width, width, config.embedding, bias=True)

    def forward(self, x: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Embed x (B, T, C), valid (B, T) bool, t (B,) -> (B, E). Raises ValueError for an item without a
        valid frame."""
        return self.projection(self.pooled(x, valid, t))

    def pooled(self, x: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Return what ``forward`` projects: (B, D) float32, the mean over tokens."""
        if not bool(valid.any(1).all()):
            items = (~valid.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"item(s) {', '.join(map(str, items))} have no valid frame: leave them out")
        size = self.frames_per_token
        rest = -x.shape[1] % size
        x = F.pad(torch.where(valid[..., None], x, 0.0), (0, 0, 0, rest))
        real = F.pad(valid, (0, rest)).unflatten(1, (-1, size)).any(-1)  # (B, N)
        h = self.project_in(x.unflatten(1, (-1, size)).flatten(2))  # (B, N, D)
        length = min(h.shape[1], self.max_tokens or h.shape[1])  # of a window
        more = -h.shape[1] % length
        h, real = F.pad(h, (0, 0, 0, more)), F.pad(real, (0, more))
        windows = h.shape[1] // length
        modulation = self.to_modulation(self.to_timestep_embed(timestep_features(t).to(h.dtype)))
        h, modulation = h.unflatten(1, (windows, length)).flatten(0, 1), modulation.repeat_interleave(windows, 0)
        seen = real.unflatten(1, (windows, length)).flatten(0, 1)
        seen = seen | ~seen.any(1, keepdim=True)  # a window of padding sees itself, and counts for nothing below
        table, attend_real = rope(0, length, h.device), partial(attend, mask=seen[:, None, None])
        for layer in self.layers:
            h = layer(h, modulation, table, attend_real)
        return _masked_mean(self.norm(h).unflatten(0, (-1, windows)).flatten(1, 2), real)


class LatentClap(nn.Module):
    """Hold audio tower, text projection and the scale of their cosines.

    The frozen text encoder is no part of the module: it is neither trained nor averaged nor in its state.
    """

    def __init__(self, config: LatentClapConfig, text_encoder: T5GemmaEncoder, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.audio = AudioTower(config.tower, config.latent_channels, config.max_frames)
        self.text = MLP(config.text.width, config.tower.width, config.tower.embedding, bias=True)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE)))
        self._text_encoder = [text_encoder.eval().requires_grad_(False)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, together with the text encoder."""
        self._text_encoder[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def scale(self) -> Tensor:
        """Return the scale of cosines in the softmax, at most 100: (1,)."""
        return self.log_scale.float().clamp_max(math.log(MAX_SCALE)).exp()

    @property
    def feature_width(self) -> int:
        """Return the size of ``audio_features``."""
        return self.config.tower.width

    def embed_audio(self, latents: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Embed latents (B, T, C) with noise of level t (B,), valid (B, T) bool -> unit vectors (B, E) float32.

        Values at frames that are not valid do not matter.
        """
        return F.normalize(self.audio(latents, valid, t).float(), dim=-1)

    def audio_features(self, latents: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Return what ``embed_audio`` projects, which holds more of a sound than its prompt does: (B, D) float32."""
        return self.audio.pooled(latents, valid, t).float()

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed ids (B, S) int, mask (B, S) bool, true at tokens -> unit vectors (B, E) float32."""
        length = max(1, int(mask.sum(1).max()))  # padding is at the right and does not matter
        ids, mask = ids[:, :length], mask[:, :length]
        with torch.no_grad():
            states = self._text_encoder[0](ids, mask)
        return self.embed_states(states, mask)

    def embed_states(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embed states (B, S, Dt) that the same text encoder gave, as ``embed_text`` does."""
        return F.normalize(self.text(_masked_mean(states, mask)).float(), dim=-1)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into ids (B, S) and mask (B, S), on the device of the weights."""
        ids, mask = self.tokenizer.encode(texts)
        device = self.log_scale.device
        return torch.from_numpy(ids).long().to(device), torch.from_numpy(mask).to(device)

    def save(self, folder: Path, state: Mapping[str, Tensor], tokenizer_file: Path) -> None:
        """Write ``state``, weights of this module, in fp32, with the text encoder and its tokenizer."""
        encoder = {_TEXT + name: tensor for name, tensor in self._text_encoder[0].state_dict().items()}
        arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in {**state, **encoder}.items()}
        entries = [array_entry(name, array) for name, array in arrays.items()]
        config = {"format": CLAP_FORMAT, **self.config.to_dict()}
        with new_folder(folder) as made:
            write_tensors(made / WEIGHTS_FILE, entries, {"format": CLAP_FORMAT})
            (made / TOKENIZER_FILE).write_bytes(tokenizer_file.read_bytes())
            write_json(made / CONFIG_FILE, config)

    @classmethod
    def load(cls, folder: Path, *, autoencoder: Path | None = None, device: str = "cpu") -> Self:
        """Open a folder, frozen and in evaluation mode.

        ``autoencoder``: the model or autoencoder folder whose latents it will be given; another one than it was trained
        on is refused. Raises FileNotFoundError, ConfigError or ValueError.
        """
        config = _read_config(folder)
        if autoencoder is not None:
            found = tensors_hash(autoencoder / WEIGHTS_FILE, "same.")
            if found != config.autoencoder:
                raise ValueError(
                    f"{folder} was trained on latents of autoencoder {config.autoencoder}; that of {autoencoder} is "
                    f"{found}: train another latent CLAP"
                )
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, config.text.max_length)
        with torch.device("meta"):
            clap = cls(config, T5GemmaEncoder(config.text), tokenizer)
        path, encoder = folder / WEIGHTS_FILE, clap._text_encoder[0]
        expected = clap.state_dict() | {_TEXT + name: tensor for name, tensor in encoder.state_dict().items()}
        with TensorFile.open(path) as tensors:
            check_tensors({name: tuple(x.shape) for name, x in expected.items()}, tensors.shapes(), str(path))
        with safe_open(path, framework="pt", device=device) as file:
            state = {name: file.get_tensor(name).float() for name in expected}
        own = {name.removeprefix(_TEXT): state.pop(name) for name in list(state) if name.startswith(_TEXT)}
        encoder.load_state_dict(own, strict=True, assign=True)
        clap.load_state_dict(state, strict=True, assign=True)
        encoder.requires_grad_(False)
        return clap.eval().requires_grad_(False)


def _read_config(folder: Path) -> LatentClapConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_FILE} there; expected a folder made by 'sa3 train clap'")
    data = read_object(path)
    found = data.pop("format", None)
    if found != CLAP_FORMAT:
        raise ConfigError(
            f"{path}: format is {quoted(found)}, expected {CLAP_FORMAT!r}, a folder made by 'sa3 train clap'"
        )
    return LatentClapConfig.from_dict(data, where=str(path))


def open_text_encoder(folder: Path, config: ModelConfig) -> T5GemmaEncoder:
    """Open a text encoder with all its embeddings in memory, as they are exported.

    Raises ValueError for an autoencoder without a diffusion model.
    """
    encoder = cast(T5GemmaEncoder, load_part(folder, config, "text_encoder", torch.device("cpu"), torch.float32))
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        encoder.embed_tokens = nn.Embedding.from_pretrained(torch.from_numpy(file.read(EMBEDDING)))
    return encoder


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average (B, N, D) over the tokens that mask (B, N) has -> (B, D) float32; 0 where there are none (an
    empty text)."""
    kept = torch.where(mask[..., None], x.float(), 0.0)
    return kept.sum(1) / mask.sum(1).clamp_min(1)[:, None]
