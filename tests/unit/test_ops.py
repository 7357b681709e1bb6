"""Boxes and largest components against known answers and a search voxel by voxel."""

from itertools import product

import numpy as np
import pytest
import torch

from ssl4mis.ops import cuboid, largest_component, largest_component_later


def test_a_box():
    inside = cuboid((4, 5), (torch.tensor(1), 2), (2, 3))
    expected = [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert inside.dtype == torch.bool and inside.tolist() == [[bool(v) for v in row] for row in expected]


def test_a_box_has_its_volume():
    inside = cuboid((6, 7, 8), torch.tensor([0, 3, 1]), (2, 4, 5))
    assert inside.shape == (6, 7, 8) and inside.sum() == 2 * 4 * 5
    assert inside.nonzero().min(0).values.tolist() == [0, 3, 1]


def slow_component(mask: np.ndarray, connectivity: int) -> np.ndarray:
    """The largest component of one mask, found voxel by voxel; the first of equals."""
    steps = [d for d in product((-1, 0, 1), repeat=mask.ndim) if 0 < np.count_nonzero(d) <= connectivity]
    seen, best = set(), []
    for start in map(tuple, np.argwhere(mask)):
        if start in seen:
            continue
        seen.add(start)
        part, todo = [], [start]
        while todo:
            voxel = todo.pop()
            part.append(voxel)
            for step in steps:
                near = tuple(int(a + b) for a, b in zip(voxel, step, strict=True))
                if all(0 <= a < n for a, n in zip(near, mask.shape, strict=True)) and mask[near] and near not in seen:
                    seen.add(near)
                    todo.append(near)
        if len(part) > len(best):
            best = part
    found = np.zeros_like(mask)
    for voxel in best:
        found[voxel] = True
    return found


@pytest.mark.parametrize("shape", [(9, 11), (6, 7, 5)], ids=["2D", "3D"])
@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_against_a_search(shape, connectivity, share):
    rng = np.random.default_rng([*shape, connectivity, int(100 * share)])
    masks = rng.random((20, *shape)) < share
    found = largest_component(torch.tensor(masks), connectivity)
    assert found.dtype == torch.bool
    for mask, mine in zip(masks, found.numpy(), strict=True):
        np.testing.assert_array_equal(mine, slow_component(mask, connectivity))


def test_the_first_of_equal_components_stays():
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[0, 0, 3:] = mask[0, 2, :2] = True  # first by rows, last by columns
    for image in (mask, mask.mT.contiguous().mT):
        found = largest_component(image, 1)
        assert found.nonzero()[:, 1:].tolist() == [[0, 3], [0, 4]]


@pytest.mark.parametrize(("connectivity", "size"), [(1, 3), (2, 4), (3, 5)])
def test_neighbors_share_faces_edges_or_corners(connectivity, size):
    mask = torch.zeros(1, 4, 4, 6, dtype=torch.bool)
    mask[0, 0, 0, :3] = True
    mask[0, 1, 1, 2] = True  # shares an edge with the line of three
    mask[0, 2, 2, 3] = True  # shares a corner with the one before
    assert largest_component(mask, connectivity).sum() == size


def test_in_2d_there_are_4_or_8_neighbors():
    mask = torch.eye(5, dtype=torch.bool)[None]
    assert [largest_component(mask, connectivity).sum() for connectivity in (1, 2, 3)] == [1, 5, 5]


def test_classes_are_reduced_one_by_one_and_put_together():
    label = torch.tensor([[[1, 1, 0, 2, 0],
                           [0, 0, 0, 2, 2],
                           [3, 0, 1, 0, 0]],
                          [[2, 0, 1, 0, 2],
                           [0, 0, 1, 0, 2],
                           [0, 0, 0, 0, 0]]], dtype=torch.uint8)
    before = label.clone()
    found = largest_component(label, 2)
    assert found.dtype == torch.uint8 and torch.equal(label, before)
    assert found.tolist() == [[[1, 1, 0, 2, 0], [0, 0, 0, 2, 2], [3, 0, 0, 0, 0]],
                              [[0, 0, 1, 0, 2], [0, 0, 1, 0, 2], [0, 0, 0, 0, 0]]]
    assert torch.equal(largest_component(label.long(), 2), found.long())


@pytest.mark.parametrize("value", [False, True])
def test_nothing_stays_nothing_and_everything_everything(value):
    mask = torch.full((2, 3, 4, 5), value)
    assert torch.equal(largest_component(mask, 3), mask)
    assert largest_component(mask[:0], 3).shape == (0, 3, 4, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_and_waits_for_the_label_map_only():
    label = torch.randint(0, 4, (4, 24, 24, 16), dtype=torch.uint8)
    there, other = label.cuda(), torch.randn(2048, 2048, device="cuda")
    largest_component(there, 3)  # makes the context and the pinned buffers
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish = largest_component_later(there, 3)
        for _ in range(2000):  # seconds of work
            other = other @ other / 2048
        queued = torch.cuda.Event()
        queued.record()
        found = finish()
        assert not queued.query(), "waited for work that was queued after the label map"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_cuda and torch.equal(found.cpu(), largest_component(label, 3))
