"""Networks compiled by torch.compile, in place: names in the `state_dict` and random numbers stay."""
import torch
from torch import nn

from networks.base import Branch, SegNet


def compile_networks(model: nn.Module, mode: str = "default", backend: str = "inductor") -> int:
    """Compile every `SegNet` in a model for the shapes that it will see, from its next calls on; returns how many.

    So is every branch, a graph of its own that counts as one. Losses and the rest of a method stay eager, so that what
    cannot be compiled there breaks no graph.

    Args:
        mode: of torch.compile: default, or reduce-overhead for CUDA graphs, whose steps the caller must mark.
        backend: of torch.compile.
    """
    torch._inductor.config.fallback_random = True  # dropout draws the numbers of a run that is not compiled
    nets = [module for module in model.modules() if isinstance(module, SegNet | Branch)]
    for net in nets:
        net.compile(dynamic=False, mode=None if mode == "default" else mode, backend=backend)
    return len(nets)
