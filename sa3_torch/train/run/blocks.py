"""Run transformer blocks compiled, or keep only their inputs and compute the rest again in the backward pass.

Both go block by block, so that one graph serves all blocks of a network, and together: what is computed again is
compiled too. Gradients of the second are the same, bit for bit, for a third more arithmetic [T10].

Compiled are steps, not what is measured and shown between them (``eager``): other lengths would make graphs of their
own, and which of two that fit a batch computes it would depend on what came before, so that a resumed run had other
last bits. For the same reason a graph takes the lengths of its first batch for granted, or none at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sa3_mlx.common.schema import ConfigError
from sa3_torch.clap.network import ModulatedBlock
from sa3_torch.dit import DiTBlock
from sa3_torch.same import SAMEBlock

from .parallel import UNITS

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    DiTBlock: ("forward",),
    SAMEBlock: ("forward", "at"),
    ModulatedBlock: ("forward",),
}
# Latents of a batch are as long as its clips, and one graph serves all lengths; crops of autoencoders are alike.
ANY_LENGTH: dict[type[nn.Module], bool] = {DiTBlock: True, SAMEBlock: False, ModulatedBlock: True}
GRAPHS = 64  # of a method at most; two networks in turns, with and without masks and gradients, have some twenty


def work_by_blocks(network: nn.Module, *, compiled: bool, checkpointed: bool, sharded: bool = False) -> None:
    """Let the transformer blocks inside ``network`` do so from now on. Names and weights stay.

    Before FSDP2 wraps them (``sharded``), so that they are gathered when they compute again; they draw no random
    numbers. Raises ConfigError for compiled blocks of which FSDP2 gathers parts: one graph cannot hold that.
    """
    for module in network.modules():
        if compiled and sharded and type(module) in METHODS and any(type(part) in UNITS for part in _inside(module)):
            raise ConfigError(
                f"train.compile is true with train.parallel 'fsdp', which gathers parts of a {type(module).__name__} "
                "by themselves: set train.compile=false, or train.parallel=ddp where the networks fit"
            )
        for name in METHODS.get(type(module), ()):
            call: Callable[..., Any] = getattr(module, name)
            if compiled:
                call = _compiled(call, any_length=ANY_LENGTH[type(module)])
            if checkpointed:
                call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
            setattr(module, name, call)


def _inside(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if part is not module]


def _compiled(call: Callable[..., Any], *, any_length: bool) -> Callable[..., Any]:
    """Compile as one graph. What cannot be is a ConfigError when it is first called, one line."""
    from torch._dynamo import config, exc  # takes a second

    config.recompile_limit = max(GRAPHS, config.recompile_limit)
    made = torch.compile(call, fullgraph=True, dynamic=any_length)

    @wraps(call)
    def run(*arguments: Any) -> Any:
        try:
            return made(*arguments)
        except exc.TorchDynamoException as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(
                f"train.compile: {call.__qualname__} cannot be compiled here ({reason}); set train.compile=false"
            ) from error

    return run


def eager(*, compiled: bool) -> AbstractContextManager[Any]:
    """Run blocks as they are written inside, where they are compiled."""
    found: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    return found
