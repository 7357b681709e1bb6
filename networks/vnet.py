"""The V-Net of the semi-supervised literature (UA-MT, DTC, MCF, BCP): plain blocks, added skips, channel dropout.

9,448,866 parameters at width 16 with 2 classes, in 3D. It is not Milletari's residual V-Net (MONAI's has 45.6 M).
Source: the network description of Yu et al., MICCAI 2019 (UA-MT), and its released behaviour.
"""
from torch import Tensor, nn

from networks.base import Backbone, NetSpec
from networks.blocks import CHANNEL_DROPOUT, Layers, convolutions, down, level_dropout, up

UPSAMPLINGS = ("transposed", "linear", "nearest")
LINEAR = {2: "bilinear", 3: "trilinear"}
DEPTHS = (1, 2, 3, 3, 3)  # convolutions per encoder stage; the decoder mirrors them without the bottom
DROPOUT = 0.5  # at the bottom and before the head


def enlarge(dims: int, inputs: int, outputs: int, upsampling: str) -> Layers:
    """Transposed 2x2 convolution that doubles every side, batch norm, ReLU, as in most V-Nets.

    As in MC-Net and CML, "linear" (corners aligned) and "nearest" double the sides first, and a 3x3 convolution
    follows. KeyError for other names.
    """
    if upsampling == "transposed":
        return up(dims, inputs, outputs)
    mode, corners = {"linear": (LINEAR[dims], True), "nearest": ("nearest", None)}[upsampling]
    resize = nn.Upsample(scale_factor=2, mode=mode, align_corners=corners)
    return Layers(resize, *convolutions(dims, 1, inputs, outputs))


class Decoder(nn.Module):
    """Four times: up, add the skip, convolutions, channel dropout at the rates given, fine to coarse."""

    checkpointed = ("level",)

    def __init__(self, dims: int, channels: tuple[int, ...], dropout: tuple[float, ...], upsampling: str):
        super().__init__()
        levels = range(len(channels) - 1, 0, -1)
        self.stages = nn.ModuleList()
        for level in levels:
            self.stages.append(enlarge(dims, channels[level], channels[level - 1], upsampling))
            self.stages.append(convolutions(dims, DEPTHS[level - 1], channels[level - 1], channels[level - 1]))
        self.dropout = level_dropout(dims, dropout, len(levels))

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        x, maps = skips[-1], []
        for index, skip in enumerate(reversed(skips[:-1])):
            x = self.level(index, x, skip)
            maps.append(x)
        return maps[::-1]

    def level(self, index: int, x: Tensor, skip: Tensor) -> Tensor:
        """One of the four, counted from the coarsest."""
        up, block = self.stages[2 * index], self.stages[2 * index + 1]
        return self.dropout[-1 - index](block(up(x) + skip))


class VNet(Backbone):
    """Encoder of 1, 2, 3, 3, 3 convolutions with strided convolutions between, and one decoder.

    Every side of an input must be a multiple of 16. Dropout zeroes whole channels at the bottom and before the head;
    UA-MT's Monte-Carlo passes live on it.
    """

    upsamplings = UPSAMPLINGS

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.describe_levels(spec, len(DEPTHS))
        self.stages = nn.ModuleList()
        for level, depth in enumerate(DEPTHS):
            outputs = self.encoder_channels[level]
            if level:
                self.stages.append(down(spec.dims, self.encoder_channels[level - 1], outputs))
            self.stages.append(convolutions(spec.dims, depth, outputs if level else spec.channels, outputs))
        own = spec.dropout is None
        self.drop_rates = (DROPOUT,) if own else spec.dropout
        self.dropout = CHANNEL_DROPOUT[spec.dims](DROPOUT if own else 0.0)
        self.upsampling = spec.upsampling or self.upsamplings[0]
        self.decoder = self.new_decoder()

    def encode(self, x: Tensor) -> list[Tensor]:
        skips = [self.stages[0](x)]
        for shrink, block in zip(self.stages[1::2], self.stages[2::2], strict=True):
            skips.append(block(shrink(skips[-1])))
        skips[-1] = self.dropout(skips[-1])
        return skips

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        return Decoder(self.spatial_dims, self.encoder_channels, self.drop_rates, upsampling or self.upsampling)


def backbone(spec: NetSpec) -> VNet:
    """The factory that `networks.backbone` calls."""
    return VNet(spec)
