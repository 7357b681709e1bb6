"""VoxResNet (Chen et al., NeuroImage 2018, arXiv 1608.05895) as SSL4MIS has it: residual blocks that never get wider.

1,992,578 parameters at width 16 with 2 classes, in 3D: all maps have four times the width, 64 channels as released.
It is not the paper's network, which has 32 and 64 channels, batch norm, strided convolutions in place of max-pooling,
and adds up four classifiers, each behind one deconvolution to full size.
Source: HiLab-git/SSL4MIS, VoxResNet (the released behavior), from which nothing differs.
"""
import torch
from torch import Tensor, nn

from networks import borrowed
from networks.base import Backbone, NetSpec, PatchError
from networks.blocks import CONV, INSTANCE_NORM, UP, Layers, strides
from networks.unet import LINEAR, POOL

LEVELS = 3
CHANNELS = 4  # of all maps, in units of the width


def block(dims: int, inputs: int, outputs: int) -> Layers:
    """Twice: instance norm without parameters, ReLU, 3x3 convolution without bias."""
    layers = []
    for channels in (inputs, outputs):
        layers += [INSTANCE_NORM[dims](channels), nn.ReLU(inplace=True),
                   CONV[dims](channels, outputs, 3, padding=1, bias=False)]
    return Layers(*layers)


class Residual(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.block = block(dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x


def double(dims: int, channels: int, upsampling: str) -> nn.Module:
    """Doubles every side: "linear" (corners aligned), by the "nearest" voxel or a "transposed" 2x2 convolution."""
    if upsampling == "transposed":
        return UP[dims](channels, channels, 2, 2)
    mode, corners = {"linear": (LINEAR[dims], True), "nearest": ("nearest", None)}[upsampling]
    return nn.Upsample(scale_factor=2, mode=mode, align_corners=corners)


class Stage(nn.Module):
    """Upsampling; where there is a skip, concatenation behind it and a block."""

    def __init__(self, dims: int, channels: int, merge: bool, upsampling: str):
        super().__init__()
        self.up = double(dims, channels, upsampling)
        self.block = block(dims, 2 * channels, channels) if merge else None

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.up(x)
        return x if self.block is None else self.block(torch.cat([skip, x], 1))


class Decoder(borrowed.Decoder):
    """Two stages with skips and one to full size without."""

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        return super().forward([None, *skips])


class VoxResNet(Backbone):
    """A convolution at full size, six residual blocks at a half, a quarter and an eighth, max-pooling between.

    The encoder's features begin at half size. Every side of an input must be a multiple of 8, and one of them at least
    16: instance norm erases a single voxel. No dropout of its own.
    """

    upsamplings = ("linear", "transposed", "nearest")

    def __init__(self, spec: NetSpec):
        super().__init__()
        dims, channels = spec.dims, CHANNELS * spec.width
        self.spatial_dims, self.drop_rates = dims, spec.dropout
        self.upsampling = spec.upsampling or self.upsamplings[0]
        self.encoder_channels = self.decoder_channels = (channels,) * LEVELS
        self.encoder_strides = strides(dims, LEVELS + 1)[1:]
        self.multiple = self.encoder_strides[-1]
        if all(side <= multiple for side, multiple in zip(spec.patch, self.multiple, strict=True)):
            raise PatchError(f"patch {list(spec.patch)}: VoxResNet needs a side of at least {2 * self.multiple[0]}")
        self.stages = nn.ModuleList([
            nn.Sequential(CONV[dims](spec.channels, channels, 3, padding=1), POOL[dims](2)),
            nn.Sequential(*self.residuals(), POOL[dims](2)),
            nn.Sequential(*self.residuals(), POOL[dims](2), *self.residuals())])
        self.decoder = self.new_decoder()

    def residuals(self) -> list[Residual]:
        """Two new residual blocks."""
        return [Residual(self.spatial_dims, self.encoder_channels[0]) for _ in range(2)]

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        dims, channels = self.spatial_dims, self.decoder_channels[0]
        stages = (Stage(dims, channels, merge, upsampling or self.upsampling) for merge in (True, True, False))
        return Decoder(dims, stages, self.drop_rates)


def backbone(spec: NetSpec) -> VoxResNet:
    """The factory that `networks.backbone` calls."""
    return VoxResNet(spec)
