"""What every network offers: an encoder, one or more decoders, and named heads on top.

A method asks for `SegNet`s with the heads it needs and reads `Output`; it never sees which backbone is inside.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks import ranks
from networks.batchnorm import channels_last  # noqa: F401  (offered here, defined below the blocks)
from networks.blocks import CONV, strides


class PatchError(ValueError):
    """A patch that a backbone cannot take, in one line for the user."""


@dataclass(frozen=True)
class NetSpec:
    """What a backbone is built for.

    Attributes:
        channels: of the image.
        patch: voxels per axis; its length is the number of spatial dimensions.
        width: channels at full resolution.
        spacing: mm per axis; None where all axes are alike.
        dropout: rates of channel dropout after the decoder levels, fine to coarse, in place of all dropout that the
            network has of its own; () for no dropout, None for the network's own.
        upsampling: how its decoder doubles sides, one of the backbone's `upsamplings`; None for the network's own.
    """

    channels: int
    patch: tuple[int, ...]
    width: int = 16
    spacing: tuple[float, ...] | None = None
    dropout: tuple[float, ...] | None = None
    upsampling: str | None = None

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, 2 or 3."""
        return len(self.patch)


class Features(NamedTuple):
    """Feature maps from fine to coarse; `decoder[0]` has the resolution of the input."""

    encoder: Sequence[Tensor]
    decoder: Sequence[Tensor]


class Output(NamedTuple):
    """Maps of every head, (B, K, *space) float32, and the features below them."""

    heads: dict[str, Tensor]
    features: Features

    @property
    def logits(self):
        """The segmentation head's map, (B, classes, *space), before softmax."""
        return self.heads["seg"]


class Backbone(nn.Module):
    """Base of all backbones.

    Attributes:
        spatial_dims: 2 or 3.
        encoder_channels, decoder_channels: channels of `Features`, fine to coarse.
        encoder_strides: per encoder level and axis, voxels of the input per voxel of the feature map.
        multiple: per axis, what the sides of an input must be divisible by.
        head_bias: whether the 1x1 convolutions on top have a bias.
        checkpointed: what `checkpointing.recompute_stages` takes as stages; decoders have this attribute, too.
        upsamplings: three ways in which its decoders can double sides, its own first; None where there is no choice.
    """

    spatial_dims: int
    encoder_channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    encoder_strides: tuple[tuple[int, ...], ...]
    multiple: tuple[int, ...]
    head_bias: bool = True
    checkpointed: tuple[str, ...] = ("stages",)
    upsamplings: tuple[str | None, ...] = (None, None, None)

    def describe_levels(self, spec: NetSpec, levels: int) -> None:
        """Set the attributes of a network that doubles channels and halves sides from each level to the next."""
        self.spatial_dims = spec.dims
        self.encoder_channels = tuple(spec.width * 2**level for level in range(levels))
        self.decoder_channels = self.encoder_channels[:-1]
        self.encoder_strides = strides(spec.dims, levels)
        self.multiple = self.encoder_strides[-1]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image (B, C, *space) -> encoder features, fine to coarse; by default what `stages` give one after another."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def decode(self, skips: list[Tensor]) -> list[Tensor]:
        """Encoder features -> decoder features, fine to coarse."""
        return self.decoder(skips)

    def initialize(self, module: nn.Module) -> nn.Module:
        """The module with the weights that this network begins with, torch's own by default; heads get them too."""
        return module

    def new_decoder(self, upsampling: str | None = None) -> nn.Module:
        """Another decoder with its own weights, for methods with several.

        It doubles sides like the network's own decoder unless `upsampling` is another of the `upsamplings`: transposed,
        linear or nearest. Where there is no choice, since upsampling is part of a borrowed block or planned with the
        encoder's strides, the decoder has the network's own whatever is asked for.
        """
        raise TypeError(f"{type(self).__name__} does not say how it decodes")


class Head(nn.Module):
    """1x1 convolution from one decoder level to a map at the input's resolution.

    Coarser levels (`level` > 0) are upsampled linearly. The map is float32 under any autocast, so losses are too.
    """

    def __init__(self, backbone: Backbone, channels: int, level: int = 0):
        super().__init__()
        self.level = level
        self.mode = "trilinear" if backbone.spatial_dims == 3 else "bilinear"
        conv = CONV[backbone.spatial_dims](backbone.decoder_channels[level], channels, 1, bias=backbone.head_bias)
        self.conv = backbone.initialize(conv)

    def forward(self, features: Features) -> Tensor:
        out = self.conv(features.decoder[self.level]).to(torch.float32, memory_format=torch.contiguous_format)
        if self.level:
            out = nn.functional.interpolate(out, size=features.decoder[0].shape[2:], mode=self.mode)
        return out


Heads = dict[str, int | tuple[int, int]]  # name -> channels, or (channels, decoder level)


def new_heads(backbone: Backbone, heads: Heads) -> nn.ModuleDict:
    """Heads by name for the decoders of a backbone."""
    sizes = {name: size if isinstance(size, tuple) else (size, 0) for name, size in heads.items()}
    return nn.ModuleDict({name: Head(backbone, *size) for name, size in sizes.items()})


class Decoding(nn.Module):
    """Base of what has `heads` on decoder features, which `maps` makes of encoder features."""

    heads: nn.ModuleDict

    def decode(self, skips: Sequence[Tensor]) -> Output:
        """Encoder features, perturbed or not, -> `Output`."""
        if not ranks.active():
            return self._decode(skips)
        if not isinstance(skips, ranks.Shared):  # they were looked at: each process takes its samples again
            skips = ranks.Shared([ranks.share(level) for level in skips], len(skips[0]))
        with ranks.part(skips.samples, skips.own[0].device):
            heads, features = self._decode(skips.own)
        return Output({name: ranks.gather(found, skips.samples) for name, found in heads.items()},
                      Features(skips, ranks.Shared(features.decoder, skips.samples)))

    def _decode(self, skips):
        features = Features(skips, self.maps(skips))
        return Output({name: head(features) for name, head in self.heads.items()}, features)

    def maps(self, skips: list[Tensor]) -> list[Tensor]:
        """Encoder features -> decoder features, fine to coarse."""
        raise TypeError(f"{type(self).__name__} does not say how it decodes")


class Branch(Decoding):
    """Another decoder with heads of its own on the encoder of a `SegNet`: its encoder features -> `Output`."""

    def __init__(self, backbone: Backbone, heads: Heads, upsampling: str | None = None):
        super().__init__()
        self.decoder = backbone.new_decoder(upsampling)
        self.heads = new_heads(backbone, heads)

    def forward(self, skips: Sequence[Tensor]) -> Output:
        return self.decode(skips)

    def maps(self, skips: list[Tensor]) -> list[Tensor]:
        return self.decoder(skips)


class SegNet(Decoding):
    """A backbone with named heads: image (B, C, *space) -> `Output`.

    Methods with several decoders add `branches`, and `net.branches[0](net(image).features.encoder)` is the `Output` of
    the first of them; `forward` leaves them out.
    """

    def __init__(self, backbone: Backbone, heads: Heads):
        super().__init__()
        self.backbone = backbone
        self.heads = new_heads(backbone, heads)
        self.branches = nn.ModuleList()

    def add_branch(self, upsampling: str | None = None, heads: Heads | None = None) -> None:
        """Another decoder as of `Backbone.new_decoder`, by default with heads like those of the network."""
        own = {name: (head.conv.out_channels, head.level) for name, head in self.heads.items()}
        self.branches.append(Branch(self.backbone, own if heads is None else heads, upsampling))

    def forward(self, x: Tensor) -> Output:
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Image -> encoder features, fine to coarse; PatchError if the backbone cannot take its size."""
        check_patch(self.backbone, x.shape[2:])
        if not ranks.active():
            return self.backbone.encode(x)
        with ranks.part(len(x), x.device):
            return ranks.Shared(self.backbone.encode(ranks.share(x)), len(x))

    def maps(self, skips: list[Tensor]) -> list[Tensor]:
        return self.backbone.decode(skips)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """From here on a network is in evaluation mode, without dropout, batch norms as they are; then as before."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)


@torch.no_grad()
def without_learning(net: nn.Module, image: Tensor):
    """What a network in training says in evaluation mode, without gradients."""
    with evaluating(net):
        return net(image)


def check_patch(backbone: Backbone, patch) -> None:
    """PatchError, one line, unless every side of the patch is a multiple of what the backbone halves."""
    if any(side % multiple for side, multiple in zip(patch, backbone.multiple, strict=True)):
        raise PatchError(f"patch {list(patch)}: {type(backbone).__name__} needs multiples of {list(backbone.multiple)}")


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
