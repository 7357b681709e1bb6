"""Exact Euclidean and signed distance transforms of batches of masks, in voxels, for any number of dimensions.

SciPy is the faster way on a CPU; elsewhere `squared_distance` keeps the host from waiting for the device. Both ways
give the same float32 numbers.
"""
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

CHUNK = 2**23  # candidates compared at a time, 32 MiB


def distance(mask: Tensor) -> Tensor:
    """Distance of each True voxel to the nearest False one, 0 where False; (B, *space) bool -> float32.

    A sample without a False voxel has the distance inf everywhere.
    """
    if mask.device.type != "cpu":
        return squared_distance(mask).double().sqrt().float()
    found = np.full(mask.shape, np.inf, np.float32)
    for sample, voxels in zip(found, mask.numpy(), strict=True):
        if not voxels.all():
            sample[...] = distance_transform_edt(voxels)
    return torch.from_numpy(found)


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
    outside, inside = distance(torch.cat([~mask, mask])).chunk(2)
    lonely = 1.0 if empty == "right" else 0.0
    signed = _unit(outside, lonely) - _unit(inside, lonely)
    return signed.masked_fill(inside == 1, 0)


def _unit(distances: Tensor, infinite: float) -> Tensor:
    """Distances over the sample's largest; `infinite` in a sample where they are infinite."""
    finite = distances.nan_to_num(posinf=infinite)
    return finite / finite.flatten(1).amax(1).clamp(min=1).view(-1, *[1] * (finite.ndim - 1))
