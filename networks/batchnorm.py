"""Batch norm that is exact and fast in channels_last on the CPU.

torch's CPU kernel is inexact there (1e-3 of the variance at full-size patches, depending on the number of threads) and
slow where channels are few. Here a channel's voxels are dealt out to many lanes, each lane is
summed by torch's kernel, and the lanes are combined in float64. Other layouts and devices use torch's own batch norm.
"""
import torch
from torch import Tensor, nn

LANES = 512  # columns to sum side by side: channels times groups of voxels


def _lanes(x: Tensor) -> tuple[Tensor, int]:
    """Channels_last (B, C, *space) as a matrix (rows, groups * C) without a copy, and the number of groups."""
    channels = x.shape[1]
    matrix = x.movedim(1, -1).reshape(-1, channels)
    groups = 1
    while matrix.shape[0] % (2 * groups) == 0 and 2 * groups * channels <= LANES:
        groups *= 2
    return matrix.view(-1, groups * channels), groups


def _is_channels_last(x: Tensor) -> bool:
    last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    return x.is_contiguous(memory_format=last) and not x.is_contiguous()


class _LaneNorm(torch.autograd.Function):
    """Training-mode batch norm of a channels_last tensor; also returns the batch's mean and variance, float64 (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        """x (B, C, *space) channels_last; weight and bias (C,)."""
        lanes, groups = _lanes(x)
        # buffers in float32 make torch return float32 statistics of half-precision inputs too; momentum 0 leaves them
        unused = torch.zeros(2, lanes.shape[1])
        means, variances = torch.batch_norm_update_stats(lanes, unused[0], unused[1], 0.0)
        means, variances = means.double().view(groups, -1), variances.double().view(groups, -1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        out = _affine(lanes, groups, mean, variance, weight, bias, eps)
        ctx.mark_non_differentiable(mean, variance)
        return _like(out, x), mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        """Gradients of x, weight and bias; sums over voxels are taken lane by lane, as in `forward`."""
        x, weight, mean, variance = ctx.saved_tensors
        lanes, groups = _lanes(x)
        if not _is_channels_last(grad):
            grad = grad.contiguous(memory_format=torch.channels_last_3d if x.ndim == 5 else torch.channels_last)
        grads, _ = _lanes(grad.to(x.dtype))
        statistics = [t.float().repeat(groups) for t in (mean, variance)]
        _, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            grads, lanes, weight.repeat(groups), *statistics, *statistics, False, ctx.eps, [False, True, True])
        by_weight, by_bias = by_weight.double().view(groups, -1).sum(0), by_bias.double().view(groups, -1).sum(0)
        count = lanes.numel() // len(mean)
        scale = weight.double() * (variance + ctx.eps).rsqrt()
        # grad_x = scale * (grad - mean(grad) - normalized(x) * mean(grad * normalized(x)))
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        through_x = _affine(grads, groups, zero, one, scale, -scale * by_bias / count, 0.0)
        through_variance = _affine(lanes, groups, mean, variance, -scale * by_weight / count, zero, ctx.eps)
        return _like(through_x + through_variance, x), by_weight.to(weight.dtype), by_bias.to(weight.dtype), None


def _affine(lanes, groups, mean, variance, weight, bias, eps) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in one pass."""
    parameters = [t.float().repeat(groups) for t in (weight, bias, mean, variance)]
    return torch.native_batch_norm(lanes, *parameters, False, 0.0, eps)[0]


def _like(lanes: Tensor, x: Tensor) -> Tensor:
    """A fresh lane matrix as a tensor laid out like x; no autograd view, so that ReLU may work in place."""
    return x.new_empty(0).set_(lanes.untyped_storage(), 0, x.shape, x.stride())


class _ExactBatchNorm:
    def forward(self, x: Tensor) -> Tensor:
        usual = self.affine and self.track_running_stats and self.momentum is not None and x.dtype != torch.float64
        if not (usual and self.training and x.device.type == "cpu" and _is_channels_last(x)):
            return super().forward(x)
        out, mean, variance = _LaneNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), self.momentum)
        return out


class BatchNorm2d(_ExactBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with exact batch statistics in channels_last on the CPU."""


class BatchNorm3d(_ExactBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with exact batch statistics in channels_last on the CPU."""
