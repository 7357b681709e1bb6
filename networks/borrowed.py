"""What the backbones made of MONAI's blocks share: layers that are exact on the CPU, and a decoder."""
from collections.abc import Iterable

from torch import Tensor, nn

from networks.base import channels_last
from networks.batchnorm import _is_channels_last
from networks.blocks import BATCH_NORM, INSTANCE_NORM, Conv3d, level_dropout


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that computes in the contiguous layout, as torch's CPU kernel errs by 1e-3 in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.contiguous())
        return out.to(memory_format=channels_last(x.ndim - 2)) if _is_channels_last(x) else out


EXACT = {nn.BatchNorm2d: BATCH_NORM[2], nn.BatchNorm3d: BATCH_NORM[3], nn.GroupNorm: GroupNorm,
         nn.InstanceNorm2d: INSTANCE_NORM[2], nn.InstanceNorm3d: INSTANCE_NORM[3], nn.Conv3d: Conv3d}


def exact(module: nn.Module) -> nn.Module:
    """The module with the suite's layers in place of torch's, of which they are subclasses."""
    for layer in module.modules():
        layer.__class__ = EXACT.get(type(layer), type(layer))
    return module


class Decoder(nn.Module):
    """Stages from coarse to fine, each a module of (the map below, the skip), each followed by channel dropout.

    Args:
        dims: number of spatial dimensions.
        stages: as many as there are skips above the coarsest one.
        dropout: rates of channel dropout, fine to coarse; None or () for none.
    """

    checkpointed = ("stages",)

    def __init__(self, dims: int, stages: Iterable[nn.Module], dropout: tuple[float, ...] | None):
        super().__init__()
        self.stages = exact(nn.ModuleList(stages))
        self.dropout = level_dropout(dims, dropout or (), len(self.stages))

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        x, maps = skips[-1], []
        for stage, skip, dropout in zip(self.stages, reversed(skips[:-1]), reversed(self.dropout), strict=True):
            x = dropout(stage(x, skip))
            maps.append(x)
        return maps[::-1]
