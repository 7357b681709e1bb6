"""The 3D U-Net of SSL4MIS and URPC: instance norm without parameters, max-pooling, linear upsampling.

5,884,050 parameters at width 16 with 2 classes, in 3D. With channel dropout of 0.1, 0.2, 0.3 and 0.5 on the decoder
levels and heads on the first four it is URPC's network, which differs from it in nothing else.
Source: Cicek et al., MICCAI 2016 (the shape); HiLab-git/SSL4MIS, unet_3D and unet_3D_dv_semi (the released behavior).
"""
import torch
from torch import Tensor, nn

from networks.base import Backbone, NetSpec, PatchError
from networks.blocks import CONV, INSTANCE_NORM, UP, Layers, kaiming, level_dropout

LEVELS = 5
DROPOUT = 0.3  # of single values, at the bottom and before the head
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def block(dims: int, inputs: int, outputs: int) -> Layers:
    """Twice: 3x3 convolution with bias, instance norm without parameters, ReLU."""
    layers = []
    for channels in (inputs, outputs):
        layers += [CONV[dims](channels, outputs, 3, padding=1), INSTANCE_NORM[dims](outputs), nn.ReLU(inplace=True)]
    return Layers(*layers)


class Decoder(nn.Module):
    """From coarse to fine: linear upsampling, concatenation behind the skip, block, dropout.

    In place of linear upsampling (corners not aligned) there may be that by the nearest voxel or a transposed 2x2
    convolution to the skip's channels. `dropout` has one module per level, fine to coarse.
    """

    checkpointed = ("level",)

    def __init__(self, dims: int, channels: tuple[int, ...], dropout: nn.ModuleList, upsampling: str):
        super().__init__()
        self.mode, self.dropout = LINEAR[dims] if upsampling == "linear" else upsampling, dropout
        levels = range(len(channels) - 2, -1, -1)
        from_below = channels[:-1] if upsampling == "transposed" else channels[1:]
        self.stages = nn.ModuleList(block(dims, channels[k] + from_below[k], channels[k]) for k in levels)
        if upsampling == "transposed":
            self.ups = nn.ModuleList(UP[dims](channels[k + 1], channels[k], 2, 2) for k in levels)

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        x, maps = skips[-1], []
        for index, skip in enumerate(reversed(skips[:-1])):
            x = self.level(index, x, skip)
            maps.append(x)
        return maps[::-1]

    def level(self, index: int, x: Tensor, skip: Tensor) -> Tensor:
        """One level, counted from the coarsest."""
        if self.mode == "transposed":
            x = self.ups[index](x)
        else:
            x = nn.functional.interpolate(x, size=skip.shape[2:], mode=self.mode)
        return self.dropout[-1 - index](self.stages[index](torch.cat([skip, x], 1)))


class UNet(Backbone):
    """Encoder of five blocks with max-pooling between, and one decoder.

    Every side of an input must be a multiple of 16, and one of them at least 32: instance norm erases a single voxel.
    """

    initialize = staticmethod(kaiming)
    upsamplings = ("linear", "transposed", "nearest")

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.describe_levels(spec, LEVELS)
        self.drop_rates, self.upsampling = spec.dropout, spec.upsampling or self.upsamplings[0]
        if all(side <= multiple for side, multiple in zip(spec.patch, self.multiple, strict=True)):
            raise PatchError(f"patch {list(spec.patch)}: UNet needs a side of at least {2 * self.multiple[0]}")
        inputs = (spec.channels, *self.encoder_channels)
        self.stages = self.initialize(nn.ModuleList(
            block(spec.dims, *pair) for pair in zip(inputs, self.encoder_channels, strict=False)))
        self.pool = POOL[spec.dims](2)
        self.dropout = nn.Dropout(DROPOUT if spec.dropout is None else 0.0)
        self.decoder = self.new_decoder()

    def encode(self, x: Tensor) -> list[Tensor]:
        skips = [self.stages[0](x)]
        for stage in self.stages[1:]:
            skips.append(stage(self.pool(skips[-1])))
        skips[-1] = self.dropout(skips[-1])
        return skips

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        dropout = level_dropout(self.spatial_dims, self.drop_rates or (), LEVELS - 1)
        if self.drop_rates is None:
            dropout[0] = nn.Dropout(DROPOUT)
        upsampling = upsampling or self.upsampling
        return self.initialize(Decoder(self.spatial_dims, self.encoder_channels, dropout, upsampling))


def backbone(spec: NetSpec) -> UNet:
    """The factory that `networks.backbone` calls."""
    return UNet(spec)
