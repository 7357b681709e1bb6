"""Pancreas-CT: how the archive is found, how labels lie on their images, what is refused, recipes and protocols."""

import itertools

import h5py
import nibabel as nib
import numpy as np
import pytest
from archives import pancreas as archive

from data_prep import DataError, dataset, load_split, pancreas
from data_prep.geometry import to_scanner
from data_prep.recipes import Recipe, apply
from data_prep.scans import Scan

CASE = "PANCREAS_0007"
SHAPE = (24, 20, 16)
SPEC = dataset("Pancreas")


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


def in_lps(scan):
    """Voxels as DICOM has them, whatever the axes of the scan."""
    change = nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt("LPS"))
    return nib.orientations.apply_orientation(scan.voxels.squeeze(), change)


# the archive


@pytest.mark.parametrize(("ids", "notes"), [(archive.IDS_82, 2), (archive.IDS_80, 0)])
def test_both_releases_are_found_and_the_duplicates_noted(tmp_path, ids, notes):
    cases = pancreas.raw_cases(archive.build(tmp_path, ids[::-1], (6, 6, 2), form="LPS"))
    assert [case.id for case in cases] == sorted(ids) == [case.patient for case in cases]
    assert not any(case.problem for case in cases)
    told = {case.id: case.note for case in cases if case.note}
    assert len(told) == notes
    for case, note in told.items():
        assert case in ("PANCREAS_0025", "PANCREAS_0070") and "\n" not in note
        assert note == f"{case} is the same scan as PANCREAS_0002 and was withdrawn by TCIA"


def test_labels_of_the_withdrawn_scans_alone_are_no_cases(tmp_path):
    archive.build(tmp_path, ["PANCREAS_0025"], (6, 6, 2), broken="no image")
    archive.build(tmp_path, ["PANCREAS_0070"], (6, 6, 2), broken="no image")
    [case] = pancreas.raw_cases(archive.build(tmp_path, ["PANCREAS_0002"], (6, 6, 2)))
    assert case.id == "PANCREAS_0002"


@pytest.mark.parametrize("image", [
    "PANCREAS_0007.nii.gz", "a/pancreas0007.nii", "b/image0007.nii.gz", "c/img0007.nii.gz", "d/0007.nii.gz",
    "e/PANCREAS_0007_0000.nii.gz", "labels and images/image0007.nii.gz",
])
@pytest.mark.parametrize("label", [
    "label0007.nii.gz", "TCIA_pancreas_labels-02-05-2017/label0007.nii", "labelsTr/PANCREAS_0007.nii.gz",
    "Labels/0007.nii.gz",
])
def test_images_and_labels_are_known_by_their_names(tmp_path, image, label):
    for name in (image, label, "__MACOSX/._image0007.nii.gz", "notes/image07.txt", "._label0007.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    [case] = pancreas.raw_cases(tmp_path)
    assert (case.id, case.images, case.label) == (CASE, (tmp_path / image,), tmp_path / label)
    assert not case.problem


@pytest.mark.parametrize("below", [
    "manifest-1/Pancreas-CT/PANCREAS_0007/study/series", '"Pancreas-CT"/"PANCREAS_0007"/1.2/3.4', "PANCREAS_0007",
    "pancreas-7/x",
])
def test_a_series_is_known_by_the_folder_of_its_patient(tmp_path, below):
    (tmp_path / below).mkdir(parents=True)
    (tmp_path / below / "1-001.DCM").write_bytes(b"")
    (tmp_path / "label0007.nii.gz").write_bytes(b"")
    [case] = pancreas.raw_cases(tmp_path)
    assert (case.id, case.images, case.problem) == (CASE, (tmp_path / below,), "")
    assert case.files == (tmp_path / below / "1-001.DCM", tmp_path / "label0007.nii.gz")


def test_a_folder_of_one_patient_is_an_archive_too(tmp_path):
    archive.build(tmp_path, [CASE])
    (tmp_path / "TCIA_pancreas_labels-02-05-2017").rename(
        tmp_path / "manifest" / "Pancreas-CT" / CASE / "TCIA_pancreas_labels-02-05-2017")
    [case] = pancreas.raw_cases(tmp_path / "manifest" / "Pancreas-CT" / CASE)
    assert case.id == CASE and not case.problem


@pytest.mark.parametrize("cases", [pancreas.raw_cases, pancreas.h5_cases])
def test_a_wrong_folder_says_what_is_there_and_what_was_expected(tmp_path, cases):
    (tmp_path / "patient001").mkdir()
    with pytest.raises(DataError, match="found patient001/, expected ") as error:
        cases(tmp_path)
    assert one_line(error).startswith(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        cases(tmp_path / "nowhere")


# image and label


@pytest.mark.parametrize("descending", [False, True])
def test_a_series_out_of_order_is_in_hu_and_in_place(tmp_path, descending):
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, descending=descending))
    names = [path.name for path in sorted(case.images[0].iterdir())]
    assert names[0] == "1-001.dcm" and len(names) == 16
    image, label = case.read(2)
    hu, truth = archive.anatomy(CASE, SHAPE)
    assert np.array_equal(image.voxels, hu.clip(-1024)[None]) and np.array_equal(label.voxels, truth)
    assert image.voxels.min() < -1000  # the intercept was added
    # the voxel (3, 4, 5) of the series lies at ORIGIN + (3, 4, 5) * SPACING in LPS
    assert image.affine @ (3, 4, 5, 1) == pytest.approx([110 - 3 * 0.75, 95 - 4 * 0.75, 30 + 5 * 1.0, 1])


HEADERS = ("image", "no origin", "wrong", "RAS")


@pytest.mark.parametrize("form", ["dicom", "LAS", "RAS", "SPR"])
@pytest.mark.parametrize("header", HEADERS)
def test_the_label_lies_on_the_pancreas_whatever_its_header_and_the_axes_of_the_image(tmp_path, form, header):
    """As TCIA has them, voxels in the order of DICOM (RAS: turned), with the place of the scan in the header or not."""
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, form=form, header=header))
    image, label = case.read(2)
    hu, truth = archive.anatomy(CASE, SHAPE)
    assert np.array_equal(in_lps(image), hu.clip(-1024) if form == "dicom" else hu)
    assert np.array_equal(in_lps(label), truth)
    assert np.array_equal(label.affine, image.affine) or header in ("image", "RAS")
    assert np.allclose(label.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize("flips", [(1,), (2,), (1, 2)])
def test_a_label_that_lies_clearly_better_mirrored_is_mirrored(tmp_path, flips):
    for case in archive.IDS_80[:8]:
        archive.build(tmp_path, [case], SHAPE, form="LPS", flips=flips)
    for case in pancreas.raw_cases(tmp_path):
        assert np.array_equal(case.read(2)[1].voxels, archive.anatomy(case.id, SHAPE)[1])


def test_a_header_that_orders_the_axes_is_followed_where_nothing_else_has_the_shape(tmp_path):
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, header="image"))
    label = nib.load(case.label)
    change = nib.orientations.axcodes2ornt("SPR")
    turned = label.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(label.affine), change))
    affine = turned.affine.copy()
    affine[:3, 3] = 0
    nib.save(nib.Nifti1Image(np.asanyarray(turned.dataobj), affine), case.label)
    assert turned.shape == (16, 20, 24)
    assert np.array_equal(case.read(2)[1].voxels, archive.anatomy(CASE, SHAPE)[1])


def test_headers_that_place_the_label_are_believed_whatever_lies_inside(tmp_path):
    """A label in the air that says so stays in the air: what is inside only decides where headers do not agree."""
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, form="LPS", header="image"))
    label = nib.load(case.label)
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[0:3, 1:4, 2:5] = 1
    nib.save(nib.Nifti1Image(voxels, label.affine), case.label)
    assert np.array_equal(case.read(2)[1].voxels, voxels)


def test_a_label_that_fits_nowhere_or_in_several_places_alike_is_refused(tmp_path):
    hu, truth = archive.anatomy(CASE, SHAPE)
    affine, elsewhere = np.diag([-1.0, -1, 1, 1]), np.diag([1.0, 1, 1, 1])
    elsewhere[:3, 3] = 500
    label = Scan(truth, elsewhere, tmp_path / "label.nii.gz")
    nothing = Scan(np.random.default_rng(0).normal(size=(1, *SHAPE)), affine, tmp_path / "ct")
    with pytest.raises(DataError, match="not tell how it lies .contrast as DICOM -0.2, flipped along y -0.0") as error:
        pancreas.align(nothing, label)
    assert one_line(error).startswith(f"{label.path}: its affine is not that of {tmp_path / 'ct'}")
    # the header says RAS, the pancreas is seen in its place and, mirrored, as well: DICOM or header, nobody knows
    twice = np.maximum(hu, hu[:, :, ::-1])
    with pytest.raises(DataError, match="do not tell how it lies"):
        pancreas.align(Scan(twice[None], affine, tmp_path / "ct"), label)
    # the header says LPS as DICOM does: that place is taken
    usual = Scan(truth, elsewhere * [[-1], [-1], [1], [1]], label.path)
    assert np.array_equal(pancreas.align(Scan(twice[None], affine, tmp_path / "ct"), usual).voxels, truth)


@pytest.mark.parametrize("flips", list(itertools.chain(*(itertools.combinations(range(3), n) for n in range(1, 4)))))
def test_a_pancreas_stands_out_in_its_place_only(flips):
    for case in archive.IDS_80[:20]:
        hu, truth = archive.anatomy(case, SHAPE)
        right, mirrored = pancreas._contrast(hu, truth), pancreas._contrast(hu, np.flip(truth, flips))
        assert right > max(pancreas.CLEARLY, 2 * mirrored)


def test_contrast_on_numbers_worked_out_by_hand():
    """A label of two voxels, 40 and 60 (mean 50, deviation 10), in a rim of -50: 10 deviations above it."""
    hu, label = np.full((9, 9, 9), -50.0), np.zeros((9, 9, 9), np.uint8)
    hu[4, 4, 4:6], label[4, 4, 4:6] = (40, 60), 1
    assert pancreas._contrast(hu, label) == pytest.approx(10)
    hu[0, 0, 0] = 3000  # beyond the rim
    assert pancreas._contrast(hu, label) == pytest.approx(10)
    assert pancreas._contrast(hu, np.ones_like(label)) == 0  # no rim


def test_a_shape_that_fits_with_other_axes_only_is_not_forced(tmp_path):
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, form="LPS"))
    label = nib.load(case.label)
    nib.save(nib.Nifti1Image(np.asanyarray(label.dataobj).transpose(1, 0, 2), label.affine), case.label)
    with pytest.raises(DataError, match=r"label has shape \(20, 24, 16\), expected \(24, 20, 16\)"):
        case.read(2)


# what is refused

LABEL = "label0007.nii.gz"
WRONG = {
    "no image": f"{LABEL}: no image of this label below .*, expected PANCREAS_0007",
    "no label": "no label of this image below .*, expected label0007.nii.gz",
    "shape": LABEL + r": label has shape \(24, 24, 15\), expected \(24, 24, 16\)",
    "affine": f"{LABEL}: its affine is not that of .*, and the HU do not tell how it lies",
    "constant": "the scan is 40 everywhere, expected contrast",
    "truncated": "is truncated or no DICOM slice|truncated, damaged or no NIfTI file",
    "no scan": "no DICOM slices|truncated, damaged or no NIfTI file",
    "value": f"{LABEL}: label has the value 2, expected 0 or 1",
    "empty": f"{LABEL}: label is background everywhere, expected foreground",
    "two series": "Scout-1: PANCREAS_0007 has 2 DICOM series, expected one, such as .*Pancreas-99667 only",
    "missing slice": "2 mm between .*, expected 1 mm as between the others",
    "same position": "are at the same position, expected one slice per position",
    "4D": "PANCREAS_0007.nii.gz: 2 volumes or channels",
    "NaN": "PANCREAS_0007.nii.gz: 1 voxels are NaN",
}


@pytest.mark.parametrize(("form", "broken"), [
    *(("dicom", broken) for broken in archive.BROKEN_DICOM), *(("LAS", broken) for broken in archive.BROKEN_NIFTI),
])
def test_a_bad_case_is_told_in_one_line_and_leaves_the_others_alone(tmp_path, form, broken):
    header = "image" if broken != "affine" else "no origin"
    archive.build(tmp_path, [CASE, "PANCREAS_0031"], broken=broken, form=form, header=header)
    bad, good = pancreas.raw_cases(tmp_path)
    assert (bad.id, good.id) == (CASE, "PANCREAS_0031")
    with pytest.raises(DataError, match=WRONG[broken]) as error:
        bad.read(2)
    assert one_line(error).startswith(str(tmp_path))
    assert good.read(2)[1].voxels.any()


@pytest.mark.parametrize("twice", ["images/image0007.nii.gz", "labels/0007.nii.gz"])
def test_two_images_or_labels_of_a_case_are_told_with_both_places(tmp_path, twice):
    archive.build(tmp_path, [CASE])
    (tmp_path / twice).parent.mkdir()
    (tmp_path / twice).write_bytes(b"")
    [case] = pancreas.raw_cases(tmp_path)
    what = twice.split("/")[0]
    assert f"{CASE} has 2 {what}, expected one, such as {tmp_path}" in case.problem
    assert str(tmp_path / twice) in case.problem


def test_several_series_in_one_folder_are_refused(tmp_path):
    archive.build(tmp_path, [CASE])
    other = archive.build(tmp_path / "other", ["PANCREAS_0008"])
    [case] = pancreas.raw_cases(tmp_path / "manifest")
    for path in sorted(other.rglob("*.dcm")):
        path.rename(case.images[0] / f"other-{path.name}")
    with pytest.raises(DataError, match="2 DICOM series .*, expected one series per folder"):
        pancreas.RawCase(CASE, case.images).read()


# recipes and h5


def test_the_paper_recipe_on_numbers_worked_out_by_hand(tmp_path):
    """The box of MC-Net's notebook: 96 voxels at least and 25 more on both sides, in x and y."""
    shape = (240, 220, 6)
    hu, _ = archive.anatomy(CASE, shape)
    label = np.zeros(shape, np.uint8)
    label[100:131, 150:171, 2:4] = 1
    affine = np.diag([-1.0, -1, 1, 1])
    image = Scan(hu[None], affine, tmp_path / "ct")
    kept = apply(pancreas.RECIPES["paper"], image, Scan(label, affine, tmp_path / "label"))
    # x: 100 to 130 is 30 wide, padded by (96 - 30) // 2 = 33; y: 20 wide, padded by 38, up to the border
    x, y = (100 - 33 - 25, 130 + 33 + 25), (150 - 38 - 25, 220)
    assert kept.geometry.crop == (x, y, (0, 6)) and kept.geometry.orientation == "LPS"
    box = (np.clip(hu[slice(*x), slice(*y)].astype(np.float64), -125, 275) + 125) / 400
    assert np.abs(kept.image[0] - (box - box.mean()) / box.std()).max() < 1e-5
    assert np.array_equal(to_scanner(kept.label, kept.geometry), label)
    assert pancreas.RECIPES["paper"].label_guided


@pytest.mark.parametrize("recipe", ["paper", "clean"])
def test_both_recipes_end_at_1_mm_and_find_the_way_back(tmp_path, recipe):
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], SHAPE, spacing=(0.5, 0.5, 2.0)))
    image, label = case.read(2)
    kept = apply(pancreas.RECIPES[recipe], image, label)
    assert kept.geometry.stored_spacing == pytest.approx((1, 1, 1), rel=0.1)
    assert kept.image.shape[3] == 32 or recipe == "clean"
    back = to_scanner(kept.label, kept.geometry)
    both = 2 * (back * label.voxels).sum() / (back.sum() + label.voxels.sum())
    assert both > 0.8  # halving and doubling a blob of 6 voxels across costs its edge


def test_the_clean_recipe_keeps_the_body_and_looks_at_no_label(tmp_path):
    shape = (72, 72, 16)
    [case] = pancreas.raw_cases(archive.build(tmp_path, [CASE], shape, spacing=(1.0, 1.0, 1.0)))
    image, label = case.read(2)
    recipe = pancreas.RECIPES["clean"]
    kept, alone = apply(recipe, image, label), apply(recipe, image)
    assert np.array_equal(kept.image, alone.image) and alone.label is None and not recipe.label_guided
    body = np.argwhere(archive.anatomy(CASE, shape)[0][::-1, ::-1] > -500)
    low, high = np.maximum(body.min(axis=0) - 5, 0), np.minimum(body.max(axis=0) + 1 + 5, shape)
    assert kept.geometry.crop == tuple(zip(low.tolist(), high.tolist(), strict=True)) and kept.geometry.cropped != shape
    assert kept.geometry.orientation == "RAS" and kept.label.sum() == label.voxels.sum()
    levels = np.unique(kept.image)
    assert levels[0] == kept.image[0, 0, 0, 0]  # the corner of the box is air, clipped with all that is darker
    assert (levels[-1] - levels[0]) / np.diff(levels).min() == pytest.approx(400, rel=0.01)  # 1 HU apart, 400 in all


def test_recipes_survive_the_way_through_a_card():
    for recipe in pancreas.RECIPES.values():
        assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", ["image0007_norm.h5", "PANCREAS_0007_norm.h5", "pancreas_007.h5"])
def test_the_h5_files_of_the_field_are_imported(tmp_path, name):
    image, label = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32), np.zeros((6, 5, 4), np.float32)
    label[2:4, 1:3] = 1
    (tmp_path / "Pancreas_h5").mkdir()
    with h5py.File(tmp_path / "Pancreas_h5" / name, "w") as file:
        file["image"], file["label"] = image, label
    [case] = pancreas.h5_cases(tmp_path)
    scan, classes = case.read(2)
    assert case.id == CASE and scan.spacing == (1, 1, 1)
    assert np.array_equal(scan.voxels[0], image) and np.array_equal(classes.voxels, label)


def test_an_h5_case_that_is_there_twice_is_told_with_both_places(tmp_path):
    for name in ("PANCREAS_0007.h5", "image0007_norm.h5", "image0025_norm.h5"):
        (tmp_path / name).write_bytes(b"")
    twice, withdrawn = pancreas.h5_cases(tmp_path)
    first, second = tmp_path / "PANCREAS_0007.h5", tmp_path / "image0007_norm.h5"
    assert twice.problem == f"{second}: {CASE} again, expected it in {first} only"
    assert "PANCREAS_0002" in withdrawn.note and not withdrawn.problem


def test_the_files_of_coranet_are_other_data(tmp_path):
    for name in ("image0007_norm.h5", "0008.h5"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError) as error:
        pancreas.h5_cases(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / '0008.h5'}: a file of CoraNet") and "\n" not in str(error.value)


# protocols


def test_protocols_and_their_lists():
    folds = {"paper": ("Pancreas-coranet", 1, archive.IDS_80), "cv5": ("Pancreas-cv5", 5, archive.IDS_80),
             "mcnet": ("Pancreas-mcnet", 1, archive.IDS_82), "mcf4": ("Pancreas-mcf4", 4, archive.IDS_82)}
    assert list(SPEC.protocols) == list(folds)
    for name, protocol in SPEC.protocols.items():
        split, count, ids = folds[name]
        assert (protocol.name, protocol.split, protocol.recipe) == (name, split, "paper")
        assert (protocol.patch, protocol.stride) == ((96, 96, 96), (16, 16, 16))
        assert (protocol.iterations, protocol.learning_rate, protocol.schedule) == (6000, 0.01, "step")
        assert (protocol.labeled_batch, protocol.unlabeled_batch, protocol.labeled) == (2, 2, (6, 12))
        assert protocol.augmentation == () and protocol.published == (name != "cv5")
        for fold in range(count):
            found = load_split(split, fold)
            assert found.folds == count and sorted(found.train + found.test) == sorted(ids)


@pytest.mark.parametrize(("name", "leaks"), [("mcnet", [0]), ("mcf4", [0, 1, 2])])
def test_the_leaks_that_the_protocols_tell_of(name, leaks):
    same = {"PANCREAS_0002", "PANCREAS_0025", "PANCREAS_0070"}
    protocol = SPEC.protocols[name]
    folds = [load_split(protocol.split, fold) for fold in range(load_split(protocol.split, 0).folds)]
    assert [n for n, fold in enumerate(folds) if same & set(fold.train) and same & set(fold.test)] == leaks
    assert "leak" in protocol.about
    assert ("PANCREAS_0070" in folds[0].labeled(12)) == ("0070 as one of 12 labeled" in protocol.about)
    assert ("folds 0 to 2" in protocol.about) == (name == "mcf4")


def test_without_prepared_data_the_user_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError) as error:
            SPEC.open(root, SPEC.protocols["paper"])
        message = str(error.value)
        assert "\n" not in message
        for part in ("cancerimagingarchive.net", "data_prep.prepare Pancreas --raw"):
            assert part in message
