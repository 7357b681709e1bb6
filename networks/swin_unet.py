"""Swin-Unet (Cao et al., ECCV 2022 workshops, arXiv 2105.05537): a U-Net of shifted-window attention, no convolutions.

27,165,348 parameters with 4 classes at width 16 and a patch of 224x224, which is the network as released for one image
channel; its finest level has six times the width, 96 channels. In 3D about 30.8 M.
Source: the paper and HiLab-git/SSL4MIS, SwinTransformerSys (the released behavior), which is 2D. Made of MONAI's Swin
blocks and patch merging, without weights from ImageNet.
Differs from the release:
- sides of windows are 7 at 224 only; elsewhere they divide the map, or pad it least, and are as near to 7 as can be;
- sides may be multiples of 16: a side of the third map that is odd is padded for the fourth, and cut on the way back;
- the image is embedded as it is, where a single channel is repeated three times for weights from ImageNet.
"""
import torch
from monai.networks.nets.swin_unetr import PatchMergingV2
from torch import Tensor, nn

from networks import borrowed
from networks.base import Backbone, NetSpec
from networks.blocks import CONV, strides
from networks.swin_unetr import Attention

TOKEN, DEPTH, HEADS = 4, 2, (3, 6, 12, 24)  # side of a token, blocks per level, heads per level
CHANNELS = 6  # of the finest level, in units of the width
WINDOWS = range(5, 10)  # sides of a window, best 7
DROP_PATH = 0.2  # of the bottom's last block; rates rise linearly from 0 at the first


class StochasticDepth(nn.Dropout):
    """Drops all that a residual branch says of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x.new_ones(len(x), *[1] * (x.ndim - 1))) if self.training and self.p else x


class Tokens(nn.Sequential):
    """Layers for (B, *space, C), called with and giving (B, C, *space)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Expand(nn.Module):
    """Every token (B, *space, C) becomes `factor` tokens along each axis by a linear layer; then layer norm."""

    def __init__(self, dims: int, inputs: int, outputs: int, factor: int):
        super().__init__()
        self.parts = (*[factor] * dims, outputs)
        self.linear = nn.Linear(inputs, factor**dims * outputs, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        axes = range(1, x.ndim - 1)
        x = self.linear(x).unflatten(-1, self.parts)
        x = x.permute(0, *(n for axis in axes for n in (axis, axis + len(axes))), -1)
        for axis in axes:
            x = x.flatten(axis, axis + 1)
        return self.norm(x)


class Stage(nn.Module):
    """Expand, concatenate the skip behind, halve the channels by a linear layer, attention."""

    def __init__(self, dims: int, channels: int, attention: Attention):
        super().__init__()
        self.expand = Expand(dims, 2 * channels, channels, 2)
        self.merge, self.attention = nn.Linear(2 * channels, channels), attention

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = self.expand(x.movedim(1, -1)), skip.movedim(1, -1)
        for axis, side in enumerate(skip.shape[1:-1], 1):
            x = x.narrow(axis, 0, side)  # a side that was odd had been padded
        return self.attention(self.merge(torch.cat([x, skip], -1))).movedim(-1, 1)


class Last(Tokens):
    """Tokens to voxels; there is no skip."""

    def forward(self, x: Tensor, skip: None) -> Tensor:
        return super().forward(x)


class Decoder(borrowed.Decoder):
    """Three stages with skips and one to full size without."""

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        return super().forward([None, *skips])


class SwinUnet(Backbone):
    """Tokens of 4 voxels, four levels of windowed attention with patch merging between, and the same backwards.

    Every side of an input must be a multiple of 16; where it is none of 32 the coarsest map is padded. A skip is what
    goes into a level's attention, as released, not what comes out. The encoder's features begin at a quarter.
    """

    head_bias = False

    def __init__(self, spec: NetSpec):
        super().__init__()
        dims, levels = spec.dims, len(HEADS)
        self.spatial_dims, self.patch, self.drop_rates = dims, spec.patch, spec.dropout
        width = CHANNELS * spec.width
        self.encoder_channels = tuple(width * 2**level for level in range(levels))
        self.decoder_channels = (width, *self.encoder_channels[:-1])
        self.encoder_strides = strides(dims, levels + 2)[2:]
        self.multiple = self.encoder_strides[-2]
        merging = [PatchMergingV2(channels, spatial_dims=dims) for channels in self.encoder_channels[:-1]]
        norm = nn.LayerNorm(self.encoder_channels[-1])
        self.stages = self.initialize(nn.ModuleList([
            nn.Sequential(CONV[dims](spec.channels, width, TOKEN, TOKEN), Tokens(nn.LayerNorm(width))),
            *(Tokens(self.attention(level), merging[level]) for level in range(levels - 2)),
            Tokens(self.attention(levels - 2), merging[-1], self.attention(levels - 1), norm)]))
        self.decoder = self.new_decoder()

    def attention(self, level: int) -> Attention:
        """New blocks of a level, whose windows fit its map."""
        window = tuple(window_side(-(-side // (TOKEN * 2**level))) for side in self.patch)
        made = Attention(self.encoder_channels[level], DEPTH, HEADS[level], window, [0.0] * DEPTH, qkv_bias=True,
                         downsample=nn.Identity, use_flash_attention=True)
        rate = DROP_PATH / (DEPTH * len(HEADS) - 1) if self.drop_rates is None else 0.0
        for index, block in enumerate(made.blocks, DEPTH * level):
            block.drop_path = StochasticDepth(rate * index)
        return made

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        """Another decoder; it expands patches whatever is asked for, as it has no other way up."""
        dims, channels = self.spatial_dims, self.encoder_channels
        stages = [Stage(dims, channels[level], self.attention(level)) for level in reversed(range(len(channels) - 1))]
        last = Last(nn.LayerNorm(channels[0]), Expand(dims, channels[0], channels[0], TOKEN))
        return self.initialize(Decoder(dims, [*stages, last], self.drop_rates))

    def initialize(self, module: nn.Module) -> nn.Module:
        """The module with small normal weights and zero biases in its linear layers."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return module


def window_side(side: int) -> int:
    """Side of the windows on a map's axis: the one that pads least, then the one nearest to 7."""
    return side if side <= 7 else min(WINDOWS, key=lambda window: (-side % window, abs(window - 7)))


def backbone(spec: NetSpec) -> SwinUnet:
    """The factory that `networks.backbone` calls."""
    return SwinUnet(spec)
