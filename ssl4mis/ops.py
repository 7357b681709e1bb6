"""Operations on label maps and masks that belong to no single paper, in any number of dimensions."""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ssl4mis.optional import cuda_kernels, optional


def cuboid(shape, corner, sides, device=None) -> Tensor:
    """Which voxels of a `shape` lie in a box: bool (*shape).

    `corner` is the box's first voxel per axis; it may hold 0-d tensors on `device`, so that nothing waits for them.
    """
    inside = torch.ones((), dtype=torch.bool, device=device)
    for length, low, side in zip(shape, corner, sides, strict=True):
        line = torch.arange(length, device=device)
        inside = inside.unsqueeze(-1) & (line >= low) & (line < low + side)
    return inside


@torch.library.custom_op("ssl4mis::largest_component", mutates_args=())
def largest_component(label: Tensor, connectivity: int) -> Tensor:
    """Every sample's every class reduced to its largest connected component; the rest becomes 0.

    Of components of the same size the first in scan order stays, as with scikit-image and an argmax over sizes. An
    operator of torch, so that steps can be traced.

    Args:
        label: (B, *space) bool or integers from 0 to 255.
        connectivity: in how many coordinates neighbors may differ: 1, 2, 3 are 6, 18, 26 neighbors in 3D; 1, 2 are
            4, 8 neighbors in 2D, where 3 is 2.
    """
    kernels = cuda_kernels() if label.is_cuda else None
    values = label.to(torch.uint8).contiguous()
    found = kernels.largest_component(values, connectivity) if kernels else None
    if found is None:
        found = _on_host(values.cpu(), connectivity).to(label.device)
    return found.to(label.dtype)


@largest_component.register_fake
def _(label: Tensor, connectivity: int) -> Tensor:
    return torch.empty_like(label, memory_format=torch.contiguous_format)


def largest_component_later(label: Tensor, connectivity: int) -> Callable[[], Tensor]:
    """A function of no arguments that gives `largest_component(label, connectivity)`.

    On a CUDA device without Triton components are found by the CPU. The label map then starts its way to the host at
    once, and the function waits for its arrival only: work that is queued between the two calls runs on the device in
    the meantime.
    """
    if not label.is_cuda or torch.compiler.is_compiling() or cuda_kernels():
        return partial(largest_component, label, connectivity)
    host = torch.empty(label.shape, dtype=torch.uint8, pin_memory=True)
    host.copy_(label.to(torch.uint8), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(label.device))

    def finish() -> Tensor:
        arrived.synchronize()
        # from pageable memory the way back would wait for everything that is queued
        return _on_host(host, connectivity).pin_memory().to(label.device, non_blocking=True).to(label.dtype)

    return finish


def _on_host(label: Tensor, connectivity: int) -> Tensor:
    """`largest_component` of uint8 in C order in the CPU's memory."""
    values = label.numpy()
    found = np.zeros_like(values)
    components = optional("ssl4mis.components") if values.ndim < 5 else None
    neighbors = ndimage.generate_binary_structure(values.ndim - 1, connectivity)

    def by_scipy(job: tuple[int, int]) -> None:
        sample, value = job
        region = values[sample] == value
        parts, count = ndimage.label(region, neighbors)
        if count > 1:
            region = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        np.copyto(found[sample], value, where=region)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # without the interpreter's lock
        if components:
            list(pool.map(partial(components.largest, connectivity=connectivity), values, found))
        else:
            list(pool.map(by_scipy, product(range(len(values)), range(1, int(values.max(initial=0)) + 1))))
    return torch.from_numpy(found)
