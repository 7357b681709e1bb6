"""LA: the published files, the raw archive and its recipes, on synthetic files and on real ones where there are any."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from archives import la as archive

from data_prep import DataError, dataset, la, load_split, store, volumes
from data_prep.geometry import to_scanner
from data_prep.recipes import Recipe, apply
from data_prep.scans import read_scan

SHARED = Path(__file__).resolve().parents[3] / "shared"
SPEC = dataset("LA")
FULL, LITE = SPEC.protocols["paper"], SPEC.protocols["lite"]
REAL = os.environ.get("SSL4MIS_DATA")
CASES = load_split("LA-paper", 0).labeled(3)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL4MIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)


def fill(folder, cases=CASES):
    rng = np.random.default_rng(0)
    for case in cases:
        image, label = rng.normal(size=(8, 6, 5)), rng.integers(0, 2, size=(8, 6, 5))
        volumes.write_case(folder / case / "mri_norm2.h5", image, label)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("below", [".", "LA"])
def test_both_places_are_found(tmp_path, below):
    fill(tmp_path / below)
    store = SPEC.open(tmp_path, FULL)
    store.check(CASES)
    image, label = store.image(CASES[0]), store.label(CASES[0])
    assert image.shape == (1, 8, 6, 5) and image.dtype == np.float32
    assert label.shape == (8, 6, 5) and label.dtype == np.uint8
    assert store.spacing(CASES[0]) == (0.625, 0.625, 0.625)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setenv("SSL4MIS_DATA", str(tmp_path))
    assert SPEC.open(None, FULL).image(CASES[0]).shape == (1, 8, 6, 5)


def test_lite_is_downsampled(tmp_path):
    fill(tmp_path)
    full, lite = SPEC.open(tmp_path, FULL), SPEC.open(tmp_path, LITE)
    assert lite.spacing(CASES[0]) == (1.25, 1.25, 1.25)
    for _ in range(2):  # made, then from the cache
        assert np.array_equal(lite.image(CASES[0]), volumes.downsample_image(full.image(CASES[0]), 2))
        assert np.array_equal(lite.label(CASES[0]), volumes.downsample_label(full.label(CASES[0]), 2))


@pytest.mark.parametrize("protocol", [FULL, LITE])
def test_an_image_is_read_without_looking_at_its_label(tmp_path, monkeypatch, protocol):
    fill(tmp_path)

    def forbidden(*_):
        raise AssertionError("a label was read")

    monkeypatch.setattr(volumes, "read_label", forbidden)
    monkeypatch.setattr("data_prep.la.read_label", forbidden)
    SPEC.open(tmp_path, protocol).image(CASES[0])


def test_missing_data_says_what_is_expected_and_how_to_get_it(tmp_path):
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(DataError) as error:
            SPEC.open(root, FULL)
        for part in ("<ID>/mri_norm2.h5", "UA-MT", "2018 Atrial Segmentation Challenge", "--data-root", "SSL4MIS_DATA"):
            assert part in one_line(error)


def test_check_counts_the_missing_cases(tmp_path):
    fill(tmp_path, CASES[:1])
    with pytest.raises(DataError, match=f"2 of 3 case files are missing .*first is {CASES[1]}/mri_norm2.h5") as error:
        SPEC.open(tmp_path, LITE).check(CASES)
    assert str(tmp_path) in one_line(error)
    with pytest.raises(DataError, match=f"case {CASES[2]} is missing"):
        SPEC.open(tmp_path, LITE).image(CASES[2])


def test_the_published_recipe():
    for name in ("paper", "cv5", "mcf5"):
        protocol = SPEC.protocols[name]
        assert (protocol.patch, protocol.stride) == ((112, 112, 80), (18, 18, 4))
        assert (protocol.iterations, protocol.learning_rate, protocol.schedule) == (6000, 0.01, "step")
        assert (protocol.labeled_batch, protocol.unlabeled_batch) == (2, 2)
        assert (protocol.width, protocol.precision, protocol.downsample) == (16, "32-true", 1)
        assert protocol.published == (name != "cv5"), "one number of iterations for every method"
    assert list(SPEC.protocols) == ["paper", "cv5", "mcf5", "lite"]
    assert all(protocol.labeled == (4, 8, 16) for protocol in SPEC.protocols.values())


def test_importing_a_data_set_loads_no_file_format_and_no_torch():
    code = (
        "import sys, data_prep; [data_prep.dataset(name) for name in data_prep.names()]; "
        "print(*{'h5py', 'scipy', 'nibabel', 'SimpleITK', 'torch', 'ssl4mis', 'networks'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# the raw archive


def test_every_case_of_the_archive_is_found_at_any_depth(tmp_path):
    split = load_split("LA-paper", 0)
    archive.build(tmp_path / "deep" / "er", split.train[::-1], (6, 6, 4))
    archive.build(tmp_path, split.test, (6, 6, 4), part="Testing Set")
    cases = la.raw_cases(tmp_path)
    assert [case.id for case in cases] == sorted(split.train + split.test)
    assert not any(case.problem or case.note for case in cases)
    assert {case.patient for case in cases} == {*split.train, *split.test}
    [path] = cases[0].images
    assert path == tmp_path / "deep" / "er" / "Training Set" / cases[0].id / "lgemri.nrrd"
    assert cases[0].label == path.with_name("laendo.nrrd")


def test_the_label_becomes_0_and_1_on_the_grid_of_the_scan(tmp_path):
    [case] = la.raw_cases(archive.build(tmp_path, ["A"]))
    image, label = case.read(len(la.CLASSES))
    expected, truth = archive.anatomy("A", (24, 24, 16))
    assert np.array_equal(image.voxels, expected[None]) and image.voxels.dtype == np.uint8
    assert np.array_equal(label.voxels, truth // 255) and label.voxels.any()
    assert np.array_equal(image.affine, np.diag([-0.625, -0.625, 0.625, 1]))  # LPS to RAS+


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAR", "AIL"])
def test_a_voxel_lies_at_its_mm_in_the_clean_store_whatever_the_axes_of_the_file(tmp_path, orientation):
    """SimpleITK says where a voxel of the file lies; in the store it must lie there as well."""
    [case] = la.raw_cases(archive.build(tmp_path, ["A"], (24, 20, 16), orientation=orientation))
    file = sitk.ReadImage(str(case.label))
    image, label = case.read(2)
    kept = apply(la.RECIPES["clean"], image, label)
    assert kept.geometry.orientation == "RAS"
    inside = np.argwhere(sitk.GetArrayFromImage(file))[:, ::-1]
    to_store = np.linalg.inv(kept.geometry.stored_affine)
    for index in inside[:: len(inside) // 7]:
        x, y, z = file.TransformIndexToPhysicalPoint(index.tolist())
        place = to_store @ (-x, -y, z, 1)
        assert np.abs(place - np.round(place)).max() < 1e-6
        assert kept.label[tuple(np.round(place[:3]).astype(int))] == 1
    assert kept.label.sum() == len(inside)
    [plain] = la.raw_cases(archive.build(tmp_path / "plain", ["A"], (24, 20, 16)))
    reference = apply(la.RECIPES["clean"], *plain.read(2))
    assert np.array_equal(kept.image, reference.image) and np.array_equal(kept.label, reference.label)


WRONG = {
    "no image": "lgemri.nrrd: no such file",
    "no label": "laendo.nrrd: no such file",
    "shape": r"laendo.nrrd: label has shape \(24, 24, 15\), expected \(24, 24, 16\)",
    "affine": "laendo.nrrd: label lies up to 5 mm away",
    "4D": "lgemri.nrrd: 2 volumes or channels",
    "NaN": "lgemri.nrrd: 1 voxels are NaN",
    "constant": "lgemri.nrrd: the scan is 7 everywhere",
    "truncated": "lgemri.nrrd: truncated, damaged",
    "no scan": "lgemri.nrrd: truncated, damaged or no NRRD file",
    "value": "laendo.nrrd: label has the value 100, expected 0 or 255",
    "empty": "laendo.nrrd: label is background everywhere",
}


@pytest.mark.parametrize("broken", archive.BROKEN)
def test_a_bad_case_is_told_in_one_line_and_leaves_the_others_alone(tmp_path, broken):
    bad, good = la.raw_cases(archive.build(tmp_path, ["A", "B"], broken=broken))
    with pytest.raises(DataError, match=WRONG[broken]) as error:
        bad.read(2)
    assert one_line(error).startswith(str(tmp_path / "Training Set" / "A")) and "expected" in one_line(error)
    assert good.read(2)[1].voxels.any()


def test_scans_that_the_challenge_kept_for_testing_may_have_no_label(tmp_path):
    [case] = la.raw_cases(archive.build(tmp_path, ["T"], broken="no label", part="Testing Set"))
    assert case.read()[1] is None
    [case] = la.raw_cases(archive.build(tmp_path / "x", ["T"], broken="no label", part="Training Set"))
    assert case.problem


@pytest.mark.parametrize("cases", [la.raw_cases, la.h5_cases])
def test_a_case_that_is_there_twice_is_told_with_both_places(tmp_path, cases):
    for below in ("1", "2"):
        archive.build(tmp_path / below, ["A", "B"] if below == "1" else ["A"])
        fill(tmp_path / below / "Training Set", ["A", "B"] if below == "1" else ["A"])
    twice, once = cases(tmp_path)
    first, second = (tmp_path / n / "Training Set" / "A" for n in "12")
    assert twice.problem == f"{second}: case A again, expected it in {first} only"
    assert not once.problem


@pytest.mark.parametrize(("cases", "expected"), [(la.raw_cases, "lgemri.nrrd"), (la.h5_cases, "mri_norm2.h5")])
def test_a_wrong_folder_says_what_is_there_and_what_was_expected(tmp_path, cases, expected):
    (tmp_path / "patient001").mkdir()
    with pytest.raises(DataError, match=f"found patient001/, expected .*<ID>/{expected}") as error:
        cases(tmp_path)
    assert one_line(error).startswith(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        cases(tmp_path / "nowhere")


# recipes


def test_the_paper_recipe_on_numbers_worked_out_by_hand(tmp_path):
    """Margins of 15 beyond 112 voxels as la_heart_processing of UA-MT has them, but for the random part."""
    [case] = la.raw_cases(archive.build(tmp_path, ["A"], (200, 180, 8)))
    image, label = case.read(2)
    label.voxels[:] = 0
    label.voxels[90:101, 30:161, 2:5] = 1
    kept = apply(la.RECIPES["paper"], image, label)
    # x: 90 to 100 is 10 wide, padded by (112 - 10) // 2 = 51; y: 130 wide, and up to the border; z: whole
    x, y = (90 - 51 - 15, 100 + 51 + 15), (30 - 15, min(160 + 15, 180))
    assert kept.geometry.crop == (x, y, (0, 8)) and kept.image.shape == (1, 142, 160, 8)
    scan = image.voxels[0].astype(np.float64)
    normal = (scan - scan.mean()) / scan.std()
    assert np.abs(kept.image[0] - normal[slice(*x), slice(*y)]).max() < 1e-5
    assert np.array_equal(kept.label, label.voxels[slice(*x), slice(*y)])
    assert np.array_equal(to_scanner(kept.label, kept.geometry), label.voxels)
    assert la.RECIPES["paper"].label_guided and kept.geometry.orientation == "LPS"


def test_the_clean_recipe_looks_at_no_label_and_brings_new_scans_to_the_spacing_of_the_archive(tmp_path):
    [case] = la.raw_cases(archive.build(tmp_path, ["A"], (24, 20, 16), spacing=(1.25, 0.625, 0.625)))
    image, label = case.read(2)
    kept, alone = apply(la.RECIPES["clean"], image, label), apply(la.RECIPES["clean"], image)
    assert np.array_equal(kept.image, alone.image) and alone.label is None
    assert not la.RECIPES["clean"].label_guided
    assert kept.geometry.stored_spacing == pytest.approx((0.625,) * 3)
    assert kept.image.shape[1] == 2 * kept.geometry.cropped[0]
    shape = (120, 100, 16)
    own = apply(la.RECIPES["clean"], *la.raw_cases(archive.build(tmp_path / "own", ["A"], shape))[0].read(2))
    assert not own.geometry.resampled
    body = np.argwhere(archive.anatomy("A", shape)[0][::-1, ::-1] > 20)
    low, high = np.maximum(body.min(axis=0) - 8, 0), np.minimum(body.max(axis=0) + 1 + 8, shape)  # 5 mm are 8 voxels
    assert own.geometry.crop == tuple(zip(low.tolist(), high.tolist(), strict=True))
    assert own.geometry.cropped != shape


def test_recipes_survive_the_way_through_a_card():
    for recipe in la.RECIPES.values():
        assert Recipe.from_dict(recipe.to_dict()) == recipe


# the published files, imported or prepared


def test_the_published_files_are_read_for_import_as_the_store_reads_them(tmp_path):
    fill(tmp_path, CASES[::-1])
    direct = SPEC.open(tmp_path, FULL)
    cases = la.h5_cases(tmp_path)
    assert [case.id for case in cases] == sorted(CASES)
    for case in cases:
        image, label = case.read(2)
        assert np.array_equal(image.voxels, direct.image(case.id))
        assert image.voxels.dtype == np.float32 and image.spacing == direct.spacing(case.id)
        assert np.array_equal(label.voxels, direct.label(case.id))


def prepared(folder, cases, recipe):
    """What data_prep.prepare leaves, as far as the store needs it."""
    for case in cases:
        kept = apply(la.RECIPES[recipe], *case.read(2))
        store.write_stored(folder / "cases" / f"{case.id}.h5", kept, la.RECIPES[recipe].id, SPEC.modalities)
    store.write_card(folder, {
        "schema": 1, "name": "LA", "title": SPEC.title, "modality": SPEC.modality, "modalities": list(SPEC.modalities),
        "classes": list(SPEC.classes), "regions": {}, "citation": SPEC.citation, "source": "raw",
        "spacing": list(SPEC.spacing), "spacing_known": True,
        "label_guided": la.RECIPES[recipe].label_guided, "recipe": la.RECIPES[recipe].to_dict(),
        "replay": la.RECIPES[recipe].to_dict(), "protocols": {},
    })


@pytest.mark.parametrize("recipe", ["paper", "clean"])
def test_prepared_cases_go_before_the_published_files(tmp_path, recipe):
    fill(tmp_path)
    cases = la.raw_cases(archive.build(tmp_path / "raw", CASES))
    prepared(tmp_path / "LA" / recipe, cases, recipe)
    opened = SPEC.open(tmp_path, replace(FULL, recipe=recipe))
    opened.check(CASES)
    image, label = cases[0].read(2)
    assert np.array_equal(opened.image(cases[0].id), apply(la.RECIPES[recipe], image, label).image)
    assert opened.replay() == la.RECIPES[recipe].to_dict()
    others = {"paper": "clean", "clean": "paper"}[recipe]
    if others == "paper":
        assert SPEC.open(tmp_path, FULL).image(CASES[0]).shape == (1, 8, 6, 5)
    else:
        with pytest.raises(DataError, match="nothing is prepared with recipe clean .*--recipe clean") as error:
            SPEC.open(tmp_path, replace(FULL, recipe="clean"))
        assert str(tmp_path) in one_line(error)
    with pytest.raises(DataError, match="^LA: recipe 'claen' is unknown, expected paper or clean$"):
        SPEC.open(tmp_path, replace(FULL, recipe="claen"))


def test_the_published_files_say_where_they_come_from_and_how_a_new_scan_is_treated(tmp_path):
    fill(tmp_path)
    opened = SPEC.open(tmp_path, LITE)
    assert opened.provenance(CASES) == {
        "recipe": "LA-published-1", "sha256": "", "label_guided": True, "spacing_known": True}
    assert opened.replay() == la.RECIPES["paper"].to_dict()


# real scans


@pytest.mark.skipif(not (SHARED / "real" / "LA").is_dir(), reason="no real scan: it lies in ../shared/real")
def test_a_real_scan_goes_through_the_recipe_of_the_papers():
    [case] = la.raw_cases(SHARED / "real" / "LA")
    image, label = case.read(2)
    kept = apply(la.RECIPES["paper"], image, label)
    assert image.space == (576, 576, 88) and image.spacing == pytest.approx((0.625,) * 3)
    assert kept.image.shape[3] == 88 and 0.03 < kept.label.mean() < 0.2
    assert np.array_equal(to_scanner(kept.label, kept.geometry), read_scan(case.label).voxels // 255)
    # around the atrium, what the papers trained on: the same voxels, but for scale and rounding
    theirs, truth = published(case.id)
    ours, label = (array[np.ix_(*_around(kept.label))] for array in (kept.image[0], kept.label))
    theirs, truth = (array[np.ix_(*_around(truth))] for array in (theirs, truth))
    assert np.array_equal(label, truth)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def _around(label, margin=10):
    ends = [np.flatnonzero(label.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(2)]
    return *(range(low - margin, high + margin) for low, high in ends), range(label.shape[2])


def published(case):
    """Image and label of a published file."""
    path = SHARED / "la" / f"{case}.npz"
    if not path.is_file():
        pytest.skip("no published file: they lie in ../shared/la")
    spec = importlib.util.spec_from_file_location("shared_scans", SHARED / "scans.py")
    scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scans)
    return scans.unpack(path)


def test_a_published_scan_is_the_same_from_the_store_and_imported(tmp_path):
    image, label = published(CASES[0])
    volumes.write_case(tmp_path / CASES[0] / "mri_norm2.h5", image, label)
    [case] = la.h5_cases(tmp_path)
    scan, classes = case.read(2)
    direct = SPEC.open(tmp_path, FULL)
    assert np.array_equal(scan.voxels, direct.image(case.id)) and np.array_equal(scan.voxels[0], image)
    assert np.array_equal(classes.voxels, direct.label(case.id)) and np.array_equal(classes.voxels, label)


@pytest.mark.skipif(not REAL, reason="SSL4MIS_DATA is not set")
def test_the_published_files(monkeypatch):
    monkeypatch.setenv("SSL4MIS_DATA", REAL)
    full, lite = SPEC.open(None, FULL), SPEC.open(None, LITE)
    case = CASES[0]
    try:
        full.check([case])
    except DataError as error:
        pytest.skip(str(error))
    image, label = full.image(case), full.label(case)
    assert image.shape[1:] == label.shape and label.shape[2] == 88
    assert set(np.unique(label)) == {0, 1} and 0.03 < label.mean() < 0.2
    assert lite.image(case).shape[1:] == lite.label(case).shape == tuple(size // 2 for size in label.shape)
    assert lite.label(case).mean() == pytest.approx(label.mean(), rel=0.1)
