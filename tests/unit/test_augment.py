"""Turn and crop against numpy, whole planes against scipy, what the authors' code can draw, strong views and boxes."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, rotate, zoom
from torch.utils._python_dispatch import TorchDispatchMode

from ssl4mis import augment
from ssl4mis.augment import Plane, Strong, View


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


@pytest.mark.parametrize("draw", [lambda rng: augment.draw(rng, (9, 9, 5), (4, 4, 4), ("dihedral",)),
                                  lambda rng: augment.draw_plane(rng, ("dihedral",))], ids=["crops", "planes"])
def test_a_square_has_eight_orientations(draw):
    views = [draw(np.random.default_rng([5, n]))[:2] for n in range(4000)]
    assert set(views) == {(transpose, flips) for transpose in (False, True) for flips in ((), (0,), (1,), (0, 1))}
    assert min(map(views.count, set(views))) > 420
    mirrored = {augment.rotflip(turns, axis) for turns in range(4) for axis in range(2)}
    assert sum(view not in mirrored for view in views) == pytest.approx(2000, abs=100)


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


def whole(plane, patch, angle=None, turns=None, axis=0, mode="constant"):
    """A turned and resized plane (x, y) by numpy and scipy, as the authors' code has it."""
    if angle is not None:
        plane = rotate(plane, angle, order=0, reshape=False)
    elif turns is not None:
        plane = np.flip(np.rot90(plane, turns), axis)
    return zoom(plane, [new / old for new, old in zip(patch, plane.shape, strict=True)], order=0, mode=mode)


def plane_of(size, seed=0):
    """Image (x, y) float32 without zeros, so that what comes from outside shows, and label (x, y) uint8."""
    rng = np.random.default_rng([seed, *size])
    return rng.normal(size=size).astype(np.float32) + 10, rng.integers(1, 200, size).astype(np.uint8)


def applied_to_plane(plane, view, patch):
    """`augment.apply_plane` into memory that holds rubbish."""
    out = torch.full(patch, 7, dtype=torch.tensor(plane).dtype)
    augment.apply_plane(torch.tensor(plane), view, out)
    return out.numpy()


@pytest.mark.parametrize("size", [(216, 256), (154, 224), (428, 512), (256, 256), (320, 320), (173, 208), (7, 300)])
def test_rotated_planes_are_what_scipy_gives(size):
    """Every angle, on sizes of ACDC and PROMISE12; scipy's default mode, for which 256 is a harmless size."""
    image, label = plane_of(size)
    for angle in range(*augment.ANGLES):
        found = applied_to_plane(image, Plane(angle=angle), (256, 256))
        assert np.array_equal(found, whole(image, (256, 256), angle)), angle
        found = applied_to_plane(label, Plane(angle=angle), (256, 256))
        assert np.array_equal(found, whole(label, (256, 256), angle)), angle


@pytest.mark.parametrize("seed", range(8))
def test_planes_of_any_size_are_what_scipy_gives(seed):
    rng = np.random.default_rng(seed)
    for _ in range(25):
        size, patch = tuple(map(int, rng.integers(1, 60, 2))), tuple(map(int, rng.integers(1, 80, 2)))
        image, label = plane_of(size)
        for angle in (None, *map(int, rng.integers(-90, 90, 2))):
            found = applied_to_plane(image, Plane(angle=angle or 0), patch)
            assert np.array_equal(found, whole(image, patch, angle, mode="nearest")), (size, patch, angle)
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        found = applied_to_plane(label, Plane(*augment.rotflip(turns, axis)), patch)
        assert np.array_equal(found, whole(label, patch, turns=turns, axis=axis, mode="nearest")), (size, patch)


@pytest.mark.parametrize(("size", "new"), [((256, 256), (216, 256)), ((256, 256), (174, 202)), ((4, 9), (188, 40))])
def test_resizing_keeps_the_last_voxels(size, new):
    """Where rounding leads past the edge scipy's default mode fills with zero, and nowhere else do we differ."""
    plane = plane_of(size)[0]
    found = augment.resize(torch.from_numpy(plane), new).numpy()
    assert np.array_equal(found, whole(plane, new, mode="nearest"))
    assert np.array_equal(found[:-1, :-1], whole(plane, new)[:-1, :-1])
    assert np.array_equal(found[[0, 0, -1, -1], [0, -1, 0, -1]], plane[[0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize(("size", "length", "expected"), [
    (4, 7, [0, 1, 1, 2, 2, 3, 3]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3]), (3, 1, [0]), (1, 3, [0, 0, 0]),
    (2, 4, [0, 0, 1, 1]),
])
def test_nearest_goes_from_the_first_to_the_last_voxel_and_halves_go_up(size, length, expected):
    assert augment.nearest(size, length, "cpu").tolist() == expected


VIEWS = (Plane(), Plane(True, (0, 1)), Plane(False, (1,)), Plane(angle=-20), Plane(angle=13))


@pytest.mark.parametrize("view", VIEWS)
def test_channels_types_and_strides_of_planes(view):
    """Planes of a volume with channels, across its last axis, like each plane alone; masks too."""
    volume = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 17, 23, 4)).astype(np.float32))
    out = torch.empty(3, 20, 16)
    augment.apply_plane(volume[..., 2], view, out)
    alone = [applied_to_plane(volume[channel, ..., 2].numpy(), view, (20, 16)) for channel in range(3)]
    assert np.array_equal(out, alone)
    inside = torch.ones((), dtype=torch.bool).expand(17, 23)
    valid = torch.empty(20, 16, dtype=torch.bool)
    augment.apply_plane(inside, view, valid)
    assert np.array_equal(valid, applied_to_plane(np.ones((17, 23), np.float32), view, (20, 16)) == 1)
    assert valid.all() == (not view.angle)


class OnMeta(TorchDispatchMode):
    """The meta device has no values to read; nothing may be made on another one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert made.device.type == "meta", func
        return made


@pytest.mark.parametrize("view", VIEWS)
def test_planes_stay_on_their_device(view):
    with OnMeta():
        out = torch.empty(2, 16, 16, device="meta")
        augment.apply_plane(torch.empty(2, 20, 30, device="meta"), view, out)


def test_planes_are_drawn_as_the_authors_do():
    views = [augment.draw_plane(np.random.default_rng([3, n]), ("rotflip_or_rotate",)) for n in range(4000)]
    turned = [view for view in views if view.transpose or view.flips]
    rotated = [view.angle for view in views if not (view.transpose or view.flips)]
    assert len(rotated) == pytest.approx(2000, abs=100)
    assert all(view.angle == 0 for view in turned)
    counts = {angle: rotated.count(angle) for angle in set(rotated)}
    assert counts.pop(0) == pytest.approx(1000 + 25, abs=100)  # left as they are, or turned by 0 degrees
    assert sorted({0, *counts}) == list(range(-20, 20)) and min(counts.values()) > 8 and max(counts.values()) < 50
    quarters = {view: turned.count(view) for view in set(turned)}
    assert {view[:2] for view in quarters} == {augment.rotflip(k, axis) for k in range(4) for axis in range(2)}
    assert min(quarters.values()) > 420


def test_planes_without_rotation_and_without_augmentation():
    views = {augment.draw_plane(np.random.default_rng(n), ("rotflip",)) for n in range(100)}
    assert views == {Plane(*augment.rotflip(k, axis)) for k in range(4) for axis in range(2)}
    assert augment.draw_plane(np.random.default_rng(0), ()) == Plane()


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
