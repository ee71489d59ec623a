"""Run transformer blocks compiled, or keep only their inputs and compute the rest again in the backward pass.

Both go block by block, so that one graph serves all blocks of a network, and together: what is computed again is
compiled too. Gradients of the second are the same, bit for bit, for a third more arithmetic [T10].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sa3_torch.clap.network import ModulatedBlock
from sa3_torch.dit import DiTBlock
from sa3_torch.same import SAMEBlock

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    DiTBlock: ("forward",),
    SAMEBlock: ("forward", "at"),
    ModulatedBlock: ("forward",),
}


def work_by_blocks(network: nn.Module, *, compiled: bool, checkpointed: bool) -> None:
    """Let the transformer blocks inside ``network`` do so from now on. Names and weights stay.

    Before FSDP2 wraps them, so that they are gathered when they compute again; they draw no random numbers.
    """
    for module in network.modules():
        for name in METHODS.get(type(module), ()):
            call: Callable[..., Any] = getattr(module, name)
            if compiled:
                call = torch.compile(call)
            if checkpointed:
                call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
            setattr(module, name, call)
