"""Correlation of positions: a head that learns it, and what CorrMatch lets travel along it, logits and whole regions.

Positions are the cells of a coarse grid, numbered as they lie in memory, last axis fastest. Everything here is float32,
under autocast too, and no function waits for the device.
Source: Sun et al., CorrMatch, CVPR 2024 (arXiv 2306.04300), carried over to any number of dimensions.
"""
import math
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.blocks import BATCH_NORM, CHANNEL_DROPOUT, CONV
from ssl4mis.errors import UserError

POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}
CHUNK = 4  # rows whose shapes are in memory at once; more do not stay in a processor's cache
COPIES = 16  # bytes per entry of a correlation: logits, softmax and the gradients of both


class CorrelationHead(nn.Module):
    """Encoder features of a `SegNet` -> correlation (B, N, N), whose rows sum to 1.

    It reads the deepest encoder level with at most `stride` voxels per cell, and the level below it.

    Args:
        backbone: whose features it reads.
        stride: most voxels per cell, along the axis with the most.
        hidden: channels of the projection.
        channels: of the two vectors per position whose products are the correlation.
        dropout: of the projection's channels.
    """

    def __init__(self, backbone, stride: int, hidden: int, channels: int, dropout: float):
        super().__init__()
        dims, strides = backbone.spatial_dims, backbone.encoder_strides
        fitting = [index for index, axes in enumerate(strides) if max(axes) <= stride]
        if not fitting:
            raise UserError(f"hp.corr_stride {stride}: expected at least {max(strides[0])} with this network")
        level = fitting[-1]
        self.levels, self.stride = slice(level, level + 2), strides[level]
        self.projection = nn.Sequential(
            CONV[dims](sum(backbone.encoder_channels[self.levels]), hidden, 3, padding=1), BATCH_NORM[dims](hidden),
            nn.ReLU(inplace=True), CHANNEL_DROPOUT[dims](dropout))
        self.one, self.other = (CONV[dims](hidden, channels, 1) for _ in range(2))

    def forward(self, encoder: list[Tensor]) -> Tensor:
        fine, *coarse = encoder[self.levels]
        return self.compare(self.projection(torch.cat([fine, *(enlarge(x, fine.shape[2:]) for x in coarse)], 1)))

    def compare(self, features: Tensor) -> Tensor:
        """Projected features (B, hidden, *grid) -> correlation; entry [i, j] says how much of i goes to j."""
        flat = features.to(self.one.weight.dtype).flatten(2)
        with torch.autocast(features.device.type, enabled=False):
            # as matrix products, since CUDA's convolutions round to ten bits of mantissa (TF32)
            one, other = (conv.weight.flatten(1) @ flat + conv.bias[:, None] for conv in (self.one, self.other))
            return (one.transpose(1, 2) @ other / math.sqrt(one.shape[1])).softmax(-1).float()

    def grid(self, space) -> tuple[int, ...]:
        """Cells per axis of an image of this size."""
        return tuple(side // stride for side, stride in zip(space, self.stride, strict=True))

    def check_memory(self, samples: int, space, limit: int) -> None:
        """UserError if the correlations of so many samples of this size would need more than `limit` MiB."""
        positions = math.prod(self.grid(space))
        need = COPIES * samples * positions**2 / 2**20
        if need > limit:
            raise UserError(f"hp.corr_stride: correlations of {samples} samples with {positions} positions need "
                            f"{need:.0f} MiB, expected at most hp.corr_memory {limit}; use a larger stride")


def enlarge(coarse: Tensor, space) -> Tensor:
    """(B, C, *grid) -> (B, C, *space) float32, linear between cells, corners on corners; it also makes maps smaller.

    Matrix products instead of `interpolate`, whose gradient is not deterministic on CUDA and which is slow on a CPU.
    """
    return combine(coarse, shares(coarse.shape[2:], space, coarse.device))


def shares(grid, space, device) -> list[Tensor]:
    """What the cells of each axis give to its voxels when a map is enlarged, (voxels, cells) float32."""
    weights = []
    for cells, side in zip(grid, space, strict=True):
        place = torch.arange(side, device=device, dtype=torch.float64) * ((cells - 1) / max(side - 1, 1))
        weights.append((1 - (place[:, None] - torch.arange(cells, device=device)).abs()).clamp(min=0).float())
    return weights


def combine(coarse: Tensor, weights: list[Tensor]) -> Tensor:
    """(B, C, *grid) -> (B, C, *space) float32, by the `shares` of its axes."""
    out = coarse.float()
    with torch.autocast(out.device.type, enabled=False):
        out = out @ weights[-1].T  # one product, where the other way around it is one for each line
        for axis in reversed(range(2, out.ndim - 1)):  # the last axes first, while the map is small
            before, after = out.shape[:axis], out.shape[axis + 1:]
            out = weights[axis - 2] @ out.reshape(*before, out.shape[axis], math.prod(after))
            out = out.view(*before, out.shape[-2], *after)
    return out


def reduce(fine: Tensor, grid, how: str = "avgpool") -> Tensor:
    """(B, C, *space) -> (B, C, *grid): means of cells, or with "interp" points between voxels, as CorrMatch does."""
    if how == "interp":
        return enlarge(fine, grid)
    size = [side // cells for side, cells in zip(fine.shape[2:], grid, strict=True)]
    return POOL[len(size)](fine, size)


def propagate(logits: Tensor, correlation: Tensor, grid, down: str = "avgpool", apply: str = "col") -> Tensor:
    """Logits (B, K, *space), without their gradient, that went along the correlation: (B, K, *grid).

    With `apply` "col" position j sums what all i send to it, as CorrMatch does; the weights of this sum do not sum
    to 1. With "row" position i has the mean over all j by its own row.
    """
    with torch.autocast(logits.device.type, enabled=False):
        coarse = reduce(logits.detach().float(), grid, down).flatten(2)
        return (coarse @ (correlation if apply == "col" else correlation.transpose(1, 2))).unflatten(2, grid)


def sample_rows(sampling: str, count: int, foreground: Tensor) -> Tensor:
    """Which rows of the correlation become shapes: (B, count) indices of positions.

    Args:
        sampling: "random"; "shared", the same for all samples and never the last position, as in CorrMatch's code;
            "uniform", evenly spaced from a random start; "balanced", random, one half among the foreground.
        count: of rows per sample.
        foreground: (B, N) bool, what the network takes for foreground; only its shape and device matter otherwise.
    """
    (samples, positions), device = foreground.shape, foreground.device
    if sampling == "shared":
        return torch.randint(max(positions - 1, 1), (1, count), device=device).expand(samples, count)
    if sampling == "uniform":
        start = torch.randint(positions, (samples, 1), device=device)
        return (start + torch.arange(count, device=device) * positions // count) % positions
    rows = torch.randint(positions, (samples, count), device=device)
    if sampling == "random":
        return rows
    among = foreground.cumsum(1)  # the n-th foreground position is where this becomes n
    wanted = (torch.rand(samples, count // 2, device=device) * among[:, -1:]).floor().long() + 1
    chosen = torch.searchsorted(among, wanted)
    half = torch.where(foreground.any(1, keepdim=True), chosen, rows[:, :count // 2])
    return torch.cat([half, rows[:, count // 2:]], 1)


@torch.no_grad()
def shapes(correlation: Tensor, rows: Tensor, grid, space, mode: str = "soft_full") -> Iterator[Tensor]:
    """Class-agnostic shapes from rows of the correlation, by chunks of rows, (B, R, *cells), 0 or 1 as float32.

    A row is scaled to [0, 1] and cut at 0.5; a constant row is an empty shape. "soft_full" enlarges before the cut, so
    that cells are voxels (CorrMatch's code); "binary_coarse" cuts on the grid (its paper), and cells are the grid's.
    """
    weights = shares(grid, space, correlation.device)
    for chunk in rows.split(CHUNK, 1):
        maps = correlation.take_along_dim(chunk[:, :, None], 1)
        varies = (maps.amax(2) > maps.amin(2))[:, :, None]
        maps = maps.unflatten(2, grid)
        if mode == "soft_full":
            maps = combine(maps, weights)
        values = maps.flatten(2)
        middle = (values.amin(2, keepdim=True) + values.amax(2, keepdim=True)) / 2  # aminmax takes ten times as long
        yield values.gt_(torch.where(varies, middle, torch.inf)).view(maps.shape)


def cell_sums(values: Tensor, cells) -> Tensor:
    """Sums of (B, C, *space) over the voxels of each cell: (B, C, number of cells)."""
    size = [side // count for side, count in zip(values.shape[2:], cells, strict=True)]
    if max(size) > 1:
        values = POOL[len(size)](values, size, divisor_override=1)
    return values.flatten(2)


@torch.no_grad()
def propagate_regions(label: Tensor, confident: Tensor, allowed: Tensor, chunks: Iterable[Tensor], tau: Tensor,
                      classes: int, order: str = "sequential") -> tuple[Tensor, Tensor]:
    """Pseudo-labels and confident voxels, cleaned and enlarged by shapes; returns new ones.

    A shape of which a share of at least tau is confident, and more than tau of that of one class, becomes that class
    and confident as a whole. Each shape sees the labels that the ones before left ("parallel": the first ones).

    Args:
        label: (B, *space) pseudo-labels.
        confident, allowed: (B, *space) bool; what is not allowed is no part of any shape.
        chunks: shapes, (B, R, *cells), 0 or 1; a cell is a voxel or a block of voxels.
        tau: 0-d.
        classes: number of classes.
        order: "sequential" or "parallel".
    """
    space, numbers, chunks = label.shape[1:], torch.arange(classes, device=label.device), iter(chunks)
    first = next(chunks)
    cells = first.shape[2:]
    votes = [(label == k) & confident & allowed for k in range(classes)]
    counts = cell_sums(torch.stack([*votes, allowed], 1).float(), cells)  # whole numbers, exact as float32
    voters, total = counts[:, :-1], counts[:, :-1].sum(1, keepdim=True)
    written = torch.full_like(counts[:, 0], -1)
    # On a CPU shapes are judged together as long as the votes stay. Elsewhere looking would mean waiting, and tensors
    # of other types may have no values.
    looks = type(label) is Tensor and label.device.type == "cpu"
    with torch.autocast(label.device.type, enabled=False):
        for chunk in chain([first], chunks):
            left = chunk.flatten(2).float()
            while left.shape[1]:
                now = left if looks else left[:, :1]
                inside = counts @ now.transpose(1, 2)
                (most, winner), agreed = inside[:, :-1].max(1), inside[:, :-1].sum(1)
                good = (agreed / inside[:, -1] >= tau) & (most / agreed > tau)  # 0/0 is NaN, which is neither
                moves = _first(good & (most < agreed)) if looks and order == "sequential" else None
                count = now.shape[1] if moves is None else moves + 1
                for index in range(count):
                    if looks and not good[:, index].any():
                        continue
                    chosen = left[:, index] * good[:, index, None]
                    # where chosen is 1, and as before where it is 0
                    written.lerp_(winner[:, index, None].float(), chosen)
                if order == "sequential" and (moves is not None or not looks):
                    own = numbers == winner[:, index, None]
                    voters.lerp_(own[:, :, None] * total, chosen[:, None])
                left = left[:, count:]
    written = written.unflatten(1, cells)
    for axis, (side, count) in enumerate(zip(space, cells, strict=True), 1):
        if side > count:
            written = written.repeat_interleave(side // count, axis)
    changed = (written >= 0) & allowed
    return torch.where(changed, written.to(label.dtype), label), confident | changed


def _first(good: Tensor) -> int | None:
    """The first index of (B, R) bool on a CPU that is true for a sample, None if none is."""
    found = good.any(0).nonzero()
    return int(found[0]) if len(found) else None


@torch.no_grad()
def class_confidence(confidence: Tensor, label: Tensor, valid: Tensor, classes: int, statistic: str = "max") -> Tensor:
    """How sure the network is: mean over the predicted classes of a statistic of their confidence, 0-d float64.

    Args:
        confidence, label: (B, *space), the largest probability and its class.
        valid: (B, *space) bool, the voxels that count; the result is NaN where none does.
        classes: number of classes.
        statistic: "max" (CorrMatch), "q95" (95th percentile) or "mean".
    """
    values = []
    for k in range(classes):
        mine = torch.where(valid & (label == k), confidence, torch.nan).flatten()
        if statistic == "q95":
            values.append(quantile(mine, 0.95))
        elif statistic == "mean":
            values.append(mine.nanmean())
        else:
            value = mine.nan_to_num(-1).amax()
            values.append(torch.where(value < 0, torch.nan, value))
    return torch.stack(values).double().nanmean()


def quantile(values: Tensor, share: float) -> Tensor:
    """Linear quantile of those (N,) that are numbers, 0-d; NaN where none is. torch's own ends at 2^24 values."""
    ordered = values.sort()[0]  # NaN comes last
    place = share * (ordered.isfinite().sum() - 1).clamp(min=0)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low[None]], ordered[high[None]], (place - low).to(values.dtype))[0]
