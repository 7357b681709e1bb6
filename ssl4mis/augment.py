"""The field's augmentation: rotation by 90 degrees and a flip in the plane of the first two axes, then a random crop.

All randomness is drawn first; applying is deterministic and runs on the device of the data. Only the crop is ever
rotated: a crop of the rotated volume is a rotated crop of the volume.
Source: UA-MT dataloaders (RandomRotFlip, RandomCrop), also SSL4MIS, DTC, MCF.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("rotflip",)


class View(NamedTuple):
    """A patch of a volume: turn, then crop. `transpose` swaps the first two axes, then `flips` are reversed.

    `start` is the first corner in the turned volume, padded by `margin` zeros on both sides of each axis.
    """

    transpose: bool
    flips: tuple[int, ...]
    start: tuple[int, ...]
    margin: tuple[int, ...]


def rotflip(quarter_turns: int, axis: int) -> tuple[bool, tuple[int, ...]]:
    """`np.rot90(x, quarter_turns)`, then `np.flip(x, axis)`, as (transpose, flips)."""
    flips = {0: set(), 1: {0}, 2: {0, 1}, 3: {1}}[quarter_turns % 4] ^ {axis}
    return quarter_turns % 2 == 1, tuple(sorted(flips))


def margins(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Zeros on both sides of each axis: as soon as one axis is not longer than the patch, every axis may get some."""
    if all(s > p for s, p in zip(size, patch, strict=True)):
        return (0,) * len(size)
    return tuple(max((p - s) // 2 + 3, 0) for s, p in zip(size, patch, strict=True))


def draw(rng: np.random.Generator, size: tuple[int, ...], patch: tuple[int, ...], augmentation) -> View:
    """A random view of a volume of this size; the last possible start is never drawn, as in the authors' code."""
    transpose, flips = False, ()
    if "rotflip" in augmentation:
        transpose, flips = rotflip(int(rng.integers(4)), int(rng.integers(2)))
    turned = (size[1], size[0], *size[2:]) if transpose else tuple(size)
    margin = margins(turned, patch)
    spans = [s + 2 * m - p for s, m, p in zip(turned, margin, patch, strict=True)]
    return View(transpose, flips, tuple(int(rng.integers(max(span, 1))) for span in spans), margin)


def apply(volume: Tensor, view: View, out: Tensor) -> None:
    """Write the view of a volume (*lead, *space) into `out` (*lead, *patch); outside the volume is zero."""
    dims = len(view.start)
    lead = volume.ndim - dims
    if view.transpose:
        volume = volume.transpose(lead, lead + 1)
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for axis in range(dims):
        size, patch = volume.shape[lead + axis], out.shape[lead + axis]
        first = view.start[axis] - view.margin[axis]
        low, high = max(first, 0), min(first + patch, size)
        target.append(slice(low - first, high - first))
        if axis in view.flips:
            low, high = size - high, size - low
        source.append(slice(low, high))
    crop = volume[tuple(source)]
    if crop.shape != out.shape:
        out.zero_()
    out[tuple(target)] = torch.flip(crop, [lead + axis for axis in view.flips]) if view.flips else crop
