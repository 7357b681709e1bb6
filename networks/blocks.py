"""Layers by dimension: the dimension is a value, so one file serves 2D and 3D."""
import torch
from torch import Tensor, nn

from networks.batchnorm import BatchNorm2d, BatchNorm3d
from networks.instancenorm import InstanceNorm2d, InstanceNorm3d


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that computes in float32 on the CPU where the kernel is longer than the map's first side.

    There torch 2.13 reads and writes beyond its memory for the gradient of a bfloat16 weight. Such maps are tiny.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        if x.device.type != "cpu" or not half or x.shape[2] >= self.kernel_size[0]:
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


CONV = {2: nn.Conv2d, 3: Conv3d}
UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = {2: BatchNorm2d, 3: BatchNorm3d}
INSTANCE_NORM = {2: InstanceNorm2d, 3: InstanceNorm3d}
CHANNEL_DROPOUT = {2: nn.Dropout2d, 3: nn.Dropout3d}


def convolutions(dims: int, count: int, inputs: int, outputs: int) -> nn.Sequential:
    """`count` times (3x3 convolution with bias, batch norm, ReLU)."""
    layers = []
    for index in range(count):
        layers += [CONV[dims](inputs if index == 0 else outputs, outputs, 3, padding=1),
                   BATCH_NORM[dims](outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def down(dims: int, inputs: int, outputs: int) -> nn.Sequential:
    """Strided 2x2 convolution that halves every side, batch norm, ReLU."""
    return nn.Sequential(CONV[dims](inputs, outputs, 2, stride=2), BATCH_NORM[dims](outputs), nn.ReLU(inplace=True))


def up(dims: int, inputs: int, outputs: int) -> nn.Sequential:
    """Transposed 2x2 convolution that doubles every side, batch norm, ReLU."""
    return nn.Sequential(UP[dims](inputs, outputs, 2, stride=2), BATCH_NORM[dims](outputs), nn.ReLU(inplace=True))


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
