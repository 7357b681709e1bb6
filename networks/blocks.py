"""Layers by dimension: the dimension is a value, so one file serves 2D and 3D."""
import torch
from torch import Tensor, nn

from networks.batchnorm import BatchNorm2d, BatchNorm3d, channel_sums
from networks.instancenorm import InstanceNorm2d, InstanceNorm3d


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that before a strided 1x1 kernel picks the pixels it sees, on the CPU.

    There oneDNN writes beyond its memory for the gradient of the weight where few channels come in (its issue 6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.kernel_size != (1, 1) or self.stride == (1, 1) or self.padding != (0, 0):
            return super().forward(x)
        picked = nn.functional.avg_pool2d(x, 1, self.stride)
        return nn.functional.conv2d(picked, self.weight, self.bias, groups=self.groups)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that computes in float32 on the CPU where the kernel is longer than one of the map's first two sides.

    There torch 2.13 reads and writes beyond its memory for the gradient of a bfloat16 weight. Such maps are tiny.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        fits = all(side >= size for side, size in zip(x.shape[2:4], self.kernel_size, strict=False))
        if x.device.type != "cpu" or not half or fits:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class _Biased(torch.autograd.Function):
    """The output of a convolution; the bias in it gets its gradient here."""

    @staticmethod
    def forward(ctx, out, bias):
        ctx.dtype = bias.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, channel_sums(grad).to(ctx.dtype)


class _Transposed:
    """A transposed convolution whose bias does not cost more than the rest: torch's sum over voxels is slow."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not self.bias.requires_grad or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        weight, bias = self.weight, self.bias.detach()
        out = UP_FUNCTION[x.ndim - 2](x, weight, bias, self.stride, self.padding, self.output_padding, self.groups,
                                      self.dilation)
        return _Biased.apply(out, self.bias)


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a cheap gradient of its bias on the CPU."""


class ConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a cheap gradient of its bias on the CPU."""


class Layers(nn.Sequential):
    """`nn.Sequential` that lets a norm take the ReLU behind it along, so that both are one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, NORMS) and layers and isinstance(layers[0], nn.ReLU | nn.LeakyReLU):
                x = layer(x, layers.pop(0))
            else:
                x = layer(x)
        return x


CONV = {2: Conv2d, 3: Conv3d}
UP = {2: ConvTranspose2d, 3: ConvTranspose3d}
UP_FUNCTION = {2: nn.functional.conv_transpose2d, 3: nn.functional.conv_transpose3d}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = {2: BatchNorm2d, 3: BatchNorm3d}
INSTANCE_NORM = {2: InstanceNorm2d, 3: InstanceNorm3d}
NORMS = (BatchNorm2d, BatchNorm3d, InstanceNorm2d, InstanceNorm3d)
CHANNEL_DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}


def convolutions(dims: int, count: int, inputs: int, outputs: int) -> Layers:
    """`count` times (3x3 convolution with bias, batch norm, ReLU)."""
    layers = []
    for index in range(count):
        layers += [CONV[dims](inputs if index == 0 else outputs, outputs, 3, padding=1),
                   BATCH_NORM[dims](outputs), nn.ReLU(inplace=True)]
    return Layers(*layers)


def down(dims: int, inputs: int, outputs: int) -> Layers:
    """Strided 2x2 convolution that halves every side, batch norm, ReLU."""
    return Layers(CONV[dims](inputs, outputs, 2, stride=2), BATCH_NORM[dims](outputs), nn.ReLU(inplace=True))


def up(dims: int, inputs: int, outputs: int) -> Layers:
    """Transposed 2x2 convolution that doubles every side, batch norm, ReLU."""
    return Layers(UP[dims](inputs, outputs, 2, stride=2), BATCH_NORM[dims](outputs), nn.ReLU(inplace=True))


def level_dropout(dims: int, rates: tuple[float, ...], levels: int) -> nn.ModuleList:
    """Channel dropout for each of `levels` decoder levels, fine to coarse; levels without a rate have none."""
    return nn.ModuleList(CHANNEL_DROPOUT[dims](rate) for rate in (*rates, *[0.0] * levels)[:levels])


def strides(dims: int, levels: int) -> tuple[tuple[int, ...], ...]:
    """Strides of an encoder that halves every side from level to level."""
    return tuple((2**level,) * dims for level in range(levels))


def kaiming(module: nn.Module) -> nn.Module:
    """The module with He-normal weights in all its convolutions, as several authors begin."""
    return _convolution_weights(module, nn.init.kaiming_normal_)


def xavier(module: nn.Module) -> nn.Module:
    """The module with Glorot-normal weights in all its convolutions, for a second network that starts elsewhere."""
    return _convolution_weights(module, nn.init.xavier_normal_)


def _convolution_weights(module: nn.Module, initialize) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, CONVOLUTIONS):
            initialize(layer.weight)
    return module
