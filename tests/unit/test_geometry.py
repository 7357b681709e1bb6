"""Resampling of scans: as scipy does it in one piece, whatever the axes, the crop and the layout in memory."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from data_prep.geometry import Geometry, labels_to_scanner, to_scanner, to_store
from data_prep.scans import Scan

SHAPES = [((11, 9, 8), (7, 13, 8)), ((40, 5, 6), (61, 2, 11)), ((1, 2, 3), (4, 5, 1)), ((3, 1, 2), (1, 1, 5)),
          ((200, 2, 3), (333, 2, 3)), ((3, 200, 2), (3, 90, 3)), ((64, 3, 1), (63, 4, 1))]


def noise(shape, kind=np.float32, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 1000).astype(kind)


def scan(voxels):
    return Scan(voxels, np.eye(4), Path("scan.nii"))


def geometry(shape, stored, crop=None, axes=(0, 1, 2), flips=(False,) * 3):
    """`shape` along the axes of the scanner, the rest along those of the store."""
    crop = tuple((0, shape[axis]) for axis in axes) if crop is None else crop
    return Geometry(shape, tuple(map(tuple, np.eye(4).tolist())), axes, flips, crop, stored)


def in_one_piece(voxels, shape, order):
    """The three axes at once and all in float64."""
    scale = np.array(voxels.shape) / shape
    return ndimage.affine_transform(voxels.astype(np.float64), np.diag(scale), 0.5 * scale - 0.5, shape, order=order,
                                    mode="nearest")


def close(found, expected, kind):
    """Up to the rounding of values in `kind` after each of three axes and of places up to 200 in scipy's float64."""
    assert found.shape == expected.shape and found.dtype == kind
    rounding = np.finfo(kind).eps + 200 * np.finfo(np.float64).eps
    assert np.abs(found - expected).max() <= 4 * rounding * np.abs(expected).max()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("shape", "stored"), SHAPES)
def test_axis_by_axis_is_as_in_one_piece(shape, stored, order):
    there = geometry(shape, stored)
    for kind, expected in ((np.float32, np.float32), (np.float64, np.float64), (np.int16, np.float32)):
        voxels = noise(shape, kind)
        oracle = in_one_piece(voxels, stored, order)
        close(to_store(scan(voxels), there, order), oracle, expected)
        close(to_scanner(voxels, geometry(stored, shape), order), oracle, expected)
    channels = np.stack([noise(shape), noise(shape, seed=1)])
    both = to_store(scan(channels), there, order)
    for channel, found in zip(channels, both, strict=True):
        assert np.array_equal(found, to_store(scan(channel), there, order))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_crop_takes_out_of_the_resampled_whole(data):
    """What lies beyond the box counts: values are those of the whole scan at the places of the stored voxels."""
    shape = tuple(data.draw(st.integers(1, 40)) for _ in range(3))
    axes = data.draw(st.sampled_from(list(itertools.permutations(range(3)))))
    crop = []
    for axis in axes:
        start = data.draw(st.integers(0, shape[axis] - 1))
        crop.append((start, data.draw(st.integers(start + 1, shape[axis]))))
    stored = tuple(data.draw(st.sampled_from([stop - start, 3, 8, 21])) for start, stop in crop)
    flips = tuple(data.draw(st.booleans()) for _ in range(3))
    there, order = geometry(shape, stored, tuple(crop), axes, flips), data.draw(st.integers(1, 5))
    voxels = noise(shape)
    places = there.stored_affine[:3] @ np.stack([*np.indices(stored), np.ones(stored)]).reshape(4, -1)
    expected = ndimage.map_coordinates(voxels.astype(np.float64), places, order=order, mode="nearest").reshape(stored)
    found = to_store(scan(voxels), there, order)
    assert found.shape == stored and found.dtype == np.float32
    # a crop may hold low values only, though its splines start from high ones beside it
    assert np.abs(found - expected).max() <= 4 * np.finfo(np.float32).eps * np.abs(voxels).max()


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_far_neighbors_count_as_far_as_float32_shows_them(order):
    """Values beyond the box that are much higher than those inside."""
    voxels = np.ones((120, 1, 1), np.float32)
    voxels[70:] = 1e4
    found = to_store(scan(voxels), geometry(voxels.shape, (45, 1, 1), ((10, 70), (0, 1), (0, 1))), order)
    expected = ndimage.affine_transform(voxels[:, 0, 0].astype(np.float64), [60 / 45], 10 + 30 / 45 - 0.5, (45,),
                                        order=order, mode="nearest")
    assert np.ptp(expected) > 100 and np.abs(found[:, 0, 0] - expected).max() < 1e4 * np.finfo(np.float32).eps


def test_labels_know_nothing_of_what_lies_beyond_the_box():
    voxels = noise((12, 10, 9), np.int16)
    inside = voxels[2:9, 3:8, 1:8]
    found = to_store(scan(voxels), geometry(voxels.shape, (5, 9, 7), ((2, 9), (3, 8), (1, 8))), 0)
    assert np.array_equal(found, to_store(scan(inside), geometry(inside.shape, (5, 9, 7)), 0))
    assert np.isin(found, inside).all()


@pytest.mark.parametrize("order", [1, 3, 5])
def test_axes_that_keep_their_voxels_are_not_touched(order):
    voxels = noise((9, 6, 5))
    found = to_store(scan(voxels), geometry(voxels.shape, (9, 11, 4), ((0, 9), (0, 6), (1, 5))), order)
    for i, plane in enumerate(voxels):
        assert np.array_equal(found[i], to_store(scan(plane[None, :, 1:]), geometry((1, 6, 4), (1, 11, 4)), order)[0])
    # where a new voxel falls on an old one between resampled neighbors it keeps its value
    thirds = to_store(scan(voxels), geometry(voxels.shape, (27, 6, 5)), order)
    assert np.abs(thirds[1::3] - voxels).max() <= np.finfo(np.float32).eps * np.abs(voxels).max()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("value", [0.1, -1024, 3e-5, 1e30])
def test_a_constant_stays_exactly_what_it_is(order, value):
    voxels = np.full((70, 6, 1), value, np.float32)
    there = geometry(voxels.shape, (31, 17, 3), ((20, 60), (0, 6), (0, 1)))
    assert (to_store(scan(voxels), there, order) == np.float32(value)).all()


def test_the_layout_in_memory_changes_no_bit():
    voxels = noise((30, 20, 10), np.int16)
    there = geometry(voxels.shape, (17, 31, 6), ((3, 29), (0, 20), (1, 9)))
    first = to_store(scan(voxels), there, 3)
    for other in (np.asfortranarray(voxels), np.repeat(voxels, 2, axis=1)[:, ::2], voxels[::-1].copy()[::-1]):
        assert np.array_equal(to_store(scan(other), there, 3), first)


def test_what_is_given_stays_as_it_was():
    probabilities = np.random.default_rng(0).random((3, 6, 5, 4))
    before = probabilities.copy()
    for shape in ((6, 5, 4), (9, 5, 3)):
        labels_to_scanner(probabilities, geometry(shape, (6, 5, 4)))
        assert np.array_equal(probabilities, before)


def peak(function, *arguments):
    function(*arguments)  # imports do not count
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_two_volumes_and_of_three_for_labels():
    voxels = noise((128, 128, 96), np.int16)
    volume = 4 * voxels.size
    assert peak(to_store, scan(voxels), geometry(voxels.shape, (100, 100, 96)), 3) < 2 * volume
    there = geometry((100, 100, 80), (80, 80, 60))
    needed = [peak(labels_to_scanner, np.random.default_rng(0).random((n, 80, 80, 60), np.float32), there)
              for n in (2, 6)]
    assert max(needed) < 3.5 * 4 * 100 * 100 * 80 and needed[1] < 1.1 * needed[0]
