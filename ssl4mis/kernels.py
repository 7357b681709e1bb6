"""Distances and connected components on a CUDA device, in Triton, which comes with torch's CUDA builds for Linux.

`ssl4mis.distance` and `ssl4mis.ops` say what they give. Nothing here makes the host wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
LIMIT = 2**30  # of the voxels of a batch and of squared distances: places and sums are int32
CLASSES = 256


def try_out() -> None:
    """Compile and launch every kernel on a few voxels; raises what Triton raises where it cannot."""
    few = torch.ones(1, 2, 2, 2, dtype=torch.uint8, device="cuda")
    signed_squares(few.bool())
    largest_component(few, 3)


def signed_squares(mask: Tensor) -> Tensor | None:
    """The square of `ssl4mis.distance.other_side` with its sign, float64; None where numbers get too large."""
    if mask.numel() >= LIMIT or sum(side**2 for side in mask.shape[1:]) >= LIMIT:
        return None
    squares = torch.where(mask, -LIMIT, LIMIT).to(torch.int32).contiguous()
    with torch.cuda.device_of(mask):
        for axis in range(1, mask.ndim):
            source, squares = squares, torch.empty_like(squares)
            _along[_grid(mask)](source, squares, mask.numel(), mask.shape[axis], source.stride(axis), BLOCK=BLOCK)
    return squares.double().masked_fill(squares.abs() == LIMIT, torch.inf).copysign(squares)


@triton.jit
def _along(source, target, size, side, stride, BLOCK: tl.constexpr):
    """The least over an axis of the values of the other side plus the squared way; all pairs are compared."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + i, mask=i < size, other=0)
    inside, least = value < 0, tl.abs(value)
    place = i // stride % side
    line = source + i - place * stride
    for other in range(side):
        square = tl.load(line + other * stride, mask=i < size, other=0)
        square = tl.maximum(tl.where(inside, -square, square), 0)
        least = tl.minimum(least, square + (place - other) * (place - other))
    tl.store(target + i, tl.where(inside, -least, least), mask=i < size)


def largest_component(label: Tensor, connectivity: int) -> Tensor | None:
    """The largest component of every class and sample; (B, *space) uint8, at most three axes, C order.

    Union-find on voxels: a component's root is its first voxel. None where numbers get too large.
    """
    size = label.numel()
    if size >= LIMIT or label.ndim > 4:
        return None
    shape = (1,) * (4 - label.ndim) + label.shape[1:]
    parent, found = torch.empty_like(label, dtype=torch.int32), torch.empty_like(label)
    count = torch.zeros_like(parent)
    best = torch.zeros(len(label), CLASSES, dtype=torch.int64, device=label.device)
    grid, voxels = _grid(label), size // max(len(label), 1)
    with torch.cuda.device_of(label):
        _begin[grid](label, parent, size, shape[2], BLOCK=BLOCK)
        _merge[grid](label, parent, size, *shape, CONNECTIVITY=connectivity, BLOCK=BLOCK)
        _count[grid](label, parent, count, size, BLOCK=BLOCK)
        _choose[grid](label, parent, count, best, size, voxels, CLASSES=CLASSES, BLOCK=BLOCK)
        _keep[grid](label, parent, best, found, size, voxels, CLASSES=CLASSES, BLOCK=BLOCK)
    return found


def _grid(batch: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(batch.numel(), BLOCK)),)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _begin(label, parent, size, nz, BLOCK: tl.constexpr):
    """Every voxel's parent is the first of its run along z within the block, and that one's the voxel before."""
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + lane
    value = tl.load(label + i, mask=i < size, other=0).to(tl.int32)
    before = tl.load(label + i - 1, mask=(i < size) & (i > 0), other=0)
    first = (i % nz == 0) | (before != value)
    start = tl.associative_scan(tl.where(first, lane, 0), 0, _later)
    above = tl.where((lane == 0) & ~first, i - 1, i - lane + start)
    tl.store(parent + i, above, mask=i < size)


@triton.jit
def _root(parent, i, going):
    """The roots of the voxels that are going; parents are smaller, so this ends whatever other programs do."""
    above = tl.load(parent + i, mask=going, other=0, cache_modifier=".cg")
    going = going & (above != i)
    while tl.max(going.to(tl.int32), 0) > 0:
        i = tl.where(going, above, i)
        above = tl.load(parent + i, mask=going, other=0, cache_modifier=".cg")
        going = going & (above != i)
    return i


@triton.jit
def _join(parent, a, b, going):
    """Joins the components of the pairs that are going.

    What was read may be old by now; what atomic_min gives is not. A voxel that was still a root is joined. Another one
    had a parent, which the lower root may have replaced, so these two are the next pair, both lower than the voxel.
    """
    while tl.max(going.to(tl.int32), 0) > 0:
        a = _root(parent, a, going)
        b = _root(parent, b, going)
        low, high = tl.minimum(a, b), tl.maximum(a, b)
        going = going & (low != high)
        was = tl.atomic_min(parent + high, low, mask=going, sem="relaxed")
        going = going & (was != high)
        a, b = tl.where(going, was, a), tl.where(going, low, b)


@triton.jit
def _merge(label, parent, size, nx, ny, nz, CONNECTIVITY: tl.constexpr, BLOCK: tl.constexpr):
    """Joins every voxel with its neighbors in the rows before its own."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(label + i, mask=i < size, other=0).to(tl.int32)
    inside = value != 0
    z, y, x = i % nz, i // nz % ny, i // nz // ny % nx
    left, right = inside & (z > 0), inside & (z < nz - 1)
    before = left & (tl.load(label + i - 1, mask=left, other=0) == value)
    after = right & (tl.load(label + i + 1, mask=right, other=0) == value)
    up, down, back = inside & (y > 0), inside & (y < ny - 1), inside & (x > 0)
    _touch(label, parent, i, value, i - nz, up, left, right, before, after, 1, CONNECTIVITY)
    behind = i - ny * nz
    _touch(label, parent, i, value, behind, back, left, right, before, after, 1, CONNECTIVITY)
    _touch(label, parent, i, value, behind - nz, back & up, left, right, before, after, 2, CONNECTIVITY)
    _touch(label, parent, i, value, behind + nz, back & down, left, right, before, after, 2, CONNECTIVITY)


@triton.jit
def _touch(label, parent, i, value, j, there, left, right, before, after, APART: tl.constexpr,
           CONNECTIVITY: tl.constexpr):
    """Joins voxels with j and its neighbors along z where it is there, unless their own neighbors along z do the same.

    Args:
        left, right: whether there is a neighbor along z; before, after: whether it has the voxel's value.
        APART: in how many coordinates j differs.
    """
    if APART <= CONNECTIVITY:
        level = there & (tl.load(label + j, mask=there, other=0) == value)
        prior = there & left & (tl.load(label + j - 1, mask=there & left, other=0) == value)
        _join(parent, i, j, level & ~(before & prior))
        if APART < CONNECTIVITY:
            coming = there & right & (tl.load(label + j + 1, mask=there & right, other=0) == value)
            _join(parent, i, j - 1, prior & ~level & ~before)
            _join(parent, i, j + 1, coming & ~level & ~after)


@triton.jit
def _count(label, parent, count, size, BLOCK: tl.constexpr):
    """Every voxel's parent becomes its root, and the root's count its component's size."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.load(label + i, mask=i < size, other=0) != 0
    root = _root(parent, i, inside)
    tl.store(parent + i, root, mask=inside)
    # most blocks meet one component, which gets one sum
    one = tl.max(tl.where(inside, root, -1), 0)
    same = inside & (root == one)
    tl.atomic_add(count + one, tl.sum(same.to(tl.int32), 0), mask=one >= 0, sem="relaxed")
    tl.atomic_add(count + root, 1, mask=inside & ~same, sem="relaxed")


@triton.jit
def _choose(label, parent, count, best, size, voxels, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Puts into best the size and, lower where later, the place of each class's largest component."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(label + i, mask=i < size, other=0).to(tl.int32)
    root = (value != 0) & (tl.load(parent + i, mask=i < size, other=-1) == i)
    rank = (tl.load(count + i, mask=root, other=0).to(tl.int64) << 32) + (size - i)
    tl.atomic_max(best + i // voxels * CLASSES + value, rank, mask=root, sem="relaxed")


@triton.jit
def _keep(label, parent, best, found, size, voxels, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(label + i, mask=i < size, other=0).to(tl.int32)
    inside = value != 0
    root = tl.load(parent + i, mask=inside, other=-1)
    rank = tl.load(best + i // voxels * CLASSES + value, mask=inside, other=0)
    tl.store(found + i, tl.where(root == size - rank.to(tl.int32), value, 0), mask=i < size)
