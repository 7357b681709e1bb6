"""Activation checkpointing: stages keep what went in, and the backward pass computes what was inside once more.

The result stays the same to the bit: dropout draws the same numbers again, and batch norm counts a batch once.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from networks import ranks


def recompute_stages(model: nn.Module) -> None:
    """Checkpoint every stage of all encoders and decoders in a model from now on.

    Modules name their stages in `checkpointed`: a method is a stage, and so is each module of a list. Names in the
    `state_dict` stay, deep copies are checkpointed too, and without gradients nothing changes.
    """
    for module in list(model.modules()):
        for name in getattr(module, "checkpointed", ()):
            found = getattr(module, name)
            if isinstance(found, nn.ModuleList):
                for stage in found:
                    _checkpoint(stage, "forward")
            else:
                _checkpoint(module, name)


def _checkpoint(module: nn.Module, name: str) -> None:
    """A bound method in a partial: deepcopy follows it to the copy's own module."""
    setattr(module, name, partial(_checkpointed, getattr(module, name)))


def _checkpointed(forward: Callable, *inputs):
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(_Passes(forward), *inputs, use_reentrant=False)


class _Passes:
    """The first call computes, later ones recompute and leave the buffers (running statistics) as they were."""

    def __init__(self, forward: Callable):
        self.forward, self.first = forward, True

    def __call__(self, *inputs):
        if self.first:
            self.first, self.noted = False, ranks.noted()
            return self.forward(*inputs)
        buffers = list(self.forward.__self__.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            with ranks.again(self.noted):
                return self.forward(*inputs)
        finally:  # checkpoint leaves by an exception as soon as it has what it needs
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
