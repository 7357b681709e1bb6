"""An nnU-Net: kernels and strides per level follow from patch and spacing.

30,446,256 parameters at width 16 with 2 classes and 6 heads, planned for thin slices in 3D, as in SSL4MIS; nnU-Net
itself has width 32. Channels double per level up to 20 times the width, which is SSL4MIS's 320 at width 16.
Source: Isensee et al., Nature Methods 2021, and nnU-Net's released rules; HiLab-git/SSL4MIS, nnunet (no dropout, no
bias on top).
"""
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.base import Backbone, NetSpec, PatchError
from networks.blocks import CONV, CONVOLUTIONS, INSTANCE_NORM, UP, Layers, level_dropout

SMALLEST = 4  # no axis is pooled below so many voxels
LIMIT = 20  # most channels, in widths
SLOPE = 0.01  # of the leaky ReLU


class Plan(NamedTuple):
    """The shape of an nnU-Net.

    Attributes:
        strides: from each level to the next, per axis.
        kernels: of the convolutions on each level, per axis.
        channels: on each level.
    """

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]


def plan(patch: tuple[int, ...], spacing: tuple[float, ...] | None, width: int) -> Plan:
    """nnU-Net's rules, but sides are halved while they are even, so that no patch needs padding.

    A level halves those axes whose spacing is less than twice the finest one among the axes that keep at least 4
    voxels; a single axis must keep 6. Kernels are 1 along an axis until its spacing is less than twice the finest one,
    and 3 in every direction on the coarsest level. PatchError where no axis can be halved.
    """
    sides, spacing, axes = list(patch), list(spacing or (1.0,) * len(patch)), range(len(patch))
    strides, kernels, kernel = [], [], (1,) * len(patch)
    while large := [a for a in axes if sides[a] >= 2 * SMALLEST and sides[a] % 2 == 0]:
        halved = [a for a in large if spacing[a] / min(spacing[b] for b in large) < 2]
        if len(halved) == 1 and sides[halved[0]] < 3 * SMALLEST:
            break
        kernel = tuple(3 if spacing[a] / min(spacing) < 2 else kernel[a] for a in axes)
        kernels.append(kernel)
        strides.append(tuple(2 if a in halved else 1 for a in axes))
        for axis in halved:
            sides[axis] //= 2
            spacing[axis] *= 2
    if not strides:
        raise PatchError(f"patch {list(patch)}: NNUNet finds no even side of {3 * SMALLEST} or more to halve")
    kernels.append((3,) * len(patch))
    return Plan(tuple(strides), tuple(kernels), tuple(min(2**level, LIMIT) * width for level in range(len(kernels))))


def he(module: nn.Module) -> nn.Module:
    """The module with He-normal weights for leaky ReLUs and zero biases in all its convolutions."""
    for layer in module.modules():
        if isinstance(layer, CONVOLUTIONS):
            nn.init.kaiming_normal_(layer.weight, a=SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def block(dims: int, inputs: int, outputs: int, kernel: tuple[int, ...], stride: int | tuple[int, ...]):
    """Twice: convolution with bias, instance norm with parameters, leaky ReLU; the first convolution is strided."""
    layers = []
    for channels, step in ((inputs, stride), (outputs, 1)):
        layers += [CONV[dims](channels, outputs, kernel, step, padding=tuple(k // 2 for k in kernel)),
                   INSTANCE_NORM[dims](outputs, affine=True), nn.LeakyReLU(SLOPE, inplace=True)]
    return Layers(*layers)


class Decoder(nn.Module):
    """From coarse to fine: transposed convolution without bias, concatenation before the skip, block, channel dropout.

    Its kernels are those of the next coarser level, as in nnU-Net's first version, which SSL4MIS has.
    """

    checkpointed = ("level",)

    def __init__(self, dims: int, plan: Plan, dropout: tuple[float, ...]):
        super().__init__()
        self.stages = nn.ModuleList()
        for level in reversed(range(len(plan.strides))):
            outputs, stride = plan.channels[level], plan.strides[level]
            self.stages.append(UP[dims](plan.channels[level + 1], outputs, stride, stride, bias=False))
            self.stages.append(block(dims, 2 * outputs, outputs, plan.kernels[level + 1], 1))
        self.dropout = level_dropout(dims, dropout, len(plan.strides))

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        x, maps = skips[-1], []
        for index, skip in enumerate(reversed(skips[:-1])):
            x = self.level(index, x, skip)
            maps.append(x)
        return maps[::-1]

    def level(self, index: int, x: Tensor, skip: Tensor) -> Tensor:
        """One level, counted from the coarsest."""
        up, block = self.stages[2 * index], self.stages[2 * index + 1]
        return self.dropout[-1 - index](block(torch.cat([up(x), skip], 1)))


class NNUNet(Backbone):
    """Encoder of strided blocks and one decoder, as planned.

    Every side of an input must be a multiple of the product of its strides. No dropout of its own.
    """

    initialize = staticmethod(he)
    head_bias = False

    def __init__(self, spec: NetSpec, plan: Plan):
        super().__init__()
        self.spatial_dims, self.plan, self.drop_rates = spec.dims, plan, spec.dropout or ()
        self.encoder_channels, self.decoder_channels = plan.channels, plan.channels[:-1]
        steps = ((1,) * spec.dims, *plan.strides)
        self.encoder_strides = tuple(
            tuple(map(prod, zip(*steps[:level + 1], strict=True))) for level in range(len(steps)))
        self.multiple = self.encoder_strides[-1]
        inputs = (spec.channels, *plan.channels[:-1])
        self.stages = self.initialize(nn.ModuleList(
            block(spec.dims, *shape) for shape in zip(inputs, plan.channels, plan.kernels, steps, strict=True)))
        self.decoder = self.new_decoder()

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        return self.initialize(Decoder(self.spatial_dims, self.plan, self.drop_rates))


def backbone(spec: NetSpec) -> NNUNet:
    """The factory that `networks.backbone` calls: as nnU-Net would plan for the patch and its spacing."""
    return NNUNet(spec, plan(spec.patch, spec.spacing, spec.width))
