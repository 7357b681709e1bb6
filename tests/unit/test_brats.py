"""BraTS from the archives of several years and from the field's h5 files: cases, labels, regions, what is wrong."""

import json

import h5py
import numpy as np
import pytest
from archives import brats as archive

from data_prep import DataError, brats, load_split, spec
from data_prep.recipes import apply

SHAPE = (20, 18, 16)
HGG, LGG = "BraTS19_CBICA_ALU_1", "BraTS19_TCIA10_109_1"
SPEC = brats.SPECS["BraTS"]
CLASSES = len(SPEC.classes)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and "expected" in message
    return message


def test_cases_of_both_grades_are_found(tmp_path):
    archive.build(tmp_path, [LGG, HGG], SHAPE)
    cases = brats.raw_cases(tmp_path)
    assert [(case.id, case.patient, case.group, case.problem) for case in cases] == [
        (HGG, HGG, "HGG", ""), (LGG, LGG, "LGG", "")]
    folder = tmp_path / "MICCAI_BraTS_2019_Data_Training" / "HGG" / HGG
    assert cases[0].images == tuple(folder / f"{HGG}_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2"))
    assert cases[0].label == folder / f"{HGG}_seg.nii.gz"


def test_the_cases_of_the_lists_are_those_of_the_archive(tmp_path):
    [entry] = json.loads((spec.SPLITS / "BraTS2019-paper.json").read_text(encoding="utf-8"))["folds"]
    some = [case for part in ("train", "validation", "test") for case in entry[part][::8]]
    archive.build(tmp_path, some, (8, 8, 8))
    cases = brats.raw_cases(tmp_path)
    assert [case.id for case in cases] == sorted(some)
    assert not any(case.problem for case in cases)


@pytest.mark.parametrize(
    ("layout", "case", "patient", "group"),
    [
        ("2019", HGG, HGG, "HGG"),
        ("2021", HGG, HGG, "HGG"),  # the folders HGG and LGG are gone: the grade is known by the id
        ("2021", LGG, LGG, "LGG"),
        ("2021", "BraTS2021_00000", "BraTS2021_00000", ""),
        ("2021", "BraTS20_Training_001", "BraTS20_Training_001", ""),
        ("2023", "BraTS-GLI-00008-103", "BraTS-GLI-00008", ""),
    ],
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_every_layout_gives_the_same_scans_and_classes(tmp_path, layout, case, patient, group, suffix):
    archive.build(tmp_path, [case], SHAPE, layout=layout, suffix=suffix)
    [found] = brats.raw_cases(tmp_path)
    assert (found.id, found.patient, found.group, found.problem) == (case, patient, group, "")
    image, label = found.read(CLASSES)
    images, truth = archive.brain(case, SHAPE)
    assert image.voxels.shape == (4, *SHAPE) and image.voxels.dtype == np.int16
    for channel, name in zip(image.voxels, SPEC.modalities, strict=True):
        assert np.array_equal(channel, images[name])
    for value, class_ in ((0, 0), (1, 1), (2, 2), (4, 3)):
        assert np.array_equal(label.voxels == class_, truth == value)
    assert label.voxels.dtype == np.uint8
    assert image.affine.tolist() == [[-1, 0, 0, 0], [0, -1, 0, 17], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_cavity_of_later_years_is_not_taken_for_enhancing_tumor(tmp_path):
    case = "BraTS-GLI-02062-100"
    archive.build(tmp_path, [case], SHAPE, layout="2021")  # until 2021 a 4 is enhancing tumor, in 2024 it is none
    folder = tmp_path / "MICCAI_BraTS_2019_Data_Training" / case
    for old, new in archive.ENDINGS.values():
        (folder / f"{case}{old}.nii.gz").rename(folder / f"{case}{new}.nii.gz")
    with pytest.raises(DataError, match="-seg.nii.gz: label has the value 4, expected 0 or 1 or 2 or 3") as error:
        brats.raw_cases(tmp_path)[0].read()
    one_line(error)


@pytest.mark.parametrize("name", archive.ENDINGS)
@pytest.mark.parametrize(("layout", "index"), [("2019", 0), ("2023", 1)])
def test_a_missing_file_is_named(tmp_path, name, layout, index):
    cases = (HGG, LGG) if layout == "2019" else ("BraTS-GLI-00000-000", "BraTS-GLI-00001-000")
    archive.build(tmp_path, cases, SHAPE, layout=layout, broken={cases[0]: f"no {name}"})
    bad, good = brats.raw_cases(tmp_path)
    assert (bad.id, good.id, good.problem) == (*cases, "")
    ending = archive.ENDINGS[name][index]
    with pytest.raises(DataError, match=f"{cases[0]}: no {name}, expected {cases[0]} with .*{ending}") as error:
        bad.read()
    assert str(tmp_path) in one_line(error)
    good.read()


def test_an_empty_folder_and_one_with_other_files_are_cases_with_a_problem(tmp_path):
    archive.build(tmp_path, [HGG], SHAPE)
    (tmp_path / "BraTS19_A").mkdir()
    (tmp_path / "BraTS19_B").mkdir()
    (tmp_path / "BraTS19_B" / "notes.txt").write_text("lost")
    empty, other, good = brats.raw_cases(tmp_path)
    for case in (empty, other):
        assert f"{case.id}: no FLAIR, T1, T1ce, T2, label, expected" in case.problem
    assert not good.problem


def test_a_case_in_two_folders_is_a_problem(tmp_path):
    archive.build(tmp_path, [HGG], SHAPE, below="a")
    archive.build(tmp_path, [HGG], SHAPE, below="b")
    archive.build(tmp_path, [HGG], SHAPE, below="__MACOSX")
    [case] = brats.raw_cases(tmp_path)
    assert case.problem == (f"{tmp_path / 'b' / 'HGG' / HGG}: {HGG} again, expected it in "
                            f"{tmp_path / 'a' / 'HGG' / HGG} only")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("truncated", r"_t2.nii.gz: truncated"),
        ("text", r"_t2.nii.gz: truncated, damaged or no NIfTI file"),
        ("nan", r"_t2.nii.gz: \d+ voxels are NaN"),
        ("constant", r"_t2.nii.gz: the scan is 7 everywhere"),
        ("4D", r"_t2.nii.gz: 2 volumes or channels .* expected a single 3D volume"),
        ("image affine", r"_t2.nii.gz: channel lies up to 5 mm away"),
        ("shape", r"_seg.nii.gz: label has shape \(19, 18, 16\), expected \(20, 18, 16\)"),
        ("affine", r"_seg.nii.gz: label lies up to 5 mm away"),
        ("values", r"_seg.nii.gz: label has the value 7, expected 0 or 1 or 2 or 4"),
        ("empty", r"_seg.nii.gz: label is background everywhere"),
    ],
)
def test_a_bad_scan_is_refused_in_one_line_and_stops_no_other(tmp_path, wrong, message):
    archive.build(tmp_path, [HGG, LGG], SHAPE, broken={HGG: wrong})
    bad, good = brats.raw_cases(tmp_path)
    assert not bad.problem
    with pytest.raises(DataError, match=f"{HGG}{message}") as error:
        bad.read()
    one_line(error)
    good.read()


def test_validation_cases_are_unlabeled(tmp_path):
    case, below = "BraTS19_UAB_3446_1", "MICCAI_BraTS_2019_Data_Validation"
    archive.build(tmp_path, [case], SHAPE, "2021", labels=False, below=below)
    archive.build(tmp_path, [HGG], SHAPE, labels=False)
    training, validation = brats.raw_cases(tmp_path)
    assert "no label" in training.problem
    for found in (validation, *brats.raw_cases(tmp_path / below)):
        assert (found.id, found.problem, found.label) == (case, "", None)
        assert found.read()[1] is None


@pytest.mark.parametrize("find", [brats.raw_cases, brats.h5_cases])
def test_another_folder_is_refused(tmp_path, find):
    (tmp_path / "lgemri.nrrd").write_text("")
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="BraTS19_") as error:
            find(root)
        assert str(root) in one_line(error)


def test_published_files_have_their_slices_first(tmp_path):
    image, label = np.random.default_rng(0).random((5, 7, 9)).astype(np.float32), np.zeros((5, 7, 9), np.uint8)
    image[4, 2, 8], label[4, 2, 8] = 9, 1  # plane 4, row 2, column 8
    (tmp_path / "data").mkdir()
    for case in (LGG, HGG):
        with h5py.File(tmp_path / "data" / f"{case}.h5", "w") as file:
            file["image"], file["label"] = image, label
    first, second = brats.h5_cases(tmp_path)
    assert [(case.id, case.group) for case in (first, second)] == [(HGG, "HGG"), (LGG, "LGG")]
    scan, classes = first.read(len(brats.H5_CLASSES))
    assert scan.voxels.shape == (len(brats.H5_MODALITIES), 9, 7, 5) and scan.spacing == (1, 1, 1)
    assert scan.voxels[0, 8, 2, 4] == 9 and np.argwhere(classes.voxels).tolist() == [[8, 2, 4]]


def test_published_files_hold_the_whole_tumor_and_nothing_else(tmp_path):
    archive.build_h5(tmp_path, [HGG], SHAPE)
    [case] = brats.h5_cases(tmp_path)
    assert np.array_equal(case.read()[1].voxels, archive.brain(HGG, SHAPE)[1] > 0)
    with h5py.File(case.files[0], "r+") as file:
        file["label"][0, 0, 0] = 2
    with pytest.raises(DataError, match="label has the value 2, expected 0 or 1") as error:
        case.read()
    one_line(error)


def test_an_h5_file_in_two_folders_is_a_problem(tmp_path):
    for folder in ("a", "b"):
        archive.build_h5(tmp_path / folder, [HGG], SHAPE)
    [case] = brats.h5_cases(tmp_path)
    assert case.problem.startswith(str(tmp_path / "b")) and str(tmp_path / "a") in case.problem


def test_the_published_recipe(tmp_path):
    archive.build(tmp_path, [HGG], SHAPE)
    image, label = brats.raw_cases(tmp_path)[0].read(CLASSES)
    stored = apply(brats.RECIPES["paper"], image, label)
    hits = np.argwhere(image.voxels[0])
    box = tuple(slice(low, high) for low, high in zip(hits.min(0), hits.max(0), strict=True))  # without the last planes
    assert np.array_equal(stored.label, label.voxels[box])
    for channel, found in zip(image.voxels, stored.image, strict=True):
        part = channel[box].astype(np.float64)
        values = np.sort(part.ravel())
        part = np.minimum(part, next(v for n, v in enumerate(values, 1) if n / values.size >= 0.999))
        brain = part[part > 0]
        assert np.allclose(found, (part - brain.mean()) / brain.std(), rtol=0, atol=1e-4)
    assert stored.image[0].min() < -1  # outside the brain is not 0


def test_the_clean_recipe_looks_at_no_label_and_measures_the_brain(tmp_path):
    archive.build(tmp_path, [HGG], SHAPE)
    image, label = brats.raw_cases(tmp_path)[0].read(CLASSES)
    recipe = brats.RECIPES["clean"]
    stored, blind = apply(recipe, image, label), apply(recipe, image)
    assert np.array_equal(stored.image, blind.image) and not recipe.label_guided
    hits = np.argwhere(image.voxels.any(axis=0))
    assert stored.image.shape[1:] == tuple(hits.max(0) - hits.min(0) + 1)
    assert stored.geometry.orientation == "RAS" and stored.geometry.stored_spacing == (1, 1, 1)
    box = tuple(slice(low, high + 1) for low, high in zip(hits.min(0), hits.max(0), strict=True))
    brain = (image.voxels[(slice(None), *box)] != 0)[:, ::-1, ::-1]  # to the right and to the front
    for found, inside in zip(stored.image, brain, strict=True):
        assert found[inside].mean() == pytest.approx(0, abs=1e-4) and found[inside].std() == pytest.approx(1, abs=1e-4)
    assert np.bincount(stored.label.ravel())[1:].tolist() == np.bincount(label.voxels.ravel())[1:].tolist()


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("SSL4MIS_DATA", raising=False)
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="data_prep.prepare BraTS --raw DIR .* --from-h5 DIR"):
            SPEC.open(root, next(iter(SPEC.protocols.values())))


def test_the_published_protocol():
    assert list(SPEC.protocols) == ["paper", "cv5", "regions"]
    for name, split in (("paper", "BraTS2019-paper"), ("cv5", "BraTS2019-cv5")):
        protocol = SPEC.protocols[name]
        assert protocol.published == (name == "paper") and protocol.split == split and SPEC.dims(protocol) == 3
        assert (protocol.patch, protocol.stride) == ((96, 96, 96), (64, 64, 64))
        assert (protocol.iterations, protocol.learning_rate, protocol.schedule) == (30000, 0.1, "poly")
        assert (protocol.labeled_batch, protocol.unlabeled_batch, protocol.labeled) == (2, 2, (25, 50))
        assert (protocol.augmentation, protocol.precision, protocol.recipe) == (("rotflip",), "32-true", "paper")
        assert SPEC.channels(protocol) == ("FLAIR",) == brats.H5_MODALITIES
        assert SPEC.task(protocol) == ("background", "whole tumor") == brats.H5_CLASSES
        assert SPEC.targets(protocol) == {"whole tumor": (1,)}


def test_regions_are_unions_of_the_tumor_parts():
    protocol = SPEC.protocols["regions"]
    assert not protocol.published and protocol.split == "BraTS2019-cv5"
    assert SPEC.channels(protocol) == ("FLAIR", "T1", "T1ce", "T2")
    named = {name: {SPEC.classes[value] for value in values} for name, values in SPEC.targets(protocol).items()}
    assert named == {
        "whole tumor": {"necrotic core", "edema", "enhancing tumor"},
        "tumor core": {"necrotic core", "enhancing tumor"},
        "enhancing tumor": {"enhancing tumor"},
    }


@pytest.mark.parametrize("name", SPEC.protocols)
def test_the_label_counts_fit_the_split(name):
    protocol = SPEC.protocols[name]
    split = load_split(protocol.split, 0)
    assert all(len(split.labeled(count)) == count and split.unlabeled(count) for count in protocol.labeled)
