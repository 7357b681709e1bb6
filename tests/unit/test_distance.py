"""Distance transforms: hand-computed maps, a comparison of all pairs of voxels, and torch against SciPy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from ssl4mis import distance as module
from ssl4mis.distance import distance, signed_distance, squared_distance

SHAPES = [(17,), (1, 9), (13, 10), (7, 1, 5), (9, 12, 6), (3, 4, 5, 2)]
DENSITIES = [0.0, 0.03, 0.5, 0.97, 1.0]


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
