"""The V-Net of the semi-supervised literature (UA-MT, DTC, MCF, BCP): plain blocks, added skips, channel dropout.

9,448,866 parameters at width 16 with 2 classes, in 3D. It is not Milletari's residual V-Net (MONAI's has 45.6 M).
Source: the network description of Yu et al., MICCAI 2019 (UA-MT), and its released behaviour.
"""
from torch import Tensor, nn

from networks.base import Backbone
from networks.blocks import CHANNEL_DROPOUT, convolutions, down, up

DEPTHS = (1, 2, 3, 3, 3)  # convolutions per encoder stage; the decoder mirrors them without the bottom


class Decoder(nn.Module):
    """Four times: up, add the skip, convolutions; channel dropout at the end."""

    def __init__(self, dims: int, channels: tuple[int, ...], dropout: float):
        super().__init__()
        levels = range(len(channels) - 1, 0, -1)
        self.stages = nn.ModuleList()
        for level in levels:
            self.stages.append(up(dims, channels[level], channels[level - 1]))
            self.stages.append(convolutions(dims, DEPTHS[level - 1], channels[level - 1], channels[level - 1]))
        self.dropout = CHANNEL_DROPOUT[dims](dropout)

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        x, maps = skips[-1], []
        for index, skip in enumerate(reversed(skips[:-1])):
            x = self.stages[2 * index + 1](self.stages[2 * index](x) + skip)
            maps.append(x)
        maps[-1] = self.dropout(x)
        return maps[::-1]


class VNet(Backbone):
    """Encoder of 1, 2, 3, 3, 3 convolutions with strided convolutions between, and one decoder.

    Every side of an input must be a multiple of 16. Dropout zeroes whole channels at the bottom and before the head;
    UA-MT's Monte-Carlo passes live on it.
    """

    multiple = 16

    def __init__(self, channels: int = 1, spatial_dims: int = 3, width: int = 16, dropout: float = 0.5):
        super().__init__()
        self.spatial_dims = spatial_dims
        self.encoder_channels = tuple(width * 2**level for level in range(len(DEPTHS)))
        self.decoder_channels = self.encoder_channels[:-1]
        self.stages = nn.ModuleList()
        for level, depth in enumerate(DEPTHS):
            outputs = self.encoder_channels[level]
            if level:
                self.stages.append(down(spatial_dims, self.encoder_channels[level - 1], outputs))
            self.stages.append(convolutions(spatial_dims, depth, outputs if level else channels, outputs))
        self.drop_rate = dropout
        self.dropout = CHANNEL_DROPOUT[spatial_dims](dropout)
        self.decoder = self.new_decoder()

    def encode(self, x: Tensor) -> list[Tensor]:
        skips = [self.stages[0](x)]
        for shrink, block in zip(self.stages[1::2], self.stages[2::2], strict=True):
            skips.append(block(shrink(skips[-1])))
        skips[-1] = self.dropout(skips[-1])
        return skips

    def new_decoder(self) -> Decoder:
        return Decoder(self.spatial_dims, self.encoder_channels, self.drop_rate)


def backbone(channels: int, spatial_dims: int, width: int) -> VNet:
    """The factory that `networks.backbone` calls."""
    return VNet(channels, spatial_dims, width)
