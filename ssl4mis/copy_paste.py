"""What methods that paste boxes of one image into another share: the box, and pseudo-labels without islands."""
from collections.abc import Callable

import torch
from torch import Tensor

from ssl4mis.ops import cuboid, largest_component_later

CONNECTIVITY = {"faces": 1, "edges": 2, "corners": 3}


def corner(shape, sides, device) -> list[Tensor]:
    """First voxel of a random box per axis; the last possible place is never drawn, as in the field's code."""
    return [torch.randint(length - side, (), device=device) for length, side in zip(shape, sides, strict=True)]


def box(image: Tensor, share: float) -> Tensor:
    """The voxels of a random box whose sides are a share of those of (B, C, *space): (*space) bool."""
    shape = image.shape[2:]
    sides = [max(1, int(share * length)) for length in shape]
    return cuboid(shape, corner(shape, sides, image.device), sides, image.device)


def pseudo_labels(probability: Tensor, component: str) -> Callable[[], Tensor]:
    """A function that gives the most probable classes of (B, K, *space), (B, *space) uint8.

    Of each class the largest component stays, of voxels that share corners, edges or faces; with "none" all voxels do.
    Components are sought when the function is called, as by `largest_component_later`.
    """
    likely = probability[:, 1] >= 0.5 if probability.shape[1] == 2 else probability.argmax(1)
    label = likely.to(torch.uint8)
    return (lambda: label) if component == "none" else largest_component_later(label, CONNECTIVITY[component])
