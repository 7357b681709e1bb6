"""PROMISE12: its archive on synthetic files, every refusal, the recipe's grid and the folds by center."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from archives import promise12 as archive

from data_prep import DataError, load_split, promise12
from data_prep.geometry import to_scanner
from data_prep.make_splits import PROMISE12_CENTERS
from data_prep.recipes import apply
from data_prep.scans import Scan

SPEC, CLEAN, CV5 = promise12.SPEC, promise12.CLEAN, promise12.CV5
FOLDS = [load_split(CV5.split, fold) for fold in range(5)]


def center(case):
    return next(name for name, numbers in PROMISE12_CENTERS.items() if int(case[-2:]) in numbers)


def refusal(folder, case="Case01"):
    cases = {found.id: found for found in promise12.raw_cases(folder)}
    with pytest.raises(DataError) as error:
        cases[case].read(len(SPEC.classes))
    assert "\n" not in str(error.value)
    assert sorted(cases) == ["Case01", "Case02"]
    cases["Case02"].read(len(SPEC.classes))  # the others are none the worse
    return str(error.value)


@pytest.mark.parametrize("parts", [True, False])
def test_cases_of_both_releases_are_found(tmp_path, parts):
    root = archive.build(tmp_path, ["Case00", "Case20", "Case49"], parts=parts)
    cases = promise12.raw_cases(root)
    assert [case.id for case in cases] == ["Case00", "Case20", "Case49"]
    assert [case.group for case in cases] == ["BIDMC", "RUNMC", "HK"]
    assert all(case.patient == case.id and not case.problem and not case.may_be_empty for case in cases)
    assert [path.name for path in cases[1].files] == [
        "Case20.mhd", "Case20.raw", "Case20_segmentation.mhd", "Case20_segmentation.raw"]


def test_voxels_and_place_are_those_of_the_header(tmp_path):
    root = archive.build(tmp_path, ["Case07"], tilt=12)
    image, label = promise12.raw_cases(root)[0].read(len(SPEC.classes))
    expected = sitk.ReadImage(str(next(root.rglob("Case07.mhd"))))
    assert np.array_equal(image.voxels[0], sitk.GetArrayFromImage(expected).transpose(2, 1, 0))
    assert image.spacing == pytest.approx(archive.SPACING)
    for index in ((0, 0, 0), (5, 7, 3)):
        x, y, z = expected.TransformIndexToPhysicalPoint(index)
        assert (image.affine @ (*index, 1))[:3] == pytest.approx((-x, -y, z))  # ITK has LPS, we RAS
    assert np.array_equal(label.voxels, archive.pelvis("Case07", (48, 44, 8))[1])


def test_the_test_data_of_the_challenge_are_passed_over(tmp_path):
    root = archive.build(tmp_path, ["Case00"], parts=False, test_data=True)
    [case] = promise12.raw_cases(root)
    assert not case.problem and case.label.parent.name == "training_data"


def test_files_of_macos_do_not_count(tmp_path):
    root = archive.build(tmp_path, ["Case00"])
    for name in ("._Case00.mhd", "../__MACOSX/Case01.mhd"):
        path = root / "TrainingData_Part1" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert [case.id for case in promise12.raw_cases(root)] == ["Case00"]


@pytest.mark.parametrize("broken, pattern", [
    ("no image", "TrainingData_Part1: no Case01.mhd, expected"),
    ("no label", "no Case01_segmentation.mhd, expected"),
    ("no raw", r"Case01.mhd: truncated, damaged or no MetaImage file"),
    ("truncated", r"Case01.mhd: truncated, damaged or no MetaImage file"),
    ("no scan", r"Case01.mhd: .* expected"),
    ("shape", r"Case01_segmentation.mhd: label has shape \(48, 44, 7\), expected \(48, 44, 8\)"),
    ("affine", r"Case01_segmentation.mhd: label lies up to .* mm away"),
    ("4D", r"Case01.mhd: 2 volumes or channels .* expected a single 3D volume"),
    ("NaN", "Case01.mhd: .* NaN or infinite, expected finite values"),
    ("constant", "Case01.mhd: the scan is 5 everywhere, expected contrast"),
    ("value", "Case01_segmentation.mhd: label has the value 2, expected 0 or 1"),
    ("empty", "Case01_segmentation.mhd: label is background everywhere"),
])
def test_a_bad_case_is_one_line(tmp_path, broken, pattern):
    root = archive.build(tmp_path, ["Case01", "Case02"], broken={"Case01": broken})
    assert re.search(pattern, refusal(root))


def test_a_repeated_case_is_a_problem(tmp_path):
    archive.build(tmp_path, ["Case01", "Case02"])
    archive.build(tmp_path / "again", ["Case01"])
    assert "Case01.mhd again, expected it in" in refusal(tmp_path)


def test_another_folder_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "patient001").mkdir()
    with pytest.raises(DataError, match=r"found patient001/, expected Case00.mhd .* zenodo.org/records/8026660"):
        promise12.raw_cases(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        promise12.raw_cases(tmp_path / "nowhere")


def test_the_recipe_goes_to_the_usual_grid_and_back(tmp_path):
    root = archive.build(tmp_path, ["Case07"], tilt=7)
    image, label = promise12.raw_cases(root)[0].read(len(SPEC.classes))
    stored = apply(CLEAN, image, label)
    # 48 x 1.25 mm are 96 x 0.625 mm; planes are 3.6 mm apart already; nothing is cropped
    assert stored.image.shape == (1, 96, 88, 8)
    assert stored.geometry.stored_spacing == pytest.approx(SPEC.spacing)
    assert stored.geometry.orientation == "RAS"
    assert float(stored.image.mean()) == pytest.approx(0, abs=1e-4) and float(stored.image.std()) == pytest.approx(1)
    back = to_scanner(stored.label, stored.geometry)
    assert back.shape == label.voxels.shape and np.array_equal(back, label.voxels)
    assert np.array_equal(apply(CLEAN, image).image, stored.image)  # the label changes nothing


def test_the_unit_of_intensities_does_not_matter(tmp_path):
    image, _ = promise12.raw_cases(archive.build(tmp_path, ["Case07"]))[0].read(len(SPEC.classes))
    brighter = Scan(image.voxels.astype(np.float32) * 8 + 100, image.affine, Path("b"))
    assert np.allclose(apply(CLEAN, brighter).image, apply(CLEAN, image).image, atol=1e-3)


def test_every_case_is_tested_once():
    tested = [case for split in FOLDS for case in split.test]
    assert sorted(tested) == [f"Case{n:02d}" for n in range(50)]
    assert {(len(split.train), len(split.test)) for split in FOLDS} == {(40, 10)}
    for split in FOLDS:
        assert not set(split.train) & set(split.test)


def test_centers_have_equal_shares():
    assert Counter(center(f"Case{n:02d}") for n in range(50)) == {"RUNMC": 13, "UCL": 13, "BIDMC": 12, "HK": 12}
    for split in FOLDS:
        assert set(Counter(map(center, split.test)).values()) <= {2, 3}
        for count in CV5.labeled:
            assert Counter(map(center, split.labeled(count))) == dict.fromkeys(PROMISE12_CENTERS, count // 4)
    assert len({split.labeled(4) for split in FOLDS}) == 5


def test_the_protocol_fits_networks_and_data():
    assert CV5.recipe == CLEAN.name and CV5.split in {path.stem for path in SPEC.splits.glob("*.json")}
    assert all(n % 16 == 0 and 2 * step == n for n, step in zip(CV5.patch, CV5.stride, strict=True))
    assert SPEC.channels(CV5) == ("T2",) and SPEC.task(CV5) == ("background", "prostate")
