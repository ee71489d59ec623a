"""Build training stages at full scale without values: their weights are fake tensors, so that plans of runs for many
GPUs are made on a laptop, and from no file but the presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE
from sa3_mlx.common.model.config import LatentClapConfig, ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.same import SAME
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.autoencoder.distill import DistillConfig, DistillStage
from sa3_torch.train.autoencoder.stage import AutoencoderConfig, AutoencoderStage
from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.clap.stage import ClapConfig, ClapStage
from sa3_torch.train.data.clip_cache import ClipSet, Draft, write_clips
from sa3_torch.train.data.latents import LatentItem, LatentSet, write_latents
from sa3_torch.train.demo_set.sets import save_tokenizer
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupConfig, OdeWarmupStage
from sa3_torch.train.few_steps.posttrain import PosttrainConfig, PosttrainStage
from sa3_torch.train.flow.model import diffusion_of, new_model
from sa3_torch.train.flow.pretrain import PretrainConfig, PretrainStage
from sa3_torch.train.run.settings import load_settings
from sa3_torch.train.run.stage import Stage
from sa3_torch.weights import build_part

HASH = "sha256:0"
ITEMS = 4  # of the data, one of which is held out; steps draw them again and again
FLOW, FEW, CLAP = "sa3_torch.train.flow", "sa3_torch.train.few_steps", "sa3_torch.train.clap"
AUTOENCODER = "sa3_torch.train.autoencoder"
_NOISE = tuple(
    f"{module}.item_noise"
    for module in (
        f"{FLOW}.matching",
        f"{FEW}.ode_warmup",
        f"{FEW}.posttrain",
        f"{CLAP}.stage",
        f"{AUTOENCODER}.coder",
        f"{AUTOENCODER}.semantics.terms",
        f"{AUTOENCODER}.semantics.critic",
    )
)


@dataclass(frozen=True)
class FullScale:
    """Name a preset for GPUs and the model that it is for."""

    stage: str
    preset: str
    model: str

    @property
    def name(self) -> str:
        """Return stage and preset as one text."""
        return f"{self.stage} {self.preset}"


FULL_SCALE = (
    FullScale("autoencoder", "same-l", "same-l"),
    FullScale("autoencoder", "same-s", "same-s"),
    FullScale("distill-autoencoder", "same-s", "same-s"),
    *(FullScale("pretrain", size, size) for size in ("small", "medium", "large")),
    FullScale("clap", "full", "medium"),
    *(FullScale(stage, size, size) for stage in ("ode-warmup", "posttrain") for size in ("small", "medium", "large")),
)


def model_of(case: FullScale) -> ModelConfig:
    """Return the configuration of the model that a preset is for."""
    return PRESETS.get(case.model) or PRESETS[{"small": "small-music"}.get(case.model, case.model) + "-base"]


@contextmanager
def built(case: FullScale, folder: Path, *changes: str) -> Iterator[Stage]:
    """Make the stage of a preset in an empty folder, and let it be planned inside; ``changes`` are as of ``--set``."""
    fake = Fakes()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "equal", lambda _a, _b: True))
        stack.enter_context(patch.object(nn.Module, "to", lambda self, *_: self))
        for place, value in _openings(model_of(case), fake).items():
            stack.enter_context(patch(place, value))
        for place in _NOISE:
            stack.enter_context(patch(place, _no_noise))
        yield _MAKERS[case.stage](case, folder, changes, fake)


def _no_noise(rows: slice, shape: tuple[int, ...], *_: object) -> Tensor:
    """Return what has the shape of noise: drawing it takes long on a CPU."""
    return torch.empty(rows.stop - rows.start, *shape)


class Fakes:
    """Make networks whose parameters have shapes only."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __call__(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return what ``make`` makes."""
        with self.mode:
            return make(*args)


def _openings(model: ModelConfig, fake: Fakes) -> dict[str, Any]:
    """Return what stands for reading files, by the place that does it."""

    def diffusion(*_: object) -> nn.Module:
        return fake(new_model, model)

    def opened(*_: object) -> tuple[nn.Module, ModelConfig, SAME]:
        return diffusion(), model, autoencoder(model)

    def autoencoder(config: ModelConfig) -> SAME:
        return fake(build_part, config, "same").eval().requires_grad_(False)

    def encoder(*_: object) -> T5GemmaEncoder:
        return fake(build_part, PRESETS["medium"], "text_encoder").eval().requires_grad_(False)

    return {
        f"{FLOW}.pretrain._start": diffusion,
        f"{FLOW}.model.open_model": opened,
        f"{FLOW}.model.file_hash": lambda _: HASH,
        f"{FEW}.posttrain.open_model": opened,
        f"{FEW}.posttrain.file_hash": lambda _: HASH,
        f"{CLAP}.stage.open_text_encoder": encoder,
        f"{CLAP}.stage.tensors_hash": lambda *_: HASH,
        f"{AUTOENCODER}.stage.SAME": lambda *args: fake(SAME, *args),
        f"{AUTOENCODER}.stage.AutoencoderStage._initialise": lambda *_: False,
        f"{AUTOENCODER}.distill.load_autoencoder": lambda _: (autoencoder(PRESETS["same-l"]), HASH),
        f"{AUTOENCODER}.semantics.captions.load_part": encoder,
    }


def _folder(model: ModelConfig, folder: Path) -> Path:
    """Write what stages read of a model beside its weights."""
    (folder / CONFIG_FILE).write_text(model.to_json(), encoding="utf-8")
    save_tokenizer("music", folder / TOKENIZER_FILE)
    return folder


def _latents(model: ModelConfig, folder: Path) -> LatentSet:
    """Write latents as long as the model takes."""
    frames, channels = diffusion_of(model).max_frames, model.same.latent_channels
    item = LatentItem(
        id="",
        captions=(),
        seconds=frames / model.frames_per_second,
        shard=0,
        offset=0,
        frames=frames,
        kind="user",
        label="user",
        midi=None,
        split="train",
        source="",
    )
    items = [
        replace(item, id=str(n), captions=(f"piano {n}",), split="train" if n < ITEMS - 2 else "validation")
        for n in range(ITEMS)
    ]
    silence = torch.zeros(channels)
    made = ((each, torch.randn(frames, channels)) for each in items)
    return write_latents(folder / "latents", made, silence=silence, autoencoder=HASH)


def _clips(folder: Path) -> ClipSet:
    """Write noise, longer than every crop."""
    random = np.random.default_rng(0)
    drafts = (
        Draft(
            id=str(number),
            captions=(f"piano {number}",),
            kind="user",
            label="user",
            instrument=None,
            midi=None,
            split="train" if number < ITEMS - 1 else "validation",
            audio=random.uniform(-0.5, 0.5, (1 << 18, 2)).astype(np.float32),
        )
        for number in range(ITEMS)
    )
    return write_clips(folder / "clips", drafts, channels=2, about={})


def _autoencoder(case: FullScale, folder: Path, changes: tuple[str, ...], _fake: Fakes) -> Stage:
    own = f"semantics.text_encoder={str(_folder(PRESETS['medium'], folder))!r}"
    config = load_settings(AutoencoderConfig, case.stage, case.preset, (own, *changes))
    return AutoencoderStage(PRESETS[case.model], config, _clips(folder))


def _distill(case: FullScale, folder: Path, changes: tuple[str, ...], _fake: Fakes) -> Stage:
    config = load_settings(DistillConfig, case.stage, case.preset, changes)
    return DistillStage(PRESETS[case.model], config, _clips(folder), folder)


def _pretrain(case: FullScale, folder: Path, changes: tuple[str, ...], fake: Fakes) -> Stage:
    config, model = load_settings(PretrainConfig, case.stage, case.preset, changes), model_of(case)
    same = fake(build_part, model, "same").eval().requires_grad_(False)
    return PretrainStage(model, config, _latents(model, folder), _folder(model, folder) / TOKENIZER_FILE, same, folder)


def _clap(case: FullScale, folder: Path, changes: tuple[str, ...], _fake: Fakes) -> Stage:
    config, model = load_settings(ClapConfig, case.stage, case.preset, changes), model_of(case)
    return ClapStage(_folder(model, folder), config, _latents(model, folder))


def _ode_warmup(case: FullScale, folder: Path, changes: tuple[str, ...], _fake: Fakes) -> Stage:
    config, model = load_settings(OdeWarmupConfig, case.stage, case.preset, changes), model_of(case)
    latents = _latents(model, folder)
    return OdeWarmupStage(_folder(model, folder), config, [*latents.folders])


def _posttrain(case: FullScale, folder: Path, changes: tuple[str, ...], fake: Fakes) -> Stage:
    config, model = load_settings(PosttrainConfig, case.stage, case.preset, changes), model_of(case)
    latents, base = _latents(model, folder), _folder(model, folder)
    text = diffusion_of(model).text_encoder
    tower = load_settings(ClapConfig, "clap", "full", ()).tower
    about = LatentClapConfig(
        tower=tower, latent_channels=latents.channels, text=text, autoencoder=HASH, text_encoder=HASH
    )
    encoder = fake(build_part, model, "text_encoder")
    clap = fake(LatentClap, about, encoder, Tokenizer(base / TOKENIZER_FILE, text.max_length))
    return PosttrainStage(base, base, config, [*latents.folders], clap.eval().requires_grad_(False))


_MAKERS: dict[str, Callable[[FullScale, Path, tuple[str, ...], Fakes], Stage]] = {
    "autoencoder": _autoencoder,
    "distill-autoencoder": _distill,
    "pretrain": _pretrain,
    "clap": _clap,
    "ode-warmup": _ode_warmup,
    "posttrain": _posttrain,
}
