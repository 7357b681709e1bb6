"""Inference over a method's `predict`: by sliding windows with the published window rule, or plane by plane.

Windows start at min(i * stride, size - patch); volumes smaller than the patch are zero-padded evenly; probabilities are
averaged plainly. Source: UA-MT test_util.test_single_case, used by every 3D code base of the field.
Planes are resized to the patch and what is predicted back, both to the nearest voxel. Source: SSL4MIS val_2D.
"""
import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl4mis.augment import resize


def window_starts(size, patch, stride) -> list[tuple[int, ...]]:
    """First corners of all windows in a volume at least as large as the patch, last axis fastest."""
    axes = []
    for length, window, step in zip(size, patch, stride, strict=True):
        count = math.ceil((length - window) / step) + 1
        axes.append([min(step * index, length - window) for index in range(count)])
    return list(itertools.product(*axes))


def coverage(length: int, patch: int, stride: int) -> Tensor:
    """Along one axis, how many windows each voxel is in, (length,) float32; that of a volume is the product of axes."""
    count = torch.zeros(length)
    for (start,) in window_starts((length,), (patch,), (stride,)):
        count[start:start + patch] += 1
    return count


@torch.inference_mode()
def sliding_window(predict, image: Tensor, patch, stride, batch: int | None = None) -> Tensor:
    """Image (C, *space) -> mean class probabilities (K, *space) float32, on the image's device.

    Where a CUDA device is too small the windows go one by one and their mean is kept, and returned, on the CPU.

    Args:
        predict: (B, C, *patch) -> (B, K, *patch) probabilities.
        patch, stride: voxels per axis.
        batch: windows per call, 4 on CUDA and else 1 without a number; it does not change the result.
    """
    return _where_there_is_room(lambda batch, home: _mean_of_windows(predict, image, patch, stride, batch, home),
                                batch or (4 if image.is_cuda else 1), image.device)


def _where_there_is_room(compute, batch: int, device: torch.device) -> Tensor:
    """`compute(batch, device)`, or one sample at a time with the result on the CPU where the device is too small."""
    try:
        return compute(batch, device)
    except torch.OutOfMemoryError:
        pass  # what failed is freed once the exception is gone
    torch.cuda.empty_cache()
    return compute(1, torch.device("cpu"))


def _mean_of_windows(predict, image: Tensor, patch, stride, batch: int, home: torch.device) -> Tensor:
    space = image.shape[1:]
    missing = [max(window - length, 0) for length, window in zip(space, patch, strict=True)]
    before = [m // 2 for m in missing]
    pads = [n for m, b in zip(reversed(missing), reversed(before), strict=True) for n in (b, m - b)]
    padded = F.pad(image, pads)
    boxes = [(..., *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))
             for start in window_starts(padded.shape[1:], patch, stride)]
    total = None
    for first in range(0, len(boxes), batch):
        chunk = boxes[first:first + batch]
        found = predict(torch.stack([padded[box] for box in chunk])).to(home, torch.float32)
        if total is None:
            total = torch.zeros((found.shape[1], *padded.shape[1:]), device=home)
        for box, probability in zip(chunk, found, strict=True):
            total[box] += probability
    count = torch.ones(())
    for sizes in zip(padded.shape[1:], patch, stride, strict=True):
        count = count.unsqueeze(-1) * coverage(*sizes)
    inner = (..., *(slice(b, b + length) for b, length in zip(before, space, strict=True)))
    return total.div_(count.to(home))[inner]


@torch.inference_mode()
def by_planes(predict, image: Tensor, patch, batch: int = 16) -> Tensor:
    """Image (C, x, y, planes) -> class probabilities (K, x, y, planes) float32, on the image's device.

    Where a CUDA device is too small the planes go one by one and what is found is kept, and returned, on the CPU.

    Args:
        predict: (B, C, *patch) -> (B, K, *patch) probabilities.
        patch: voxels per axis. batch: planes per call; it does not change the result, but for rounding in `predict`.
    """
    def compute(batch: int, home: torch.device) -> Tensor:
        found = [predict(resize(planes, patch)).to(home, torch.float32) for planes in image.movedim(-1, 0).split(batch)]
        return resize(torch.cat(found), image.shape[1:3]).movedim(0, -1).contiguous()

    return _where_there_is_room(compute, batch, image.device)
