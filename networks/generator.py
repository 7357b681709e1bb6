"""The adversary that makes images out of noise, in 2D and 3D."""
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from networks.blocks import BATCH_NORM, UP, Layers

LEVELS = 4  # that double every side


class Generator(nn.Module):
    """Noise (B, noise) -> images (B, channels, *patch) in -1 to 1, float32 under any autocast.

    A linear layer fills a coarse grid, a 16th of the patch; four transposed convolutions double its sides and, but for
    the last one, halve the channels; what goes beyond the patch is cut off. So a 3D generator costs little beside a
    segmenter of the same width, any patch will do, and one of 256 x 256 begins with 16 x 16 positions as in SSGAN.

    Args:
        channels: of the images. patch: their sides in voxels.
        width: channels before the last convolution.
        noise: random numbers that an image is made of.
    """

    def __init__(self, channels: int, patch: tuple[int, ...], width: int = 16, noise: int = 100):
        super().__init__()
        self.patch, self.noise, dims = tuple(patch), noise, len(patch)
        self.grid = tuple(-(-side // 2**LEVELS) for side in patch)
        sizes = [width * 2**level for level in reversed(range(LEVELS))]
        self.first = nn.Linear(noise, sizes[0] * prod(self.grid), bias=False)
        layers = []
        for inputs, outputs in zip(sizes, [*sizes[1:], channels], strict=True):
            layers += [BATCH_NORM[dims](inputs), nn.ReLU(inplace=True),
                       UP[dims](inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=outputs == channels)]
        self.layers = Layers(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        with torch.autocast(noise.device.type, enabled=False):  # small, and torch's half types err on tiny maps
            coarse = self.first(noise.to(self.first.weight.dtype)).unflatten(1, (-1, *self.grid))
            return self.layers(coarse)[(..., *map(slice, self.patch))].tanh()


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """A context that leaves a network's running statistics as they were, whatever images it sees in between."""
    buffers = [buffer.data for buffer in net.buffers()]  # by `data`: a backward pass has saved them and reads nothing
    before = [buffer.clone() for buffer in buffers]
    yield
    if buffers:
        torch._foreach_copy_(buffers, before)
