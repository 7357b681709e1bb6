"""The field's augmentation: rotation by 90 degrees and a flip in the plane of the first two axes, then a random crop.

All randomness is drawn first; applying is deterministic and runs on the device of the data. Only the crop is ever
rotated: a crop of the rotated volume is a rotated crop of the volume. Strong views change the intensities of a crop and
leave its geometry alone, so that labels of the crop stay true; boxes to mix two crops are drawn by torch. Planes of
slices protocols are not cropped but resized to the patch, to the nearest voxel and by scipy's arithmetic.
Source: UA-MT dataloaders (RandomRotFlip, RandomCrop), also SSL4MIS, DTC, MCF; for planes, SSL4MIS (RandomGenerator);
for strong views and boxes, what color jitter, blur and CutMix of UniMatch are on gray volumes.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("rotflip", "dihedral", "rotflip_or_rotate")
ANGLES = (-20, 20)  # whole degrees of "rotflip_or_rotate", the last one never drawn
JITTER, BLUR = 0.8, 0.5  # how often a strong view has other intensities, and how often it is blurred
CONTRAST, BRIGHTNESS, SIGMA = (0.5, 1.5), (-0.5, 0.5), (0.1, 2.0)
STRETCH = 0.6  # a box's sides differ by at most exp(2 * STRETCH), 3.3
TRIES = 40  # stretches drawn at once for each box; at a share of 0.4 none of them fits less than once in 1e13


class View(NamedTuple):
    """A patch of a volume: turn, then crop. `transpose` swaps the first two axes, then `flips` are reversed.

    `start` is the first corner in the turned volume, padded by `margin` zeros on both sides of each axis.
    """

    transpose: bool
    flips: tuple[int, ...]
    start: tuple[int, ...]
    margin: tuple[int, ...]


def rotflip(quarter_turns: int, axis: int) -> tuple[bool, tuple[int, ...]]:
    """`np.rot90(x, quarter_turns)`, then `np.flip(x, axis)`, as (transpose, flips).

    Both together are always a reflection: with "rotflip" no training crop is oriented as the scans are, nor as any turn
    of them. Half of the orientations of "dihedral" are.
    """
    flips = {0: set(), 1: {0}, 2: {0, 1}, 3: {1}}[quarter_turns % 4] ^ {axis}
    return quarter_turns % 2 == 1, tuple(sorted(flips))


def orientation(rng: np.random.Generator, augmentation) -> tuple[bool, tuple[int, ...]]:
    """A random (transpose, flips) of the first two axes: the authors' rotation and flip, or any of the square's eight.
    """
    if "rotflip" in augmentation:
        return rotflip(int(rng.integers(4)), int(rng.integers(2)))
    if "dihedral" in augmentation:
        transpose, *flips = map(bool, rng.integers(2, size=3))
        return transpose, tuple(axis for axis, flip in enumerate(flips) if flip)
    return False, ()


def margins(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Zeros on both sides of each axis: as soon as one axis is not longer than the patch, every axis may get some."""
    if all(s > p for s, p in zip(size, patch, strict=True)):
        return (0,) * len(size)
    return tuple(max((p - s) // 2 + 3, 0) for s, p in zip(size, patch, strict=True))


def draw(rng: np.random.Generator, size: tuple[int, ...], patch: tuple[int, ...], augmentation) -> View:
    """A random view of a volume of this size; the last possible start is never drawn, as in the authors' code."""
    transpose, flips = orientation(rng, augmentation)
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


class Plane(NamedTuple):
    """A view of a whole plane: turned by `transpose` and `flips` as in `View` or by `angle` degrees, then resized."""

    transpose: bool = False
    flips: tuple[int, ...] = ()
    angle: int = 0


def draw_plane(rng: np.random.Generator, augmentation) -> Plane:
    """A random view of a plane; with "rotflip_or_rotate" half are rotated and flipped, a quarter is turned a little.

    The last quarter stays as it is: so SS-Net, BCP and, until June 2025, SSL4MIS, hence the published numbers.
    """
    if "rotflip_or_rotate" not in augmentation:
        return Plane(*orientation(rng, augmentation))
    chance = rng.random()
    if chance < 0.5:
        return Plane(*orientation(rng, ("rotflip",)))
    return Plane(angle=int(rng.integers(*ANGLES))) if chance < 0.75 else Plane()


def apply_plane(plane: Tensor, view: Plane, out: Tensor) -> None:
    """Write the view of a plane (*lead, x, y) into `out` (*lead, *patch); what a rotation brings in is zero."""
    if view.angle:
        index, outside = rotation(plane.shape[-2:], view.angle, out.shape[-2:], plane.device)
        out.copy_(plane.flatten(-2).index_select(-1, index).view(out.shape)).masked_fill_(outside, 0)
        return
    if view.transpose:
        plane = plane.transpose(-2, -1)
    if view.flips:
        plane = plane.flip([axis - 2 for axis in view.flips])
    out.copy_(resize(plane, out.shape[-2:]))


def resize(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(*lead, *space) to (*lead, *shape), to the nearest voxel: scipy's `zoom` of order 0.

    Only that a last voxel, which scipy's rounding may push over the edge and fill with zero (at 256 to 216, for
    example), is kept, as scipy does in its mode "nearest".
    """
    for axis, length in enumerate(shape, start=-len(shape)):
        if image.shape[axis] != length:
            image = image.index_select(axis, nearest(image.shape[axis], length, image.device).long())
    return image


def nearest(size: int, length: int, device) -> Tensor:
    """For `length` places from the first to the last of `size` voxels the nearest voxel, (length,) float64."""
    step = (size - 1) / (length - 1) if length > 1 else 1.0
    return (torch.arange(length, device=device, dtype=torch.float64) * step + 0.5).floor_()


def rotation(size: tuple[int, int], angle: int, patch: tuple[int, int], device) -> tuple[Tensor, Tensor]:
    """Where the voxels come from when a plane is rotated about its center and then resized to the patch.

    Returns (patch voxels,) int64, indices into the flattened plane, and (*patch) bool, true where a voxel comes from
    beyond the plane. It is scipy's `rotate` of order 0 without reshaping, then `resize`: float64, one operation after
    the other, so that every device rounds alike.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    last = tuple(length - 1 for length in size)
    x, y = (end / 2 for end in last)
    shift = x - (cos * x + sin * y), y - (cos * y - sin * x)
    rows, columns = nearest(size[0], patch[0], device)[:, None], nearest(size[1], patch[1], device)
    x, y = (rows * cos + columns * sin).add_(shift[0]), (columns * cos - rows * sin).add_(shift[1])
    outside = (x < 0) | (x > last[0]) | (y < 0) | (y > last[1])
    index = x.add_(0.5).floor_().mul_(size[1]).add_(y.add_(0.5).floor_()).masked_fill_(outside, 0)
    return index.long().flatten(), outside


class Strong(NamedTuple):
    """A strong view: contrast is a factor about the mean, brightness is in standard deviations, sigma in voxels."""

    contrast: float = 1.0
    brightness: float = 0.0
    brightness_first: bool = False
    sigma: float = 0.0


def draw_strong(rng: np.random.Generator) -> Strong:
    """A random strong view: contrast and brightness in random order, then blur, either or both of them."""
    strong = Strong()
    if rng.random() < JITTER:
        strong = Strong(rng.uniform(*CONTRAST), rng.uniform(*BRIGHTNESS), bool(rng.integers(2)))
    if rng.random() < BLUR:
        strong = strong._replace(sigma=rng.uniform(*SIGMA))
    return strong


def apply_strong(image: Tensor, strong: Strong) -> Tensor:
    """The strong view of a crop (C, *space) float32; mean and standard deviation are each channel's own.

    Brightness is added, as suits z-scored intensities; UniMatch multiplies its images in [0, 1].
    """
    space = tuple(range(1, image.ndim))
    for brighten in (strong.brightness_first, not strong.brightness_first):
        if brighten and strong.brightness:
            image = image + strong.brightness * image.std(space, keepdim=True)
        elif not brighten and strong.contrast != 1:
            mean = image.mean(space, keepdim=True)
            image = (image - mean) * strong.contrast + mean
    return blur(image, strong.sigma) if strong.sigma else image


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (C, *space), sigma in voxels; edges are repeated and the kernel ends at 4 sigma, as in scipy.

    CUDA may compute it in TF32, with ten bits of mantissa.
    """
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum())[None, None]
    for axis in range(1, image.ndim):
        lines = image.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode="replicate")
        image = F.conv1d(padded, kernel).view(lines.shape).movedim(-1, axis)
    return image.contiguous()


def boxes(count: int, space: tuple[int, ...], probability: float, share: tuple[float, float], device) -> Tensor:
    """Random boxes as masks (count, *space) bool; a mask is empty unless with `probability`.

    A box has a share of all voxels that is uniform in `share`, and sides stretched against each other so that none is
    longer than the patch. torch's generator of the device draws, without waiting for the device: several stretches at
    once, of which the first that fits is taken.
    """
    dims = len(space)
    stretch = torch.empty(count, TRIES, dims, device=device).uniform_(-STRETCH, STRETCH)
    root = torch.empty(count, 1, 1, device=device).uniform_(*share) ** (1 / dims)
    relative = root * torch.exp(stretch - stretch.mean(-1, keepdim=True))
    sides = torch.stack([(relative[..., axis] * side).round() for axis, side in enumerate(space)], -1)
    fits = torch.stack([sides[..., axis] <= side for axis, side in enumerate(space)], -1).all(-1)
    first = fits.int().argmax(1)[:, None, None]
    sides, place = sides.take_along_dim(first, 1)[:, 0], torch.rand(count, dims, device=device)
    mask = (torch.rand(count, device=device) < probability).view(-1, *[1] * dims)
    for axis, side in enumerate(space):
        width = sides[:, axis, None].clamp(max=side)
        start = (place[:, axis, None] * (side - width + 1)).floor()
        voxels = torch.arange(side, device=device)
        inside = (voxels >= start) & (voxels < start + width)
        mask = mask & inside.view(count, *[side if other == axis else 1 for other in range(dims)])
    return mask
