"""ISLES-2022: its archive on synthetic files, every refusal, channels in one unit, and the folds."""

import re

import nibabel as nib
import numpy as np
import pytest
from archives import isles2022 as archive

from data_prep import DataError, isles2022, load_split
from data_prep.geometry import to_scanner
from data_prep.recipes import apply

SPEC, CLEAN, CV5 = isles2022.SPEC, isles2022.CLEAN, isles2022.CV5
ONE, TWO, THREE = (f"sub-strokecase{n:04d}" for n in (1, 2, 3))


def read(root):
    return [case.read(len(SPEC.classes)) for case in isles2022.raw_cases(root)]


@pytest.mark.parametrize("rawdata", [False, True])
def test_cases_of_both_releases_are_found(tmp_path, rawdata):
    root = archive.build(tmp_path, [TWO, ONE], rawdata=rawdata)
    cases = isles2022.raw_cases(root)
    assert [case.id for case in cases] == [ONE, TWO]
    assert [path.name for path in cases[0].files] == [
        f"{ONE}_ses-0001_dwi.nii.gz", f"{ONE}_ses-0001_adc.nii.gz", f"{ONE}_ses-0001_msk.nii.gz"]
    assert all(case.patient == case.id and not case.problem for case in cases)


def test_channels_are_dwi_and_adc_and_flair_is_left_alone(tmp_path):
    root = archive.build(tmp_path, [ONE])
    [(image, label)] = read(root)
    diffusion, adc, mask = archive.brain(ONE, (44, 52, 36))
    assert np.array_equal(image.voxels, np.stack([diffusion, adc]))
    assert np.array_equal(label.voxels, mask) and label.voxels.dtype == np.uint8
    flair = nib.load(next(root.rglob("*_FLAIR.nii.gz")))
    assert flair.shape != image.space and not np.allclose(flair.affine, image.affine)


def test_a_brain_without_lesion_is_a_case(tmp_path):
    [(_, label), (_, other)] = read(archive.build(tmp_path, [ONE, TWO], empty=[ONE]))
    assert not label.voxels.any() and other.voxels.any()


@pytest.mark.parametrize("broken, pattern", [
    ("no dwi", f"no {ONE}_ses-0001_dwi.nii.gz for this case, expected DWI, ADC and mask"),
    ("no adc", f"no {ONE}_ses-0001_adc.nii.gz for this case"),
    ("no mask", f"no {ONE}_ses-0001_msk.nii.gz for this case"),
    ("adc grid", f"{ONE}_ses-0001_adc.nii.gz: channel lies up to .* mm away"),
    ("shape", r"msk.nii.gz: label has shape \(43, 52, 36\), expected \(44, 52, 36\)"),
    ("affine", "msk.nii.gz: label lies up to .* mm away"),
    ("4D", r"dwi.nii.gz: 2 volumes or channels .* expected a single 3D volume"),
    ("NaN", "dwi.nii.gz: .* NaN or infinite, expected finite values"),
    ("constant", "dwi.nii.gz: the scan is 7 everywhere, expected contrast"),
    ("truncated", "dwi.nii.gz: truncated, damaged or no NIfTI file"),
    ("no scan", "dwi.nii.gz: truncated, damaged or no NIfTI file"),
    ("value", "msk.nii.gz: label has the value 3, expected 0 or 1"),
])
def test_a_bad_case_is_one_line(tmp_path, broken, pattern):
    root = archive.build(tmp_path, [ONE, TWO], broken={ONE: broken})
    bad, good = isles2022.raw_cases(root)
    with pytest.raises(DataError) as error:
        bad.read(len(SPEC.classes))
    assert re.search(pattern, str(error.value)) and "\n" not in str(error.value)
    good.read(len(SPEC.classes))


def test_a_repeated_case_is_a_problem(tmp_path):
    archive.build(tmp_path, [ONE])
    archive.build(tmp_path / "again", [ONE])
    [case] = isles2022.raw_cases(tmp_path)
    assert f"dwi of {ONE} again, expected" in case.problem


def test_files_of_macos_do_not_count(tmp_path):
    root = archive.build(tmp_path, [ONE])
    for place in (f"__MACOSX/{TWO}_ses-0001_dwi.nii.gz", f"ISLES-2022/._{TWO}_ses-0001_dwi.nii.gz"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_text("")
    assert [case.id for case in isles2022.raw_cases(root)] == [ONE]


def test_another_folder_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(DataError, match=r"found sub-01/, expected sub-strokecase0001.* zenodo.org/records/7960856"):
        isles2022.raw_cases(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        isles2022.raw_cases(tmp_path / "nowhere")


def test_the_recipe_keeps_the_head_at_2_mm_and_goes_back(tmp_path):
    root = archive.build(tmp_path, [ONE])
    [(image, label)] = read(root)
    stored = apply(CLEAN, image, label)
    # what is not 0 is within 0.8, 0.85 and 0.9 of the half axes; 5 mm more are 3 voxels of 2 mm on each side
    brain = [np.flatnonzero(image.voxels.any(axis=(0, *({1, 2, 3} - {axis})))) for axis in (1, 2, 3)]
    assert stored.image.shape[1:] == tuple(min(n[-1] + 3, size - 1) - max(n[0] - 3, 0) + 1
                                           for n, size in zip(brain, image.space, strict=True))
    assert stored.geometry.orientation == "RAS" and stored.geometry.stored_spacing == pytest.approx(SPEC.spacing)
    assert np.array_equal(to_scanner(stored.label, stored.geometry), label.voxels)
    assert np.array_equal(apply(CLEAN, image).image, stored.image)  # the label changes nothing


def test_adc_in_three_units_becomes_one(tmp_path):
    root = archive.build(tmp_path, [ONE, TWO, THREE])
    adc = [apply(CLEAN, *scans).image[1] for scans in read(root)]
    raw = [scans[0].voxels[1].max() for scans in read(root)]
    assert raw[0] > 900 * raw[1] > 900_000 * raw[2] / 1.5  # 1e-6 mm2/s, 1e-3 mm2/s, mm2/s
    water = [float(np.quantile(part, 0.999)) for part in adc]
    assert max(water) < 1.05 * min(water)


def test_thick_planes_come_to_2_mm(tmp_path):
    root = archive.build(tmp_path, [ONE], (64, 72, 15), (1.15, 1.15, 4.8))
    [(image, label)] = read(root)
    stored = apply(CLEAN, image, label)
    assert stored.geometry.stored_spacing == pytest.approx(SPEC.spacing, rel=0.02)
    centers = [(grid @ (*np.argwhere(part).mean(axis=0), 1))[:3] for part, grid in (
        (label.voxels, image.affine), (stored.label, stored.geometry.stored_affine))]
    assert np.linalg.norm(centers[1] - centers[0]) < 1  # half a voxel


def test_folds_cover_the_250_cases_once():
    folds = [load_split(CV5.split, fold) for fold in range(5)]
    cases = [f"sub-strokecase{n:04d}" for n in range(1, 251)]
    assert sorted(case for split in folds for case in split.test) == cases
    assert all(sorted(split.train + split.test) == cases for split in folds)
    assert len({frozenset(split.labeled(10)) for split in folds}) == 5


def test_the_protocol_fits_networks_and_data():
    assert CV5.recipe == CLEAN.name and CV5.split in {path.stem for path in SPEC.splits.glob("*.json")}
    assert all(n % 16 == 0 and 2 * step == n for n, step in zip(CV5.patch, CV5.stride, strict=True))
    assert SPEC.channels(CV5) == ("DWI", "ADC") and SPEC.task(CV5) == ("background", "stroke lesion")
