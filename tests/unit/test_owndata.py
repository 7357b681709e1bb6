"""Own data: every layout becomes an archive, every mismatch a line, and folds, patch and recipe follow from rules."""

import json
import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from archives import owndata as archive

from data_prep import DataError, load_split, owndata
from data_prep.geometry import to_scanner
from data_prep.prepare import prepare
from data_prep.raw import Archive, RawCase
from data_prep.recipes import Recipe, apply
from data_prep.scans import Scan

REAL = Path(__file__).resolve().parents[3] / "shared" / "real"
IDS = [f"torso_{n:03d}" for n in range(6)]


def found(root):
    return owndata.archive("mine", root)


def refused(root):
    with pytest.raises(DataError) as error:
        found(root)
    assert "\n" not in str(error.value)
    return str(error.value)


def problems(root):
    """What reading says of every case that cannot be read."""
    data, lines = found(root), {}
    for case in data.cases:
        try:
            case.read(len(data.classes))
        except DataError as error:
            lines[case.id] = str(error)
            assert "\n" not in lines[case.id]
    return lines


def table(folder, text, name="cases.csv"):
    path = folder / name
    path.write_text(text)
    return path


def plain(ids, patients=None, groups=None, unlabeled=(), given=None):
    """An archive without files, for the rules of the folds."""
    patients, groups = patients or {}, groups or {}
    cases = tuple(RawCase(case, (Path("i"),), None if case in unlabeled else Path("l"), {}, patients.get(case, case),
                          groups.get(patients.get(case, case), "")) for case in ids)
    recipe = Recipe("mine", "clean", 1, "")
    return Archive("mine", "", "MRI", ("MRI",), ("background", "a"), {}, "", "raw", True, cases, recipe, recipe, given)


# Layouts.


@pytest.mark.parametrize("layout", archive.LAYOUTS)
@pytest.mark.parametrize("modalities", [("MRI",), ("T1", "T2")])
def test_every_layout_gives_the_same_voxels(tmp_path, layout, modalities):
    data = found(archive.build(tmp_path, IDS[:2], layout, modalities, unlabeled=["free"]))
    assert [case.id for case in data.cases] == ["free", *IDS[:2]]
    assert data.modalities == modalities
    named = ("background", "label 1", "label 2") if layout == "csv" else tuple(archive.LABELS)
    assert data.classes == named and data.regions == {} and data.folds is None
    for case in data.cases:
        image, label = case.read(len(data.classes))
        voxels, classes = archive.torso(case.id, (40, 36, 24), len(modalities), (0, 1, 2))
        assert np.array_equal(image.voxels, np.moveaxis(voxels, 3, 0))
        assert image.spacing == (1.5, 1.5, 2) and image.orientation == "LPS"
        if case.id == "free":
            assert label is None
        else:
            assert np.array_equal(label.voxels, classes)


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("layout", ["nnunet", "decathlon", "csv"])
def test_other_formats_are_read_too(tmp_path, ending, layout):
    root = archive.build(tmp_path, IDS[:1], layout, ("T1", "T2"), ending=ending)
    data = found(root)
    image, label = data.cases[0].read(len(data.classes))
    assert data.cases[0].id == IDS[0]
    assert np.array_equal(label.voxels, archive.torso(IDS[0], (40, 36, 24), 2, (0, 1, 2))[1])
    assert image.voxels.shape == (2, 40, 36, 24) and data.recipe.spacing == (1.5, 1.5, 2)


def test_what_the_card_will_say(tmp_path):
    data = found(archive.build(tmp_path, IDS[:2], modalities=("CT",)))
    assert (data.name, data.title, data.citation, data.modality) == ("mine", "Torso", "nobody", "CT")
    assert (data.source, data.spacing_known, data.recipe.id) == ("raw", True, "mine-clean-1")
    assert data.replay == data.recipe and not data.recipe.label_guided
    assert Recipe.from_dict(json.loads(json.dumps(data.recipe.to_dict()))) == data.recipe


def test_files_that_dataset_json_names_itself(tmp_path):
    archive.build(tmp_path, IDS[:2], modalities=("T1", "T2"))
    entry = {"images": [f"imagesTr/{IDS[0]}_000{n}.nii.gz" for n in (0, 1)], "label": f"labelsTr/{IDS[0]}.nii.gz"}
    content = json.loads((tmp_path / "dataset.json").read_text())
    for case, expected in (({"one": entry}, None), ({"one": {}}, "dataset has 'one' as {}, expected paths as images")):
        (tmp_path / "dataset.json").write_text(json.dumps(content | {"dataset": case}))
        if expected:
            assert expected in refused(tmp_path)
        else:
            [one] = found(tmp_path).cases
            assert one.id == "one" and one.read(3)[0].voxels.shape == (2, 40, 36, 24)


def test_label_values_with_gaps_become_classes_in_their_order(tmp_path):
    data = found(archive.build(tmp_path, IDS[:2], labels={"spleen": 7, "background": 0, "liver": 2}))
    assert data.classes == ("background", "liver", "spleen")
    raw = archive.torso(IDS[0], (40, 36, 24), 1, (0, 2, 7))[1]
    assert np.array_equal(data.cases[0].read(3)[1].voxels, np.select([raw == 2, raw == 7], [1, 2], 0))


def test_labels_of_a_table_become_classes_in_their_order(tmp_path):
    data = found(archive.build(tmp_path, IDS[:2], "csv", labels={"a": 0, "b": 100, "c": 255}))
    assert data.classes == ("background", "label 100", "label 255")
    assert data.cases[0].values == {0: 0, 100: 1, 255: 2}


def test_regions_are_unions_of_the_classes_below_them(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2, 4], "core": [2, 4], "enhancing": 4}
    data = found(archive.build(tmp_path, IDS[:2], labels=labels, content={"regions_class_order": [1, 2, 3]}))
    assert data.classes == ("background", "label 1", "label 2", "enhancing")
    assert data.regions == {"whole tumor": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}


def test_lists_of_one_value_are_no_regions(tmp_path):
    data = found(archive.build(tmp_path, IDS[:2], labels={"background": [0], "liver": [1]}))
    assert data.classes == ("background", "liver") and data.regions == {}


def test_images_for_testing_and_hidden_files_do_not_count(tmp_path):
    archive.build(tmp_path, IDS[:2])
    (tmp_path / "imagesTs").mkdir()
    for name in ("imagesTs/torso_009_0000.nii.gz", "imagesTr/._torso_000_0000.nii.gz", "labelsTr/._torso_000.nii.gz",
                 "imagesTr/notes.txt", "._cases.csv"):
        (tmp_path / name).write_text("no scan")
    assert [case.id for case in found(tmp_path).cases] == IDS[:2] and not problems(tmp_path)


def test_the_only_table_of_a_folder_is_taken(tmp_path):
    archive.build(tmp_path, IDS[:2], "csv")
    assert [case.id for case in found(tmp_path).cases] == IDS[:2]
    table(tmp_path, "id,image,label\n", "more.csv")
    assert "found cases.csv, masks/, more.csv, scans/, expected dataset.json" in refused(tmp_path)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_any_separator_and_the_mark_of_spreadsheets(tmp_path, separator):
    path = archive.build(tmp_path, IDS[:2], "csv", ("T1", "T2"), separator=separator)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"label", b"Label"))
    data = found(path)
    assert data.modalities == ("T1", "T2") and not problems(path)


def test_ids_of_digits_keep_their_zeros(tmp_path):
    data = found(archive.build(tmp_path, ["001", "002"], "csv", columns={"patient": {"001": "07"}}))
    assert [(case.id, case.patient) for case in data.cases] == [("001", "07"), ("002", "002")]


def test_channels_of_one_name_are_told_apart(tmp_path):
    assert found(archive.build(tmp_path, IDS[:1], modalities=("MR", "MR", "CT"))).modalities == ("MR 0", "MR 1", "CT")


def test_channels_keep_their_order_beyond_nine(tmp_path):
    data = found(archive.build(tmp_path, IDS[:1], modalities=[f"b{n}" for n in range(12)], shape=(12, 10, 8)))
    voxels = archive.torso(IDS[0], (12, 10, 8), 12, (0, 1, 2))[0]
    assert np.array_equal(data.cases[0].read(3)[0].voxels, np.moveaxis(voxels, 3, 0))


# What is wrong with a case.


LINES = {
    "no image": r"(no such file|a label without an image)",
    "no channel": r"(no such file|expected a file per channel: _0000 T1, _0001 T2)",
    "no label": r"(no such file|an image without a label, expected torso_001 in .*labelsTr)",
    "shape": r"label has shape \(40, 35, 24\), expected \(40, 36, 24\)",
    "affine": r"label lies up to .* mm away",
    "NaN": r"NaN or infinite, expected finite values",
    "constant": r"3 everywhere, expected contrast",
    "truncated": r"truncated, damaged or no NIfTI file",
    "no scan": r"truncated, damaged or no NIfTI file",
    "value": r"label has the value 9, expected 0 or 1 or 2",
    "empty": r"label is background everywhere",
}


# a table declares no values, and a 4D file has all channels
@pytest.mark.parametrize("layout, broken", [(layout, broken) for layout in archive.LAYOUTS for broken in LINES
                                            if (layout, broken) not in {("csv", "value"), ("decathlon", "no channel")}])
def test_a_bad_case_is_one_line_and_stops_no_other(tmp_path, layout, broken):
    root = archive.build(tmp_path, IDS[:3], layout, ("T1", "T2"), broken={IDS[1]: broken})
    lines = problems(root)
    assert list(lines) == [IDS[1]] and IDS[1] in lines[IDS[1]]
    assert re.search(LINES[broken], lines[IDS[1]])


@pytest.mark.parametrize("layout, broken, line", [
    ("nnunet", "4D", "2 volumes or channels of shape (40, 36, 24), expected a single 3D volume"),
    ("csv", "4D", "2 volumes or channels of shape (40, 36, 24), expected a single 3D volume"),
    ("decathlon", "3D", "1 volumes, expected 2, one per channel"),
])
def test_the_wrong_number_of_volumes_is_one_line(tmp_path, layout, broken, line):
    root = archive.build(tmp_path, IDS[:2], layout, ("T1", "T2"), broken={IDS[0]: broken})
    assert line in problems(root)[IDS[0]]


def test_a_case_with_and_without_label_is_a_problem(tmp_path):
    archive.build(tmp_path, IDS[:2], unlabeled=[IDS[2]])
    path = tmp_path / "imagesUnlabeled" / f"{IDS[2]}_0000.nii.gz"
    path.rename(path.with_name(f"{IDS[0]}_0000.nii.gz"))
    assert problems(tmp_path) == {f"{IDS[0]} (imagesUnlabeled)": f"{tmp_path / 'imagesUnlabeled'}: {IDS[0]} is in "
                                  "imagesTr too, expected every case once"}


def test_a_name_without_its_channel_is_a_problem(tmp_path):
    archive.build(tmp_path, IDS[:2])
    (tmp_path / "imagesTr" / f"{IDS[0]}_0000.nii.gz").rename(tmp_path / "imagesTr" / f"{IDS[0]}.nii.gz")
    assert problems(tmp_path) == {IDS[0]: f"{tmp_path / 'imagesTr'}: {IDS[0]}.nii.gz for {IDS[0]}, expected a file per "
                                  "channel: _0000 MRI"}


def test_repeated_and_unfit_ids_are_problems(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], lines[2].replace(IDS[1], "a/b", 1)]) + "\n")
    assert problems(path) == {
        "a/b": f"{path}: case 'a/b' cannot name a file, expected an id in UTF-8 without slashes",
        IDS[0]: f"{path}: case {IDS[0]} is listed 2 times, expected every id once",
    }


def test_an_empty_cell_for_an_image_is_a_problem(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv", ("T1", "T2"))
    path.write_text(path.read_text().replace(f"scans/{IDS[1]}_0001.nii.gz", ""))
    assert problems(path) == {IDS[1]: f"{path}: case '{IDS[1]}' has no T2, expected a path"}


def test_numtraining_is_only_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(found(archive.build(tmp_path, IDS[:2], content={"numTraining": 41})).cases) == 2
    assert caplog.messages == [f"{tmp_path / 'dataset.json'}: numTraining is 41, found 2 cases with a label"]


# What nothing can be made of.


@pytest.mark.parametrize("content, line", [
    ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "labels have 'ignore' (2), expected scans that are"),
    ({"labels": {"liver": 1}}, "labels are {'liver': 1}, expected one name for each value, background 0 among them"),
    ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels are {'background': 0, 'a': 1, 'b': 1}, expected one name"),
    ({"labels": {"background": 0, "liver": "many"}}, "label 'liver' is 'many', expected a whole number from 0"),
    ({"labels": {"background": 0, "liver": 1.5}}, "label 'liver' is 1.5, expected a whole number from 0"),
    ({"labels": {"background": 0, "liver": []}}, "label 'liver' is [], expected a whole number from 0"),
    ({"labels": {"background": 0}}, "1 label values, expected background and 1 to 255 classes"),
    ({"labels": None}, "labels is None, expected names and values, background 0 among them"),
    ({"channel_names": None}, "modality is None, expected names of channels by number from 0"),
    ({"channel_names": {"1": "CT"}}, "channel_names is {'1': 'CT'}, expected names of channels by number from 0"),
    ({"file_ending": ".png"}, "file_ending '.png', expected one of .nii.gz, .nii, .nrrd"),
])
def test_an_unfit_dataset_json_is_one_line(tmp_path, content, line):
    archive.build(tmp_path, IDS[:1], content=content)
    assert f"{tmp_path / 'dataset.json'}: {line}" in refused(tmp_path)


@pytest.mark.parametrize("text, line", [
    ("{", "not readable as JSON"), ("[]", "a JSON list, expected an object with channel_names and labels"),
])
def test_what_is_no_dataset_json_is_one_line(tmp_path, text, line):
    (tmp_path / "dataset.json").write_text(text)
    assert f"{tmp_path / 'dataset.json'}: {line}" in refused(tmp_path)


def test_a_list_for_training_with_other_entries_is_one_line(tmp_path):
    archive.build(tmp_path, IDS[:1], "decathlon", content={"training": ["imagesTr/a.nii.gz"]})
    assert "training has 'imagesTr/a.nii.gz', expected paths as image and label" in refused(tmp_path)


def test_a_wrong_folder_says_what_is_there_and_what_was_expected(tmp_path):
    (tmp_path / "patient001").mkdir()
    assert refused(tmp_path) == (
        f"{tmp_path}: found patient001/, expected dataset.json with imagesTr and labelsTr as for nnU-Net or of the "
        "Medical Decathlon, or a CSV file with the columns id, image, label")
    assert "no such folder" in refused(tmp_path / "nowhere")
    archive.build(tmp_path, IDS[:1])
    (tmp_path / "labelsTr").rename(tmp_path / "labels")
    assert "found dataset.json, imagesTr/, labels/, patient001/, expected imagesTr and labelsTr" in refused(tmp_path)


def test_folders_without_scans_are_refused(tmp_path):
    archive.build(tmp_path, [])
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    assert f"{tmp_path / 'imagesTr'}: found nothing, expected CASE_0000.nii.gz" in refused(tmp_path)


def test_data_without_any_usable_label_are_refused(tmp_path):
    root = archive.build(tmp_path, IDS[:1], unlabeled=["free"], broken={IDS[0]: "no label"})
    (root / "labelsTr").mkdir()
    assert "nothing with a label can be used" in refused(root) and "an image without a label" in refused(root)


@pytest.mark.parametrize("text, line", [
    ("image,label\na.nii.gz,b.nii.gz\n", "columns image, label, expected id, image (or a column for each modality)"),
    ("id,label\na,b.nii.gz\n", "columns id, label, expected id, image"),
    ("id,image\na,b.nii.gz\n", "columns id, image, expected id, image"),
    ("id,image,label\na,a.nii.gz,b.nii.gz\n", "column 'image' names no file that exists (such as "),
    ("id,image,label\n", "column 'image' names no file that exists (it is empty)"),
    ("id,image,label\na,b,c,d,e\n,,\n1,2,3,4,5,6,7\n", "not readable as a table"),
    ("", "not readable as a table"),
    ("id,label,Label,image\n", "columns id, label, Label, image, expected id"),
    ("id,label,label\na,a.nii.gz,b.nii.gz\n", "columns id, label, label, expected id"),
    ("id,image,label\na,a.nii.gz,b.nii.gz,\n", "not readable as a table (Expected 3 fields in line 2, saw 4)"),
    (",,\n,,\n", "columns none, expected id"),
])
def test_an_unfit_table_is_one_line(tmp_path, text, line):
    assert f"{table(tmp_path, text)}: {line}" in refused(tmp_path / "cases.csv")


def test_a_column_that_holds_no_paths_is_named(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv", columns={"age": {IDS[0]: "63"}})
    assert f"column 'age' names no file that exists (such as {tmp_path / '63'})" in refused(path)


def test_a_file_in_other_letters_is_no_table(tmp_path):
    path = tmp_path / "cases.csv"
    for letters in ("utf-16", "latin-1"):
        path.write_bytes("id,image,label\nä,b,c\n".encode(letters))
        assert "not readable as a table (it is not in UTF-8), expected a CSV file in UTF-8 with" in refused(path)


def test_empty_rows_and_columns_of_a_spreadsheet_do_not_count(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv")
    path.write_text("".join(f"{line},,\n" for line in path.read_text().splitlines()) + ",,,,\n")
    data = found(path)
    assert data.modalities == ("MRI",) and [case.id for case in data.cases] == IDS[:2]


def test_a_table_without_labels_is_refused(tmp_path):
    path = archive.build(tmp_path, [], "csv", unlabeled=IDS[:2])
    assert refused(path) == f"{path}: nothing with a label can be used (no case has one), expected scans with labels"


def test_a_table_with_a_scan_for_a_label_names_it(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv")
    mask = tmp_path / "masks" / f"{IDS[0]}.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(40 * 36 * 24, dtype=np.int16).reshape(40, 36, 24) % 1000, np.eye(4)), mask)
    assert refused(path) == f"{mask}: 1000 label values, expected at most 256 in all labels of {path}"


def test_an_image_in_the_column_of_labels_adds_no_classes(tmp_path):
    path = archive.build(tmp_path, IDS[:3], "csv")
    path.write_text(path.read_text().replace(f"masks/{IDS[1]}.nii.gz", f"scans/{IDS[2]}_0000.nii.gz"))
    line = f"{path}: case '{IDS[1]}' has the image scans/{IDS[2]}_0000.nii.gz as its label, expected a label"
    assert problems(path) == {IDS[1]: line} and found(path).classes == ("background", "label 1", "label 2")


def test_what_libraries_print_is_not_heard(tmp_path, capfd, monkeypatch):
    root, load = archive.build(tmp_path, IDS[:2]), nib.load

    def loud(path):
        os.write(2, b"data code 9999 not recognized")  # as C++ code does
        return load(path)

    monkeypatch.setattr(nib, "load", loud)
    assert len(found(root).cases) == 2
    os.write(2, b"heard")
    assert capfd.readouterr() == ("", "heard")


@pytest.mark.parametrize("column, line", [
    ("group", "patient 'p' has group 'A' and 'B', expected all cases of a patient in one group"),
    ("fold", "patient 'p' has fold 'A' and 'B', expected all cases of a patient in one fold"),
])
def test_a_patient_is_in_one_group_and_one_fold(tmp_path, column, line):
    columns = {"patient": dict.fromkeys(IDS[:2], "p"), column: dict(zip(IDS, "AB", strict=False))}
    assert line in refused(archive.build(tmp_path, IDS[:2], "csv", columns=columns))


def test_a_label_below_zero_spoils_its_own_case(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv")
    mask = tmp_path / "masks" / f"{IDS[0]}.nii.gz"
    scan = nib.load(mask)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj).astype(np.int16) - 1, scan.affine), mask)
    assert found(path).classes == ("background", "label 1", "label 2")
    assert problems(path) == {IDS[0]: f"{mask}: label has the value -1, expected 0 or 1 or 2"}


def test_a_label_of_fractions_adds_no_classes(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv")
    mask = tmp_path / "masks" / f"{IDS[0]}.nii.gz"
    scan = nib.load(mask)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj) * np.float32(0.3), scan.affine), mask)
    assert found(path).classes == ("background", "label 1", "label 2")
    assert "label has the values" in problems(path)[IDS[0]]


# Folds.


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 50])
def test_folds_test_every_case_once_and_as_evenly_as_can_be(count):
    ids = [f"c{n:02d}" for n in range(count)]
    made = owndata.folds(plain(ids), ids)
    assert len(made) == min(5, count)
    assert sorted(case for fold in made for case in fold["test"]) == ids
    assert max(len(fold["test"]) for fold in made) - min(len(fold["test"]) for fold in made) <= 1
    for fold in made:
        assert sorted(fold["train"] + fold["test"]) == ids and fold["extra"] == []


def test_folds_follow_from_the_ids_alone():
    ids = [f"c{n:02d}" for n in range(20)]
    made = owndata.folds(plain(ids), ids)
    assert owndata.folds(plain(ids[::-1]), set(ids)) == made
    assert owndata.folds(replace(plain(ids), name="other"), ids) == made
    assert len({tuple(fold["train"][:4]) for fold in made}) == 5  # other labels in every fold


def test_patients_stay_whole_and_count_as_one():
    ids = [f"p{n:02d}_{frame}" for n in range(10) for frame in ("ed", "es")]
    data = plain(ids, {case: case[:3] for case in ids})
    made = owndata.folds(data, ids)
    for fold in made:
        assert len(fold["test"]) == 4 and not {c[:3] for c in fold["test"]} & {c[:3] for c in fold["train"]}
        assert all(a[:3] == b[:3] for a, b in zip(fold["train"][::2], fold["train"][1::2], strict=True))
    assert owndata.per_patient(data, made) == 2


def test_cases_per_patient_are_one_unless_all_have_as_many_in_a_row():
    ids = ["a_1", "a_2", "b_1", "b_2", "c_1", "c_2"]
    data = plain(ids, {case: case[0] for case in ids})
    assert owndata.per_patient(data, [{"train": ids}]) == 2
    assert owndata.per_patient(data, [{"train": ids}, {"train": ids[:3]}]) == 1
    assert owndata.per_patient(data, [{"train": ["a_1", "b_1", "a_2", "b_2"]}]) == 1
    assert owndata.per_patient(plain(ids), [{"train": ids}]) == 1


def test_groups_have_equal_shares_in_test_and_from_the_start_of_train():
    ids = [f"c{n:02d}" for n in range(30)]
    groups = {case: "sick" if number < 10 else "well" for number, case in enumerate(ids)}
    for fold in owndata.folds(plain(ids, groups=groups), ids):
        assert Counter(groups[case] for case in fold["test"]) == {"sick": 2, "well": 4}
        for n in (3, 6, 12, 24):
            assert Counter(groups[case] for case in fold["train"][:n]) == {"sick": n // 3, "well": 2 * n // 3}


def test_cases_without_label_are_extra_but_not_those_of_patients_under_test():
    ids = ["a", "b", "c", "c_old", "free"]
    data = plain(ids, {"c_old": "c"}, unlabeled=["c_old", "free"])
    made = owndata.folds(data, ids)
    assert len(made) == 3
    for fold in made:
        assert fold["extra"] == (["free"] if fold["test"] == ["c"] else ["c_old", "free"])
        assert not set(fold["test"]) & {"c_old", "free"} and not set(fold["train"]) & {"c_old", "free"}


def test_only_cases_that_are_done_are_listed():
    ids = [f"c{n}" for n in range(8)]
    data = plain(ids, unlabeled=["c7"])
    for fold in owndata.folds(data, ids[1:7]):
        assert sorted(fold["train"] + fold["test"]) == ids[1:7] and fold["extra"] == []


def test_one_patient_is_not_enough():
    with pytest.raises(DataError, match="mine: 1 patients with labels, expected at least 2 for folds"):
        owndata.folds(plain(["a", "b"], {"b": "a"}), ["a", "b"])


def test_folds_of_nnunet_are_taken_as_they_are(tmp_path):
    archive.build(tmp_path, IDS, unlabeled=["free"])
    given = [{"train": [IDS[n] for n in (5, 2, 0, 1)], "val": [IDS[4], IDS[3]]},
             {"train": [IDS[3], IDS[4]], "val": IDS[:3]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(given))
    data = found(tmp_path)
    assert data.folds == given
    assert owndata.folds(data, [*IDS, "free"]) == [
        {"train": fold["train"], "test": fold["val"], "extra": ["free"]} for fold in given]
    # and without a case that turned out to be bad
    assert [fold["train"] for fold in owndata.folds(data, IDS[1:])] == [[IDS[5], IDS[2], IDS[1]], [IDS[3], IDS[4]]]
    with pytest.raises(DataError, match="mine: no usable test case in fold 0, expected at least one"):
        owndata.folds(data, IDS[:3])


def test_folds_that_prepare_writes_come_back_equal(tmp_path):
    ids = [f"p{n}_{frame}" for n in range(5) for frame in ("ed", "es")]
    path = archive.build(tmp_path / "raw", ids, "csv", shape=(16, 14, 8), unlabeled=["free"],
                         columns={"patient": {case: case[:2] for case in ids}})
    data, out = found(path), tmp_path / "out"
    made = owndata.folds(data, [*ids, "free"])
    assert prepare(data, out, path.parent) == []
    for k, fold in enumerate(made):
        split = load_split("cv5", k, out / "splits")
        assert (list(split.train), list(split.test), list(split.extra)) == (fold["train"], fold["test"], ["free"])
        assert (split.patients, len(split.labeled(2))) == (4, 4)
    # nnU-Net's file among the raw data again: other folds than by rule could not hide
    given = json.loads((out / "splits_final.json").read_text())[::-1]
    (path.parent / "splits_final.json").write_text(json.dumps(given))
    assert owndata.folds(found(path), [*ids, "free"]) == made[::-1]


@pytest.mark.parametrize("given, line", [
    ([{"train": IDS[:1], "val": ["other"]}], "fold 0 has 'other' (1 such ids), expected ids of cases with labels, "),
    ([{"train": [IDS[0]], "val": ["free"]}], "fold 0 has 'free' (1 such ids), expected ids of cases with labels"),
    ([{"train": IDS[:2], "val": [IDS[1]]}], f"fold 0 has '{IDS[1]}' twice, expected every case once in train or val"),
    ({"train": IDS[:2]}, "no list of folds, expected lists train and val in each"),
    ([], "no list of folds, expected lists train and val in each"),
    ([{"train": IDS[:2], "test": IDS[2:]}], "no list of folds, expected lists train and val in each"),
])
def test_unfit_folds_of_nnunet_are_one_line(tmp_path, given, line):
    archive.build(tmp_path, IDS[:3], unlabeled=["free"])
    (tmp_path / "splits_final.json").write_text(json.dumps(given))
    assert f"{tmp_path / 'splits_final.json'}: {line}" in refused(tmp_path)


def test_a_bad_case_among_given_folds_stops_no_other(tmp_path):
    root = archive.build(tmp_path, IDS[:4], broken={IDS[0]: "no label", IDS[1]: "no image"})
    (root / "splits_final.json").write_text(json.dumps([{"train": IDS[:3], "val": [IDS[3]]}]))
    assert owndata.folds(found(root), IDS[2:4]) == [{"train": [IDS[2]], "test": [IDS[3]], "extra": []}]


def test_given_folds_may_not_divide_a_patient(tmp_path):
    path = archive.build(tmp_path, IDS[:3], "csv", columns={"patient": dict.fromkeys(IDS[:2], "p")})
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": [IDS[0]], "val": IDS[1:3]}]))
    assert "fold 0 trains and tests on patient 'p', expected all cases of a patient on one side" in refused(path)


def test_a_column_says_in_which_fold_a_case_is_tested(tmp_path):
    number = dict(zip(IDS, ["1", "2", "1", "3", "", "2"], strict=True))
    data = found(archive.build(tmp_path, IDS, "csv", columns={"fold": number, "patient": {IDS[4]: IDS[3]}}))
    made = owndata.folds(data, IDS)
    assert [fold["test"] for fold in made] == [[IDS[0], IDS[2]], [IDS[1], IDS[5]], [IDS[3]]]
    # the scan that is never tested is of the patient tested in the last fold
    assert [len(fold["train"]) for fold in made] == [4, 4, 4]
    assert [IDS[4] in fold["train"] for fold in made] == [True, True, False]


def test_a_fold_that_is_no_number_is_one_line(tmp_path):
    path = archive.build(tmp_path, IDS[:2], "csv", columns={"fold": {IDS[0]: "first"}})
    assert "fold 'first', expected the number of the fold in which the case is tested" in refused(path)


# Recipe and protocol.


def test_spacing_is_the_median_of_the_headers_per_axis(tmp_path):
    for number, mm in enumerate([(0.7, 0.7, 5), (0.9, 0.9, 3), (0.8, 0.8, 1), (0.8, 0.8, 5), (0.8, 0.8, 5)]):
        archive.build(tmp_path, IDS[: number + 1], shape=(12, 10, 8), spacing=mm, broken={
            case: "no image" for case in IDS[:number]})
    assert found(tmp_path).recipe.spacing == (0.8, 0.8, 5)
    (tmp_path / "imagesTr" / f"{IDS[4]}_0000.nii.gz").unlink()
    assert found(tmp_path).recipe.spacing == (0.8, 0.8, 3)  # of 1, 3, 5, 5 the lower middle one, not 4, which none has


def test_spacing_counts_along_the_patient_and_in_mm(tmp_path):
    archive.build(tmp_path, IDS[:1], shape=(12, 10, 8))
    path = tmp_path / "imagesTr" / f"{IDS[0]}_0000.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 99, (12, 10, 8)).astype(np.int16)
    # a sagittal scan: i to the back, j to the feet, k to the left, in meters
    affine = np.array([[0, 0, -0.004, 0], [-0.0005, 0, 0, 0], [0, -0.0006, 0, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("meter")
    nib.save(image, path)
    assert found(tmp_path).recipe.spacing == pytest.approx((4, 0.5, 0.6))


def test_spacing_of_other_formats_is_that_of_the_reader(tmp_path):
    from data_prep.scans import read_scan

    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(4, 5, 6)))
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))  # i to the back, j to the head, k to the left
    for ending in (".nrrd", ".mha", ".nii.gz"):
        path = tmp_path / f"a{ending}"
        sitk.WriteImage(image, str(path))
        assert owndata._spacing(path) == pytest.approx((2.5, 0.5, 0.75))
        assert sorted(owndata._spacing(path)) == pytest.approx(sorted(read_scan(path).spacing))
    path.write_bytes(b"no scan")
    with pytest.raises(DataError, match="no readable header"):
        owndata._spacing(path)


def test_a_damaged_header_does_not_count(tmp_path):
    root = archive.build(tmp_path, IDS[:3], broken={IDS[0]: "no scan"})
    assert found(root).recipe.spacing == (1.5, 1.5, 2)


@pytest.mark.parametrize("modality, ct", [
    ("CT", True), ("ct_portal", True), ("NCCT", True), ("CTA", True), ("CT1", True), ("abdominal CT", True),
    ("MRI", False), ("FLAIR", False), ("subtraction", False), ("direct", False), ("PET", False), ("image", False),
])
def test_which_names_mean_ct(modality, ct):
    recipe = owndata._recipe("mine", (modality,), (1, 1, 1))
    assert (recipe.crop.around == "body") == ct
    assert [step.name for step in recipe.after] == ["clip" if ct else "clip_quantiles", "zscore"]


def test_ct_beside_another_modality_has_no_window(tmp_path):
    assert owndata._recipe("mine", ("CT", "PET"), (1, 1, 1)).crop.around == "foreground"


@pytest.mark.parametrize("modality", ["MRI", "CT"])
def test_the_recipe_keeps_the_body_and_goes_back(tmp_path, modality):
    data = found(archive.build(tmp_path, IDS[:1], modalities=(modality,)))
    image, label = data.cases[0].read(len(data.classes))
    stored = apply(data.recipe, image, label)
    # the body reaches to 0.85 and 0.7 of the half axes, (40, 36) voxels of 1.5 mm; CT has 5 mm to spare, which take 4
    # voxels, and MRI 10 mm, which take 7
    body = [min(2 * sum(abs(np.linspace(-1, 1, n)) < r) // 2 + 8, n) for n, r in ((40, 0.85), (36, 0.7))]
    assert stored.image.shape == ((1, *body, 24) if modality == "CT" else (1, 40, 36, 24))
    assert np.array_equal(to_scanner(stored.label, stored.geometry), label.voxels)
    assert stored.geometry.stored_spacing == (1.5, 1.5, 2)
    assert np.array_equal(apply(data.recipe, image).image, stored.image)  # the label changes nothing


def test_hu_beyond_the_window_do_not_matter(tmp_path):
    data = found(archive.build(tmp_path, IDS[:1], modalities=("CT",)))
    image, _ = data.cases[0].read(len(data.classes))
    metal = image.voxels.astype(np.int16).copy()
    metal[0, 20, 18, 12], metal[0, 0, 0, 0] = 500, -3024
    more = np.where(metal == 500, 3071, metal)
    low, high = (apply(data.recipe, Scan(voxels, image.affine, image.path)).image for voxels in (metal, more))
    assert np.array_equal(low, high)


@pytest.mark.parametrize("name, shape, spacing, patch", [
    # all 80 planes, and the two sides that leaves: 112 * 112 * 80 voxels, the patch of LA
    ("LA", (178, 150, 88), (0.625, 0.625, 0.625), (112, 112, 80)),
    # shortest side 139 mm; 16 planes would have 80 mm, 48 planes leave 144 * 0.79 = 114 mm for the other sides
    ("spleen CT", (450, 400, 100), (0.79, 0.79, 5.0), (176, 176, 32)),
    # sides of 96, 102 and 80 mm; 32 planes leave 70 mm, all 48 planes 58 mm for the others
    ("head CT", (400, 400, 60), (0.4, 0.4, 5.0), (240, 256, 16)),
    ("cardiac cine", (216, 256, 10), (1.5625, 1.5625, 10.0), (208, 256, 16)),
    ("tiny", (40, 30, 20), (1.0, 1.0, 1.0), (32, 32, 16)),
    ("isotropic", (240, 240, 155), (1.0, 1.0, 1.0), (96, 96, 96)),
    ("long", (64, 64, 1000), (1.0, 1.0, 1.0), (64, 64, 240)),
    ("one plane", (512, 512, 1), (0.5, 0.5, 5.0), (240, 256, 16)),
])
def test_the_patch_follows_from_shape_and_spacing(name, shape, spacing, patch):
    protocol = owndata.protocols([shape] * 3, [spacing] * 3, 20)["cv5"]
    assert protocol.patch == patch
    assert protocol.stride == tuple(n // 2 for n in patch)
    assert np.prod(patch) <= 112 * 112 * 80 and all(n % 16 == 0 for n in patch)


def test_the_patch_follows_from_the_median_case():
    shapes, spacings = [(178, 150, 88), (20, 20, 20), (999, 999, 999)], [(0.625,) * 3] * 3
    assert owndata.protocols(shapes, spacings, 20)["cv5"].patch == (112, 112, 80)


@pytest.mark.parametrize("labeled, counts", [
    (0, (1,)), (1, (1,)), (2, (1,)), (3, (1,)), (4, (2,)), (8, (2,)), (16, (2, 4)), (40, (2, 4, 8)), (80, (4, 8, 16)),
    (200, (8, 16, 32))])
def test_label_counts_leave_most_cases_unlabeled(labeled, counts):
    assert owndata.protocols([(64, 64, 64)], [(1, 1, 1)], labeled)["cv5"].labeled == counts


@pytest.mark.parametrize("spacing, classes, augmentation", [
    ((0.8, 0.8, 5), (), ("dihedral",)),
    ((0.8, 0.8004, 5), (), ("dihedral",)),
    ((4, 0.5, 0.5), (), ()),
    ((1, 1, 1), ("background", "left kidney", "right kidney"), ()),
    ((1, 1, 1), ("background", "Left_atrium"), ("dihedral",)),
    ((1, 1, 1), ("background", "bright spot", "left"), ("dihedral",)),
])
def test_planes_are_turned_only_where_that_changes_nothing(spacing, classes, augmentation):
    protocol = owndata.protocols([(64, 64, 64)], [spacing], 20, classes)["cv5"]
    assert protocol.augmentation == augmentation
    assert ("turned and flipped" in protocol.about) == bool(augmentation)


def test_the_protocol_says_what_it_is():
    protocol = owndata.protocols([(64, 64, 30)], [(1, 1, 2.5)], 20)["cv5"]
    assert (protocol.name, protocol.recipe, protocol.split, protocol.iterations) == ("cv5", "clean", "cv5", 6000)
    assert (protocol.labeled_batch, protocol.unlabeled_batch) == (2, 2)
    assert "64 x 64 x 30 voxels of 1 x 1 x 2.5 mm" in protocol.about


# Real scans.


def test_the_decathlon_as_downloaded():
    root = REAL / "MSD" / "Task09_Spleen"
    if not root.is_dir():
        pytest.skip("no real scans: they lie in ../shared/real")
    data = found(root)
    assert (data.title, data.modalities, data.classes) == ("Spleen", ("CT",), ("background", "spleen"))
    assert data.recipe.spacing == (0.794922, 0.794922, 5) and data.recipe.crop.around == "body"
    image, label = data.cases[0].read(2)
    stored = apply(data.recipe, image, label)
    spleen = np.count_nonzero(nib.load(root / "labelsTr" / "spleen_2.nii.gz").dataobj)
    assert np.count_nonzero(stored.label) == spleen > 90_000
    assert np.array_equal(to_scanner(stored.label, stored.geometry), label.voxels)


def test_nrrd_files_in_a_table(tmp_path):
    folder = REAL / "nrrd" / "data"
    if not folder.is_dir():
        pytest.skip("no real scans: they lie in ../shared/real")
    rows = "".join(f"{case};{folder / case}_image.nrrd;{folder / case}_label.nrrd\n" for case in (
        "brain1", "brain2", "breast1"))
    data = found(table(tmp_path, "id;image;label\n" + rows))
    assert data.classes == ("background", "label 1") and data.recipe.spacing == (0.78125, 0.78125, 6.5)
    for case in data.cases:
        image, label = case.read(2)
        stored = apply(data.recipe, image, label)
        assert case.problem == "" and np.unique(label.voxels).tolist() == [0, 1]
        volumes = [float(np.count_nonzero(part) * np.prod(mm)) for part, mm in (
            (label.voxels, image.spacing), (stored.label, stored.geometry.stored_spacing))]
        same = not stored.geometry.resampled
        assert volumes[1] == pytest.approx(volumes[0], rel=1e-6 if same else 0.2)
