"""Operations on label maps and masks that belong to no single paper, in any number of dimensions."""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def cuboid(shape, corner, sides, device=None) -> Tensor:
    """Which voxels of a `shape` lie in a box: bool (*shape).

    `corner` is the box's first voxel per axis; it may hold 0-d tensors on `device`, so that nothing waits for them.
    """
    inside = torch.ones((), dtype=torch.bool, device=device)
    for length, low, side in zip(shape, corner, sides, strict=True):
        line = torch.arange(length, device=device)
        inside = inside.unsqueeze(-1) & (line >= low) & (line < low + side)
    return inside


def largest_component(label: Tensor, connectivity: int) -> Tensor:
    """Every sample's every class reduced to its largest connected component; the rest becomes 0.

    Of components of the same size the first in scan order stays, as with scikit-image and an argmax over sizes.

    Args:
        label: (B, *space) bool or integers from 0 to 255.
        connectivity: in how many coordinates neighbors may differ: 1, 2, 3 are 6, 18, 26 neighbors in 3D; 1, 2 are
            4, 8 neighbors in 2D, where 3 is 2.
    """
    return largest_component_later(label, connectivity)()


def largest_component_later(label: Tensor, connectivity: int) -> Callable[[], Tensor]:
    """A function of no arguments that gives `largest_component(label, connectivity)`.

    Components are found by the CPU. A CUDA device's label map starts its way to the host at once, and the function
    waits for its arrival only: work that is queued between the two calls runs on the device in the meantime.
    """
    if label.device.type != "cuda":
        return lambda: _largest_component(label.cpu(), connectivity).to(label.device)
    host = torch.empty(label.shape, dtype=label.dtype, pin_memory=True)
    host.copy_(label, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(label.device))

    def finish() -> Tensor:
        arrived.synchronize()
        # from pageable memory the way back would wait for everything that is queued
        return _largest_component(host, connectivity).pin_memory().to(label.device, non_blocking=True)

    return finish


def _largest_component(label: Tensor, connectivity: int) -> Tensor:
    values = label.to(torch.uint8).numpy()
    found, neighbors = np.zeros_like(values), ndimage.generate_binary_structure(values.ndim - 1, connectivity)

    def keep(job: tuple[int, int]) -> None:
        sample, value = job
        region = values[sample] == value
        parts, count = ndimage.label(region, neighbors)
        if count > 1:
            region = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        np.copyto(found[sample], value, where=region)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # scipy labels without the interpreter's lock
        list(pool.map(keep, product(range(len(values)), range(1, int(values.max(initial=0)) + 1))))
    return torch.from_numpy(found).to(label.dtype)
