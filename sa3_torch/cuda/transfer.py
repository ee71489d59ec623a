"""Move values to a device and back without making the host wait, and read the device's clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Put values on a device: CUDA takes them from pinned memory when it comes to it. On a CPU they are shared."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("values from the host cannot be part of a graph of kernels")
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")


def fetch(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Begin to bring a tensor to the host; what is returned waits for it, and for nothing that was launched later."""
    if tensor.device.type != "cuda":
        values = tensor.cpu().numpy()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # of the pool that PyTorch keeps
    host.copy_(tensor, non_blocking=True)
    copied = mark()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


def mark() -> torch.cuda.Event:
    """Return an event at this place of the device's work."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
    """Return the device's seconds from one mark to a later one, which is waited for."""
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
