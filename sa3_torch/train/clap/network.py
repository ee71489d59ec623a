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
from pathlib import Path
from typing import Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, tensors_hash, write_tensors
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, check_tensors
from sa3_mlx.common.model.clap import CLAP_FORMAT, TEXT_TENSORS, read_clap
from sa3_mlx.common.model.config import LatentClapConfig, ModelConfig
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.clap.network import ClapTowers
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.weights import EMBEDDING, load_part

FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0


class LatentClap(ClapTowers):
    """Hold audio tower, text projection and the scale of their cosines.

    The frozen text encoder is no part of the module: it is neither trained nor averaged nor in its state.
    """

    def __init__(self, config: LatentClapConfig, text_encoder: T5GemmaEncoder, tokenizer: Tokenizer) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer
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

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into ids (B, S) and mask (B, S), on the device of the weights."""
        ids, mask = self.tokenizer.encode(texts)
        device = self.log_scale.device
        return torch.from_numpy(ids).long().to(device), torch.from_numpy(mask).to(device)

    def save(self, folder: Path, state: Mapping[str, Tensor], tokenizer_file: Path) -> None:
        """Write ``state``, weights of this module, in fp32, with the text encoder and its tokenizer."""
        encoder = {TEXT_TENSORS + name: tensor for name, tensor in self._text_encoder[0].state_dict().items()}
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
        config = read_clap(folder)
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
        expected = clap.state_dict() | {TEXT_TENSORS + name: tensor for name, tensor in encoder.state_dict().items()}
        with TensorFile.open(path) as tensors:
            check_tensors({name: tuple(x.shape) for name, x in expected.items()}, tensors.shapes(), str(path))
        with safe_open(path, framework="pt", device=device) as file:
            state = {name: file.get_tensor(name).float() for name in expected}
        own = [name for name in state if name.startswith(TEXT_TENSORS)]
        encoder.load_state_dict(
            {name.removeprefix(TEXT_TENSORS): state.pop(name) for name in own}, strict=True, assign=True
        )
        clap.load_state_dict(state, strict=True, assign=True)
        encoder.requires_grad_(False)
        return clap.eval().requires_grad_(False)


def open_text_encoder(folder: Path, config: ModelConfig) -> T5GemmaEncoder:
    """Open a text encoder with all its embeddings in memory, as they are exported.

    Raises ValueError for an autoencoder without a diffusion model.
    """
    encoder = cast(T5GemmaEncoder, load_part(folder, config, "text_encoder", torch.device("cpu"), torch.float32))
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        encoder.embed_tokens = nn.Embedding.from_pretrained(torch.from_numpy(file.read(EMBEDDING)))
    return encoder
