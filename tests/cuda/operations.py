"""Count what PyTorch is asked for: every operation by its name, as a GPU would launch it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKED = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default")
VIEWS = {
    *("view", "expand", "select", "slice", "unsqueeze", "squeeze", "alias", "transpose", "permute", "detach", "t"),
    *("_unsafe_view", "split", "unbind", "as_strided", "unfold", "split_with_sizes", "_reshape_alias", "lift_fresh"),
}


class Operations(TorchDispatchMode):
    """Count operations inside a ``with`` block. The device is "meta", whose tensors have no values."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()
        self.waits = 0  # the host asks for values, or copies in a way for which it has to wait
        self.copies = 0  # between host and device, waited for or not

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(function)
        out = function(*args, **kwargs)
        on_host = isinstance(out, torch.Tensor) and out.device.type == "cpu"
        if name == "aten._to_copy.default" and args[0].device != out.device:
            self.copies += 1
            self.waits += not kwargs.get("non_blocking", False)
        elif name in ASKED and args[0].device.type == "meta":
            self.waits += 1
        elif not on_host:
            self.met[name] += 1
        return out

    @property
    def kernels(self) -> int:
        """Count those on the device that are more than another view of the same numbers."""
        return sum(count for name, count in self.met.items() if name.split(".")[1] not in VIEWS)
