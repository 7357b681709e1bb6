"""ENet (Paszke et al., 2016, arXiv 1606.02147): narrow bottlenecks that look far, and unpooling by remembered places.

351,076 parameters at width 16 with 4 classes in 2D (349,284 as released, below; the paper counts 0.37 M with 19
classes), 701,330 with 2 classes in 3D.
Source: the paper and HiLab-git/SSL4MIS, enet (the released behavior), which is 2D.
Differs from the release:
- the last transposed convolution keeps the channels, and a 1x1 head makes the classes of them, both without bias; the
  release goes there at once. The functions are the same, and there are features at the input's size;
- places of maxima are found again in the encoder's features, so that decoders need nothing else;
- in 3D an asymmetric pair has kernels of 5x1x1 and 1x5x5, in 2D of 5x1 and 1x5.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional

from networks import borrowed
from networks.base import Backbone, NetSpec
from networks.blocks import BATCH_NORM, CHANNEL_DROPOUT, CONV, UP, Layers, strides
from networks.unet import POOL

SMALL = 4  # regular bottlenecks at a quarter of the size
PAIR = "asymmetric"
CONTEXT = (1, 2, PAIR, 4, 1, 8, PAIR, 16) * 2  # at an eighth: dilations of 3x3 kernels, or a pair of long kernels
DROPOUT = 0.01, 0.1  # of channels in the bottlenecks of the first encoder stage, and of all others
NARROW = 4  # channels per channel inside a bottleneck
MAX_POOL = {2: functional.max_pool2d, 3: functional.max_pool3d}


def convolved(dims: int, convolutions: list[nn.Module], activation: type[nn.Module], dropout: float) -> Layers:
    """Convolutions, each with batch norm and activation, then channel dropout: a bottleneck's path."""
    layers = []
    for convolution in convolutions:
        layers += [convolution, BATCH_NORM[dims](convolution.out_channels), activation()]
    return Layers(*layers, CHANNEL_DROPOUT[dims](dropout))


class Initial(nn.Module):
    """Strided convolution beside max-pooling of the image, batch norm, PReLU."""

    def __init__(self, dims: int, inputs: int, outputs: int):
        super().__init__()
        self.conv = CONV[dims](inputs, outputs - inputs, 3, 2, padding=1, bias=False)
        self.pool = POOL[dims](3, 2, padding=1)
        self.end = Layers(BATCH_NORM[dims](outputs), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.cat([self.conv(x), self.pool(x)], 1))


class Bottleneck(nn.Module):
    """1x1 convolution to fewer channels, a wide one or a pair of long ones, 1x1 back; added to the input.

    Args:
        dims: number of spatial dimensions.
        channels: in and out.
        kind: dilation of a 3x3 convolution, or `PAIR`.
        activation: class of all activations.
        dropout: rate of channel dropout before the sum.
    """

    def __init__(self, dims: int, channels: int, kind: int | str, activation: type[nn.Module], dropout: float):
        super().__init__()
        conv, inner = CONV[dims], max(1, channels // NARROW)
        if kind == PAIR:
            rest = dims - 1
            middle = [conv(inner, inner, (5, *[1] * rest), padding=(2, *[0] * rest), bias=False),
                      conv(inner, inner, (1, *[5] * rest), padding=(0, *[2] * rest), bias=False)]
        else:
            middle = [conv(inner, inner, 3, padding=kind, dilation=kind, bias=False)]
        path = [conv(channels, inner, 1, bias=False), *middle, conv(inner, channels, 1, bias=False)]
        self.path, self.end = convolved(dims, path, activation, dropout), activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x + self.path(x))


class Down(nn.Module):
    """Strided 2x2 convolution, 3x3, 1x1; added to the max-pooled input, whose missing channels are zero."""

    def __init__(self, dims: int, inputs: int, outputs: int, dropout: float):
        super().__init__()
        conv, inner = CONV[dims], max(1, inputs // NARROW)
        path = [conv(inputs, inner, 2, 2, bias=False), conv(inner, inner, 3, padding=1, bias=False),
                conv(inner, outputs, 1, bias=False)]
        self.path, self.end = convolved(dims, path, nn.PReLU, dropout), nn.PReLU()
        self.pool, self.missing = POOL[dims](2), [0, 0] * dims + [0, outputs - inputs]

    def forward(self, x: Tensor) -> Tensor:
        return self.end(functional.pad(self.pool(x), self.missing) + self.path(x))


class Up(nn.Module):
    """1x1 convolution, transposed 2x2, 1x1; added to the unpooled input; then regular bottlenecks."""

    def __init__(self, dims: int, inputs: int, outputs: int, regular: int, dropout: float):
        super().__init__()
        conv, inner = CONV[dims], max(1, inputs // NARROW)
        path = [conv(inputs, inner, 1, bias=False), UP[dims](inner, inner, 2, 2, bias=False),
                conv(inner, outputs, 1, bias=False)]
        self.path, self.end = convolved(dims, path, nn.ReLU, dropout), nn.ReLU()
        self.main = Layers(conv(inputs, outputs, 1, bias=False), BATCH_NORM[dims](outputs))
        self.blocks = nn.Sequential(*(Bottleneck(dims, outputs, 1, nn.ReLU, dropout) for _ in range(regular)))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(self.end(unpool(self.main(x), skip) + self.path(x)))


class Last(nn.Module):
    """Transposed 3x3 convolution without bias that doubles every side; there is no skip."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.conv = UP[dims](channels, channels, 3, 2, padding=1, output_padding=1, bias=False)

    def forward(self, x: Tensor, skip: None) -> Tensor:
        return self.conv(x)


def unpool(x: Tensor, skip: Tensor) -> Tensor:
    """Twice the size: a value of x stands where its 2x2 cell of the skip has the (first) maximum, zeros elsewhere.

    torch's own is not deterministic on CUDA and does not know bfloat16 on the CPU.
    """
    space = skip.shape[2:]
    place = MAX_POOL[len(space)](skip.detach(), 2, return_indices=True)[1]
    voxel = torch.arange(space.numel(), device=x.device).view([n for side in space for n in (side // 2, 2)])
    for axis in range(3, 3 + 2 * len(space), 2):
        x, place = x.unsqueeze(axis), place.unsqueeze(axis)
    return (x * (place == voxel)).reshape(skip.shape).contiguous(memory_format=borrowed.channels_last(len(space)))


class Decoder(borrowed.Decoder):
    """Two stages that unpool by the skips and one to full size without."""

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        return super().forward([None, *skips])


class ENet(Backbone):
    """An initial block at half size, bottlenecks at a quarter and at an eighth; a decoder of few bottlenecks.

    Every side of an input must be a multiple of 8. The first map has the width's channels, more where the image leaves
    none of them to the convolution beside it. Its own dropout zeroes channels inside every bottleneck.
    """

    head_bias = False

    def __init__(self, spec: NetSpec):
        super().__init__()
        dims, first = spec.dims, max(spec.width, spec.channels + 1)
        self.spatial_dims, self.drop_rates = dims, spec.dropout
        self.encoder_channels = (first, 4 * spec.width, 8 * spec.width)
        self.decoder_channels = (first, first, 4 * spec.width)
        self.encoder_strides = strides(dims, 4)[1:]
        self.multiple = self.encoder_strides[-1]
        light, self.rate = DROPOUT if spec.dropout is None else (0.0, 0.0)
        _, middle, coarse = self.encoder_channels
        self.stages = nn.ModuleList([
            Initial(dims, spec.channels, first),
            nn.Sequential(Down(dims, first, middle, light),
                          *(Bottleneck(dims, middle, 1, nn.PReLU, light) for _ in range(SMALL))),
            nn.Sequential(Down(dims, middle, coarse, self.rate),
                          *(Bottleneck(dims, coarse, kind, nn.PReLU, self.rate) for kind in CONTEXT))])
        self.decoder = self.new_decoder()

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        """Another decoder; it unpools whatever is asked for, since without the remembered places it is no ENet."""
        dims, (first, middle, coarse) = self.spatial_dims, self.encoder_channels
        stages = (Up(dims, coarse, middle, 2, self.rate), Up(dims, middle, first, 1, self.rate), Last(dims, first))
        return Decoder(dims, stages, self.drop_rates)


def backbone(spec: NetSpec) -> ENet:
    """The factory that `networks.backbone` calls."""
    return ENet(spec)
