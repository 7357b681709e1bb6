"""The ResVNet of MCF: a ResNet-34 encoder at full resolution under the V-Net's decoder.

17,930,354 parameters at width 16 with 2 classes, in 3D.
Source: Wang et al., CVPR 2023 (MCF), and the released behavior of WYC-321/MCF; He et al., CVPR 2016 (the blocks).
"""
from torch import Tensor, nn

from networks.base import Backbone, NetSpec
from networks.blocks import BATCH_NORM, CONV, Layers, kaiming
from networks.vnet import UPSAMPLINGS, Decoder

DEPTHS = (3, 4, 6, 3)  # residual blocks per stage behind the stem
DROPOUT = 0.5  # before the head


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input; the first one strided.

    Where the shape changes a strided 1x1 convolution with batch norm carries the input over.
    """

    def __init__(self, dims: int, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        conv, norm = CONV[dims], BATCH_NORM[dims]
        self.inner = Layers(
            conv(inputs, outputs, 3, stride, padding=1, bias=False), norm(outputs), nn.ReLU(inplace=True),
            conv(outputs, outputs, 3, padding=1, bias=False), norm(outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential() if same else nn.Sequential(
            conv(inputs, outputs, 1, stride, bias=False), norm(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.inner(x) + self.shortcut(x))


class ResVNet(Backbone):
    """A 7x7 stem without pooling, four residual stages that each halve every side, and the V-Net's decoder.

    Every side of an input must be a multiple of 16. Dropout zeroes whole channels before the head only.
    """

    initialize = staticmethod(kaiming)
    upsamplings = UPSAMPLINGS

    def __init__(self, spec: NetSpec):
        super().__init__()
        self.describe_levels(spec, len(DEPTHS) + 1)
        self.stages = nn.ModuleList([Layers(
            CONV[spec.dims](spec.channels, spec.width, 7, padding=3, bias=False),
            BATCH_NORM[spec.dims](spec.width), nn.ReLU(inplace=True))])
        for inputs, outputs, depth in zip(self.encoder_channels, self.encoder_channels[1:], DEPTHS, strict=False):
            first, others = Residual(spec.dims, inputs, outputs, 2), range(depth - 1)
            self.stages.append(nn.Sequential(first, *(Residual(spec.dims, outputs, outputs) for _ in others)))
        self.initialize(self.stages)
        self.drop_rates = (DROPOUT,) if spec.dropout is None else spec.dropout
        self.upsampling = spec.upsampling or self.upsamplings[0]
        self.decoder = self.new_decoder()

    def new_decoder(self, upsampling: str | None = None) -> Decoder:
        upsampling = upsampling or self.upsampling
        return self.initialize(Decoder(self.spatial_dims, self.encoder_channels, self.drop_rates, upsampling))


def backbone(spec: NetSpec) -> ResVNet:
    """The factory that `networks.backbone` calls."""
    return ResVNet(spec)
