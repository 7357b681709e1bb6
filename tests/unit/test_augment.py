"""Turn and crop against numpy, the starts that the authors' code can draw, strong views and boxes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ssl4mis import augment
from ssl4mis.augment import Strong, View


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


def drawn(count=4000):
    return [augment.draw_strong(np.random.default_rng([7, index])) for index in range(count)]


def test_strong_views_are_drawn_as_often_as_stated():
    views = drawn()
    jittered, blurred = [v for v in views if v.contrast != 1], [v for v in views if v.sigma]
    assert len(jittered) == len([v for v in views if v.brightness]) == pytest.approx(0.8 * 4000, abs=80)
    assert len(blurred) == pytest.approx(0.5 * 4000, abs=100)
    assert len([v for v in jittered if v.brightness_first]) == pytest.approx(0.4 * 4000, abs=100)
    assert len([v for v in jittered if v.sigma]) == pytest.approx(0.4 * 4000, abs=100)
    for values, low, high in (([v.contrast for v in jittered], 0.5, 1.5), ([v.brightness for v in jittered], -0.5, 0.5),
                              ([v.sigma for v in blurred], 0.1, 2.0)):
        span = high - low
        assert low <= min(values) < low + span / 50 and high - span / 50 < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=span / 20)


def test_a_strong_view_is_a_function_of_the_generator():
    assert drawn(20) == drawn(20) and len(set(drawn(20))) > 15


@pytest.mark.parametrize("space", [(9, 7), (9, 7, 5)])
def test_intensities_of_a_strong_view(space):
    """Each channel by its own mean and standard deviation, one after the other."""
    image = torch.randn(2, *space) * 3 + 5
    x = image.double().numpy().reshape(2, -1)

    def contrast(x):
        return (x - x.mean(1, keepdims=True)) * 1.4 + x.mean(1, keepdims=True)

    def brightness(x):
        return x + 0.3 * x.std(1, ddof=1, keepdims=True)

    for first, expected in ((False, brightness(contrast(x))), (True, contrast(brightness(x)))):
        found = augment.apply_strong(image, Strong(1.4, 0.3, first)).numpy()
        np.testing.assert_allclose(found.reshape(2, -1), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(brightness(contrast(x)), contrast(brightness(x)))
    assert torch.equal(augment.apply_strong(image, Strong()), image)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 2.0])
@pytest.mark.parametrize("space", [(13, 8), (9, 14, 6)])
def test_blur_is_that_of_scipy(space, sigma):
    image = torch.randn(2, *space)
    expected = np.stack([gaussian_filter(channel, sigma, mode="nearest") for channel in image.double().numpy()])
    for found in (augment.blur(image, sigma), augment.apply_strong(image, Strong(sigma=sigma))):
        assert found.shape == image.shape and found.is_contiguous()
        np.testing.assert_allclose(found, expected, atol=2e-6)


def corners(mask):
    """First corner and sides of the box around a mask, and whether the mask fills it."""
    found = [np.flatnonzero(mask.any(axis=tuple({*range(mask.ndim)} - {axis}))) for axis in range(mask.ndim)]
    spans = np.array([places[-1] - places[0] + 1 for places in found])
    return np.array([places[0] for places in found]), spans, np.prod(spans) == mask.sum()


@pytest.mark.parametrize("space", [(48, 32), (32, 24, 40)])
def test_boxes(space):
    torch.manual_seed(0)
    masks = augment.boxes(8000, space, 0.5, (0.02, 0.4), "cpu")
    assert masks.shape == (8000, *space) and masks.dtype == torch.bool
    full = masks[masks.flatten(1).any(1)].numpy()
    assert len(full) == pytest.approx(4000, abs=150)
    starts, spans, boxes = map(np.array, zip(*map(corners, full), strict=True))
    assert boxes.all()
    relative, shares = spans / space, full.mean(axis=tuple(range(1, full.ndim)))
    assert 0.014 < shares.min() < 0.03 and 0.38 < shares.max() < 0.43
    uniform = np.array([0.08, 0.1, 0.1, 0.1]) / 0.38 * len(full)
    assert np.histogram(shares, [0.02, 0.1, 0.2, 0.3, 0.41])[0] == pytest.approx(uniform, abs=110)
    stretch = relative.max(1) / relative.min(1)
    assert 2.3 < stretch.max() < 3.8 and stretch.min() < 1.2
    assert relative.argmax(1).mean() == pytest.approx((len(space) - 1) / 2, abs=0.12), "axes differ"
    room = space - spans
    for axis in range(len(space)):
        place = (starts / np.maximum(room, 1))[room[:, axis] > 4, axis]
        assert place.min() == 0 and place.max() == 1 and place.mean() == pytest.approx(0.5, abs=0.04)


def test_boxes_reach_every_corner_and_never_leave_the_patch():
    torch.manual_seed(0)
    masks = augment.boxes(400, (6, 5), 1.0, (0.3, 0.4), "cpu")
    assert masks.flatten(1).any(1).all()
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert masks[(slice(None), *corner)].any()
    assert all(corners(mask)[2] for mask in masks.numpy())


def test_no_boxes():
    assert not augment.boxes(20, (8, 8, 8), 0.0, (0.02, 0.4), "cpu").any()


def test_boxes_follow_torchs_generator():
    def drawn(seed):
        torch.manual_seed(seed)
        return augment.boxes(3, (16, 16, 16), 1.0, (0.02, 0.4), "cpu")

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert len({mask.numpy().tobytes() for mask in drawn(1)}) == 3, "samples share a box"
