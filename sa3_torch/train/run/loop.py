"""The training loop of every stage: groups in turns, schedules, EMA, precision, checkpoints with exact resume, logs.

Several processes, started by torchrun, take one step together; see parallel.py.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import ConfigError
from sa3_mlx.common.version import revision
from sa3_torch.train.run.planning.timing import time_precisions

from . import parallel
from .blocks import eager, work_by_blocks
from .checkpoints import Checkpoints, RunProgress, Tensors
from .logs import RunLog
from .optimizers import Ema, UpdateRatio, learning_rate_at, make_optimizer, optimizer_tensors, set_rate, take_turn
from .parallel import BatchSlice
from .plot import plot_run
from .settings import Belongings, check_settings, keep_settings
from .stage import Stage, StageConfig

MAX_BAD_STEPS = 10  # non-finite losses or gradients in a row before the run gives up
LOG_EVERY = 10
AVERAGE = "ema"  # the table of a checkpoint


class Trainer:
    """Run a stage in ``folder``: checkpoints/, log.jsonl, loss.png, tensorboard/, demo/ and, at the end, model/ (the
    EMA). Under torchrun every process makes one, with the same arguments.

    ``at``: only to ``export`` the checkpoint of this step; the run, which may go on meanwhile, stays as it is.
    """

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        folder: Path,
        belongings: Belongings,
        *,
        trusted: bool = False,
        at: int | None = None,
    ) -> None:
        self.stage, self.config, self.folder = stage, config.train, folder
        train = config.train
        self.slices = parallel.own_slice().micro_batches(train.accumulate)
        self.slices[0].rows(train.batch)  # raises where the batch cannot be cut so
        stage.slices = self.slices
        self.checkpoints = Checkpoints(folder, train.milestone_every, trusted=trusted)
        if at is None:
            folder.mkdir(parents=True, exist_ok=True)
            keep_settings(folder, config, belongings, resumed=bool(self.checkpoints.steps()))
        else:
            check_settings(folder, config, belongings)
        self.networks = {name: group.network for name, group in stage.groups.items()}
        sharded = torch.distributed.is_initialized() and train.parallel == "fsdp"
        for network in self.networks.values():
            work_by_blocks(network, compiled=train.compile, checkpointed=train.checkpoint_blocks, sharded=sharded)
        self.turns: dict[str, nn.Module] = self._wrap()
        self.optimizers = {name: make_optimizer(group) for name, group in stage.groups.items()}
        self.trained = {name: list(optimizer.state) for name, optimizer in self.optimizers.items()}
        self.ema = Ema(stage.model, self.trained, decay=train.ema_decay, after=train.ema_after, every=train.ema_every)
        self.step = 0
        self.asked = self.stop = False  # asked: by a signal, of this process; stop: what all have agreed on
        self.updates = dict.fromkeys(self.networks, 0)  # turns that each group had
        self.bad_steps = dict.fromkeys(self.networks, 0)  # those that were skipped since its last good one
        self.precision: str | None = None if train.precision == "auto" else train.precision
        self.shown: dict[str, float] = {}  # the latest values of every group, for the log
        self.revision, self.known_revision = revision(), ""  # of the source, now and at the last checkpoint
        self.saved = -1  # step of the checkpoint last written or read
        self.remarks = self._resume(at)

    def _wrap(self) -> dict[str, nn.Module]:
        if not torch.distributed.is_initialized():
            return dict.fromkeys(self.networks, parallel.Turn({}))
        if self.config.parallel == "fsdp":
            return parallel.wrap_fsdp(self.networks, self.stage.device)
        return parallel.wrap_ddp(self.networks)

    def run(self) -> bool:
        """Train to the end, or until SIGTERM or SIGINT ask to stop; True when finished.

        What was asked to stop has a checkpoint to resume from, and says so.
        """
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        feed = self.stage.feed
        if feed is not None:
            feed.start(self.slices)
        try:
            with RunLog(self.folder, self.stage.name, step=self.step, steps=self.config.steps) as log:
                if self.revision != self.known_revision:
                    log.write({"step": self.step, "revision": self.revision})
                for remark in self.remarks:
                    log.say(remark)
                try:
                    self._choose_precision(log)
                    self._loop(log)
                    self.save()
                except (ConfigError, RuntimeError):  # a compiler that blocks wait for has the same signal, and ends
                    if not self.asked or torch.distributed.is_initialized():
                        raise
                    self.stop, self.step = True, max(0, self.saved)
                self.checkpoints.wait()
                if self.stop:
                    log.say(f"stopped at step {self.step} of {self.config.steps}; the same command goes on from there")
        finally:
            self.checkpoints.close()
            if feed is not None:
                feed.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if not self.stop:
            self.export(self.folder / "model")
        return not self.stop

    def _loop(self, log: RunLog) -> None:
        config, seconds, count = self.config, 0.0, 0
        while self.step < config.steps and not self.stop:
            begun = time.perf_counter()
            self._train_step(log)
            seconds, count = seconds + time.perf_counter() - begun, count + 1
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == config.steps:
                speed = {"steps_per_second": count / seconds, "items_per_second": count * config.batch / seconds}
                log.write({"step": self.step, **self.shown, **speed})
                for alarm in self.stage.alarms(self.shown):
                    log.write({"step": self.step, "alarm": alarm})
                    log.say(f"step {self.step}: {alarm}")
                seconds, count = 0.0, 0
            log.advance({name: value for name, value in self.shown.items() if "/" not in name})
            if self.step % config.validate_every == 0 or self.step == config.steps:
                self._evaluate(log)
            if self.step % config.save_every == 0 and not any(self.bad_steps.values()):
                self.save()

    def _train_step(self, log: RunLog) -> None:
        """Take one group's turn: gradients of all micro-batches, clipping, optimiser, EMA."""
        stage, config = self.stage, self.config
        name = stage.turn(self.step)
        optimizer, settings = self.optimizers[name], stage.groups[name].optimizer
        rate = learning_rate_at(settings, step=self.step, steps=config.steps, update=self.updates[name])
        set_rate(optimizer, rate)
        stage.begin(self.step)
        values = self._gradients(name)
        norm = float(parallel.clip(self.trained[name], settings.clip_norm))
        self.updates[name] += 1
        ratio = UpdateRatio(self.trained[name]) if self.updates[name] % LOG_EVERY == 0 else None
        terms = [term for term in values if "/" not in term]
        if math.isfinite(norm) and all(math.isfinite(values[term]) for term in terms):
            self.bad_steps[name] = 0
            optimizer.step()
            self.ema.update(stage.model, self.step)
        else:
            self._skip(log, name, [term for term in terms if not math.isfinite(values[term])] or ["gradient"])
        optimizer.zero_grad(set_to_none=True)
        self.shown |= {**values, f"grad_norm/{name}": norm, f"lr/{name}": rate}
        if ratio is not None:
            self.shown[f"update_ratio/{name}"] = ratio.after()

    def _gradients(self, name: str) -> dict[str, float]:
        """Compute the gradients of a turn; return its terms and notes, averaged over micro-batches and processes."""
        stage, turn, count = self.stage, self.turns[name], len(self.slices)
        take_turn(self.trained, name)
        for network in self.networks.values():
            network.train()
        if count > 1:
            with torch.no_grad():
                turn(lambda: stage.prepare(self.step, self.slices))
        sums: dict[str, Tensor] = {}
        for each in self.slices:
            stage.batch_slice, stage.notes = each, {}
            with parallel.last_micro_batch(turn, each is self.slices[-1]):
                terms = turn(lambda: stage.losses(self.step))
                (torch.stack(list(terms.values())).sum() / count).backward()
            for key, value in {**terms, **stage.notes}.items():
                sums[key] = sums.get(key, 0) + value.detach().float() / count
        return self._agree(sums)

    def _agree(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return means over processes, of pairs the quotient; all stop when one was asked to, or cannot write."""
        asked = torch.tensor([float(self.asked or self.checkpoints.failed)], device=self.stage.device)
        means = parallel.mean(torch.cat([*(value.reshape(-1) for value in sums.values()), asked])).tolist()
        self.stop, found, place = means.pop() > 0, dict[str, float](), iter(means)
        for name, value in sums.items():
            mean, share = next(place), next(place) if value.numel() > 1 else 1.0
            if share:
                found[name] = mean / share
        return found

    def _skip(self, log: RunLog, name: str, bad: list[str]) -> None:
        self.bad_steps[name] += 1
        log.write({"step": self.step, "skipped": bad})
        if self.bad_steps[name] >= MAX_BAD_STEPS:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            last = (
                f"the last good checkpoint is {self.checkpoints.path(kept[-1])}" if kept else "there is no checkpoint"
            )
            raise RuntimeError(
                f"{self.stage.name}: {', '.join(bad)} not finite in {MAX_BAD_STEPS} steps of {name} in a row at step "
                f"{self.step}; {last}; lower the learning rate"
            )

    def _choose_precision(self, log: RunLog) -> None:
        """Take the one in which steps are faster, where it is "auto" and this run has not chosen [T0.3]."""
        if self.precision is None:
            self.stage.batch_slice = self.slices[0]
            seconds = time_precisions(self.stage)
            self.precision = min(seconds, key=seconds.__getitem__)
            log.write({"step": 0, **{f"precision/{name}_step_seconds": value for name, value in seconds.items()}})
            timed = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
            log.say(f"precision auto: a step takes {timed}; {self.precision} it is")
        self.stage.precision = self.precision

    def _evaluate(self, log: RunLog) -> None:
        """Measure and demonstrate the averaged weights, all processes together; the first one writes."""
        stage = self.stage
        with self._averaged():
            measures = stage.validate()
            stage.demo(self.folder / "demo", self.step)
            if parallel.is_first():
                log.write({"step": self.step, **{f"validation/{name}": value for name, value in measures.items()}})
                plot_run(self.folder, stage.name)
                log.say(f"step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in measures.items()))

    def export(self, folder: Path) -> None:
        """Write what the average of the weights makes at this step, for use outside of training."""
        self.ema.swap(self.stage.model)
        weights = parallel.gather(self.stage.model.state_dict())
        self.ema.swap(self.stage.model)
        with self._averaged():
            if parallel.is_first():
                self.stage.export(folder, weights)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Keep the averaged weights in the model, in evaluation mode and whole on every process."""
        stage = self.stage
        stage.batch_slice = BatchSlice()
        self.ema.swap(stage.model)
        for network in self.networks.values():
            network.eval()
        plain = eager(compiled=self.config.compile)
        with parallel.whole_weights(self.turns[stage.turn(self.step)]), torch.no_grad(), plain:
            yield
        self.ema.swap(stage.model)

    def _ask_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def _tensors(self) -> Tensors:
        """Return all that a checkpoint holds, not copies; the EMA and every group's weights, buffers and optimiser."""
        tables: Tensors = {AVERAGE: self.ema.state}
        for name, network in self.networks.items():
            tables[f"weights/{name}"] = network.state_dict()
            tables[f"optimizer/{name}"] = optimizer_tensors(network, self.optimizers[name])
        return tables

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one."""
        if self.step != self.saved:
            assert self.precision is not None  # chosen before the first step
            progress = RunProgress(
                step=self.step,
                updates=self.updates,
                bad_steps=self.bad_steps,
                precision=self.precision,
                revision=self.revision,
                checksums={},
            )
            self.checkpoints.save(self._tensors(), progress, own=frozenset({AVERAGE}))
            self.saved = self.step

    def _resume(self, at: int | None) -> list[str]:
        """Start from the newest good checkpoint, or that of step ``at``; return remarks on damaged ones."""
        progress, remarks = self.checkpoints.load(self._tensors(), at)
        if progress is not None:
            self.step = self.saved = progress.step
            self.updates, self.bad_steps = dict(progress.updates), dict(progress.bad_steps)
            self.precision, self.known_revision = progress.precision, progress.revision or ""
            remarks.append(f"going on from step {self.step}")
        return remarks
