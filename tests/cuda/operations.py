"""Count what PyTorch is asked for: every operation by its name, as a GPU would launch it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.lift_fresh.default")  # host and device meet
VIEWS = {
    *("view", "expand", "select", "slice", "unsqueeze", "squeeze", "alias", "transpose", "permute", "detach", "t"),
    *("_unsafe_view", "split", "unbind", "as_strided", "unfold", "split_with_sizes", "_reshape_alias"),
}


class Operations(TorchDispatchMode):
    """Count operations inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.met[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Count those that are more than another view of the same numbers."""
        return sum(count for name, count in self.met.items() if name.split(".")[1] not in VIEWS)

    @property
    def waits(self) -> int:
        """Count those at which the host waits for the device, or brings it values that it keeps."""
        return sum(count for name, count in self.met.items() if name in WAITS)
