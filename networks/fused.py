"""Batch and instance norm with the ReLU behind it, on channels_last memory of the CPU, compiled by numba.

Such memory is a matrix of voxels and channels; voxels stand side by side in its rows, so that processors take many
columns at once. Forwards a first pass takes mean and squared deviations of a block of rows while it is in the cache,
and blocks are combined in float64 (Chan et al. 1979); a second one normalizes and rectifies. Backwards two passes do
the same. Sums do not depend on the number of threads.

Compiling takes seconds of a processor, once per environment: numba keeps the result in `__pycache__` beside this file
or, where that is read-only, in the user's cache (or NUMBA_CACHE_DIR).
"""
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

LANES = 512  # columns to sum side by side: channels times voxels
BLOCK = 64  # rows that are summed in float32
PIECE, PIECES = 2**17, 64  # fewest numbers worth a thread of their own, and most such pieces

compiled = njit(cache=True, nogil=True)


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float,
              units: int) -> tuple[Tensor, Tensor, Tensor]:
    """The output, laid out like x, and mean and variance, float64 (units, C).

    Args:
        x: (B, C, *space) float32 or bfloat16, channels_last.
        weight, bias: (C,), or None for 1 and 0.
        slope: what negative outputs are multiplied by: 0 is a ReLU, 1 leaves them.
        units: parts of the batch that have statistics of their own: 1 in batch norm, B in instance norm.
    """
    out, channels = torch.empty_like(x), x.shape[1]
    values = _matrix(x, units)
    bounds, sums = _bounds(*values.shape), _sums(values)
    _share(_moments, bounds, values, *sums)
    mean, variance = _combined(bounds, *sums, channels, units)
    affine = _affine(mean, variance, *_vectors(weight, bias, channels), eps, values.shape[2])
    _share(_apply, bounds, values, _matrix(out, units), affine, np.float32(slope))
    return out, torch.from_numpy(mean), torch.from_numpy(variance)


def gradients(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor,
              eps: float, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, given that of the output and what `normalize` took and gave."""
    out, (units, channels) = torch.empty_like(x), mean.shape
    values, given = _matrix(x, units), _matrix(grad, units)
    bounds, sums, statistics = _bounds(*values.shape), _sums(values), (mean.numpy(), variance.numpy())
    weight, bias = _vectors(weight, bias, channels)
    affine = _affine(*statistics, weight, bias, eps, values.shape[2])
    _share(_backward_sums, bounds, values, given, affine, np.float32(slope), *sums)
    by_weight, by_bias, slopes = _slopes(*sums, *statistics, weight, eps, values.shape[1:])
    _share(_backward, bounds, values, given, _matrix(out, units), affine, slopes, np.float32(slope))
    return out, torch.from_numpy(by_weight), torch.from_numpy(by_bias)


def column_sums(x: Tensor) -> Tensor:
    """Sums of a channels_last tensor (B, C, *space) over all but the channels, float64 (C,)."""
    values = _matrix(x, 1)
    totals = _sums(values)[0]
    _share(_totals, _bounds(*values.shape), values, totals)
    return torch.from_numpy(totals.reshape(-1, x.shape[1]).sum(0))


def _matrix(x: Tensor, units: int) -> np.ndarray:
    """A channels_last tensor's memory as (units, rows, groups of voxels * C); bfloat16 as uint16."""
    memory = x.detach().movedim(1, -1)
    memory = (memory.view(torch.uint16) if x.dtype == torch.bfloat16 else memory).numpy()
    return memory.reshape(_shape(x.numel(), x.shape[1], units))


@cache
def _shape(size: int, channels: int, units: int) -> tuple[int, int, int]:
    voxels, groups = size // channels // units, 1
    while voxels % (2 * groups) == 0 and 2 * groups * channels <= LANES:
        groups *= 2
    return units, voxels // groups, groups * channels


@cache
def _bounds(units: int, rows: int, columns: int) -> np.ndarray:
    """First and last rows of the pieces of a unit; they do not depend on the number of threads."""
    pieces = min(max(1, units * rows * columns // PIECE), PIECES)
    return np.linspace(0, rows, min(-(-pieces // units), rows) + 1).astype(np.int64)


def _sums(values: np.ndarray) -> np.ndarray:
    """Two times zeros, float64 (units * pieces, columns)."""
    return np.zeros((2, values.shape[0] * (len(_bounds(*values.shape)) - 1), values.shape[2]))


def _vectors(weight: Tensor | None, bias: Tensor | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias, float32 (C,)."""
    if weight is None:
        return np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return weight.detach().float().numpy(), bias.detach().float().numpy()


def _share(kernel: Callable, bounds: np.ndarray, values: np.ndarray, *more) -> None:
    """Run a kernel on all pieces of all units, dealt out to as many threads as torch has."""
    jobs = values.shape[0] * (len(bounds) - 1)
    threads = min(torch.get_num_threads(), jobs)
    parts = pairwise(jobs * n // threads for n in range(threads + 1))
    mine, *others = [(*part, bounds, values, *more) for part in parts]
    waiting = [_pool(os.getpid()).submit(kernel, *arguments) for arguments in others]
    kernel(*mine)
    for job in waiting:
        job.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(PIECES)


def _number(stored):
    """A float32 from float32 or from the bits of a bfloat16."""


@overload(_number, inline="always")
def _number_of(stored):
    if isinstance(stored, types.Float):
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


def _keep(number, target):
    """A float32 as what an array stores, rounded to the nearest bfloat16, to even ones in between."""


@overload(_keep, inline="always")
def _keep_in(number, target):
    if isinstance(target.dtype, types.Float):
        return lambda number, target: number

    def rounded(number, target):
        bits = np.float32(number).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))

    return rounded


@compiled
def _moments(first, last, bounds, values, means, squares):
    """Means of the pieces' columns and sums of squared deviations from them.

    Within a block numbers are taken relative to its first row: far from zero, float32 has few digits left for them.
    """
    pieces, columns = len(bounds) - 1, values.shape[2]
    origin, mean, square = np.empty((3, columns), np.float32)
    for job in range(first, last):
        rows, low, high = values[job // pieces], bounds[job % pieces], bounds[job % pieces + 1]
        for start in range(low, high, BLOCK):
            stop = min(start + BLOCK, high)
            for column in range(columns):
                origin[column] = _number(rows[start, column])
                mean[column] = square[column] = 0
            for row in range(start, stop):
                for column in range(columns):
                    mean[column] += _number(rows[row, column]) - origin[column]
            for column in range(columns):
                mean[column] /= np.float32(stop - start)
            for row in range(start, stop):
                for column in range(columns):
                    away = _number(rows[row, column]) - origin[column] - mean[column]
                    square[column] += away * away
            share, before = (stop - start) / (stop - low), start - low
            for column in range(columns):
                away = np.float64(origin[column]) + mean[column] - means[job, column]
                means[job, column] += away * share
                squares[job, column] += square[column] + away * away * share * before


@compiled
def _combined(bounds, means, squares, channels, units):
    """Mean and variance of the channels of every unit, float64 (units, C), from those of pieces and columns."""
    pieces, columns, rows = len(bounds) - 1, means.shape[1], bounds[-1]
    mean, variance = np.zeros((units, channels)), np.zeros((units, channels))
    share = channels / (columns * rows)
    for job in range(units * pieces):
        weight = share * (bounds[job % pieces + 1] - bounds[job % pieces])
        for column in range(columns):
            mean[job // pieces, column % channels] += weight * means[job, column]
    for job in range(units * pieces):
        weight = share * (bounds[job % pieces + 1] - bounds[job % pieces])
        for column in range(columns):
            away = means[job, column] - mean[job // pieces, column % channels]
            variance[job // pieces, column % channels] += weight * away * away + share * squares[job, column]
    return mean, variance


@compiled
def _affine(mean, variance, weight, bias, eps, columns):
    """Mean, scale and bias of all columns, float32 (3, units, columns)."""
    units, channels = mean.shape
    out = np.empty((3, units, columns), np.float32)
    for unit in range(units):
        for channel in range(channels):
            out[0, unit, channel::channels] = mean[unit, channel]
            out[1, unit, channel::channels] = weight[channel] / np.sqrt(variance[unit, channel] + eps)
            out[2, unit, channel::channels] = bias[channel]
    return out


@compiled
def _apply(first, last, bounds, values, out, affine, slope):
    """(value - mean) * scale + bias, where negative times the slope."""
    pieces, columns = len(bounds) - 1, values.shape[2]
    for job in range(first, last):
        unit = job // pieces
        rows, target, means, scales, biases = values[unit], out[unit], affine[0, unit], affine[1, unit], affine[2, unit]
        for row in range(bounds[job % pieces], bounds[job % pieces + 1]):
            for column in range(columns):
                y = (_number(rows[row, column]) - means[column]) * scales[column] + biases[column]
                y = y if y > np.float32(0) else y * slope
                target[row, column] = _keep(y, target)


@compiled
def _backward_sums(first, last, bounds, values, grad, affine, slope, by_bias, by_scale):
    """Sums of the gradient before the ReLU, and of its product with (value - mean)."""
    pieces, columns = len(bounds) - 1, values.shape[2]
    total, product = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for job in range(first, last):
        unit, low, high = job // pieces, bounds[job % pieces], bounds[job % pieces + 1]
        rows, given, means, scales, biases = values[unit], grad[unit], affine[0, unit], affine[1, unit], affine[2, unit]
        for start in range(low, high, BLOCK):
            total[:] = 0
            product[:] = 0
            for row in range(start, min(start + BLOCK, high)):
                for column in range(columns):
                    away, g = _number(rows[row, column]) - means[column], _number(given[row, column])
                    g = g if away * scales[column] + biases[column] > np.float32(0) else g * slope
                    total[column] += g
                    product[column] += g * away
            for column in range(columns):
                by_bias[job, column] += total[column]
                by_scale[job, column] += product[column]


@compiled
def _slopes(by_bias, by_scale, mean, variance, weight, eps, shape):
    """Gradients of weight and bias, float64 (C,), and what (value - mean) and 1 have in that of a value.

    The latter are float32 (2, units, columns).
    grad_x = scale * (grad - mean(grad) - normalized(x) * mean(grad * normalized(x)))
    """
    units, channels = mean.shape
    rows, columns = shape
    slopes = np.empty((2, units, columns), np.float32)
    weights, biases = np.zeros(channels), np.zeros(channels)
    pieces, count = len(by_bias) // units, rows * columns / channels
    for unit in range(units):
        for channel in range(channels):
            product, total = 0.0, 0.0
            for job in range(unit * pieces, unit * pieces + pieces):
                product += by_scale[job, channel::channels].sum()
                total += by_bias[job, channel::channels].sum()
            inverse = 1 / np.sqrt(variance[unit, channel] + eps)
            weights[channel] += product * inverse
            biases[channel] += total
            scale = weight[channel] * inverse / count
            slopes[0, unit, channel::channels] = -scale * inverse * inverse * product
            slopes[1, unit, channel::channels] = -scale * total
    return weights, biases, slopes


@compiled
def _backward(first, last, bounds, values, grad, out, affine, slopes, slope):
    """The gradient of the values."""
    pieces, columns = len(bounds) - 1, values.shape[2]
    for job in range(first, last):
        unit = job // pieces
        rows, given, target, by_value, constant = values[unit], grad[unit], out[unit], slopes[0, unit], slopes[1, unit]
        means, scales, biases = affine[0, unit], affine[1, unit], affine[2, unit]
        for row in range(bounds[job % pieces], bounds[job % pieces + 1]):
            for column in range(columns):
                away, g = _number(rows[row, column]) - means[column], _number(given[row, column])
                g = g if away * scales[column] + biases[column] > np.float32(0) else g * slope
                target[row, column] = _keep(g * scales[column] + (away * by_value[column] + constant[column]), target)


@compiled
def _totals(first, last, bounds, values, totals):
    """Sums of the pieces' columns."""
    pieces, columns = len(bounds) - 1, values.shape[2]
    total = np.empty(columns, np.float32)
    for job in range(first, last):
        rows, low, high = values[job // pieces], bounds[job % pieces], bounds[job % pieces + 1]
        for start in range(low, high, BLOCK):
            total[:] = 0
            for row in range(start, min(start + BLOCK, high)):
                for column in range(columns):
                    total[column] += _number(rows[row, column])
            for column in range(columns):
                totals[job, column] += total[column]
