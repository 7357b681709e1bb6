"""SegResNet (Myronenko, BrainLes 2018, arXiv 1810.11654): residual encoder, slim decoder, no autoencoder branch.

Made of the blocks of MONAI's `SegResNet`; the paper is width 32. It has no dropout of its own, where the paper drops
0.2 of the first convolution's output.
"""
import math

from monai.networks.blocks.segresnet_block import ResBlock, get_conv_layer, get_upsample_layer
from torch import Tensor, nn

from networks.base import Backbone, NetSpec
from networks.borrowed import Decoder, exact

DEPTHS = (1, 2, 2, 4)  # residual blocks per encoder level; the decoder has one per level
GROUPS = 8  # of the group norm; fewer where the width is not divisible by 8


class Stage(nn.Module):
    """1x1 convolution, linear upsampling, add the skip, residual block; before the head also norm and ReLU."""

    def __init__(self, dims: int, outputs: int, groups: int, last: bool):
        super().__init__()
        self.up = nn.Sequential(get_conv_layer(dims, 2 * outputs, outputs, kernel_size=1),
                                get_upsample_layer(dims, outputs))
        self.block = residual(dims, outputs, groups)
        self.end = nn.Sequential(nn.GroupNorm(groups, outputs), nn.ReLU(inplace=True)) if last else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.end(self.block(self.up(x) + skip))


class SegResNet(Backbone):
    """Residual blocks before activation; strided convolutions between levels. Sides must be multiples of 8."""

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.describe_levels(spec, len(DEPTHS))
        self.drop_rates, self.groups = spec.dropout, math.gcd(GROUPS, spec.width)
        self.stages, inputs = nn.ModuleList(), spec.channels
        for level, (depth, outputs) in enumerate(zip(DEPTHS, self.encoder_channels, strict=True)):
            first = get_conv_layer(spec.dims, inputs, outputs, stride=2 if level else 1)
            self.stages.append(nn.Sequential(first, *(residual(spec.dims, outputs, self.groups) for _ in range(depth))))
            inputs = outputs
        exact(self.stages)
        self.decoder = self.new_decoder()

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        stages = (Stage(self.spatial_dims, outputs, self.groups, last=outputs == self.decoder_channels[0])
                  for outputs in reversed(self.decoder_channels))
        return Decoder(self.spatial_dims, stages, self.drop_rates)


def residual(dims: int, channels: int, groups: int) -> ResBlock:
    """Twice (group norm, ReLU, 3x3 convolution), added to the input."""
    return ResBlock(dims, channels, ("group", {"num_groups": groups}))


def backbone(spec: NetSpec) -> SegResNet:
    """The factory that `networks.backbone` calls."""
    return SegResNet(spec)
