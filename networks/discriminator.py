"""Critics of adversarial methods, which judge the maps that a segmenter predicts, in 2D and 3D.

Convolutions with a kernel of 4 halve every side and double the channels; no critic has a norm. Where several processes
train together each of them judges the whole batch: a critic costs little beside the segmenter.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.blocks import CHANNEL_DROPOUT, CONV

SLOPE = 0.2  # of LeakyReLU where it is negative
WIDTH = 4  # times the segmenter's: the field's critics have 64 channels beside its 16


class Verdict(NamedTuple):
    """Logits of images, (B, classes), and the pooled features under them, (B, channels), both float32 or wider."""

    logits: Tensor
    features: Tensor


class ImageDiscriminator(nn.Module):
    """A class for each image as a whole, from maps and, where wanted, the image that they were predicted of.

    Convolutions of both are summed, three more follow, and the mean over all voxels goes into a linear layer, so that
    any patch will do; the first three levels end in channel dropout.

    Args:
        dims: number of spatial dimensions. maps: channels of the maps.
        images: channels of the image, 0 for a critic that does not see it.
        width: channels of the first level. patch: sides in voxels, as in `halving`.
        classes: logits per image. dropout: rate of the channel dropout.
    """

    def __init__(self, dims: int, maps: int, images: int = 1, width: int = 64, patch: tuple[int, ...] | None = None,
                 classes: int = 2, dropout: float = 0.5):
        super().__init__()
        levels = halving(dims, patch, 4)
        self.map = _convolution(dims, maps, width, levels[0])
        self.image = _convolution(dims, images, width, levels[0]) if images else None
        self.deeper = nn.ModuleList(_convolution(dims, width * 2**level, width * 2**(level + 1), halved)
                                    for level, halved in enumerate(levels[1:]))
        self.activation, self.dropout = nn.LeakyReLU(SLOPE, inplace=True), CHANNEL_DROPOUT[dims](dropout)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, maps: Tensor, image: Tensor | None = None) -> Verdict:
        kind = self.map.weight.dtype  # the segmenter's maps are float32 in any precision
        x = self.map(maps.to(kind))
        if self.image is not None:
            x = x + self.image(image.to(kind))
        for conv in self.deeper:
            x = conv(self.dropout(self.activation(x)))
        features = wide(self.activation(x)).mean(tuple(range(2, x.ndim)))
        return Verdict(wide(self.head(features.to(kind))), features)


class PatchDiscriminator(nn.Module):
    """A logit for each part of an image: fully convolutional, maps (B, maps, *space) -> (B, 1, *coarse), float32.

    Args:
        dims: number of spatial dimensions. maps: channels of the maps.
        width: channels of the first of the five levels. patch: sides in voxels, as in `halving`.
        halvings: how many levels halve the sides.
    """

    def __init__(self, dims: int, maps: int, width: int = 64, patch: tuple[int, ...] | None = None, halvings: int = 5):
        super().__init__()
        channels = (maps, width, 2 * width, 4 * width, 8 * width, 1)
        levels = halving(dims, patch, halvings, len(channels) - 1)
        self.levels = nn.ModuleList(map(_convolution, [dims] * len(levels), channels[:-1], channels[1:], levels))
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        first, *others = self.levels
        x = first(maps.to(first.weight.dtype))  # the segmenter's maps are float32 in any precision
        for conv in others:
            x = conv(self.activation(x))
        return wide(x)


def halving(dims: int, patch: tuple[int, ...] | None, halvings: int, levels: int | None = None) -> list:
    """Per level and axis, whether the side is halved: in the first `halvings` levels, as long as 2 voxels are left.

    `patch` is the sides that the critic will see, None for sides that are never too small; `levels` is `halvings`
    where not given.
    """
    found, sides = [], list(patch) if patch else [2**halvings] * dims
    for level in range(levels or halvings):
        found.append(tuple(level < halvings and side >= 2 for side in sides))
        sides = [side // 2 if halved else side for side, halved in zip(sides, found[-1], strict=True)]
    return found


def _convolution(dims: int, inputs: int, outputs: int, halved: tuple[bool, ...]) -> nn.Module:
    """A convolution that halves some sides (kernel 4) and keeps the others (kernel 3)."""
    kernel, stride = (tuple(pair[half] for half in halved) for pair in ((3, 4), (1, 2)))
    return CONV[dims](inputs, outputs, kernel, stride, padding=1)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 where it has less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sized(build) -> dict:
    """Width and patch of a critic beside the networks that a `networks.Build` makes."""
    spec = getattr(build, "spec", None)  # other builders leave the critic's defaults
    return {"width": WIDTH * spec.width, "patch": spec.patch} if spec else {}


def tell_apart(logits: Tensor, labeled: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of two-class logits that should say 1 for the first `labeled` images, else 0."""
    truth = (torch.arange(len(logits), device=logits.device) < labeled).long()
    return nn.functional.cross_entropy(logits, truth), (logits.argmax(1) == truth).float().mean()


def against(logits: Tensor, truth: float) -> Tensor:
    """Mean binary cross-entropy of logits that should say 0 or 1 everywhere."""
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))
