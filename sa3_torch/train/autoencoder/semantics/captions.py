"""Turn captions into states for the critic: by a frozen text encoder, or word embeddings that are trained with it.

Shapes: B captions, S text tokens, Dt text width [T1.1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.model.checkpoint import CONFIG_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.demo_set.sets import build_tokenizer
from sa3_torch.train.demo_set.vocabulary import PAD
from sa3_torch.weights import load_part

MAX_WORDS = 16


class WordStates(nn.Module):
    """Embed every word of a set of sounds, "first" or "music"."""

    def __init__(self, width: int, words: str) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer(words)
        self.embedding = nn.Embedding(self.tokenizer.get_vocab_size(), width)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids (B, S) int64 and mask (B, S) bool, False = padding; S is always 16."""
        rows = [encoding.ids[:MAX_WORDS] for encoding in self.tokenizer.encode_batch(list(captions))]
        ids = torch.tensor([row + [PAD] * (MAX_WORDS - len(row)) for row in rows])
        return ids, torch.arange(MAX_WORDS) < torch.tensor([len(row) for row in rows])[:, None]

    def forward(self, ids: Tensor, _mask: Tensor) -> Tensor:
        """Embed ids (B, S) -> (B, S, Dt)."""
        return self.embedding(ids)


class FrozenStates(nn.Module):
    """Run the text encoder of a checkpoint folder; nothing of it is trained or kept in checkpoints of the run.

    Raises FileNotFoundError or ValueError for a folder without one, ConfigError when its width is not ``width``.
    """

    def __init__(self, folder: Path, width: int) -> None:
        super().__init__()
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"semantics.text_encoder is {str(folder)!r}: no model there; give the folder of a converted one with "
                "--set semantics.text_encoder=FOLDER, or --set semantics.text_encoder= to train embeddings of words"
            )
        config = ModelConfig.load(folder)
        if config.diffusion is None:
            raise ConfigError(f"semantics.text_encoder is {str(folder)!r}: an autoencoder without a text encoder")
        self.tokenizer = open_tokenizer(folder, config)
        encoder = load_part(folder, config, "text_encoder", torch.device("cpu"), torch.float32)
        if config.diffusion.text_encoder.width != width:
            raise ConfigError(
                f"semantics.text_width is {width}: the text encoder of {folder} has "
                f"{config.diffusion.text_encoder.width}"
            )
        self._encoder = [encoder]  # in a list: not a part of this module

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids (B, S) int64 and mask (B, S) bool, False = padding; S is the encoder's longest text."""
        ids, mask = self.tokenizer.encode(captions)
        return torch.from_numpy(ids).long(), torch.from_numpy(mask)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids (B, S) -> (B, S, Dt)."""
        self._encoder[0].to(ids.device)
        with torch.no_grad():
            states: Tensor = self._encoder[0](ids, mask)
        return states
