"""Instance norm that stays in channels_last on the CPU, exact and fast, together with the ReLU behind it.

torch's instance norm copies a channels_last tensor to the contiguous layout and leaves it there, so that every
convolution after it copies it back. Its group norm keeps the layout, but is inexact in float32 (1e-4) and slow
backwards in half precision. Other layouts and devices use torch's own instance norm. So do compiled networks, but they
keep the layout, too, in which the dropout behind a norm draws its numbers.
"""
import torch
from torch import Tensor, nn

from networks.batchnorm import Normalize, channels_last_on_cpu, fusible, relaid, slope


class _ExactInstanceNorm:
    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        """The norm, and where an activation (a ReLU, leaky or not) is given what it makes of that."""
        if self.track_running_stats or not channels_last_on_cpu(x):
            out = super().forward(x)
        elif torch.compiler.is_compiling() or not fusible(x):
            out = relaid(super().forward, x)
        else:
            return Normalize.apply(x, self.weight, self.bias, self.eps, slope(activation), len(x))[0]
        return out if activation is None else activation(out)


class InstanceNorm2d(_ExactInstanceNorm, nn.InstanceNorm2d):
    """`nn.InstanceNorm2d` that keeps channels_last on the CPU."""


class InstanceNorm3d(_ExactInstanceNorm, nn.InstanceNorm3d):
    """`nn.InstanceNorm3d` that keeps channels_last on the CPU."""
