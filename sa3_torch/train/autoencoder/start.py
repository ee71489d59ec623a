"""Start an autoencoder from the weights of a trained one, also at another stride [T13.1]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sa3_mlx.common.model.config import HEAD_SIZE, ModelConfig, SAMEConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.networks.init import position_query


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Hold the autoencoder of a checkpoint folder and the hash of its weights."""

    folder: Path
    model: SAME
    digest: str

    @classmethod
    def open(cls, folder: Path) -> Start:
        """Open a folder. Raises FileNotFoundError or ValueError for a folder without an autoencoder."""
        model, digest = load_autoencoder(folder)
        return cls(folder=folder, model=model, digest=digest)

    def load_into(self, same: SAME, config: ModelConfig) -> bool:
        """Copy the weights to ``same``, see ``restride``; return whether its stride is that of the start.

        Raises ConfigError for other sizes.
        """
        differing = differences(self.model.config, same.config)
        if self.model.audio_channels != same.audio_channels:
            differing.append(f"audio_channels {self.model.audio_channels}, not {same.audio_channels}")
        if differing:
            raise ConfigError(
                f"{self.folder}: its autoencoder cannot be the start of {config.name}: {'; '.join(differing)}; only "
                "the stride may differ"
            )
        same.load_state_dict(restride(self.model.state_dict(), self.model.config, same.config))
        return self.model.config.stride == same.config.stride


@torch.no_grad()
def restride(weights: Mapping[str, Tensor], old: SAMEConfig, new: SAMEConfig) -> dict[str, Tensor]:
    """Return the weights of an autoencoder of stride ``old.stride`` for one of ``new.stride`` that is otherwise the
    same.

    All of them carry over: no shape depends on the stride, as a group has one latent token, one vector stands for all
    new tokens, and attention knows positions by rotation only. How far heads look back from new tokens, which
    ``init_autoencoder`` spreads over 1..stride, is spread again, by the difference of the two beginnings. What the
    weights do does not carry over: the sound is wrong at first, and running_std has to be measured again.

    Measured on the demo autoencoder, 1024x to 4096x, after 640 steps at 1e-3 (75 s on one core, one seed): loss over
    the last 20 steps, SI-SDR and multi-STFT are .634, -5.6 dB, 2.77 from fresh weights; .680, -6.9 dB, 2.82 from all
    weights as they were; .659, -5.6 dB, 2.70 with heads spread again.
    """
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    for stack, depth in (("encoder", new.encoder_depth), ("decoder", new.decoder_depth)):
        for number in range(depth * new.heads):
            layer, head = divmod(number, new.heads)
            queries = moved[f"{stack}.layers.{layer}.self_attn.to_qkv.weight"]
            rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
            queries[rows, -1] += position_query(number, new.stride) - position_query(number, old.stride)
    return moved


def differences(old: SAMEConfig, new: SAMEConfig) -> list[str]:
    """Name the sizes of a start that a model does not have, but for the stride: "width 64, not 128"."""
    a, b = old.to_dict(), new.to_dict()
    return [f"{name} {a[name]}, not {b[name]}" for name in a if name != "stride" and a[name] != b[name]]
