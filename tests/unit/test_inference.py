"""The sliding window: known starts, functions that it must not change, and MONAI's implementation. Planes: scipy's."""

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from ssl4mis.inference import by_planes, coverage, sliding_window, window_starts


def voxelwise(image):
    """Two probabilities from the voxel alone, so that the window must not matter."""
    p = image[:, :1].sigmoid()
    return torch.cat([1 - p, p], 1)


def by_position(image):
    """Depends on the place in the window, so that wrong places or weights show."""
    ramp = torch.arange(image[0, 0].numel(), dtype=torch.float32).view(image.shape[2:]) / image[0, 0].numel()
    return torch.cat([image[:, :1] * ramp, image[:, :1] + ramp], 1)


@pytest.mark.parametrize(("size", "patch", "stride", "expected"), [
    ((10,), (4,), (3,), [0, 3, 6]), ((10,), (4,), (4,), [0, 4, 6]), ((10,), (4,), (6,), [0, 6]),
    ((4,), (4,), (1,), [0]), ((5,), (4,), (4,), [0, 1]), ((11,), (4,), (5,), [0, 5, 7]),
    ((6,), (4,), (1,), [0, 1, 2]),
])
def test_known_starts(size, patch, stride, expected):
    assert window_starts(size, patch, stride) == [(start,) for start in expected]


def test_the_last_axis_is_fastest():
    assert window_starts((5, 6), (4, 4), (4, 2)) == [(0, 0), (0, 2), (1, 0), (1, 2)]


def test_the_papers_number_of_windows():
    """LA: ceil((s - p) / stride) + 1 per axis."""
    assert len(window_starts((176, 128, 88), (112, 112, 80), (18, 18, 4))) == 5 * 2 * 3


@pytest.mark.parametrize("seed", range(20))
def test_every_voxel_is_covered_and_no_window_sticks_out(seed):
    rng = torch.Generator().manual_seed(seed)
    draw = [torch.randint(1, 9, (2,), generator=rng).tolist() for _ in range(3)]
    patch, stride = draw[0], [min(s, p) for s, p in zip(draw[1], draw[0], strict=True)]
    size = [p + extra for p, extra in zip(patch, draw[2], strict=True)]
    covered = torch.zeros(size)
    for x, y in window_starts(size, patch, stride):
        assert 0 <= x <= size[0] - patch[0] and 0 <= y <= size[1] - patch[1]
        covered[x:x + patch[0], y:y + patch[1]] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("space", [(16, 16, 8), (21, 19, 13), (9, 30, 8), (7, 6, 5), (16, 15, 3), (20, 17), (5, 6)])
@pytest.mark.parametrize("stride", [8, 5])
def test_voxelwise_functions_pass_unchanged(space, stride):
    patch = (16, 16, 8)[:len(space)]
    image = torch.randn((1, *space), generator=torch.Generator().manual_seed(0))
    found = sliding_window(voxelwise, image, patch, (stride, stride, 4)[:len(space)])
    assert found.shape == (2, *space) and found.dtype == torch.float32
    torch.testing.assert_close(found, voxelwise(image[None])[0], rtol=0, atol=1e-6)


def test_a_constant_stays_that_constant():
    image = torch.zeros(1, 19, 11)
    found = sliding_window(lambda x: torch.full((len(x), 3, *x.shape[2:]), 0.25), image, (8, 8), (3, 5))
    assert torch.equal(found, torch.full((3, 19, 11), 0.25))


def test_windows_are_averaged_plainly():
    """Windows 0-3 and 2-5 of a line of 6: the middle is the mean of both."""
    calls = iter([1.0, 3.0])
    found = sliding_window(lambda x: torch.full((1, 1, 4), next(calls)), torch.zeros(1, 6), (4,), (2,), batch=1)
    assert found.tolist() == [[1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize(("length", "before"), [(4, 2), (5, 1), (7, 0), (8, 0)])
def test_padding_is_even_and_the_odd_voxel_comes_after(length, before):
    seen = []

    def predict(x):
        seen.append(x)
        return x

    image = torch.arange(1.0, length + 1)[None]
    assert torch.equal(sliding_window(predict, image, (8,), (8,)), image)
    padded = torch.zeros(8)
    padded[before:before + length] = image[0]
    assert torch.equal(seen[0][0, 0], padded)


def test_several_channels():
    image = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(sliding_window(lambda x: x, image, (8, 8), (4, 4)), image)


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_the_batch_size_does_not_matter(batch):
    image = torch.randn(1, 20, 19, 13, generator=torch.Generator().manual_seed(2))
    expected = sliding_window(by_position, image, (8, 8, 8), (4, 3, 5))
    assert torch.equal(sliding_window(by_position, image, (8, 8, 8), (4, 3, 5), batch=batch), expected)


def test_a_device_that_is_too_small_gets_one_window_at_a_time():
    image, sizes = torch.randn(1, 20, 19, generator=torch.Generator().manual_seed(2)), []

    def small(windows):
        sizes.append(len(windows))
        if len(windows) > 1:
            raise torch.OutOfMemoryError
        return by_position(windows)

    expected = sliding_window(by_position, image, (8, 8), (4, 3))
    assert torch.equal(sliding_window(small, image, (8, 8), (4, 3), batch=4), expected)
    assert sizes == [4] + [1] * len(window_starts((20, 19), (8, 8), (4, 3)))


@pytest.mark.parametrize(("length", "patch", "stride"), [(10, 4, 3), (4, 4, 1), (11, 4, 5), (9, 8, 8)])
def test_coverage_counts_windows(length, patch, stride):
    expected = [sum(start <= voxel < start + patch for (start,) in window_starts((length,), (patch,), (stride,)))
                for voxel in range(length)]
    assert coverage(length, patch, stride).tolist() == expected


def test_half_precision_predictions_are_summed_in_float32():
    found = sliding_window(lambda x: x.bfloat16(), torch.full((1, 40), 1.0), (8,), (1,))
    assert found.dtype == torch.float32 and torch.equal(found, torch.ones(1, 40))


@pytest.mark.slow
@pytest.mark.parametrize("space", [(20, 19, 13), (16, 8, 9), (6, 20, 5)])
def test_monai_agrees(space):
    """With an overlap of one half MONAI's scan interval is the stride, and its constant mode is a plain mean."""
    inferers = pytest.importorskip("monai.inferers")
    image = torch.randn((1, *space), generator=torch.Generator().manual_seed(3))
    expected = inferers.sliding_window_inference(image[None], (8, 8, 8), 4, by_position, overlap=0.5, mode="constant")
    found = sliding_window(by_position, image, (8, 8, 8), (4, 4, 4))
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def lines(image):
    """Three classes that follow the values of both channels and the place in the plane."""
    rows, columns = (torch.linspace(-1, 1, n) for n in image.shape[2:])
    return torch.stack([image[:, 0], image[:, 1] + rows[:, None], columns - image[:, 0]], 1).softmax(1)


@pytest.mark.parametrize(("space", "patch"), [
    ((30, 21, 5), (16, 16)), ((9, 40, 3), (24, 32)), ((16, 16, 1), (16, 16)), ((256, 216, 2), (128, 256)),
])
def test_planes_are_resized_predicted_and_put_back(space, patch):
    """As the authors' loop does it, plane after plane with scipy."""
    image = np.random.default_rng(0).normal(size=(2, *space)).astype(np.float32)
    expected = np.zeros(space, np.uint8)
    there = [new / old for new, old in zip(patch, space, strict=False)]
    for z in range(space[2]):
        resized = np.stack([zoom(channel[..., z], there, order=0, mode="nearest") for channel in image])
        classes = lines(torch.from_numpy(resized)[None]).argmax(1)[0].numpy()
        expected[..., z] = zoom(classes, [1 / factor for factor in there], order=0, mode="nearest")
    found = by_planes(lines, torch.from_numpy(image), patch)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert np.array_equal(found.argmax(0), expected) and len(np.unique(expected)) == 3


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_the_batch_size_does_not_matter_for_planes(batch):
    image = torch.randn(2, 20, 19, 7, generator=torch.Generator().manual_seed(2))
    calls = []

    def predict(planes):
        calls.append(len(planes))
        return lines(planes)

    assert torch.equal(by_planes(predict, image, (16, 24), batch), by_planes(lines, image, (16, 24)))
    assert sum(calls) == 7 and max(calls) == min(batch, 7)


def test_a_device_that_is_too_small_gets_one_plane_at_a_time():
    image, sizes = torch.randn(2, 20, 19, 5, generator=torch.Generator().manual_seed(2)), []

    def small(planes):
        sizes.append(len(planes))
        if len(planes) > 1:
            raise torch.OutOfMemoryError
        return lines(planes)

    assert torch.equal(by_planes(small, image, (16, 24), 3), by_planes(lines, image, (16, 24)))
    assert sizes == [3] + [1] * 5
