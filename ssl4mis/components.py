"""Largest connected components of a label map, compiled by numba; `ssl4mis.ops` says what they are.

A map is read once, eight voxels at a time, as runs of one value along the last axis. Runs of neighboring rows that
touch are joined (union-find, the root of a component is its first run), so the time grows with the runs, and all
classes are found at once.

Compiling takes some seconds of a processor, once per environment; `ssl4mis.surface` says where numba keeps the result.
The kernels hold no state and release the interpreter lock.
"""

import numpy as np
from numba import njit

from ssl4mis.surface import compiled, lowest

EIGHT, REST, BYTE = np.uint64(8), np.uint64(56), np.uint64(255)


def largest(label: np.ndarray, out: np.ndarray, connectivity: int) -> None:
    """Copy the largest component of each class of a map into `out`, which is 0.

    Args:
        label, out: uint8 with one to three axes, C order.
        connectivity: in how many coordinates neighbors may differ.
    """
    shape = (1,) * (3 - label.ndim) + label.shape
    words = np.zeros(label.size // 8 + 1, "<u8")
    words.view(np.uint8)[: label.size] = label.reshape(-1)
    _largest(words, shape, connectivity, out.reshape(-1))


@compiled
def _largest(words, shape, connectivity, out):
    nx, ny, nz = shape
    start, low, high, value = _runs(words, nx * ny, nz)
    root = np.arange(low.size)
    for x in range(nx):
        for y in range(ny):
            row = x * ny + y
            if start[row] == start[row + 1]:
                continue
            # the rows before this one; runs along z may be apart by one more voxel where that is still a neighbor
            if y > 0:
                _join(row, row - 1, int(connectivity > 1), start, low, high, value, root)
            if x > 0:
                _join(row, row - ny, int(connectivity > 1), start, low, high, value, root)
                if connectivity > 1 and y > 0:
                    _join(row, row - ny - 1, int(connectivity > 2), start, low, high, value, root)
                if connectivity > 1 and y + 1 < ny:
                    _join(row, row - ny + 1, int(connectivity > 2), start, low, high, value, root)

    size = np.zeros(low.size, np.int64)
    for i in range(low.size):
        root[i] = root[root[i]]  # a root stands before its runs, so theirs are right by now
        size[root[i]] += high[i] - low[i]
    best = np.full(256, -1)
    for i in range(low.size):
        k = value[i]
        if best[k] < 0 or size[i] > size[best[k]]:
            best[k] = i
    for row in range(nx * ny):
        for i in range(start[row], start[row + 1]):
            if root[i] == best[value[i]]:
                out[row * nz + low[i] : row * nz + high[i]] = value[i]


@compiled
def _runs(words, rows, nz):
    """Runs of one value that is not 0: those of row r are start[r] to start[r + 1], from low to before high."""
    start = np.zeros(rows + 1, np.int64)
    room = rows * nz  # untouched memory costs nothing
    low, high, value = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.uint8)
    count, first, current, last = 0, 0, np.uint64(0), np.uint64(0)
    for w in range(words.size):
        word = words[w]
        change = word ^ ((word << EIGHT) | last)  # bytes that differ from the one before
        last = word >> REST
        while change:
            k = lowest(change) >> 3
            change &= ~(BYTE << np.uint64(8 * k))
            place = 8 * w + k
            while current and first < place:
                row = first // nz
                end = min(place, (row + 1) * nz)
                low[count], high[count], value[count] = first - row * nz, end - row * nz, current
                start[row + 1] += 1
                count += 1
                first = end
            first, current = place, (word >> np.uint64(8 * k)) & BYTE
    return np.cumsum(start), low[:count], high[:count], value[:count]


@njit(cache=True, nogil=True, inline="always")  # most rows have few runs
def _join(row, other, slack, start, low, high, value, root):
    """Joins the runs of two rows that overlap, or would if they were longer by the slack."""
    first, end = start[other], start[other + 1]
    for i in range(start[row], start[row + 1]):
        while first < end and high[first] + slack <= low[i]:
            first += 1
        j = first
        while j < end and low[j] < high[i] + slack:
            if value[i] == value[j] and root[i] != root[j]:
                a, b = _find(root, i), _find(root, j)
                root[max(a, b)] = min(a, b)
            j += 1


@compiled
def _find(root, i):
    while root[i] != i:
        root[i] = root[root[i]]
        i = root[i]
    return i
