"""Build training stages at full scale from no file but the presets: with weights that have no values, so that runs for
many GPUs are planned on a laptop, or with random ones, so that a GPU is measured without a model and without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, Part
from sa3_mlx.common.model.config import LatentClapConfig, ModelConfig
from sa3_mlx.common.model.precision import choose_precision
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.quant.calibration import CalibrationPrompt, requests, usual_prompts
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.pipeline import Pipeline
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
from sa3_torch.train.lora.stage import LoraConfig, LoraStage
from sa3_torch.train.quantize.stage import QuantizeConfig, QuantizeStage
from sa3_torch.train.run import parallel
from sa3_torch.train.run.settings import Settings, load_settings
from sa3_torch.train.run.stage import Stage, StageConfig
from sa3_torch.trajectory import State
from sa3_torch.weights import build_part

HASH = "sha256:0"
ITEMS = 4  # of the data, one of which is held out; steps draw them again and again
FLOW, FEW, CLAP = "sa3_torch.train.flow", "sa3_torch.train.few_steps", "sa3_torch.train.clap"
AUTOENCODER, QUANTIZE = "sa3_torch.train.autoencoder", "sa3_torch.train.quantize"
SIZES = ("small", "medium", "large")
TEACHERS = {"same-s": PRESETS["same-l"]}  # of autoencoders that are distilled
FIRST_TEXT = diffusion_of(PRESETS["first"]).text_encoder
TEXT_SLOTS = 8  # of the prompts of a quantization
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
    *(FullScale("pretrain", size, size) for size in SIZES),
    FullScale("clap", "full", "medium"),
    *(FullScale(stage, size, size) for stage in ("ode-warmup", "posttrain", "quantize") for size in SIZES),
    FullScale("lora", "released", "medium-base"),
)


def model_of(case: FullScale) -> ModelConfig:
    """Return the configuration of the model that a preset is for."""
    return PRESETS.get(case.model) or PRESETS[{"small": "small-music"}.get(case.model, case.model) + "-base"]


class NetworkMaker(Protocol):
    """Make the networks of a stage that are read from files otherwise."""

    def __call__(self, make: Callable[..., Any], *args: Any) -> Any:
        """Return what ``make`` makes, with weights."""

    def around(self) -> list[AbstractContextManager[object]]:
        """Return what must hold while stages have such weights."""


class WithoutValues:
    """Make networks whose parameters have shapes only, for a plan, on any machine."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __call__(self, make: Callable[..., Any], *args: Any) -> Any:
        with self.mode:
            return make(*args)

    def around(self) -> list[AbstractContextManager[object]]:
        return [
            patch.object(parallel, "own_device", lambda: torch.device("cpu")),
            patch.object(nn.Module, "to", lambda self, *_: self),
            patch(f"{QUANTIZE}.stage.velocity_error", lambda *_: 1.0),
            *(patch(place, _no_noise) for place in _NOISE),
        ]


@dataclass(frozen=True)
class RandomValues:
    """Make networks with random weights on a device, to be trained for a few steps."""

    device: torch.device

    def __call__(self, make: Callable[..., Any], *args: Any) -> Any:
        with self.device:
            made = make(*args)
        randomise(made)
        return made

    def around(self) -> list[AbstractContextManager[object]]:
        return []


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Give a network weights with which activations keep the size of their inputs, as trained ones do."""
    for name, values in network.state_dict().items():
        if values.is_floating_point():
            gain = name.endswith(("gamma", "alpha", "scale", "running_std"))
            values.normal_(1.0 if gain else 0.0, values.shape[-1] ** -0.5 if values.dim() == 2 else 0.02)


@contextmanager
def built(
    case: FullScale, folder: Path, *changes: str, networks: NetworkMaker | None = None, model: ModelConfig | None = None
) -> Iterator[Stage]:
    """Make the stage of a preset in an empty folder, and let it be used inside; ``changes`` are as of ``--set``.

    Without ``networks`` it is for a plan; ``model`` is another one than the preset's.
    """
    make, model = networks or WithoutValues(), model or model_of(case)
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "equal", lambda _a, _b: True))
        for context in make.around():
            stack.enter_context(context)
        for place, value in _openings(model, make).items():
            stack.enter_context(patch(place, value))
        yield _STAGES[case.stage][1](Made(case=case, model=model, folder=folder, changes=changes, make=make))


def _no_noise(rows: slice, shape: tuple[int, ...], *_: object) -> Tensor:
    """Return what has the shape of noise: drawing it takes long on a CPU."""
    return torch.empty(rows.stop - rows.start, *shape)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Hold what a stage is made of."""

    case: FullScale
    model: ModelConfig
    folder: Path
    changes: tuple[str, ...]
    make: NetworkMaker

    def settings(self, kind: type[Settings]) -> Settings:
        """Read the preset."""
        return load_settings(kind, self.case.stage, self.case.preset, self.changes)

    def base(self) -> Path:
        """Write what stages read of a model beside its weights."""
        return _folder(self.model, self.folder)


def _openings(model: ModelConfig, make: NetworkMaker) -> dict[str, Any]:
    """Return what stands for reading files, by the place that does it."""

    def diffusion(*_: object) -> nn.Module:
        return make(new_model, model)

    def frozen(config: ModelConfig, part: Part) -> Any:
        return make(build_part, config, part).eval().requires_grad_(False)

    def opened(*_: object) -> tuple[nn.Module, ModelConfig, SAME]:
        return diffusion(), model, frozen(model, "same")

    def encoder(*_: object) -> T5GemmaEncoder:
        return frozen(model if model.diffusion else PRESETS["medium"], "text_encoder")

    def pipeline(folder: Path, *, dtype: str, device: str) -> Pipeline:
        return Pipeline(folder, model, choose_precision(dtype, dtype, on_gpu=False), torch.device(device))

    return {
        f"{FLOW}.pretrain._start": diffusion,
        f"{FLOW}.model.open_model": opened,
        f"{FLOW}.model.file_hash": lambda _: HASH,
        f"{FEW}.posttrain.open_model": opened,
        f"{FEW}.posttrain.file_hash": lambda _: HASH,
        f"{CLAP}.stage.open_text_encoder": encoder,
        f"{CLAP}.stage.tensors_hash": lambda *_: HASH,
        f"{AUTOENCODER}.stage.SAME": lambda *args: make(SAME, *args),
        f"{AUTOENCODER}.stage.AutoencoderStage._initialise": lambda *_: False,
        f"{AUTOENCODER}.distill.load_autoencoder": lambda _: (frozen(TEACHERS.get(model.name, model), "same"), HASH),
        f"{AUTOENCODER}.semantics.captions.load_part": encoder,
        f"{QUANTIZE}.stage.check_source": lambda _: defaultdict(lambda: "F16"),
        f"{QUANTIZE}.stage.Pipeline.load": pipeline,
        f"{QUANTIZE}.stage.Pipeline._read": lambda self, part, **_: frozen(self.config, part),
        f"{QUANTIZE}.stage.QuantizeStage._visited": _visited,
    }


def _visited(
    stage: QuantizeStage, prompts: tuple[CalibrationPrompt, ...], _number: int, *, held_out: bool
) -> Iterator[State]:
    """Yield states as a teacher's runs have them, with what runs load."""
    model, device = stage.model_config, stage.device
    width, channels = diffusion_of(model).text_encoder.width, model.same.latent_channels
    for part in ("text_encoder", "conditioner", "same"):
        stage.pipeline.load_part(part)
    for request in requests(prompts, model, held_out=held_out):
        planned = plan(request, model)
        items, frames, steps = len(request.items), planned.frames, planned.sampling.steps
        cond = Conditioning(
            context=torch.randn(items, TEXT_SLOTS, width, device=device),
            seconds=torch.randn(items, width, device=device),
            local=torch.zeros(items, 1, 1 + channels, device=device),
            valid=None,
        )
        for index in range(steps):
            x, velocity, end = torch.randn(3, items, frames, channels, device=device)
            t = np.full(items, 1 - index / steps, np.float32)
            yield State(index=index, x=x, t=t, cond=cond, velocity=velocity, end=end)


def _folder(model: ModelConfig, folder: Path) -> Path:
    """Write what stages read of a model beside its weights."""
    (folder / CONFIG_FILE).write_text(model.to_json(), encoding="utf-8")
    save_tokenizer("first" if diffusion_of(model).text_encoder == FIRST_TEXT else "music", folder / TOKENIZER_FILE)
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


def _autoencoder(made: Made) -> Stage:
    config = made.settings(AutoencoderConfig)
    if config.semantics is not None and config.semantics.text_encoder:
        semantics = replace(config.semantics, text_encoder=str(_folder(PRESETS["medium"], made.folder)))
        config = replace(config, semantics=semantics)
    return AutoencoderStage(made.model, config, _clips(made.folder))


def _distill(made: Made) -> Stage:
    return DistillStage(made.model, made.settings(DistillConfig), _clips(made.folder), made.folder)


def _pretrain(made: Made) -> Stage:
    model, base = made.model, made.base()
    same = made.make(build_part, model, "same").eval().requires_grad_(False)
    config, latents = made.settings(PretrainConfig), _latents(model, made.folder)
    return PretrainStage(model, config, latents, base / TOKENIZER_FILE, same, base)


def _clap(made: Made) -> Stage:
    return ClapStage(made.base(), made.settings(ClapConfig), _latents(made.model, made.folder))


def _ode_warmup(made: Made) -> Stage:
    latents = _latents(made.model, made.folder)
    return OdeWarmupStage(made.base(), made.settings(OdeWarmupConfig), [*latents.folders])


def _posttrain(made: Made) -> Stage:
    latents, base = _latents(made.model, made.folder), made.base()
    text = diffusion_of(made.model).text_encoder
    tower = load_settings(ClapConfig, "clap", "full" if made.case.preset in SIZES else made.case.preset, ()).tower
    about = LatentClapConfig(
        tower=tower, latent_channels=latents.channels, text=text, autoencoder=HASH, text_encoder=HASH
    )
    encoder = made.make(build_part, made.model, "text_encoder")
    clap = made.make(LatentClap, about, encoder, Tokenizer(base / TOKENIZER_FILE, text.max_length))
    config = made.settings(PosttrainConfig)
    return PosttrainStage(base, base, config, [*latents.folders], clap.eval().requires_grad_(False))


def _lora(made: Made) -> Stage:
    return LoraStage(made.base(), made.settings(LoraConfig), [*_latents(made.model, made.folder).folders])


def _quantize(made: Made) -> Stage:
    base, config = made.base(), made.settings(QuantizeConfig)
    return QuantizeStage(base, config, usual_prompts(open_tokenizer(base, made.model)))


_STAGES: dict[str, tuple[type[StageConfig], Callable[[Made], Stage]]] = {
    "autoencoder": (AutoencoderConfig, _autoencoder),
    "distill-autoencoder": (DistillConfig, _distill),
    "pretrain": (PretrainConfig, _pretrain),
    "clap": (ClapConfig, _clap),
    "ode-warmup": (OdeWarmupConfig, _ode_warmup),
    "posttrain": (PosttrainConfig, _posttrain),
    "lora": (LoraConfig, _lora),
    "quantize": (QuantizeConfig, _quantize),
}


def settings_of(case: FullScale, *changes: str) -> StageConfig:
    """Read the settings of a preset; ``changes`` are as of ``--set``."""
    return load_settings(_STAGES[case.stage][0], case.stage, case.preset, changes)
