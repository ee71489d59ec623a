"""Write what a run leaves to look at: ``log.jsonl``, tensorboard, a progress bar, sounds with their spectrograms."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import soundfile as sf
from numpy.typing import NDArray
from tqdm import tqdm

from sa3_mlx.common.files.atomic import WriteError, new_file, write_text
from sa3_mlx.common.files.spectrogram import save_spectrogram
from sa3_mlx.common.terminal import clean

from . import parallel

Row = dict[str, Any]  # JSON values


class RunLog:
    """Log of one run, written by the first process; the others' calls do nothing.

    Keys: a term's name (weighted), "name/raw" (as it was before the weight), "grad_norm/group", "lr/group",
    "update_ratio/group" (|change| / |weights| of an update), "validation/name", "precision/...", "steps_per_second",
    "items_per_second"; "skipped": terms that were not finite; "alarm": what a user should look at now; "revision": the
    source that ran from this step on.
    """

    def __init__(self, folder: Path, name: str, *, step: int, steps: int) -> None:
        self.path = folder / "log.jsonl"
        self._bar: tqdm[Any] | None = None
        self._board: Any = None  # the library is untyped
        if not parallel.is_first():
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logs need tensorboard; install the extra sa3[train]") from error
        self._forget_after(step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=2.0)

    def _forget_after(self, step: int) -> None:
        """Drop rows after the checkpoint that is resumed from, which are written again, and a torn last line."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def write(self, row: Row) -> None:
        """Write a row with its "step"."""
        if self._bar is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise WriteError(self.path, error.strerror or str(error), error.errno) from error
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def advance(self, terms: dict[str, float] | None) -> None:
        """Move one step on; ``terms`` are shown after the bar."""
        if self._bar is not None:
            if terms is not None:
                self._bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items()}, refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        if self._bar is not None:
            tqdm.write(clean(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._board.close()


def save_sound(path: Path, audio: NDArray[np.float32], sample_rate: int, *, title: str) -> None:
    """Write audio (L, channels), clipped to [-1, 1], to ``path`` (.wav), and its spectrogram beside it (.png)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        sf.write(partial, audio.clip(-1, 1), sample_rate, format="WAV")
    save_spectrogram(path.with_suffix(".png"), audio, sample_rate, title=title)
