"""Boxes and largest components against known answers and a search voxel by voxel."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl4mis import ops
from ssl4mis.ops import cuboid, largest_component, largest_component_later


@pytest.fixture(params=["numba", "SciPy"], autouse=True)
def host(request, monkeypatch):
    """Every test runs with and without the compiled kernels."""
    if request.param == "SciPy":
        monkeypatch.setattr(ops, "optional", lambda name: None)
    else:
        pytest.importorskip("numba", reason="numba is not installed")
        assert ops.optional("ssl4mis.components") is not None


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


def by_scipy(label: np.ndarray, connectivity: int) -> np.ndarray:
    """What the authors' way gives, class by class."""
    found, near = np.zeros_like(label), ndimage.generate_binary_structure(label.ndim, connectivity)
    for value in np.unique(label[label > 0]):
        parts, _ = ndimage.label(label == value, near)
        found[parts == np.bincount(parts.flat)[1:].argmax() + 1] = value
    return found


@pytest.mark.parametrize("classes", [1, 2, 3, 255])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_against_scipy(dimensions, classes):
    rng = np.random.default_rng([dimensions, classes])
    for _ in range(30):
        shape = tuple(rng.integers(1, {1: 70, 2: 30, 3: 14, 4: 6}[dimensions], dimensions))
        label = (rng.integers(1, classes + 1, shape) * (rng.random(shape) < rng.random())).astype(np.uint8)
        if classes == 255:
            label[label % 4 > 0] |= 252  # few values, with the largest that there are
        for connectivity in (1, 2, 3):
            found = largest_component(torch.from_numpy(label)[None], connectivity)[0]
            np.testing.assert_array_equal(found.numpy(), by_scipy(label, connectivity))


@pytest.mark.parametrize("shape", [(3, 4, 300), (300, 4, 3), (5, 64, 64), (40, 33, 17), (500, 301)],
                         ids=lambda shape: "x".join(map(str, shape)))
def test_smooth_shapes_of_several_classes(shape):
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    label = np.digitize(noise, np.quantile(noise, [0.4, 0.6, 0.8])).astype(np.uint8)
    for connectivity in (1, 2, 3):
        found = largest_component(torch.from_numpy(label)[None], connectivity)[0]
        np.testing.assert_array_equal(found.numpy(), by_scipy(label, connectivity))


def test_rows_do_not_touch_over_their_ends():
    label = torch.tensor([[[0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]]], dtype=torch.uint8)
    for connectivity in (1, 2):
        assert largest_component(label, connectivity).nonzero()[:, 1:].tolist() == [[3, 0], [4, 0]]


def test_views_threads_and_a_label_that_stays():
    label = torch.randint(0, 4, (9, 6, 2, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view, before, threads = label.movedim(2, 0), label.clone(), torch.get_num_threads()
    expected = torch.stack([torch.from_numpy(by_scipy(one.numpy(), 2)) for one in view])
    torch.set_num_threads(3)
    try:
        assert torch.equal(largest_component(view, 2), expected) and torch.equal(label, before)
    finally:
        torch.set_num_threads(threads)


def test_an_operator_that_can_be_traced():
    label = torch.randint(0, 3, (2, 5, 6, 4), dtype=torch.uint8)
    torch.library.opcheck(largest_component, (label, 2))
    with FakeTensorMode():
        for dtype in (torch.uint8, torch.bool, torch.int64):
            fake = torch.zeros(2, 5, 6, 4, dtype=dtype)
            found = largest_component_later(fake, 3)()
            assert found.shape == fake.shape and found.dtype == dtype
    traced = torch.compile(lambda label: largest_component_later(label, 3)(), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(label), largest_component(label, 3))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_a_gpu_finds_the_same_components(connectivity):
    """Noise of several densities, where components wind through many blocks, and smooth shapes of several classes."""
    rng = np.random.default_rng(connectivity)
    noise = rng.random((6, 112, 112, 80))
    noise[3:] = ndimage.gaussian_filter(noise[3:], (0, 2, 2, 2))
    levels = [[0.7], [0.85], [0.9, 0.95], [0.5], [0.3, 0.6], [0.4, 0.5, 0.6]]
    label = np.stack([np.digitize(one, np.quantile(one, at)) for one, at in zip(noise, levels, strict=True)])
    for batch in torch.from_numpy(label.astype(np.uint8)), torch.from_numpy(label[:, :, 0].astype(np.uint8)):
        expected = largest_component(batch, connectivity)
        for _ in range(3):
            assert torch.equal(largest_component(batch.cuda(), connectivity).cpu(), expected)
