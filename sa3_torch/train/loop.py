"""The training loop of every stage: optimiser, schedule, EMA, checkpoints with exact resume, logs, progress.

A stage is a function of (weights, step): its batches and its noise come from counter-based generators keyed by the
step, so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sa3_mlx.spec.config import Config, ConfigError

from .plot import plot_run

MAX_BAD_STEPS = 10  # non-finite losses or gradients in a row before the run gives up
LOG_EVERY = 10


def check(config: Config, low: float, high: float, *names: str) -> None:
    """Raises ConfigError for a field of a settings table outside low..high."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ConfigError(f"{name} is {value!r}: allowed is {allowed}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """What every stage needs."""

    seed: int
    steps: int
    batch: int
    learning_rate: float
    final_learning_rate: float  # reached by a cosine
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    ema_decay: float
    precision: Literal["bf16", "fp32"]
    compile: bool  # torch.compile of network and loss; needs a C++ compiler on a CPU
    save_every: int  # steps
    validate_every: int  # steps

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "seed", "warmup_steps", "weight_decay")
        check(self, 1, math.inf, "steps", "batch", "save_every", "validate_every")
        check(self, 1e-12, math.inf, "learning_rate", "final_learning_rate", "clip_norm")
        check(self, 0, 1 - 1e-12, "beta1", "beta2", "ema_decay")


class Stage(ABC):
    """One training stage: what is trained, on which losses."""

    name: str
    model: nn.Module  # its state is averaged and saved

    @abstractmethod
    def losses(self, step: int) -> dict[str, Tensor]:
        """Weighted terms of a step; their sum is minimised."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measures on held-out data, with the weights now in ``model``."""

    @abstractmethod
    def demo(self, folder: Path, step: int) -> None:
        """Write sounds or pictures of the weights now in ``model``."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the weights now in ``model`` as a checkpoint folder."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, independent of all others."""
    return torch.Generator().manual_seed((seed << 40) ^ (step * 2_654_435_761 + 97))


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` to ``final_learning_rate``."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return warm * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine)


class Ema:
    """Power EMA in fp32: beta_k = min(decay, 1 - (1 + k)^-3/4); buffers are copied (training spec 0.4)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.averaged = {name for name, _ in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        beta = min(self.decay, 1 - (1 + step) ** -0.75)
        for name, tensor in model.state_dict().items():
            if name in self.averaged:
                self.state[name].lerp_(tensor.float(), 1 - beta)
            else:
                self.state[name].copy_(tensor)

    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged weights and those of the model."""
        live = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.state)
        self.state = live


class Trainer:
    """Runs a stage in ``folder``: checkpoint.pt, log.jsonl, loss.png, demo/ and, at the end, model/ (the EMA)."""

    def __init__(self, stage: Stage, config: TrainConfig, folder: Path, settings_json: str) -> None:
        self.stage, self.config, self.folder, self.settings_json = stage, config, folder, settings_json
        folder.mkdir(parents=True, exist_ok=True)
        parameters = [p for p in stage.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.parameters = parameters
        self.ema = Ema(stage.model, config.ema_decay)
        self.step, self.bad_steps, self.stop = 0, 0, False
        if (folder / "checkpoint.pt").is_file():
            self._resume()

    def run(self) -> bool:
        """Train to the end or until SIGTERM / SIGINT; True when finished. Both leave a checkpoint to resume from."""
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.save()
        if self.stop:
            tqdm.write(f"stopped at step {self.step}; the same command goes on from there")
            return False
        self.ema.swap(self.stage.model)
        self.stage.export(self.folder / "model")
        self.ema.swap(self.stage.model)
        return True

    def _loop(self) -> None:
        config, stage = self.config, self.stage
        start = time.time()
        bar = tqdm(total=config.steps, initial=self.step, desc=stage.name, unit="step", mininterval=2.0)
        while self.step < config.steps and not self.stop:
            terms, norm = self._train_step()
            self.step += 1
            bar.update()
            if self.step % LOG_EVERY == 0 or self.step == config.steps:
                values = {name: float(value.detach()) for name, value in terms.items()}
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                lr = self.optimizer.param_groups[0]["lr"]
                self._log({"step": self.step, **values, "grad_norm": norm, "lr": lr, "seconds": time.time() - start})
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self._evaluate()
            if self.step % config.save_every == 0:
                self.save()
        bar.close()

    def _train_step(self) -> tuple[dict[str, Tensor], float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.config, self.step)
        self.stage.model.train()
        terms = self.stage.losses(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        if math.isfinite(norm):
            self.bad_steps = 0
            self.optimizer.step()
            self.ema.update(self.stage.model, self.step)
        else:
            self.bad_steps += 1
            bad = [name for name, value in terms.items() if not torch.isfinite(value)] or ["gradient"]
            self._log({"step": self.step, "skipped": bad})
            if self.bad_steps >= MAX_BAD_STEPS:
                raise RuntimeError(
                    f"{self.stage.name}: {', '.join(bad)} not finite in {MAX_BAD_STEPS} steps in a row at step "
                    f"{self.step}; the last good checkpoint is {self.folder / 'checkpoint.pt'}; lower the learning rate"
                )
        return terms, norm

    def _evaluate(self) -> None:
        self.ema.swap(self.stage.model)
        self.stage.model.eval()
        with torch.no_grad():
            measures = self.stage.validate()
            self.stage.demo(self.folder / "demo", self.step)
        self.ema.swap(self.stage.model)
        self._log({"step": self.step, **{f"validation/{name}": value for name, value in measures.items()}})
        plot_run(self.folder, self.stage.name)
        tqdm.write(f"step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items()))

    def _log(self, row: dict[str, object]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _ask_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stop = True

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename."""
        state = {
            "settings": self.settings_json, "step": self.step, "model": self.stage.model.state_dict(),
            "ema": self.ema.state, "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        part = self.folder / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # what torch raises depends on where the damage is
            raise ValueError(f"{path}: damaged, it cannot be resumed from; remove it to begin anew") from error
        if settings != self.settings_json:
            raise ConfigError(
                f"{self.folder} holds a run with other settings; choose another folder or give the same settings"
            )
        self.stage.model.load_state_dict(state["model"])
        self.ema.state = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


Compiled = Callable[..., Tensor]


def maybe_compile(function: Compiled, enabled: bool) -> Compiled:
    """torch.compile where the configuration asks for it."""
    return torch.compile(function) if enabled else function
