"""Measure energy where the system tells it: powermetrics on a Mac (needs sudo), nvidia-smi beside an NVIDIA GPU.

Both report power in samples while the work runs; energy is the sum of power x time. powermetrics counts the chip
(CPU, GPU, neural engine), nvidia-smi the whole card, neither the rest of the computer. Elsewhere there is no number.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

_SAMPLE_MS = 200
_POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power,gpu_power", "-i", str(_SAMPLE_MS))
_NVIDIA = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"-lms={_SAMPLE_MS}")
_ELAPSED = re.compile(r"\(([\d.]+)\s*ms elapsed\)")
_COMBINED = re.compile(r"^Combined Power \(CPU \+ GPU \+ ANE\): (\d+(?:\.\d+)?) mW", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Hold the mean power of some work and how long it took."""

    source: str
    watts: float  # mean over the run
    seconds: float

    @property
    def joules(self) -> float:
        """Return power times time."""
        return self.watts * self.seconds


def parse_powermetrics(text: str) -> float | None:
    """Return the mean power in watts, weighted by the length of each sample; None without a complete sample."""
    energy = total = 0.0
    for block in text.split("*** Sampled system activity")[1:]:
        elapsed, power = _ELAPSED.search(block), _COMBINED.search(block)
        if elapsed and power:
            seconds = float(elapsed[1]) / 1000
            energy += seconds * float(power[1]) / 1000
            total += seconds
    return energy / total if total else None


def parse_nvidia(text: str) -> float | None:
    """Return the mean power in watts over equally spaced lines; None where the card does not tell it."""
    values = [float(line) for line in text.splitlines() if re.fullmatch(r"\s*\d+(\.\d+)?\s*", line)]
    return sum(values) / len(values) if values else None


class EnergyMeter:
    """Measure ``with EnergyMeter(...) as meter: work()``; ``energy`` is None where the system does not tell it."""

    def __init__(self, *, on_cuda: bool) -> None:
        self.energy: Energy | None = None
        self._command: tuple[str, ...] = ()
        if sys.platform == "darwin" and shutil.which("powermetrics"):
            self._command = _POWERMETRICS
        elif on_cuda and shutil.which("nvidia-smi"):
            self._command = _NVIDIA

    def __enter__(self) -> EnergyMeter:
        self._process = None
        if self._command:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._process is None:
            return
        seconds = time.perf_counter() - self._start
        time.sleep(2 * _SAMPLE_MS / 1000)  # the last sample
        self._process.terminate()
        text, _ = self._process.communicate()
        watts = parse_powermetrics(text) if self._command == _POWERMETRICS else parse_nvidia(text)
        if watts is not None:
            name = "powermetrics" if self._command == _POWERMETRICS else "nvidia-smi"
            self.energy = Energy(source=name, watts=watts, seconds=seconds)
