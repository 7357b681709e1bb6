"""Distance transforms: hand-computed maps, a comparison of all pairs of voxels, and all ways against SciPy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl4mis import distance as module
from ssl4mis.distance import distance, other_side, signed_distance, squared_distance

SHAPES = [(17,), (1, 9), (13, 10), (7, 1, 5), (9, 12, 6), (3, 4, 5, 2)]
DENSITIES = [0.0, 0.03, 0.5, 0.97, 1.0]


@pytest.fixture(params=["numba", "SciPy"], autouse=True)
def host(request, monkeypatch):
    """Every test runs with and without the compiled kernels."""
    if request.param == "SciPy":
        monkeypatch.setattr(module, "optional", lambda name: None)
    else:
        pytest.importorskip("numba", reason="numba is not installed")
        assert module.optional("ssl4mis.edt") is not None
    return request.param


def masks(shape, seed=0):
    """Random masks of several densities, empty and full, then one voxel and all but one voxel."""
    rng = np.random.default_rng(seed)
    found = np.stack([rng.random(shape) < density for density in DENSITIES] + [np.zeros(shape, bool)] * 2)
    found[-2:].reshape(2, -1)[:, rng.integers(np.prod(shape))] = True
    found[-1] = ~found[-1]
    return torch.from_numpy(found)


def cube(side=8, within=16):
    """A cube of True voxels in the middle of a volume, one sample."""
    mask, inner = torch.zeros(1, within, within, within, dtype=torch.bool), slice((within - side) // 2, None)
    mask[0, inner, inner, inner] = True
    return mask & mask.flip(1, 2, 3)


def shape_id(shape):
    return "x".join(map(str, shape))


# --- distance ----------------------------------------------------------------------------------------------------


def test_a_line_by_hand():
    line = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    assert distance(line).tolist() == [[0, 1, 2, 2, 1, 0, 1, 2]]
    assert squared_distance(line).tolist() == [[0, 1, 4, 4, 1, 0, 1, 4]]


def test_a_plane_by_hand():
    plane = torch.ones(1, 3, 4, dtype=torch.bool)
    plane[0, 0, 0] = False
    expected = [[0, 1, 4, 9], [1, 2, 5, 10], [4, 5, 8, 13]]
    assert squared_distance(plane)[0].tolist() == expected
    torch.testing.assert_close(distance(plane)[0], torch.tensor(expected).sqrt(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_against_all_pairs_of_voxels(shape):
    for mask in masks(shape):
        places = torch.cartesian_prod(*map(torch.arange, shape)).view(mask.numel(), -1)
        outside = places[~mask.flatten()]
        pairs = (places[:, None] - outside).square().sum(-1)
        expected = pairs.amin(1) if len(outside) else torch.full((len(places),), torch.inf)
        assert squared_distance(mask[None]).flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [*SHAPES, (40, 33), (24, 31, 18)], ids=shape_id)
def test_torch_equals_scipy(shape):
    for mask in masks(shape, 1):
        squared = squared_distance(mask[None])[0].numpy()
        if mask.all():
            assert np.isposinf(squared).all()
        else:
            np.testing.assert_array_equal(squared, np.rint(distance_transform_edt(mask.numpy()) ** 2))


def test_both_ways_give_the_same_float32():
    batch = masks((20, 15, 9))
    assert distance(batch).dtype == torch.float32
    assert torch.equal(distance(batch), squared_distance(batch).double().sqrt().float())


@pytest.mark.parametrize("chunk", [1, 500, 2**30])
def test_chunks_do_not_matter(monkeypatch, chunk):
    batch = masks((9, 12, 6))
    expected = squared_distance(batch)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert torch.equal(squared_distance(batch), expected)


def test_a_view_of_a_batch():
    batch = masks((9, 12, 6)).movedim(3, 1)[1:4]
    assert torch.equal(squared_distance(batch).double().sqrt().float(), distance(batch))
    assert torch.equal(distance(batch), distance(batch.contiguous()))


# --- both sides --------------------------------------------------------------------------------------------------


def definition(mask):
    """`other_side` of one sample by SciPy."""
    if mask.all() or not mask.any():
        return torch.full(mask.shape, -torch.inf if mask.all() else torch.inf)
    outside, inside = (torch.from_numpy(distance_transform_edt(side)).float() for side in (~mask, mask))
    return outside - inside


def test_both_sides_of_a_line_by_hand():
    line = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    assert other_side(line).tolist() == [[1, -1, -2, -2, -1, 1, 2, 3]]
    assert other_side(line[:, :1]).item() == torch.inf and other_side(line[:, 1:2]).item() == -torch.inf


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_against_scipy_to_the_last_bit(dimensions):
    rng = np.random.default_rng(dimensions)
    for _ in range(60):
        shape = tuple(rng.integers(1, {1: 300, 2: 50, 3: 22, 4: 8}[dimensions], dimensions))
        mask = rng.random(shape) < rng.choice([0.002, 0.02, 0.3, 0.5, 0.9, 0.99, 0.998])
        found = other_side(torch.from_numpy(mask)[None])
        assert found.dtype == torch.float32 and torch.equal(found[0], definition(mask))


@pytest.mark.parametrize("shape", [
    (253, 4, 3), (254, 3, 4), (255, 4, 3), (256, 3, 4), (300, 6, 5), (5, 300, 6), (4, 5, 300), (2, 255, 255),  # 2^8
    (128, 128, 128), (100, 130, 120), (150, 20, 160), (148, 148, 20), (180, 181), (181, 182), (300, 400),  # 2^16
    (1, 46000), (1, 50000),  # 2^31
], ids=shape_id)  # fmt: skip
def test_sides_where_types_change(shape):
    """Corner to corner are the largest distances that there are."""
    corner = np.zeros(shape, bool)
    corner.flat[0] = True
    spots = np.random.default_rng(0).random(shape) < 5 / np.prod(shape)
    spots.flat[-1] = True
    found = other_side(torch.from_numpy(np.stack([corner, ~corner, np.flip(corner), spots])))
    for mask, mine in zip((corner, ~corner, np.flip(corner), spots), found, strict=True):
        assert torch.equal(mine, definition(mask))


def test_masks_as_labels_are():
    """Smooth bodies, which rows do not leave at once: bounds from neighboring rows count."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (60, 50, 40)), indexing="ij"), -1)
    rng = np.random.default_rng(3)
    for _ in range(10):
        balls = [(np.square(grid - rng.uniform(0, 60, 3)).sum(-1) < rng.uniform(2, 25) ** 2) for _ in range(3)]
        mask = np.logical_or.reduce(balls) & (grid[..., 2] > rng.integers(0, 20))
        assert torch.equal(other_side(torch.from_numpy(mask)[None])[0], definition(mask))


def test_the_mask_is_left_alone_and_threads_do_not_matter():
    batch = masks((12, 14, 33))
    before, threads = batch.clone(), torch.get_num_threads()
    expected = other_side(batch)
    torch.set_num_threads(3)
    try:
        assert torch.equal(other_side(batch), expected) and torch.equal(batch, before)
    finally:
        torch.set_num_threads(threads)


def test_an_operator_that_can_be_traced():
    batch = masks((6, 5, 4))
    torch.library.opcheck(other_side, (batch,))
    with FakeTensorMode():
        fake = torch.zeros(3, 6, 5, 4, dtype=torch.bool)
        for found in (signed_distance(fake, "right"), distance(fake)):
            assert found.shape == fake.shape and found.dtype == torch.float32
    traced = torch.compile(signed_distance, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(batch, "right"), signed_distance(batch, "right"))


def test_compilers_are_imported_when_they_are_needed():
    code = """if True:
        import sys
        from ssl4mis import distance, ops
        sys.exit(any(name in sys.modules for name in ("numba", "ssl4mis.kernels")))
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parents[1]).returncode == 0


# --- signed distance -----------------------------------------------------------------------------------------------


def test_a_signed_line_by_hand():
    line = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[1, 2 / 3, 1 / 3, 0, -2 / 3, -1, -2 / 3, 0, 1 / 3, 2 / 3]])
    torch.testing.assert_close(signed_distance(line, "right"), expected, rtol=0, atol=1e-7)


def test_beyond_the_patch_is_neither_side():
    line = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(signed_distance(line, "right"), torch.tensor([[-1, -2 / 3, 0, 0.5, 1]]))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("empty", ["right", "legacy"])
def test_sign_and_range(shape, empty):
    batch = masks(shape)
    found = signed_distance(batch, empty)
    assert found.dtype == torch.float32 and found.shape == batch.shape
    for mask, map in zip(batch, found, strict=True):
        if mask.any() and not mask.all():
            assert map[~mask].min() > 0 and map[~mask].max() == 1
            assert map[mask].max() <= 0 and map[mask].min() in (-1, 0)


@pytest.mark.parametrize("space", [(6, 5), (4, 6, 5)], ids=shape_id)
def test_masks_with_one_side_only(space):
    empty, full = torch.zeros(1, *space, dtype=torch.bool), torch.ones(1, *space, dtype=torch.bool)
    assert (signed_distance(empty, "right") == 1).all() and (signed_distance(full, "right") == -1).all()
    assert (signed_distance(empty, "legacy") == 0).all() and (signed_distance(full, "legacy") == 0).all()


def test_one_voxel_has_no_inside():
    mask = torch.zeros(1, 5, 5, 5, dtype=torch.bool)
    mask[0, 1, 2, 3] = True
    found = signed_distance(mask, "right")
    assert found[mask] == 0 and found[0, 4, 4, 0] == 1 and found[0, 1, 2, 4] == pytest.approx(1 / 22**0.5)


def test_samples_do_not_share_a_scale():
    small, large = cube(4), cube(12)
    together = signed_distance(torch.cat([small, large]), "right")
    assert torch.equal(together, torch.cat([signed_distance(m, "right") for m in (small, large)]))


def test_the_boundary_has_face_neighbors_outside():
    """The steep step of DTC puts 0.5 on the boundary, so a mask of what is more loses one layer of voxels."""
    found = torch.sigmoid(-1500 * signed_distance(cube(8), "right"))
    assert (found > 0.5).sum() == 6**3 and (found >= 0.5).sum() == 8**3
    corner = torch.ones(1, 3, 3, dtype=torch.bool)
    corner[0, 0, 0] = False
    assert (signed_distance(corner, "right")[0] == 0).tolist() == [[False, True, False], [True, False, False],
                                                                   [False, False, False]]


def test_another_word_for_empty_is_an_error():
    with pytest.raises(ValueError, match="right or legacy"):
        signed_distance(cube(), "zero")


@pytest.mark.parametrize("empty", ["right", "legacy"])
@pytest.mark.parametrize("shape", [(9,), (13, 10), (9, 12, 6)], ids=shape_id)
def test_the_definition_in_float32(shape, empty):
    batch = masks(shape, 4)
    for mask, found in zip(batch, signed_distance(batch, empty), strict=True):
        sides = definition(mask.numpy())
        lonely = 1.0 if empty == "right" else 0.0
        outside, inside = (side.clamp(min=0).nan_to_num(posinf=lonely) for side in (sides, -sides))
        expected = outside / outside.max().clamp(min=1) - inside / inside.max().clamp(min=1)
        assert torch.equal(found, expected.masked_fill(sides == -1, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("empty", ["right", "legacy"])
def test_a_gpu_gives_the_same_without_waiting(empty):
    batch = masks((24, 31, 18))
    there = batch.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distances, signed = distance(there), signed_distance(there, empty)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(distances.cpu(), distance(batch))
    torch.testing.assert_close(signed.cpu(), signed_distance(batch, empty), rtol=0, atol=1e-7)
