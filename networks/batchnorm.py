"""Batch norm that is exact and fast in channels_last on the CPU, together with the ReLU behind it.

torch's CPU kernel is inexact there (1e-3 of the variance at full-size patches, depending on the number of threads) and
slow where channels are few. `networks.fused` is neither; without numba and for other types the contiguous layout is
exact. Other layouts and devices, and compiled networks, use torch's own batch norm. Where several processes share a
batch its statistics are those of all of them.
"""
from functools import cache

import torch
from torch import Tensor, nn

from networks import ranks


def channels_last(spatial_dims: int) -> torch.memory_format:
    """The memory format that makes convolutions of this dimension fast in half precision."""
    return torch.channels_last_3d if spatial_dims == 3 else torch.channels_last


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=channels_last(x.ndim - 2)) and not x.is_contiguous()


@cache
def _compiled():
    """The module `networks.fused`, or None without numba or where its cache has no place."""
    try:
        from networks import fused
    except (ImportError, RuntimeError):
        return None
    return fused


def channels_last_on_cpu(x: Tensor) -> bool:
    """Whether this is the layout that torch's own norms on the CPU do not keep, or are inexact or slow in."""
    return x.device.type == "cpu" and _is_channels_last(x)


def inexact(x: Tensor) -> bool:
    """Whether torch's own norms of this tensor are inexact or slow, so that another way is due."""
    return not torch.compiler.is_compiling() and channels_last_on_cpu(x)


def fusible(x: Tensor) -> bool:
    """Whether `Normalize` can take an `inexact` tensor."""
    return x.dtype in (torch.float32, torch.bfloat16) and _compiled() is not None


def slope(activation: nn.Module | None) -> float:
    """What negative values are multiplied by in an activation."""
    if activation is None:
        return 1.0
    return activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.0


def channel_sums(x: Tensor) -> Tensor:
    """Sums of (B, C, *space) over all but the channels, (C,) float32 or wider."""
    if inexact(x) and fusible(x):
        return _compiled().column_sums(x)
    return x.sum((0, *range(2, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32))


class Normalize(torch.autograd.Function):
    """Norm and ReLU by statistics of the batch; also returns mean and variance, as `networks.fused.normalize`."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, slope, units):
        out, mean, variance = _compiled().normalize(x, weight, bias, eps, slope, units)
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.settings = eps, slope
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, *others = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=channels_last(x.ndim - 2))
        by_x, *rest = _compiled().gradients(grad, x, weight, *others, *ctx.settings)
        return by_x, *(None if weight is None else g.to(weight.dtype) for g in rest), None, None, None


class _ChannelsLast(torch.autograd.Function):
    """To channels_last, and gradients back: torch's 2D instance norm of one sample errs where only they are in it."""

    @staticmethod
    def forward(ctx, x):
        return x.contiguous(memory_format=channels_last(x.ndim - 2))

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def relaid(norm, x: Tensor) -> Tensor:
    """What torch's own norm makes of a channels_last tensor in the contiguous layout, in channels_last."""
    return _ChannelsLast.apply(norm(x.contiguous()))


class _ExactBatchNorm:
    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        """The norm, and where an activation (a ReLU, leaky or not) is given what it makes of that."""
        usual = self.affine and self.track_running_stats and self.momentum is not None
        if self.training and usual and ranks.in_part():
            out = self._over_processes(x)
        elif not (self.training and usual and inexact(x)):
            out = super().forward(x)
        elif not fusible(x):
            out = relaid(super().forward, x)
        else:
            out, mean, variance = Normalize.apply(x, self.weight, self.bias, self.eps, slope(activation), 1)
            count = x.numel() // x.shape[1]
            self._follow(mean[0], variance[0] * (count / max(count - 1, 1)))
            return out
        return out if activation is None else activation(out)

    def _over_processes(self, x: Tensor) -> Tensor:
        """The norm by the samples of all processes, so that their number does not matter."""
        axes, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        values = ranks.real(wide)
        count = ranks.total(wide.new_full((), values.numel() // x.shape[1]))
        mean = ranks.total(values.sum(axes)) / count
        centered = wide - mean.view(shape)
        variance = ranks.total(ranks.real(centered).square().sum(axes)) / count
        scale = self.weight / (variance + self.eps).sqrt()
        self._follow(mean, variance * (count / (count - 1).clamp(min=1)))
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards a mean and an unbiased variance per channel."""
        self.num_batches_tracked.add_(1)
        for statistic, seen in ((self.running_mean, mean), (self.running_var, variance)):
            # by `data` as torch's kernel does, which saves them for a backward pass that never reads them
            statistic.data.lerp_(seen.to(statistic.dtype), self.momentum)


class BatchNorm2d(_ExactBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with exact batch statistics in channels_last on the CPU."""


class BatchNorm3d(_ExactBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with exact batch statistics in channels_last on the CPU."""
