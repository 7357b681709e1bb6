"""What is said and shown of prepared cases, against numbers worked out by hand."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from data_prep import DataError, summary
from data_prep.geometry import Geometry
from data_prep.recipes import Stored
from data_prep.scans import Scan
from data_prep.spec import Protocol

CLASSES = ("background", "organ", "lesion")
PROTOCOL = Protocol("paper", "", "x", patch=(8, 8, 4), stride=(4, 4, 4), iterations=1, labeled=(1,))


def stored(image, label=None, spacing=(1, 1, 1), signs=(1, 1, 1)):
    """A case on its own grid; `signs` -1 makes an axis run to the left, back or foot."""
    image = np.asarray(image, np.float32)
    image = image if image.ndim == 4 else image[None]
    affine = np.diag([*np.array(spacing, float) * signs, 1])
    return Stored(image, label, Geometry.of(Scan(image, affine, "x"), orientation=None))


def test_facts_of_a_case():
    image = np.arange(101, dtype=np.float32).reshape(1, 101, 1)  # its quantiles are the percentages themselves
    label = np.zeros((1, 101, 1), np.uint8)
    label[0, :50], label[0, 50:60] = 1, 2
    found = summary.facts(stored(np.stack([image, -2 * image]), label, (1, 2, 5)), ("T1", "T2"), CLASSES)
    assert found == {
        "shape": [1, 101, 1],
        "spacing": [1.0, 2.0, 5.0],
        "intensities": {"T1": [0, 1, 5, 50, 95, 99, 100], "T2": [-200, -198, -190, -100, -10, -2, 0]},
        "voxels": {"organ": 50, "lesion": 10},
        "ml": {"organ": 0.5, "lesion": 0.1},  # a voxel has 10 mm^3
    }


def test_facts_without_a_label_and_of_an_empty_class():
    image = np.arange(8.0).reshape(2, 2, 2)
    assert summary.facts(stored(image), ("T1",), CLASSES)["voxels"] is None
    found = summary.facts(stored(image, np.ones((2, 2, 2), np.uint8)), ("T1",), CLASSES)
    assert found["voxels"] == {"organ": 8, "lesion": 0} and found["ml"] == {"organ": 0.008, "lesion": 0.0}


def case(shape=(9, 8, 4), spacing=(1, 1, 2), organ=10, lesion=5, low=0):
    voxels = None if organ is None else {"organ": organ, "lesion": lesion}
    return {"shape": list(shape), "spacing": list(spacing), "voxels": voxels,
            "ml": voxels and {name: count / 500 for name, count in voxels.items()},
            "intensities": {"T1": [low, 1, 2, 3, 4, 5, 6]}}


@pytest.fixture
def found():
    cases = {"a": case(), "b": case((7, 8, 4), lesion=0), "c": case(spacing=(1, 1, 3), organ=20),
             "d": case(spacing=(1, 0.7, 2.9), organ=None), "e": case((9, 9, 9), (0.6, 1, 2), organ=60, low=-2)}
    return summary.summarize(cases, [["a", "c"]], PROTOCOL)


def test_ranges_and_oddities_of_all_cases(found):
    assert (found["cases"], found["labeled"]) == (5, 4)
    assert found["shape"] == [[7, 9, 9], [8, 8, 9], [4, 4, 9]]
    assert found["spacing"] == [[0.6, 1, 1], [0.7, 1, 1], [2, 2, 3]]
    assert found["ml"] == {"organ": [0.02, 0.03, 0.12], "lesion": [0, 0.01, 0.01]}
    assert found["intensities"]["T1"]["0"] == [-2, 0, 0] and found["intensities"]["T1"]["100"] == [6, 6, 6]
    assert found["odd"] == {
        "duplicates": [["a", "c"]],
        "empty": {"organ": [], "lesion": ["b"]},
        "spacing": ["c", "e"],  # 3 / 2 and 1 / 0.6; those of d are 1 / 0.7 and 2.9 / 2 times the median
        "smaller_than_patch": ["b"],
    }


@pytest.mark.parametrize(("change", "smaller"), [
    ({}, False), ({"patch": (10, 8, 4)}, True), ({"downsample": 2}, True),
    ({"patch": (4, 4, 2), "downsample": 2}, False),
    ({"patch": (256, 256), "slices": True}, False)])  # slices are resized to it
def test_a_volume_is_compared_with_the_patch_after_downsampling(change, smaller):
    odd = summary.summarize({"a": case()}, [], replace(PROTOCOL, **change))["odd"]
    assert odd["smaller_than_patch"] == ["a"] * smaller


def test_the_text_has_a_table_and_what_to_look_at(found):
    found |= {"title": "Scans", "name": "X", "recipe": "X-clean-1", "groups": {"g": 2, "h": 3}, "notes": ["3 of 4"],
              "bad": {"z": "z.nii: damaged"}}
    text = summary.markdown(found)
    for line in ("# Scans", "X, recipe `X-clean-1`: 5 cases, 4 with a label.", "Groups: g 2, h 3.",
                 "| voxels along x | 7 | 9 | 9 |", "| spacing along z (mm) | 2 | 2 | 3 |",
                 "| volume of organ (ml) | 0.02 | 0.03 | 0.12 |", "| T1, intensity at 0 % | -2 | 0 | 0 |",
                 "- the same scan: a, c", "- no voxel of lesion: 1 of 4 cases (b)",
                 "- spacing 1.5 times the median or more, or that part of it: 2 of 5 cases (c, e)",
                 "- smaller than the patch 8x8x4 of protocol paper, so that crops are padded: 1 of 5 cases (b)",
                 "- 3 of 4", "## Left out: 1 case", "- z: z.nii: damaged"):
        assert f"{line}\n" in text, line
    assert text.endswith("\n") and not text.endswith("\n\n")


def test_the_text_of_a_plain_data_set_says_that_nothing_stands_out():
    found = summary.summarize({"a": case()}, [], PROTOCOL)
    found |= {"title": "", "name": "", "recipe": "", "groups": {}, "notes": [], "bad": {}}
    assert summary.markdown(found).endswith("## To look at\n\nNothing stands out.\n")


def test_long_lists_are_cut_in_the_text_only():
    found = summary.summarize({f"c{n:02d}": case(lesion=0) for n in range(9)}, [], None)
    assert len(found["odd"]["empty"]["lesion"]) == 9
    assert summary.remarks(found | {"notes": []}) == [
        "no voxel of lesion: 9 of 9 cases (c00, c01, c02, c03, c04, c05 and 3 more)"]


@pytest.mark.parametrize("count", [1, 60, 61, 100, 335])
def test_cases_of_the_sheet_are_spread_evenly(count):
    cases = [f"{n}" for n in range(count)]
    picked = [int(case) for case in summary.chosen(cases)]
    assert len(picked) == min(count, 60) and picked[0] == 0 and picked == sorted(set(picked))
    assert set(np.diff(picked)) <= {count // 60, -(-count // 60)} | {1}


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_planes_are_seen_as_radiologists_do(signs):
    """Patient's right on the left; front up, head up, and front on the left of the sagittal plane."""
    shape, spacing = (5, 6, 7), (1, 2, 3)
    image, label = np.zeros(shape), np.zeros(shape, np.uint8)
    right, front, head = (n - 1 if sign > 0 else 0 for n, sign in zip(shape, signs, strict=True))
    label[2, 3, 4] = 1
    image[right, front, 4], image[right, 3, head], image[2, front, head] = 10, 20, 30
    axial, coronal, sagittal = summary.tile("x", stored(image, label, spacing, signs)).planes
    assert [plane.across for plane in (axial, coronal, sagittal)] == [2, 1, 0]
    assert [plane.image.shape for plane in (axial, coronal, sagittal)] == [(6, 5), (7, 5), (7, 6)]
    assert [plane.spacing for plane in (axial, coronal, sagittal)] == [(2, 1), (3, 1), (3, 2)]
    for plane in (axial, coronal, sagittal):
        assert plane.image[0, 0] == plane.image.max() > 0
        assert plane.label.sum() == 1


def test_planes_go_through_the_label_and_the_window_is_1_to_99_percent():
    image = np.linspace(0, 1000, 1000).reshape(10, 10, 10)
    label = np.zeros((10, 10, 10), np.uint8)
    label[1, 2:4, 7], label[8, 2, 7] = 1, 2  # the middle of its box has no label
    axial, coronal, sagittal = summary.tile("x", stored(image, label)).planes
    assert [int(plane.label.max()) for plane in (axial, coronal, sagittal)] == [2, 2, 1]
    low, high = np.percentile(image, (1, 99))
    expected = np.clip((image[:, :, 7] - low) / (high - low), 0, 1) * 255
    # RAS: x and y are turned around
    np.testing.assert_allclose(axial.image, expected[::-1, ::-1].T, rtol=0, atol=0.51)


def test_a_small_structure_on_an_even_background_keeps_its_shades():
    image, label = np.zeros((10, 10, 10)), np.zeros((10, 10, 10), np.uint8)
    image[5, 5, 5], image[5, 5, 6], label[5, 5, 5] = 1, 5, 1
    axial, coronal, sagittal = summary.tile("x", stored(image, label)).planes
    assert [int(plane.image.max()) for plane in (axial, coronal, sagittal)] == [51, 255, 255]


def pixels(path):
    from matplotlib.image import imread

    return np.rint(imread(path)[..., :3] * 255).astype(np.uint8)


def rgb(color):
    return np.array([int(color[n : n + 2], 16) for n in (1, 3, 5)])


def box_case(name, shape, spacing):
    """A bright class 1 in x 4:12, y 6:14 with a class 2 in its middle, on noise."""
    label = np.zeros(shape, np.uint8)
    label[4:12, 6:14, 2:6], label[6:10, 8:12, 3:5] = 1, 2
    image = np.random.default_rng(0).normal(size=shape) + 5 * label
    return summary.tile(name, stored(image, label, spacing))


def test_contact_sheet_has_the_size_of_its_planes_and_contours_where_the_label_is(tmp_path):
    shape, spacing = (16, 20, 8), (1, 1, 1.25)
    tiles = [box_case(name, shape, spacing) for name in ("first", "second")]
    summary.contact_sheet(tmp_path / "a.png", tiles, "Title", CLASSES, spacing)
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and b"matplotlib" not in data
    # 320 pixels for 20 mm: planes 16, 16 and 20 mm wide and 20, 10 and 10 mm high
    width = 2 * 14 + 2 * (256 + 256 + 320 + 2 * 4) + 8
    height = 66 + 15 + 320 + 2 * 4 + 14
    assert struct.unpack(">II", data[16:24]) == (width, height)
    found = pixels(tmp_path / "a.png")
    for value in (1, 2):
        hits = np.argwhere((found == rgb(summary.COLORS[value - 1])).all(axis=-1))
        axial = hits[(hits[:, 0] >= 81) & (hits[:, 1] < 14 + 256)] - (81, 14)
        # RAS: y 6:14 of 20 becomes rows 6:14 from the front, x 4:12 of 16 becomes columns 4:12 from the right
        rows, columns = ((6, 14), (4, 12)) if value == 1 else ((8, 12), (6, 10))
        np.testing.assert_allclose([axial.min(axis=0), axial.max(axis=0)], np.array([rows, columns]).T * 16, atol=9)
        inside = (axial > np.array([rows[0], columns[0]]) * 16 + 12).all(axis=1)
        inside &= (axial < np.array([rows[1], columns[1]]) * 16 - 12).all(axis=1)
        assert not inside.any()  # an outline, not an area


def test_between_two_classes_the_outline_is_that_of_the_inner_one():
    """A ring of class 2 around a larger core of class 1, as of a tumor, and one of 1 around 2, as of a heart."""
    for core, ring in ((1, 2), (2, 1)):
        label = np.zeros((30, 30), np.uint8)
        label[4:26, 4:26], label[7:23, 7:23] = ring, core
        found = summary._contours(label, (30, 30))
        expected = np.zeros_like(label)
        expected[4:26, 4:26], expected[5:25, 5:25] = ring, 0
        expected[7:23, 7:23], expected[8:22, 8:22] = core, 0
        assert np.array_equal(found, expected)


def test_the_same_input_gives_the_same_sheet_and_stacks_show_one_plane(tmp_path):
    shape, spacing = (16, 20, 8), (1, 1, 8)
    tiles = [box_case(f"case {n}", shape, spacing) for n in range(17)]
    for name in ("a", "b"):
        summary.contact_sheet(tmp_path / f"{name}.png", tiles, "Title", CLASSES, spacing, "; 17 of 99")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    # 17 planes of 120 x 150 pixels, 14 in a row
    columns = (1920 - 28 + 8) // (120 + 8)
    assert columns == 14
    assert struct.unpack(">II", data[16:24]) == (28 + columns * 128 - 8, 66 + 2 * (15 + 150 + 8) + 14)
    summary.contact_sheet(tmp_path / "c.png", tiles, "Title", CLASSES, spacing, "; 17 of 98")
    assert data != (tmp_path / "c.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_sheet_of_unlabeled_cases_has_no_contour_and_a_bad_place_is_one_line(tmp_path):
    image = np.random.default_rng(0).normal(size=(9, 9, 9))
    tile = summary.tile("x", stored(image))
    summary.contact_sheet(tmp_path / "a.png", [tile], "Title", CLASSES, (1, 1, 1))
    below = pixels(tmp_path / "a.png")[66:].reshape(-1, 3)
    assert not any((below == rgb(color)).all(axis=-1).any() for color in summary.COLORS[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        summary.contact_sheet(tmp_path / "file" / "a.png", [tile], "Title", CLASSES, (1, 1, 1))
