"""Inference over a method's `predict`: by sliding windows with the published window rule, or plane by plane.

Windows start at min(i * stride, size - patch); volumes smaller than the patch are zero-padded evenly; probabilities are
averaged plainly. Source: UA-MT test_util.test_single_case, used by every 3D code base of the field.
Planes are resized to the patch and their class maps back, both to the nearest voxel. Source: SSL4MIS val_2D.
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


@torch.inference_mode()
def sliding_window(predict, image: Tensor, patch, stride, batch: int = 4) -> Tensor:
    """Image (C, *space) -> mean class probabilities (K, *space) float32, on the image's device.

    Args:
        predict: (B, C, *patch) -> (B, K, *patch) probabilities.
        patch, stride: voxels per axis. batch: windows per call; it does not change the result.
    """
    space = image.shape[1:]
    missing = [max(window - length, 0) for length, window in zip(space, patch, strict=True)]
    before = [m // 2 for m in missing]
    pads = [n for m, b in zip(reversed(missing), reversed(before), strict=True) for n in (b, m - b)]
    padded = F.pad(image, pads)
    starts = window_starts(padded.shape[1:], patch, stride)
    boxes = [(..., *(slice(s, s + p) for s, p in zip(start, patch, strict=True))) for start in starts]
    total, count = None, torch.zeros(padded.shape[1:], device=image.device)
    for first in range(0, len(boxes), batch):
        chunk = boxes[first:first + batch]
        for box, probability in zip(chunk, predict(torch.stack([padded[box] for box in chunk])).float(), strict=True):
            if total is None:
                total = torch.zeros((probability.shape[0], *padded.shape[1:]), device=image.device)
            total[box] += probability
            count[box] += 1
    inner = (..., *(slice(b, b + length) for b, length in zip(before, space, strict=True)))
    return (total / count)[inner]


@torch.inference_mode()
def by_planes(predict, image: Tensor, patch, batch: int = 16) -> Tensor:
    """Image (C, x, y, planes) -> classes (x, y, planes) uint8, on the image's device.

    Args:
        predict: (B, C, *patch) -> (B, K, *patch) probabilities.
        patch: voxels per axis. batch: planes per call; it does not change the result, but for rounding in `predict`.
    """
    classes = [predict(resize(planes, patch)).argmax(1).to(torch.uint8) for planes in image.movedim(-1, 0).split(batch)]
    return resize(torch.cat(classes), image.shape[1:3]).movedim(0, -1).contiguous()
