"""Turn and crop against numpy, and the starts that the authors' code can draw."""

import numpy as np
import pytest
import torch

from ssl4mis import augment
from ssl4mis.augment import View


def oracle(volume, turns, axis, start, margin, patch):
    """np.rot90, np.flip, zero padding and a crop of the last axes of (C, *space), as the authors' code does it."""
    if turns is not None:
        volume = np.flip(np.rot90(volume, turns, axes=(1, 2)), axis + 1)
    volume = np.pad(volume, [(0, 0), *((m, m) for m in margin)])
    return volume[(slice(None), *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))]


def applied(volume, view, patch):
    """`augment.apply` into memory that holds rubbish."""
    out = torch.full((len(volume), *patch), -7.0)
    augment.apply(torch.from_numpy(volume), view, out)
    return out.numpy()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("seed", range(30))
def test_any_view_is_what_numpy_gives(dims, seed):
    rng = np.random.default_rng([seed, dims])
    patch, size = tuple(rng.integers(4, 12, dims)), tuple(rng.integers(3, 16, dims))
    volume = rng.normal(size=(2, *size)).astype(np.float32) + 10  # zeros are padding only
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    transpose, flips = augment.rotflip(turns, axis)
    turned = np.rot90(volume, turns, axes=(1, 2)).shape[1:]
    margin = augment.margins(turned, patch)
    for _ in range(5):
        start = tuple(int(rng.integers(s + 2 * m - p + 1)) for s, m, p in zip(turned, margin, patch, strict=True))
        expected = oracle(volume, turns, axis, start, margin, patch)
        assert np.array_equal(applied(volume, View(transpose, flips, start, margin), patch), expected)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("axis", range(2))
def test_the_eight_turns(turns, axis):
    volume = np.arange(5 * 7 * 3, dtype=np.float32).reshape(1, 5, 7, 3)
    expected = np.flip(np.rot90(volume, turns, axes=(1, 2)), axis + 1)
    transpose, flips = augment.rotflip(turns, axis)
    view = View(transpose, flips, (0, 0, 0), (0, 0, 0))
    assert np.array_equal(applied(volume, view, expected.shape[1:]), expected)


def test_the_eight_turns_are_four_views_and_never_none():
    """A rotation and then a flip is always a reflection, so the plain volume never occurs, as in the authors' code."""
    views = [augment.rotflip(turns, axis) for turns in range(4) for axis in range(2)]
    assert sorted(set(views)) == [(False, (0,)), (False, (1,)), (True, ()), (True, (0, 1))]
    assert all(views.count(view) == 2 for view in views)


def test_labels_without_channels_are_turned_like_images():
    volume = np.arange(6 * 9 * 4).reshape(6, 9, 4)
    rng = np.random.default_rng(3)
    for _ in range(20):
        view = augment.draw(rng, volume.shape, (5, 5, 5), ("rotflip",))
        image, label = torch.zeros(1, 5, 5, 5), torch.zeros(5, 5, 5, dtype=torch.uint8)
        augment.apply(torch.from_numpy(volume)[None].float(), view, image)
        augment.apply(torch.from_numpy(volume.astype(np.uint8)), view, label)
        assert torch.equal(image[0].to(torch.uint8), label)


@pytest.mark.parametrize(("size", "patch", "expected"), [
    ((20, 20, 20), (16, 16, 16), (0, 0, 0)),
    ((16, 20, 20), (16, 16, 16), (3, 1, 1)),  # (16-16)//2+3, (16-20)//2+3: the others get some as well
    ((10, 40, 17), (16, 16, 16), (6, 0, 2)),
    ((9, 30), (16, 16), (6, 0)),
])
def test_margins(size, patch, expected):
    assert augment.margins(size, patch) == expected


@pytest.mark.parametrize("augmentation", [(), ("rotflip",)])
def test_the_last_start_is_never_drawn(augmentation):
    rng = np.random.default_rng(0)
    size, patch = (12, 10, 9), (8, 8, 8)
    starts = {False: set(), True: set()}
    for _ in range(600):
        view = augment.draw(rng, size, patch, augmentation)
        starts[view.transpose].add(view.start)
    assert starts[False] == {(x, y, 0) for x in range(4) for y in range(2)}
    assert starts[True] == ({(x, y, 0) for x in range(2) for y in range(4)} if augmentation else set())


def test_padded_volumes_stay_inside_their_padding():
    rng = np.random.default_rng(1)
    for _ in range(300):
        view = augment.draw(rng, (9, 20, 16), (16, 16, 16), ("rotflip",))
        turned = (20, 9, 16) if view.transpose else (9, 20, 16)
        for start, size, margin in zip(view.start, turned, view.margin, strict=True):
            assert 0 <= start < max(size + 2 * margin - 16, 1)


def test_without_augmentation_only_crops():
    view = augment.draw(np.random.default_rng(0), (20, 20), (8, 8), ())
    assert (view.transpose, view.flips, view.margin) == (False, (), (0, 0))
