"""Attention U-Net (Oktay et al., MIDL 2018, arXiv 1804.03999): gates weigh every skip voxel by voxel.

Made of the blocks of MONAI's `AttentionUnet`, which has no dropout of its own and, unlike the paper, merges with
instance norm and PReLU.
"""
import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.attentionunet import AttentionBlock, ConvBlock, UpConv
from torch import Tensor, nn

from networks.base import Backbone, NetSpec
from networks.borrowed import Decoder, exact

LEVELS = 5


class Stage(nn.Module):
    """Up, gate the skip by what comes from below, merge the two."""

    def __init__(self, dims: int, inputs: int, outputs: int):
        super().__init__()
        self.up = UpConv(dims, inputs, outputs)
        self.gate = AttentionBlock(dims, f_int=outputs // 2, f_g=outputs, f_l=outputs)
        self.merge = Convolution(dims, 2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        return self.merge(torch.cat((self.gate(x, skip), x), 1))


class AttentionUNet(Backbone):
    """Two convolutions per level, strided between levels; gated skips. Sides must be multiples of 16."""

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.describe_levels(spec, LEVELS)
        self.drop_rates = spec.dropout
        inputs = (spec.channels, *self.encoder_channels)
        self.stages = exact(nn.ModuleList(
            ConvBlock(spec.dims, inputs[level], inputs[level + 1], strides=2 if level else 1)
            for level in range(LEVELS)))
        self.decoder = self.new_decoder()

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        channels = self.encoder_channels
        stages = (Stage(self.spatial_dims, channels[level], channels[level - 1]) for level in range(LEVELS - 1, 0, -1))
        return Decoder(self.spatial_dims, stages, self.drop_rates)


def backbone(spec: NetSpec) -> AttentionUNet:
    """The factory that `networks.backbone` calls."""
    return AttentionUNet(spec)
