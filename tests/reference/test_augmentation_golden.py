"""Rotation, flip and crop against stored volumes, driven by the stored draws."""

import numpy as np
import pytest
import torch

from ssl4mis import augment

INPUTS = ("image_*", "label_*", "crop_start_[0-9]*", "rotflip_[0-9]*", "crop_size")
COVERED = ("crop_start_upper_*", "random_crop_image_*", "random_crop_label_*", "rotflip_image_*", "rotflip_label_*")
NOT_COVERED = {"center_crop_image_*": "the suite never crops the center: evaluation slides over the whole volume"}


class Draws:
    """A random generator that returns stored draws and remembers their exclusive upper bounds."""

    def __init__(self, *values):
        self.waiting, self.uppers = [int(value) for value in values], []

    def integers(self, upper):
        self.uppers.append(upper)
        return self.waiting.pop(0)


@pytest.fixture
def cases(golden):
    """The file and the numbers of its cases."""
    data = golden("augmentation_3d")
    numbers = [name.removeprefix("image_") for name in data if name.startswith("image_")]
    assert numbers
    return data, numbers


def applied(volume, view, patch):
    """A view of a stored volume; the target starts out full of rubbish."""
    out = torch.full((1, *patch), 7, dtype=torch.tensor(volume).dtype)
    augment.apply(torch.tensor(volume)[None], view, out)
    return out[0]


def test_random_crop(cases):
    data, numbers = cases
    patch = tuple(data["crop_size"].tolist())
    for i in numbers:
        rng = Draws(*data[f"crop_start_{i}"])
        view = augment.draw(rng, data[f"image_{i}"].shape, patch, ())
        np.testing.assert_array_equal(rng.uppers, data[f"crop_start_upper_{i}"])
        for part in ("image", "label"):
            crop = applied(data[f"{part}_{i}"], view, patch)
            np.testing.assert_array_equal(crop, data[f"random_crop_{part}_{i}"], err_msg=f"{part} {i}")


def test_rotation_and_flip(cases):
    data, numbers = cases
    for i in numbers:
        patch = data[f"rotflip_image_{i}"].shape
        start = augment.margins(patch, patch)  # the volume itself within its margin
        rng = Draws(*data[f"rotflip_{i}"], *start)
        view = augment.draw(rng, data[f"image_{i}"].shape, patch, ("rotflip",))
        assert rng.uppers[:2] == [4, 2] and not rng.waiting
        for part in ("image", "label"):
            turned = applied(data[f"{part}_{i}"], view, patch)
            np.testing.assert_array_equal(turned, data[f"rotflip_{part}_{i}"], err_msg=f"{part} {i}")


def test_crop_of_the_turned_volume(cases):
    """Turn, then crop as the authors' chain of transforms does, with the stored turn and the first start."""
    data, numbers = cases
    patch = tuple(data["crop_size"].tolist())
    for i in numbers:
        turned = data[f"rotflip_image_{i}"]
        turn, start = data[f"rotflip_{i}"], [0] * turned.ndim
        view = augment.draw(Draws(*turn, *start), data[f"image_{i}"].shape, patch, ("rotflip",))
        padded = np.pad(turned, [(m, m) for m in augment.margins(turned.shape, patch)])
        crop = applied(data[f"image_{i}"], view, patch)
        np.testing.assert_array_equal(crop, padded[tuple(slice(p) for p in patch)], err_msg=str(i))


def test_every_array_is_accounted_for(golden, every_array_is_in_one):
    every_array_is_in_one(golden("augmentation_3d"), COVERED, INPUTS, NOT_COVERED)
