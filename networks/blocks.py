"""Layers by dimension: the dimension is a value, so one file serves 2D and 3D."""
from torch import nn

from networks.batchnorm import BatchNorm2d, BatchNorm3d

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {2: BatchNorm2d, 3: BatchNorm3d}
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
