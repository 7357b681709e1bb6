"""Distances of voxels to the other side of a mask, compiled by numba; `ssl4mis.distance` says what they mean.

Squared distances separate (Felzenszwalb & Huttenlocher 2012): two scans give every voxel its way along x; then a row
along z is compared as a whole, which processors do many voxels at a time, with the rows beside it and at last with
itself, moved. A voxel is on one side only, so one array holds the distances of both. How far a row looks is bounded by
what its neighbors found: along an axis, a distance grows by at most 1 per voxel. No step is approximate.

Compiling takes some seconds of a processor, once per environment; `ssl4mis.surface` says where numba keeps the result.
The kernels hold no state and release the interpreter lock.
"""

import numpy as np

from ssl4mis.surface import compiled

STEPS = 4  # that `_lower` compares at a time
WIDTH = 32  # of rows, times this: processors take so many numbers at once


def other_side(mask: np.ndarray, out: np.ndarray) -> bool:
    """Write each voxel's distance to the nearest one of the other value, negative where True; see `ssl4mis.distance`.

    Args:
        mask: bool with one to three axes, C order, of both values; out: float32, alike.

    Returns: False, and nothing is written, where the mask is too long for int32.
    """
    shape = (1,) * (3 - mask.ndim) + mask.shape
    squares = np.square(np.arange(max(shape) + STEPS - 1))
    none = sum((side - 1) ** 2 for side in shape) + 1  # more than any
    most = none + squares[-1]
    if most < 2**16:
        kind, narrow = np.uint16, np.uint8  # no side is longer than 181 here
    elif most < 2**31:
        kind, narrow = np.int32, np.int32
    else:
        return False
    _other_side(mask.view(np.uint8).reshape(shape), np.empty(shape, narrow), squares.astype(kind), kind(none),
                out.reshape(shape))
    return True


@compiled
def _other_side(mask, away, squares, none, out):
    """away: scratch for `_along_x`; squares: of all steps; none: more than any, of the same type."""
    nx, ny, nz = mask.shape
    narrow, nowhere = squares.dtype.type, away.dtype.type(nx)
    nought = narrow(0)
    _along_x(mask, away)
    width = -(-nz // WIDTH) * WIDTH
    plane = np.full((2, ny, width), nought, squares.dtype)  # of one x: outside and inside, 0 on the other side
    margin = nz + STEPS
    padded = np.full(width + 2 * margin, none, squares.dtype)
    beside, best = padded[margin : margin + width], np.empty(width, squares.dtype)
    row, voxels = np.empty(nz, squares.dtype), np.empty(ny, np.int64)
    known = np.full((2, ny + 1), np.inf)  # largest distance of a row, at x for smaller y, else at x - 1
    for x in range(nx):
        for y in range(ny):
            ways, side, outside, inside = away[x, y], mask[x, y], plane[0, y], plane[1, y]
            count = 0
            for z in range(nz):
                count += side[z]
                square = none if ways[z] == nowhere else narrow(narrow(ways[z]) * narrow(ways[z]))
                outside[z] = nought if side[z] else square
                inside[z] = square if side[z] else nought
            voxels[y] = count
        for y in range(ny):
            row[:] = nought
            for s in range(2):
                near = min(known[s, y], known[s, y + 1]) + 1
                known[s, y + 1] = 0
                if voxels[y] == (0 if s else nz):
                    continue
                beside[:] = plane[s, y]
                _lower(beside, plane[s].reshape(ny * width), y * width, width, ny, squares, 0, near)
                beside[nz:] = none
                best[:] = beside
                best[nz:] = nought
                least = none
                for z in range(nz):
                    least = min(least, best[z])
                _lower(best, padded, margin, 1, nz, squares, least, near)
                most = nought
                for z in range(nz):
                    row[z] = narrow(row[z] + best[z])
                    most = max(most, best[z])
                known[s, y + 1] = np.sqrt(most)
            for z in range(nz):
                root = np.float32(np.sqrt(np.float64(row[z])))
                out[x, y, z] = -root if mask[x, y, z] else root


@compiled
def _along_x(mask, away):
    """Steps along x to the other side, or the number of planes where all of the line is on one side."""
    nx, ny, nz = away.shape
    narrow = away.dtype.type
    none, one = narrow(nx), narrow(1)
    sides, ways = mask.reshape((nx, ny * nz)), away.reshape((nx, ny * nz))
    ways[0] = none
    for x in range(1, nx):
        here, before, side, other = ways[x], ways[x - 1], sides[x], sides[x - 1]
        for k in range(here.size):
            here[k] = min(narrow(before[k] + one), none) if side[k] == other[k] else one
    for x in range(nx - 2, -1, -1):
        here, behind, side, other = ways[x], ways[x + 1], sides[x], sides[x + 1]
        for k in range(here.size):
            here[k] = min(here[k], narrow(behind[k] + one) if side[k] == other[k] else one)


@compiled
def _lower(best, cells, start, stride, count, squares, least, near):
    """Lowers `best` to the least of the rows at start + d * stride and start - d * stride plus d squared, d < count.

    Args:
        best: the row at start, on memory of its own. least: of all rows. near: upper bound of the distances in the end.
    """
    narrow = best.dtype.type
    size, last = best.size, cells.size - best.size
    limit = near * near * (1 + 1e-6) + 1  # the least square that is no use
    for d in range(1, count, STEPS):
        most = best[0]
        for z in range(size):
            most = max(most, best[z])
        if least + squares[d] >= min(most, limit):
            break
        # Beyond the border the row at the border: too far by the way, so never the nearest. With d = 3 below as well.
        a0, b0 = max(start - d * stride, 0), min(start + d * stride, last)
        a1, b1 = max(a0 - stride, 0), min(b0 + stride, last)
        a2, b2 = max(a1 - stride, 0), min(b1 + stride, last)
        a3, b3 = max(a2 - stride, 0), min(b2 + stride, last)
        p0, q0, p1, q1 = cells[a0 : a0 + size], cells[b0 : b0 + size], cells[a1 : a1 + size], cells[b1 : b1 + size]
        p2, q2, p3, q3 = cells[a2 : a2 + size], cells[b2 : b2 + size], cells[a3 : a3 + size], cells[b3 : b3 + size]
        s0, s1, s2, s3 = squares[d], squares[d + 1], squares[d + 2], squares[d + 3]
        for z in range(size):
            first = min(narrow(min(p0[z], q0[z]) + s0), narrow(min(p1[z], q1[z]) + s1))
            second = min(narrow(min(p2[z], q2[z]) + s2), narrow(min(p3[z], q3[z]) + s3))
            best[z] = min(best[z], min(first, second))

