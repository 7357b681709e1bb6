"""Exact Euclidean and signed distance transforms of batches of masks, in voxels, for any number of dimensions.

On a CPU two and three dimensions are left to the compiled `ssl4mis.edt` where numba is installed, others to SciPy; on
a CUDA device all to Triton where torch has it, others to `squared_distance`, so that the host never waits for the
device. All ways give the same float32 numbers.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional

from ssl4mis.optional import cuda_kernels, optional

CHUNK = 2**23  # candidates compared at a time, 32 MiB


def distance(mask: Tensor) -> Tensor:
    """Distance of each True voxel to the nearest False one, 0 where False; (B, *space) bool -> float32.

    A sample without a False voxel has the distance inf everywhere.
    """
    return (-other_side(mask)).clamp(min=0)


def signed_distance(mask: Tensor, empty: str) -> Tensor:
    """DTC's signed distance map: in (0, 1] outside, [-1, 0) inside, 0 on the inner boundary; (B, *space) -> float32.

    The two sides of a sample are each divided by their largest distance, so the scale depends on the patch. The inner
    boundary are the mask's voxels with a face neighbor outside; neighbors beyond the patch do not count.

    Args:
        mask: (B, *space) bool.
        empty: of samples on one side only: "right" is 1 in an empty mask and -1 in a full one; "legacy" is 0 in an
            empty mask, as DTC has it, and in a full one, where DTC divides by zero. ValueError for other values.
    """
    if empty not in ("right", "legacy"):
        raise ValueError(f"empty {empty!r}: expected right or legacy")
    alone = 2.0 if empty == "right" else 0.0  # will be divided by itself; a 1 would be taken for the boundary
    found = other_side(mask).nan_to_num_(posinf=alone, neginf=-alone)
    inside = functional.threshold_(-found, 1, 0)
    return _scale(found.clamp_(min=0)).sub_(_scale(inside))


def class_distances(label: Tensor, classes: int, empty: str) -> Tensor:
    """The `signed_distance` to each foreground class of labels (B, *space): (B, classes - 1, *space)."""
    masks = torch.stack([label == index for index in range(1, classes)], 1)
    return signed_distance(masks.flatten(0, 1), empty).view(masks.shape)


def _scale(distances: Tensor) -> Tensor:
    """Divide distances by the sample's largest, in place."""
    return distances.div_(distances.flatten(1).amax(1).clamp(min=1).view(-1, *[1] * (distances.ndim - 1)))


@torch.library.custom_op("ssl4mis::other_side", mutates_args=())
def other_side(mask: Tensor) -> Tensor:
    """Distance of each voxel to the nearest one of the other value, negative where True; (B, *space) bool -> float32.

    A sample of one value has the distance inf or -inf everywhere. An operator of torch, so that steps can be traced.
    """
    if mask.device.type == "cpu":
        return _on_host(mask)
    kernels = cuda_kernels() if mask.is_cuda else None
    squares = kernels.signed_squares(mask) if kernels else None
    if squares is None:
        outside, inside = squared_distance(torch.cat([~mask, mask])).chunk(2)
        squares = (outside - inside).double()
    return (squares.sign() * squares.abs().sqrt()).float()


@other_side.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.float32, device=mask.device)


def _on_host(mask: Tensor) -> Tensor:
    found, edt = torch.empty(mask.shape), optional("ssl4mis.edt") if mask.ndim < 5 else None

    def fill(pair: tuple[np.ndarray, np.ndarray]) -> None:
        sample, out = pair
        if sample.all() or not sample.any():
            out[...] = -np.inf if sample.all() else np.inf
        elif edt is None or not edt.other_side(sample, out):
            np.subtract(distance_transform_edt(~sample), distance_transform_edt(sample), out=out, casting="same_kind")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # the interpreter's lock is not held
        list(pool.map(fill, zip(mask.contiguous().numpy(), found.numpy(), strict=True)))
    return found


def squared_distance(mask: Tensor) -> Tensor:
    """Square of `distance` on any device, exact while the squared diagonal is below 2^24 voxels.

    Squared distances separate: along one axis after the other, each voxel takes the least of the values so far plus
    the squared offset (Felzenszwalb & Huttenlocher 2012, by comparing all pairs in place of the lower envelope).
    """
    squared = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, torch.inf)
    for _ in mask.shape[1:]:
        squared = squared.movedim(1, -1)  # as many times as there are axes: the order is then the first again
        side = squared.shape[-1]
        place = torch.arange(side, dtype=squared.dtype, device=mask.device)
        offset = (place[:, None] - place).square()
        rows, least = squared.reshape(-1, 1, side), torch.empty(squared.shape, device=mask.device)
        at_once = max(1, CHUNK // side**2)
        for some, answer in zip(rows.split(at_once), least.view(-1, side).split(at_once), strict=True):
            torch.amin(some + offset, -1, out=answer)
        squared = least
    return squared
