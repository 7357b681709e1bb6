"""Recipes: steps with known answers, boxes against the published formulas, laws of `apply`, real scans."""

import importlib
import itertools
import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import recipes
from data_prep.geometry import to_scanner
from data_prep.recipes import Crop, Recipe, Step, apply
from data_prep.scans import Scan, read_scan
from data_prep.spec import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared"
REAL = SHARED / "real"
OVER = {"over": "foreground"}
ROBUST = (Step("clip_quantiles", {"low": 0.005, "high": 0.995, **OVER}), Step("zscore", OVER))
WINDOW = {"low": -125, "high": 275}


def recipe(crop=None, after=(), **options):
    return Recipe("Any", "test", 1, "", crop=crop or Crop(), after=after, **options)


LA = recipe(Crop("label", (15, 15, None), True, (112, 112, 0), exclusive=True), orientation=None,
            before=(Step("zscore"),))
PANCREAS = recipe(Crop("label", (25, 25, None), smallest=(96, 96, 0), exclusive=True), spacing=(1, 1, 1),
                  after=(Step("clip", WINDOW), Step("rescale", WINDOW), Step("zscore")))
BRATS = recipe(Crop("nonzero", channel=0, exclusive=True), orientation=None,
               after=(Step("clip_share", {"share": 0.999}), Step("zscore", {"over": "positive"})))
ACDC = recipe(after=(Step("minmax"),), orientation=None)
CLEAN_MR = recipe(Crop("foreground", (10, 10, None), smallest=(16, 16, 0)), ROBUST, spacing=(1.5, 1.5, None))
CLEAN_CT = recipe(Crop("body", (5, 5, 5)), (Step("clip", WINDOW), Step("zscore", OVER)), spacing=(2, 2, 2))
CLEAN_BRATS = recipe(Crop("nonzero"), (Step("zscore", OVER),))
FREE = {"ACDC": ACDC, "BraTS": BRATS, "clean MR": CLEAN_MR, "clean CT": CLEAN_CT, "clean BraTS": CLEAN_BRATS}
GUIDED = {"LA": LA, "Pancreas": PANCREAS}


def scan(voxels, spacing=(1, 1, 1), name="scan.nii", affine=None):
    return Scan(np.asarray(voxels), np.diag([*spacing, 1.0]) if affine is None else affine, Path(name))


def marked(shape, *boxes):
    """uint8 zeros with ones in boxes of (start, stop) per axis."""
    label = np.zeros(shape, np.uint8)
    for box in boxes:
        label[tuple(slice(*ends) for ends in box)] = 1
    return label


def noisy(signal, sigma, seed=0):
    """Magnitude of a signal with complex noise, as an MR scanner makes it."""
    rng = np.random.default_rng(seed)
    return np.hypot(signal + rng.normal(0, sigma, signal.shape), rng.normal(0, sigma, signal.shape))


def torso(shape=(64, 72, 20), inside=400.0, rim=150.0, seed=0):
    """(mask, signal) of an ellipse with a bright rim, which keeps 8 voxels away from the sides in x and y."""
    x, y, _ = np.indices(shape)
    r = ((x - (shape[0] - 1) / 2) / (shape[0] / 2 - 8)) ** 2 + ((y - (shape[1] - 1) / 2) / (shape[1] / 2 - 8)) ** 2
    texture = np.random.default_rng(seed).uniform(0.7, 1.3, shape)
    return r <= 1, np.where(r <= 1, texture * inside + rim * (r > 0.85), 0)


def ct(shape=(64, 72, 20), seed=0):
    """HU of a torso of soft tissue in air."""
    mask, _ = torso(shape)
    return (np.where(mask, 40, -1000) + np.random.default_rng(seed).normal(0, 20, shape)).astype(np.int16)


def ends(mask):
    """(first, last + 1) of the true voxels per axis."""
    return tuple((int(hit.min()), int(hit.max()) + 1) for hit in np.nonzero(mask))


def image_for(name, seed=0):
    """Voxels a recipe of FREE or GUIDED is meant for, (channels, i, j, k)."""
    if "CT" in name or name == "Pancreas":
        return ct(seed=seed)[None]
    mask, signal = torso(seed=seed)
    if "BraTS" in name:
        return np.stack([np.where(mask, noisy(signal, 8, seed + n), 0) for n in range(2)]).astype(np.int16)
    return noisy(signal, 8, seed).astype(np.float32)[None]


# As JSON


@pytest.mark.parametrize("one", [*FREE.values(), *GUIDED.values(), recipe(Crop("label", ((1, 2.5), 0.1, None)))])
def test_json_keeps_a_recipe(one):
    assert Recipe.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False))) == one


@pytest.mark.parametrize("module", ["la", "pancreas", "acdc", "brats", "promise12", "isles2022"])
def test_json_keeps_the_recipes_of_the_data_sets(module):
    for name, one in importlib.import_module(f"data_prep.{module}").RECIPES.items():
        assert one.name == name and Recipe.from_dict(json.loads(json.dumps(one.to_dict()))) == one
        assert one.label_guided <= (name == "paper")


def test_what_is_not_said_is_the_default():
    entry = {"dataset": "LA", "name": "clean", "version": 3, "about": "short"}
    assert Recipe.from_dict(entry) == Recipe("LA", "clean", 3, "short")
    assert Recipe.from_dict(entry).id == "LA-clean-3"


@pytest.mark.parametrize(("change", "said"), [
    ({"after": [{"name": "sharpen", "arguments": {}}]}, "step 'sharpen', expected one of zscore, minmax"),
    ({"after": [{"name": "clip", "arguments": {"low": 0}}]}, "step clip: missing a required argument: 'high'"),
    ({"before": [{"name": "minmax", "arguments": {"low": 0}}]}, "step minmax: got an unexpected keyword"),
    ({"after": [{"name": "zscore", "arguments": {"over": "label"}}]}, "over 'label', expected one of all, positive"),
    ({"after": [{"arguments": {}}]}, "name"),
    ({"crop": {"around": "heart"}}, "crop around 'heart', expected one of '', 'label'"),
    ({"crop": {"around": "label", "margin": [1, 2]}}, "margin (1, 2)"),
    ({"crop": {"margin": [1, -2, 0]}}, "margin (1, -2, 0)"),
    ({"crop": {"smallest": [1, None, 0]}}, "smallest|NoneType"),
    ({"crop": {"size": [1, 2, 3]}}, "size"),
    ({"sharpness": 1}, "sharpness"),
    ({"name": None, "crop": 3}, "int"),
])
def test_broken_entries_are_refused_in_one_line(change, said):
    with pytest.raises(DataError) as error:
        Recipe.from_dict(ACDC.to_dict() | change)
    assert any(part in str(error.value) for part in said.split("|")) and str(error.value).startswith("recipe: ")
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_missing_entries_and_other_things_are_refused():
    entry = ACDC.to_dict()
    del entry["version"]
    for broken in (entry, [], None, "LA"):
        with pytest.raises(DataError, match="^recipe: .*expected what Recipe.to_dict gives$"):
            Recipe.from_dict(broken)


# Steps


def volume(*values):
    return np.array(values, np.float32).reshape(1, -1, 1, 1)


def test_zscore_over_all_positive_and_foreground_voxels():
    image = volume(-2, 0, 1, 3)
    np.testing.assert_allclose(recipes.zscore(image), (image - 0.5) / np.sqrt(13 / 4), rtol=1e-6)
    np.testing.assert_array_equal(recipes.zscore(image, "positive"), image - 2)
    mask = np.array([1, 1, 0, 0], bool).reshape(image.shape)
    np.testing.assert_array_equal(recipes.zscore(image, "foreground", mask), image + 1)


def test_channels_are_measured_one_by_one():
    image = np.concatenate([volume(0, 2), volume(10, 50)])
    mask = np.ones(image.shape, bool)
    for scored in (recipes.zscore(image), recipes.zscore(image, "foreground", mask)):
        np.testing.assert_array_equal(scored, np.concatenate([volume(-1, 1)] * 2))
    np.testing.assert_array_equal(recipes.minmax(image), np.concatenate([volume(0, 1)] * 2))
    np.testing.assert_array_equal(recipes.clip_share(image, 0.5), np.concatenate([volume(0, 0), volume(10, 10)]))
    half = recipes.clip_quantiles(image, 0.25, 0.75)
    np.testing.assert_array_equal(half, np.concatenate([volume(0.5, 1.5), volume(20, 40)]))


def test_sums_are_taken_in_double_precision():
    """Intensities far from zero, where sums in single precision are off by more than the deviation."""
    image = (np.random.default_rng(0).normal(0, 3, (1, 80, 80, 80)) + 60000).astype(np.float32)
    exact = image.astype(np.float64)
    exact = (exact - exact.mean()) / exact.std()
    np.testing.assert_allclose(recipes.zscore(image), exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(recipes.zscore(image[:, ::-1].swapaxes(1, 3)), exact[:, ::-1].swapaxes(1, 3), atol=1e-6)


def test_range_window_and_scale():
    image = volume(-1000, -125, 75, 275, 3000)
    np.testing.assert_array_equal(recipes.clip(image, -125, 275), volume(-125, -125, 75, 275, 275))
    np.testing.assert_array_equal(recipes.rescale(image, -125, 275), (image + 125) / 400)
    np.testing.assert_array_equal(recipes.minmax(image), (image + 1000) / 4000)
    for step in (recipes.clip(image, 0, 1), recipes.rescale(image, 0, 1), recipes.minmax(image)):
        assert step.dtype == np.float32 and step.shape == image.shape


def test_share_at_the_edge_of_a_step_of_the_distribution():
    """999 of 1000 voxels do not exceed 999: that share is reached there, the next float above it is not."""
    image = volume(*np.random.default_rng(0).permutation(1000) + 1)
    assert recipes.clip_share(image, 0.999).max() == 999
    assert recipes.clip_share(image, float(np.nextafter(0.999, 1))).max() == 1000
    assert recipes.clip_share(image, 1.0).max() == 1000
    assert recipes.clip_share(volume(5, 5, 5, 1, 9), 0.21).max() == 5
    assert recipes.clip_share(volume(*range(1, 101)), 0.07).max() == 7  # 100 x 0.07 is more than 7 in floats
    assert recipes.clip_share(volume(1, 2, 3), float(np.nextafter(1 / 3, 1))).max() == 2  # and 3 times this is 1


@settings(deadline=None)
@given(values=st.lists(st.integers(-3, 12), min_size=1, max_size=60), share=st.floats(0.01, 1))
def test_share_is_that_of_the_cumulative_distribution(values, share):
    levels, counts = np.unique(values, return_counts=True)
    top = levels[np.argmax(np.cumsum(counts) / len(values) >= share)]
    np.testing.assert_array_equal(recipes.clip_share(volume(*values), share), np.minimum(volume(*values), top))


def test_quantiles_of_the_foreground_cut_off_everywhere():
    image = volume(-50, *range(101), 500)
    mask = (image >= 0) & (image <= 100)
    clipped = recipes.clip_quantiles(image, 0.05, 0.9, "foreground", mask)
    np.testing.assert_array_equal(clipped, np.clip(image, 5, 90))


@pytest.mark.parametrize(("step", "image", "said"), [
    (recipes.zscore, volume(3, 3, 3), "the same value in all 3 voxels"),
    (recipes.minmax, volume(3, 3, 3), "the same value in all 3 voxels"),
    (lambda image: recipes.zscore(image, "positive"), volume(-1, 0), "no voxel of channel 0 counts (positive)"),
    (lambda image: recipes.clip_quantiles(image, 0, 1, "positive"), volume(-1, 0), "no voxel of channel 0 counts"),
    (lambda image: recipes.zscore(image, "positive"), volume(-1, 2, 2), "the same value in all 2 voxels that count"),
])
def test_nothing_to_measure(step, image, said):
    with pytest.raises(ValueError) as error:
        step(image)
    assert said in str(error.value)


# What counts as foreground

def lit(kind, shape=(64, 72, 20)):
    """How much of the signal coils receive, along y."""
    y = np.indices(shape)[1]
    if kind == "surface coil":
        return np.exp(-((y - 60) / 28.0) ** 2) + 0.08
    return 5 * np.exp(-((y - 60) / 10.0) ** 2) + 0.2 if kind == "coil in the rectum" else np.ones(shape)


@pytest.mark.parametrize("kind", ["even", "surface coil", "coil in the rectum"])
@pytest.mark.parametrize("sigma", [1, 6])
def test_the_body_is_found_whatever_the_coil_does(kind, sigma):
    mask, signal = torso()
    found = recipes.foreground(noisy(signal * lit(kind), sigma))
    for (start, stop), (first, last) in zip(ends(found), ends(mask), strict=True):
        assert first - 2 <= start <= first and last <= stop <= last + 2
    assert found[mask].mean() > 0.97 and found[~mask].mean() < 0.03


@pytest.mark.parametrize("change", [
    lambda v: v - 500, lambda v: 1e-4 * v, lambda v: v.astype(np.int16),
    lambda v: np.where(np.random.default_rng(1).random(v.shape) < 1e-4, 1e4 * v.max(), v),
    lambda v: np.pad(v[4:, :-5], ((4, 0), (0, 5), (0, 0))),
], ids=["negative", "tiny", "integers", "spikes", "padding"])
def test_the_body_is_found_on_any_scale(change):
    mask, signal = torso()
    found = recipes.foreground(change(noisy(signal, 8)))
    for (start, stop), (first, last) in zip(ends(found), ends(mask), strict=True):
        assert first - 2 <= start <= first and last <= stop <= last + 2


def test_a_field_of_view_full_of_body_is_kept():
    x, y, _ = np.indices((48, 48, 16))
    full = noisy(300 + 100 * np.sin(x / 5) * np.cos(y / 7), 15)
    assert ends(recipes.foreground(full)) == ((0, 48), (0, 48), (0, 16))


def test_noise_as_strong_as_the_body_keeps_the_whole_scan():
    mask, signal = torso()
    found = ends(recipes.foreground(noisy(signal, 200)))
    assert all(start <= first and last <= stop for (start, stop), (first, last) in zip(found, ends(mask), strict=True))


def test_specks_and_single_values():
    tiny = np.zeros((40, 40, 10))
    tiny[3:6, 4:8, 5:7] = 9  # less than the share of voxels that the threshold takes for outliers
    assert ends(recipes.foreground(tiny)) == ((3, 6), (4, 8), (5, 7))
    tiny[30, 30, 3] = 9
    assert ends(recipes.foreground(tiny)) == ((3, 6), (4, 8), (5, 7))
    assert not recipes.foreground(np.full((4, 4, 4), 7)).any()


def test_the_body_of_a_ct_without_its_table_but_with_both_legs():
    hu = np.full((60, 60, 12), -1000, np.int16)
    hu[5:25, 10:30], hu[35:55, 20:30] = 40, -450
    hu[10:45, 50] = -300  # the shell of the table, 9 percent of the larger leg
    hu[10:15, 15:20] = -900  # air inside does not matter to the box
    assert ends(recipes.body(hu)) == ((5, 55), (10, 30), (0, 12))
    assert ends(recipes.body(np.where(hu == -450, -550, hu))) == ((5, 25), (10, 30), (0, 12))


# Boxes


def published(label, target, margins):
    """The authors' loop over axes, on the grid of the label: slices [low, high)."""
    box = []
    for axis, (low, high) in enumerate(margins):
        where = np.nonzero(label)[axis]
        least, most = int(where.min()), int(where.max())
        widened = max(target[axis] - (most - least), 0) // 2
        box.append((max(least - low - widened, 0), min(most + high + widened, label.shape[axis])))
    return tuple(box)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_published_box_for_any_label_margin_and_size(data):
    shape = [data.draw(st.integers(4, 40)) for _ in range(3)]
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    stops = [data.draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    margins = [(data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))) for _ in range(3)]
    target = tuple(data.draw(st.integers(0, 30)) for _ in range(3))
    label = marked(shape, list(zip(starts, stops, strict=True)))
    image = np.random.default_rng(0).normal(size=shape)
    crop = Crop("label", tuple(margins), True, target, exclusive=True)
    expected = published(label, target, margins)
    stored = apply(recipe(crop, orientation=None), scan(image), scan(label))
    assert stored.geometry.crop == expected
    inside = tuple(slice(*ends) for ends in expected)
    np.testing.assert_array_equal(stored.image[0], image[inside].astype(np.float32))
    np.testing.assert_array_equal(stored.label, label[inside])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_box_in_mm_is_the_published_one_up_to_rounding(data):
    """Resampled first and then boxed as published, against boxed on the scanner's grid and then resampled."""
    from scipy import ndimage

    spacing = data.draw(st.floats(0.55, 1.0))
    starts = [data.draw(st.integers(5, 70)) for _ in range(2)]
    label = marked((150, 150, 4), [*((start, start + data.draw(st.integers(6, 70))) for start in starts), (1, 3)])
    stored = apply(replace(PANCREAS, order=1, after=()), scan(np.random.default_rng(0).normal(size=label.shape),
                                                             (spacing, spacing, 1)), scan(label, (spacing, spacing, 1)))
    size = [int(n * spacing) for n in label.shape[:2]]
    at = [(np.arange(n) / spacing).round().astype(int) for n in size]
    one_mm = label[np.ix_(at[0], at[1], np.arange(4))]
    expected = published(one_mm, (96, 96, 0), [(25, 25), (25, 25), (0, 0)])
    for axis in range(2):
        low, high = (edge * spacing for edge in stored.geometry.crop[axis])
        # a voxel for the grid that the ends of the label fall on, and one for the growth that is halved
        assert abs(low - expected[axis][0]) <= 2 and abs(high - expected[axis][1]) <= 2
    assert stored.geometry.crop[2] == (0, 4) and ndimage.label(stored.label)[1] == 1


def test_margins_of_our_own_are_in_mm_and_keep_everything():
    label = marked((50, 50, 50), [(20, 30), (20, 30), (20, 30)])
    for margin, spacing, expected in (
        (0, (1, 1, 1), (20, 30)), (4, (1, 1, 1), (16, 34)), (4, (2, 2, 2), (18, 32)), (5, (2, 2, 2), (17, 33)),
        (0.1, (1, 1, 1), (19, 31)), ((2, 6), (1, 1, 1), (18, 36)), (90, (1, 1, 1), (0, 50)), (None, (1, 1, 1), (0, 50)),
    ):
        stored = apply(recipe(Crop("label", (margin, 0, None))), scan(np.arange(125000.0).reshape(50, 50, 50), spacing),
                       scan(label, spacing))
        assert stored.geometry.crop == (expected, (20, 30), (0, 50))


def test_margins_in_voxels_of_the_store():
    label = marked((50, 50, 50), [(20, 30)] * 3)
    crop = Crop("label", (3, 3, 3), voxels=True)
    image = scan(np.random.default_rng(0).normal(size=label.shape), (2, 1, 0.5))
    stored = apply(recipe(crop, spacing=(1, 1, 1), order=1), image, scan(label, (2, 1, 0.5)))
    assert stored.geometry.crop == ((18, 32), (17, 33), (14, 36))
    assert stored.label.shape == (28, 16, 11)


def test_the_published_box_on_another_grid_ends_at_the_nearest_voxel():
    """In mm x is 16 to 24, y too, z 16 to 24.8; a voxel of 1 mm is lost; x has a margin of 3: 13 to 26, which is 16.25
    to 32.5 voxels; y grows by 2.5, halves down, to 14 to 25; z by 2.6, rounded to 3, to 13 to 26.8."""
    label, spacing = marked((50, 50, 50), [(20, 30), (20, 30), (20, 31)]), (0.8, 0.8, 0.8)
    image = scan(np.random.default_rng(0).normal(size=label.shape), spacing)
    crop = Crop("label", (3, 0, 0), smallest=(0, 12, 13), exclusive=True)
    stored = apply(recipe(crop, spacing=(1, 1, 1)), image, scan(label, spacing))
    assert stored.geometry.crop == ((16, 33), (18, 31), (16, 34))


def test_the_smallest_box_grows_evenly_up_to_the_borders():
    label = marked((50, 50, 50), [(20, 30), (2, 12), (45, 50)])
    image = scan(np.random.default_rng(0).normal(size=label.shape))
    for size, expected in ((10, ((20, 30), (2, 12), (42, 50))), (20, ((15, 35), (0, 17), (37, 50))),
                           (13, ((18, 32), (0, 14), (41, 50))), (99, ((0, 50), (0, 50), (0, 50)))):
        stored = apply(recipe(Crop("label", smallest=(size,) * 3)), image, scan(label))
        assert stored.geometry.crop == expected
    resampled = recipe(Crop("label", smallest=(40, 0, 0)), spacing=(0.5, None, None), order=1)
    assert apply(resampled, image, scan(label)).image.shape == (1, 40, 10, 5)


def test_margins_follow_the_axes_of_the_store():
    """Low and high are those of RAS, although the scanner's first axis runs from right to left and holds y."""
    affine = np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    label = marked((40, 30, 20), [(25, 30), (5, 8), (10, 11)])
    image = scan(np.random.default_rng(0).normal(size=label.shape), affine=affine)
    stored = apply(recipe(Crop("label", ((1, 2), (3, 4), (5, 6)))), image, scan(label, affine=affine))
    # x is axis 1 reversed: label from 22 to 25; y is axis 0 reversed: label from 10 to 15
    assert stored.geometry.crop == ((21, 27), (7, 19), (5, 17))
    assert ends(stored.label) == ((1, 4), (3, 8), (5, 6))


def test_boxes_of_all_channels_and_of_one():
    image = np.zeros((2, 20, 20, 20), np.int16)
    image[0, 4:9, 5:9, 6:9] = np.arange(60).reshape(5, 4, 3) + 1
    image[1, 2:6, 7:12, 8:10] = -3
    whole = apply(recipe(Crop("nonzero")), scan(image)).geometry.crop
    assert whole == ((2, 9), (5, 12), (6, 10))
    assert apply(recipe(Crop("nonzero", channel=0)), scan(image)).geometry.crop == ((4, 9), (5, 9), (6, 9))
    lost = apply(recipe(Crop("nonzero", channel=0, exclusive=True)), scan(image)).geometry.crop
    assert lost == ((4, 8), (5, 8), (6, 8))


# Laws of apply


@pytest.mark.parametrize("name", FREE)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_without_guidance_the_label_changes_nothing(name, seed):
    image = image_for(name, seed)
    label = np.random.default_rng(seed).integers(0, 3, image.shape[1:]).astype(np.uint8)
    with_label, without = apply(FREE[name], scan(image), scan(label)), apply(FREE[name], scan(image))
    empty = apply(FREE[name], scan(image), scan(0 * label))
    assert without.label is None and with_label.geometry == without.geometry == empty.geometry
    np.testing.assert_array_equal(with_label.image, without.image)
    np.testing.assert_array_equal(empty.image, without.image)


@pytest.mark.parametrize("name", [*FREE, *GUIDED])
def test_types_shapes_and_that_nothing_given_changes(name):
    one = (FREE | GUIDED)[name]
    image = scan(image_for(name), (1, 1.2, 2.5))
    label = scan(marked(image.space, [(20, 30), (22, 28), (5, 9)]), (1, 1.2, 2.5))
    before = image.voxels.tobytes(), label.voxels.tobytes()
    image.voxels.flags.writeable = label.voxels.flags.writeable = False
    stored, again = apply(one, image, label), apply(one, image, label)
    assert (image.voxels.tobytes(), label.voxels.tobytes()) == before
    assert stored.image.dtype == np.float32 and stored.label.dtype == np.uint8
    assert stored.image.shape == (len(image.voxels), *stored.geometry.stored)
    assert stored.label.shape == stored.geometry.stored and stored.label.any()
    assert stored.image.flags.c_contiguous and not np.shares_memory(stored.image, image.voxels)
    assert stored.image.tobytes() == again.image.tobytes() and stored.geometry == again.geometry


def test_without_any_step_the_store_is_a_copy():
    voxels = np.random.default_rng(0).normal(size=(1, 5, 6, 7)).astype(np.float32)
    stored = apply(recipe(orientation=None), scan(voxels))
    np.testing.assert_array_equal(stored.image, voxels)
    assert not np.shares_memory(stored.image, voxels)
    np.testing.assert_array_equal(apply(recipe(orientation=None), scan(voxels[0])).image, voxels)


@pytest.mark.parametrize("name", ["clean MR", "clean CT", "clean BraTS", "Pancreas"])
@pytest.mark.parametrize(("order", "signs"), [((0, 1, 2), (-1, -1, 1)), ((2, 0, 1), (1, -1, -1))])
def test_the_same_scan_in_other_axes_is_stored_the_same(name, order, signs):
    """Only what is up to `exclusive` (which end loses its plane) follows the axes: there LPS is no question."""
    one = (FREE | GUIDED)[name]
    one = replace(one, crop=replace(one.crop, exclusive=False))
    image = scan(image_for(name), (1, 1.2, 2.5))
    label = scan(marked(image.space, [(20, 30), (22, 28), (5, 9)]), (1, 1.2, 2.5))

    def turned(one):
        flips = tuple(slice(None, None, sign) for sign in signs)
        voxels = one.voxels[(..., *flips)]
        flip = np.diag([*signs, 1.0])
        flip[:3, 3] = [(n - 1) if sign < 0 else 0 for n, sign in zip(one.space, signs, strict=True)]
        lead = one.voxels.ndim - 3
        swap = np.eye(4)[:, [*order, 3]]
        return scan(voxels.transpose(*range(lead), *(lead + axis for axis in order)), affine=one.affine @ flip @ swap)

    stored, other = apply(one, image, label), apply(one, turned(image), turned(label))
    assert stored.geometry.stored == other.geometry.stored
    np.testing.assert_array_equal(stored.label, other.label)
    np.testing.assert_allclose(other.image, stored.image, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(stored.geometry.stored_affine, other.geometry.stored_affine, atol=1e-9)


def test_scores_of_the_foreground_are_measured_where_it_is():
    """Mean 0 and deviation 1 over the body, though the box holds air too and nothing was resampled."""
    mask, signal = torso()
    signal[32:, 36:] = 0  # nothing else tells a mask that is turned from one that lies where it should
    image = scan(noisy(signal, 4).astype(np.float32))
    stored = apply(recipe(Crop("foreground", (5, 5, 5)), (Step("zscore", OVER),)), image)
    found = recipes.foreground(image.voxels)[tuple(slice(*box) for box in stored.geometry.crop)]
    inside = stored.image[0][found].astype(np.float64)
    assert abs(inside.mean()) < 1e-6 and abs(inside.std() - 1) < 1e-6 and stored.image[0][~found].mean() < -2


def test_resampling_comes_before_clipping():
    """Splines overshoot at edges: only clipping afterwards keeps the window."""
    hu = np.full((12, 12, 12), -200, np.int16)
    hu[6:] = 300
    clipped = apply(recipe(spacing=(0.7, 1, 1), after=(Step("clip", WINDOW),)), scan(hu)).image
    early = apply(recipe(spacing=(0.7, 1, 1), before=(Step("clip", WINDOW),)), scan(hu)).image
    assert (clipped.min(), clipped.max()) == (-125, 275) and early.min() < -125 and early.max() > 275


def test_labels_are_resampled_to_the_nearest_and_go_back():
    label = np.random.default_rng(0).integers(0, 4, (9, 10, 11)).astype(np.uint8)
    image = scan(np.random.default_rng(1).normal(size=label.shape), (2, 2, 2))
    twice = apply(recipe(spacing=(1, 1, 1)), image, scan(label, (2, 2, 2)))
    np.testing.assert_array_equal(twice.label, label.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    boxed = apply(recipe(Crop("label")), image, scan(label, (2, 2, 2)))
    np.testing.assert_array_equal(to_scanner(boxed.label, boxed.geometry), label)


@pytest.mark.parametrize("name", GUIDED)
def test_a_new_scan_has_no_label_and_stays_whole(name):
    image = scan(image_for(name))
    stored = apply(GUIDED[name], image)
    assert stored.label is None and stored.geometry.crop == tuple((0, n) for n in image.space)
    assert stored.image.shape == image.voxels.shape


@pytest.mark.parametrize(("one", "image", "label", "said"), [
    (LA, scan(image_for("LA")), scan(np.zeros((64, 72, 20), np.uint8), name="l.nii"), "l.nii: the label is empty"),
    (ACDC, scan(image_for("LA")), scan(np.zeros((64, 72, 20)), (1, 1, 2), "l.nii"), "l.nii: scan lies up to"),
    (LA, scan(image_for("LA")), scan(np.ones((64, 72, 19)), name="l.nii"), "l.nii: label has shape (64, 72, 19)"),
    (ACDC, scan(image_for("LA")), scan(np.full((64, 72, 20), 0.5), name="l.nii"), "l.nii: label values beyond whole"),
    (ACDC, scan(image_for("LA")), scan(np.full((64, 72, 20), 300), name="l.nii"), "l.nii: label values beyond whole"),
    (ACDC, scan(np.full((4, 4, 4), 7)), None, "scan.nii: minmax: the same value in all 64 voxels"),
    (CLEAN_CT, scan(np.arange(-2000, -1000).reshape(10, 10, 10)), None, "scan.nii: no voxel is body, expected some"),
    (replace(BRATS, crop=Crop("nonzero", channel=2)), scan(image_for("BraTS")), None, "2 channels, expected one of"),
    (BRATS, scan(np.diag([0, 0, 3, 0]).reshape(1, 4, 4, 1)), None, "expected 3 boxes with at least a voxel"),
    (recipe(), scan(np.array([1.0, 1e300]).reshape(2, 1, 1)), None, "scan.nii: NaN or infinite values"),
    (recipe(spacing=(0, 1, 1)), scan(image_for("LA")), None, "scan.nii: spacing (0, 1, 1), expected"),
    (recipe(orientation="XYZ"), scan(image_for("LA")), None, "scan.nii: orientation 'XYZ', expected"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_stored_is_refused_in_one_line(one, image, label, said):
    with pytest.raises(DataError) as error:
        apply(one, image, label)
    assert said in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


# Real scans


def real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real scans at {REAL}")
    return path


def test_real_la_scan_against_its_published_case():
    """The raw scan is the published crop in a wider matrix: same label, same contrast up to scale and shift."""
    folder = real("LA", "Training Set", "06SR5RBREL16DQ6M8LWS")
    image, label = runpy.run_path(str(SHARED / "scans.py"))["unpack"](SHARED / "la" / f"{folder.name}.npz")
    raw = read_scan(folder / "laendo.nrrd")
    stored = apply(LA, read_scan(folder / "lgemri.nrrd"), replace(raw, voxels=raw.voxels // 255))
    box, theirs = ends(stored.label), ends(label)
    assert [stop - start for start, stop in box] == [stop - start for start, stop in theirs]
    inside, published = tuple(slice(*edge) for edge in box), tuple(slice(*edge) for edge in theirs)
    np.testing.assert_array_equal(stored.label[inside], label[published])
    ours, expected = stored.image[0][inside].astype(np.float64).ravel(), image[published].astype(np.float64).ravel()
    slope, shift = np.polyfit(ours, expected, 1)
    np.testing.assert_allclose(slope * ours + shift, expected, atol=1e-5)
    assert stored.geometry.crop[2] == (0, 88) and [low for low, _ in box[:2]] == [15, 28]  # 28: widened to 112 voxels
    low, high = box[1]
    assert stored.label.shape[1] == high - low - 1 + 2 * 15 + 2 * ((112 - (high - low - 1)) // 2)


CASES = {
    "ACDC": ("ACDC/training/patient001/patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz", CLEAN_MR),
    "spleen": ("MSD/Task09_Spleen/imagesTr/spleen_2.nii.gz", "../labelsTr/spleen_2.nii.gz", CLEAN_CT),
    "brain1": ("nrrd/data/brain1_image.nrrd", "brain1_label.nrrd", CLEAN_MR),
    "brain2": ("nrrd/data/brain2_image.nrrd", "brain2_label.nrrd", CLEAN_MR),
    "breast": ("nrrd/data/breast1_image.nrrd", "breast1_label.nrrd", CLEAN_MR),
}


@pytest.mark.parametrize("name", CASES)
def test_clean_recipes_keep_the_body_of_real_scans(name):
    """No label is lost, and next to nothing above the threshold either; brightness is that of scored scans."""
    path, beside, one = CASES[name]
    image = read_scan(real(*path.split("/")))
    label = read_scan(image.path.parent / beside)
    stored = apply(one, image, label)
    assert to_scanner(np.ones_like(stored.label), stored.geometry)[label.voxels > 0].all()
    mask = recipes.MASKS[one.crop.around](image.voxels)
    assert to_scanner(np.ones_like(stored.label), stored.geometry)[mask].all()
    assert set(np.unique(stored.label)) == set(np.unique(label.voxels))
    assert -1.5 < stored.image.mean() < 0.5 and 0.7 < stored.image.std() < 1.5 and np.abs(stored.image).max() < 8


def test_the_air_beside_a_real_head_is_cut_off():
    image = read_scan(real("nrrd", "data", "brain2_image.nrrd"))
    stored = apply(recipe(Crop("foreground"), ROBUST), image)
    (left, right), (back, front), _ = stored.geometry.crop
    assert left + image.space[0] - right >= 30 and front - back >= 245
    outside = to_scanner(np.ones(stored.geometry.stored, np.uint8), stored.geometry) == 0
    assert np.quantile(image.voxels[outside], 0.99) < 0.1 * np.quantile(image.voxels, 0.98)


def test_no_orientation_is_left_out():
    """All 48 ways to hold a scanner's axes end in the same store, bit by bit."""
    label = marked((5, 6, 7), [(1, 4), (2, 4), (3, 7)])
    image = np.random.default_rng(0).normal(size=label.shape)
    expected = apply(recipe(Crop("label", (1, 0, 0))), scan(image), scan(label))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)[:, [*order, 3]]
            affine[:3, :3] *= [signs[axis] for axis in order]
            affine[:3, 3] = [(n - 1) if sign < 0 else 0 for n, sign in zip(label.shape, signs, strict=True)]
            flips = tuple(slice(None, None, sign) for sign in signs)
            turned = [scan(array[flips].transpose(order), affine=affine) for array in (image, label)]
            stored = apply(recipe(Crop("label", (1, 0, 0))), *turned)
            np.testing.assert_array_equal(stored.image, expected.image)
            np.testing.assert_array_equal(stored.label, expected.label)


def test_a_header_in_wrong_units_is_refused_before_it_takes_all_memory():
    recipe = Recipe("x", "clean", 1, "", spacing=(1, 1, 1))
    with pytest.raises(DataError, match=r"^scan.nii: voxels of 100 x 100 x 100 mm would become .* expected a header"):
        apply(recipe, scan(np.random.default_rng(0).normal(size=(1, 8, 8, 8)), spacing=(100, 100, 100)))
    with pytest.raises(DataError, match=r"^scan.nii: voxels of 0.01 x 0.01 x 0.01 mm would become 1 of"):
        apply(recipe, scan(np.random.default_rng(0).normal(size=(1, 24, 24, 24)), spacing=(0.01, 0.01, 0.01)))
