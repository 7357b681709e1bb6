"""Surface voxels of two masks and their nearest distances, compiled by numba; `ssl4mis.metrics` says what they mean.

A mask becomes one bit per voxel in words of 64 along the last axis, so that a few operations on words find its
surface. Squared distances separate (Felzenszwalb & Huttenlocher 2012): along x every voxel of the joint box gets its
way to the nearest surface voxel of the goal; along y whole rows are compared, which processors do many voxels at a
time; along z only the surface voxels of the start look around. How far they look is bounded by what their neighbors
found, since distances of neighbors differ by at most the way between them. No step is approximate, and the worst
case, masks far apart, is that of the separable transform.

Compiling takes seven seconds of a processor, once per environment: numba keeps the result in `__pycache__` beside this
file or, where that is read-only, in the user's cache (or NUMBA_CACHE_DIR). The kernels hold no state and release the
interpreter lock, so threads can score at the same time.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

ONE = np.uint64(1)
ALL = np.uint64(2**64 - 1)
LAST = np.uint64(63)
PAIRS, FOURS, BYTES, SUM = (np.uint64(0x0101010101010101 * byte) for byte in (0x55, 0x33, 0x0F, 0x01))
SLACK = 1 + 1e-12  # bounds are rounded, distances are not allowed to notice

compiled = njit(cache=True, nogil=True)


class Surface(NamedTuple):
    """Surface voxels of a mask in C order: those of row r along z are z[start[r]:start[r + 1]]."""

    start: np.ndarray
    z: np.ndarray


class Pair(NamedTuple):
    """Voxels of two masks and of both, and their surfaces in the joint box of this shape (x, y, z)."""

    voxels: tuple[int, int, int]
    shape: tuple[int, int, int]
    pred: Surface
    truth: Surface


def pair(pred: np.ndarray, truth: np.ndarray) -> Pair:
    """Counts and surfaces of two masks of one shape, bool or uint8 0/1, with two or three axes."""
    shape = (1,) * (3 - pred.ndim) + pred.shape
    words = _words(pred), _words(truth)
    low, size = _box(*words, shape)
    # beyond an axis that the masks do not have there is no background
    rows = [_rows(bits, shape, low, size, pred.ndim == 2) for bits in words]
    return Pair(_count(*rows), size, Surface(*_surface(rows[0])), Surface(*_surface(rows[1])))


def squared(pair: Pair, spacing=None) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance of every surface voxel to the nearest of the other mask, pred to truth and back, in C order.

    Integers without a spacing, float64 with one (a positive number per axis of the masks). Neither mask is empty.
    """
    unit = spacing is None
    shape = (*pair.shape[:2], -(-pair.shape[2] // 32) * 32)  # rows of a width that processors take at once
    steps = np.ones(3) if unit else np.concatenate([np.ones(3 - len(spacing)), spacing])
    along_y, along_z = ((np.arange(n) * step) ** 2 for n, step in zip(shape[1:], steps[1:], strict=True))
    if unit and np.square(np.subtract(pair.shape, 1)).sum() < 2**16 - 1 and shape[0] < 2**8 - 1:
        cost, kind, none = np.uint16, np.uint8, 2**16 - 1
    else:
        cost, kind, none = np.float64, np.promote_types(np.uint16, np.min_scalar_type(shape[0] + 1)), np.inf
    away = np.empty(shape, kind)
    ways = (pair.pred, pair.truth), (pair.truth, pair.pred)
    found = (_nearest(*start, *goal, away, along_y.astype(cost), along_z.astype(cost), cost(steps[0] ** 2), cost(none),
                      steps) for start, goal in ways)
    return tuple(some.astype(np.int64) if unit else some for some in found)


def _words(mask: np.ndarray) -> np.ndarray:
    """The mask as one stream of bits, with a spare word at the end."""
    bits = np.packbits(mask, bitorder="little")
    words = np.zeros(bits.size // 8 + 2, "<u8")
    words.view(np.uint8)[: bits.size] = bits
    return words


@compiled
def _ones(word):
    """Number of bits that are set."""
    word -= (word >> ONE) & PAIRS
    word = (word & FOURS) + ((word >> np.uint64(2)) & FOURS)
    return np.int64((((word + (word >> np.uint64(4))) & BYTES) * SUM) >> np.uint64(56))


@compiled
def lowest(word):
    """Place of the lowest set bit of a word that is not 0."""
    return _ones((word & (~word + ONE)) - ONE)


@compiled
def _read(words, bit):
    """The 64 bits from a place of the stream on."""
    shift = np.uint64(bit & 63)
    return (words[bit >> 6] >> shift) | ((words[(bit >> 6) + 1] << ONE) << (LAST - shift))


@compiled
def _head(bits):
    """The lowest bits set, 64 of them at most."""
    return ALL if bits >= 64 else (ONE << np.uint64(bits)) - ONE


@compiled
def _box(pred, truth, shape):
    """First voxel and shape of the box around both masks; an empty box is one voxel."""
    nx, ny, nz = shape
    plane = ny * nz
    first, last = 0, pred.size - 1
    while first < last and pred[first] | truth[first] == 0:
        first += 1
    while last > first and pred[last] | truth[last] == 0:
        last -= 1
    x0, x1 = 64 * first // plane, min((64 * last + 63) // plane, nx - 1)

    # all planes on top of each other, with a spare word
    seen = np.zeros((plane + 63) // 64 + 1, np.uint64)
    for x in range(x0, x1 + 1):
        for k in range(seen.size - 1):
            bit = x * plane + 64 * k
            seen[k] |= _read(pred, bit) | _read(truth, bit)

    row = np.zeros((nz + 63) // 64, np.uint64)
    y0, y1 = ny, -1
    for y in range(ny):
        filled = False
        for k in range(row.size):
            word = _read(seen, y * nz + 64 * k) & _head(nz - 64 * k)
            row[k] |= word
            filled |= word != 0
        if filled:
            y0, y1 = min(y0, y), y
    if y1 < 0:
        return (0, 0, 0), (1, 1, 1)
    z0, z1 = nz, 0
    for z in range(nz):
        if (row[z >> 6] >> np.uint64(z & 63)) & ONE:
            z0, z1 = min(z0, z), z
    return (x0, y0, z0), (x1 + 1 - x0, y1 + 1 - y0, z1 + 1 - z0)


@compiled
def _rows(words, shape, low, size, flat):
    """Words (x, y, k) of the box with one row of background around it; flat: along x of mask."""
    rows = np.zeros((size[0] + 2, size[1] + 2, (size[2] + 63) // 64), np.uint64)
    if flat:
        rows[0], rows[2] = ALL, ALL
    for x in range(size[0]):
        for y in range(size[1]):
            bit = ((low[0] + x) * shape[1] + low[1] + y) * shape[2] + low[2]
            for k in range(rows.shape[2]):
                rows[x + 1, y + 1, k] = _read(words, bit + 64 * k) & _head(size[2] - 64 * k)
    return rows


@compiled
def _count(pred, truth):
    """Voxels of the first, the second and both."""
    first, second, both = 0, 0, 0
    for x in range(1, pred.shape[0] - 1):
        for y in range(1, pred.shape[1] - 1):
            for k in range(pred.shape[2]):
                a, b = pred[x, y, k], truth[x, y, k]
                first += _ones(a)
                second += _ones(b)
                both += _ones(a & b)
    return first, second, both


@compiled
def _surface(rows):
    """The fields of `Surface`: voxels with one of the six neighbors outside."""
    nx, ny, words = rows.shape[0] - 2, rows.shape[1] - 2, rows.shape[2]
    outer = np.empty((nx, ny, words), np.uint64)
    start = np.zeros(nx * ny + 1, np.int64)
    for x in range(nx):
        for y in range(ny):
            count = 0
            for k in range(words):
                word = rows[x + 1, y + 1, k]
                before = word << ONE
                if k > 0:
                    before |= rows[x + 1, y + 1, k - 1] >> LAST
                after = word >> ONE
                if k + 1 < words:
                    after |= rows[x + 1, y + 1, k + 1] << LAST
                inner = rows[x, y + 1, k] & rows[x + 2, y + 1, k] & rows[x + 1, y, k] & rows[x + 1, y + 2, k]
                word &= ~(inner & before & after)
                outer[x, y, k] = word
                count += _ones(word)
            start[x * ny + y + 1] = start[x * ny + y] + count
    places = np.empty(start[-1], np.int32)
    i = 0
    for x in range(nx):
        for y in range(ny):
            for k in range(words):
                word = outer[x, y, k]
                while word:
                    places[i] = 64 * k + lowest(word)
                    word &= word - ONE
                    i += 1
    return start, places


@compiled
def _along_x(start, places, away):
    """away (x, y, z): voxels to the nearest of these along x, or the number of planes where there is none."""
    nx, ny, nz = away.shape
    narrow = away.dtype.type  # wider numbers in between would be slower by as much
    none, one = narrow(nx), narrow(1)
    flat = away.reshape((nx, ny * nz))
    for x in range(nx):
        here, before = flat[x], flat[max(x - 1, 0)]
        if x == 0:
            here[:] = none
        else:
            for k in range(here.size):
                here[k] = min(narrow(before[k] + one), none)
        for y in range(ny):
            for i in range(start[x * ny + y], start[x * ny + y + 1]):
                here[y * nz + places[i]] = 0
    for x in range(nx - 2, -1, -1):
        here, behind = flat[x], flat[x + 1]
        for k in range(here.size):
            here[k] = min(narrow(behind[k] + one), here[k])


@compiled
def _nearest(start, places, goal_start, goal_places, away, along_y, along_z, weight, none, steps):
    """Squared distances, of the type of along_y and along_z, the squares of all ways along these axes.

    Args:
        away: scratch for `_along_x`. weight: of its squares. none: more than any distance. steps: lengths of steps.
    """
    nx, ny, nz = away.shape
    narrow, nowhere = along_y.dtype.type, away.dtype.type(nx)
    _along_x(goal_start, goal_places, away)
    found = np.empty(places.size, along_y.dtype)
    plane = np.empty((ny, nz), along_y.dtype)  # of one x: squared distance to the goal along x
    padded = np.full(3 * nz, none, along_y.dtype)
    best = padded[nz : 2 * nz]  # of one row: least over y
    known = np.full((ny + 1, nz + 2), np.inf)  # distances of the voxels at x, for smaller y, else at x - 1
    slant_x, slant_y = np.sqrt(steps[0] ** 2 + steps[2] ** 2), np.sqrt(steps[1] ** 2 + steps[2] ** 2)
    for x in range(nx):
        if start[x * ny] < start[x * ny + ny]:
            ways, squares = away[x].reshape(ny * nz), plane.reshape(ny * nz)
            for k in range(ways.size):
                squares[k] = none if ways[k] == nowhere else narrow(weight * narrow(ways[k]) * narrow(ways[k]))
        for y in range(ny):
            row = x * ny + y
            first, last = start[row], start[row + 1]
            left, below = known[y], known[y + 1]
            widest = 0.0
            if first < last:
                for z in range(best.size):
                    best[z] = plane[y, z]
            for i in range(first, last):
                z = places[i]
                near = min(
                    min(left[z + 1] + steps[1], min(left[z], left[z + 2]) + slant_y),
                    min(below[z + 1] + steps[0], min(below[z], below[z + 2]) + slant_x),
                )
                if near == np.inf:
                    limit = float(_along_z(padded, nz + z, along_z))
                else:
                    limit = near * near
                widest = max(widest, min(limit * SLACK, float(best[z])))
            for d in range(1, ny):
                if along_y[d] >= widest:
                    break
                # beyond the border the row at the border: too far by the way, so never the nearest
                one, other, more = plane[max(y - d, 0)], plane[min(y + d, ny - 1)], along_y[d]
                room = narrow(none - more)
                for z in range(best.size):
                    best[z] = min(best[z], narrow(min(min(one[z], other[z]), room) + more))
            if x > 0:
                for i in range(start[row - ny], start[row - ny + 1]):
                    below[places[i] + 1] = np.inf
            for i in range(first, last):
                least = _along_z(padded, nz + places[i], along_z)
                found[i] = least
                below[places[i] + 1] = np.sqrt(float(least))
    return found


@compiled
def _along_z(row, z, along_z):
    """Least of the row's values plus the squared way to them from z."""
    least = row[z]
    for d in range(1, along_z.size):
        if along_z[d] >= least:
            break
        least = min(least, min(row[z - d], row[z + d]) + along_z[d])
    return least
