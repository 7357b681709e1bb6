"""The lists of `make_splits`: equal to the published ones, by patients, balanced by groups, reproducible."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep import DataError, load_split, spec
from data_prep import make_splits as make

SHARED = Path(__file__).resolve().parents[3] / "shared" / "splits"
SIZES = {  # train and test of every fold
    "Pancreas-mcnet": [(62, 20)],
    "Pancreas-coranet": [(62, 18)],
    "Pancreas-mcf4": [(62, 20), (62, 20), (61, 21), (61, 21)],
    "Pancreas-cv5": [(64, 16)] * 5,
    "ACDC-paper": [(140, 40)],
    "ACDC-cv5": [(160, 40)] * 5,
    "ACDC-lite": [(28, 14)],
    "BraTS2019-paper": [(250, 60)],
    "BraTS2019-cv5": [(268, 67)] * 5,
    "PROMISE12-cv5": [(40, 10)] * 5,
    "ISLES2022-cv5": [(200, 50)] * 5,
}
CV5 = [name for name in SIZES if name.endswith("cv5")]
# First 16 digits of the published lists' SHA-256, in the spelling of their repositories.
HASHES = {
    ("Pancreas-mcnet", "train"): "96e54f3254f359a1",
    ("Pancreas-mcnet", "test"): "e55da970a8195809",
    ("ACDC-paper", "validation"): "61b935c936d8e12f",
    ("ACDC-paper", "test"): "98161bdfaad072bf",
    ("BraTS2019-paper", "train"): "7d897caa29191e24",
    ("BraTS2019-paper", "validation"): "7c73bf3984aee0ab",
    ("BraTS2019-paper", "test"): "bf63460c885deb8f",
}


def all_folds(name):
    return [load_split(name, fold) for fold in range(len(SIZES[name]))]


def entries(name):
    return json.loads((spec.SPLITS / f"{name}.json").read_text(encoding="utf-8"))["folds"]


def patient(case):
    return case.split("_")[0]


def patients(cases):
    return list(dict.fromkeys(map(patient, cases)))


def group(case):
    """The pathology group of an ACDC case, 0 to 4: twenty patients each."""
    return (int(patient(case).removeprefix("patient")) - 1) // 20


def scans(*numbers):
    return tuple(f"PANCREAS_{n:04d}" for n in numbers)


@pytest.fixture
def shared():
    """shared(file) -> the ids of a published list; the test is skipped where the lists are absent."""
    if not SHARED.is_dir():
        pytest.skip("no published lists: they lie in ../shared/splits")
    return lambda file: tuple((SHARED / file).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_published(name):
    folds = all_folds(name)
    assert folds[0].folds == len(SIZES[name])
    assert [(len(split.train), len(split.test)) for split in folds] == SIZES[name]
    assert len({split.sha256 for split in folds}) == len(folds)


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("Pancreas-mcnet", scans(*range(1, 83))),
        ("Pancreas-mcf4", scans(*range(1, 83))),
        ("Pancreas-coranet", scans(*(n for n in range(1, 83) if n not in (25, 70)))),
        ("Pancreas-cv5", scans(*(n for n in range(1, 83) if n not in (25, 70)))),
        ("ACDC-cv5", tuple(f"patient{n:03d}_frame0{f}" for n in range(1, 101) for f in (1, 2))),
        ("PROMISE12-cv5", tuple(f"Case{n:02d}" for n in range(50))),
        ("ISLES2022-cv5", tuple(f"sub-strokecase{n:04d}" for n in range(1, 251))),
    ],
)
def test_every_fold_covers_all_cases(name, cases):
    for split in all_folds(name):
        assert tuple(sorted(split.train + split.test)) == cases


def test_every_fold_of_brats_covers_the_cases_of_the_paper():
    [entry] = entries("BraTS2019-paper")
    for split in all_folds("BraTS2019-cv5"):
        assert sorted(split.train + split.test) == sorted(entry["train"] + entry["validation"] + entry["test"])


@pytest.mark.parametrize("name", ["Pancreas-mcf4", *CV5])
def test_every_case_is_tested_once(name):
    tested = [case for split in all_folds(name) for case in split.test]
    assert len(tested) == len(set(tested))
    assert set(tested) == {*load_split(name, 0).train, *load_split(name, 0).test}


@pytest.mark.parametrize(("name", "total", "size"), [("ACDC-paper", 200, 20), ("BraTS2019-paper", 335, 25)])
def test_validation_cases_are_recorded_and_neither_train_nor_test(name, total, size):
    [entry] = entries(name)
    split = load_split(name, 0)
    assert len(entry["validation"]) == size
    assert spec.ids_sha256(entry["validation"]) == entry["sha256_validation"]
    assert len({*split.train, *split.test, *entry["validation"]}) == total


@pytest.mark.parametrize("name", SIZES)
def test_files_say_what_they_are(name):
    content = json.loads((spec.SPLITS / f"{name}.json").read_text(encoding="utf-8"))
    assert content["name"] == name
    assert content["dataset"] == name.split("-")[0]
    assert "labeled" in content["about"]
    assert content["source"]


@pytest.mark.parametrize(("name", "part"), HASHES)
def test_published_lists_have_their_known_hashes(name, part):
    ids = [case.replace("PANCREAS_", "image") for case in entries(name)[0][part]]
    assert spec.ids_sha256(ids).startswith(HASHES[name, part])


def test_coranet_and_mcf_lists_are_ranges():
    coranet, mcf = load_split("Pancreas-coranet", 0), all_folds("Pancreas-mcf4")
    assert coranet.train == scans(*(n for n in range(1, 64) if n != 25))
    assert coranet.labeled(12) == scans(*range(1, 13))
    for split, (first, last) in zip(mcf, [(63, 82), (1, 20), (21, 41), (42, 62)], strict=True):
        assert split.test == scans(*range(first, last + 1))
        assert split.train == scans(*(n for n in range(1, 83) if not first <= n <= last))


@pytest.mark.parametrize(
    ("name", "fold", "file", "spelling"),
    [
        ("Pancreas-mcnet", 0, "pancreas_mcnet_{}.txt", "image"),
        *(("Pancreas-mcf4", k, f"pancreas_mcf_fold{k}_{{}}.txt", "PANCREAS_") for k in range(4)),
        ("ACDC-paper", 0, "acdc_{}.txt", None),
        ("BraTS2019-paper", 0, "brats2019_{}.txt", None),
    ],
)
def test_lists_equal_the_published_files(shared, name, fold, file, spelling):
    entry = entries(name)[fold]
    for part, short in (("train", "train"), ("test", "test"), ("validation", "val")):
        if part in entry:
            ids = tuple(case.replace("PANCREAS_", spelling) if spelling else case for case in entry[part])
            assert ids == shared(file.format(short))


def test_coranet_equals_the_published_files(shared):
    split = load_split("Pancreas-coranet", 0)
    labeled, unlabeled, test = (
        tuple(f"PANCREAS_{n}" for n in shared(f"pancreas_coranet_bcp_20pct_{part}.txt"))
        for part in ("train_lab", "train_unlab", "test")
    )
    assert (split.labeled(12), split.unlabeled(12), split.test) == (labeled, unlabeled, test)


@pytest.mark.parametrize(("count", "slices"), [(1, 32), (3, 68), (7, 136), (14, 256), (70, 1312)])
def test_labeled_patients_of_acdc_are_the_labeled_slices_of_the_papers(shared, count, slices):
    labeled = load_split("ACDC-paper", 0).labeled(count)
    published = [line.split("_slice_")[0] for line in shared("acdc_train_slices.txt")]
    assert tuple(dict.fromkeys(published[:slices])) == labeled
    assert not set(published[slices:]) & set(labeled)


def test_the_first_labeled_patients_of_acdc():
    labeled = load_split("ACDC-paper", 0).labeled(3)
    assert labeled == tuple(f"patient{n}_frame0{f}" for n in ("099", "038", "050") for f in (1, 2))


def test_labels_of_acdc_are_counted_in_patients():
    for name in ("ACDC-paper", "ACDC-cv5", "ACDC-lite"):
        for split in all_folds(name):
            assert split.per_patient == 2
            assert 2 * split.patients == len(split.train)
    paper = load_split("ACDC-paper", 0)
    assert (len(paper.labeled(70)), len(paper.unlabeled(70))) == (140, 0)
    with pytest.raises(DataError, match="labeled=71, expected 1 to 70 patients"):
        paper.labeled(71)


def test_the_small_list_of_acdc_is_the_beginning_of_the_published_one():
    paper, lite = load_split("ACDC-paper", 0), load_split("ACDC-lite", 0)
    assert (lite.train, lite.test) == (paper.train[:28], paper.test[:14])
    assert (len(patients(lite.train)), len(patients(lite.test))) == (14, 7)
    assert lite.labeled(3) == paper.labeled(3) and lite.labeled(14) == paper.labeled(14)


@pytest.mark.parametrize("name", ["ACDC-paper", "ACDC-cv5"])
def test_patients_are_never_divided(name):
    for split, entry in zip(all_folds(name), entries(name), strict=True):
        parts = [split.train, split.test, tuple(entry.get("validation", ()))]
        for part in parts:
            assert part == tuple(f"{one}_frame0{n}" for one in patients(part) for n in (1, 2))
        owners = [one for part in parts for one in patients(part)]
        assert len(owners) == len(set(owners)) == 100
        for count in (1, 3, 7, 14):
            assert len(patients(split.labeled(count))) == count
            assert not set(patients(split.labeled(count))) & set(patients(split.unlabeled(count)))


def test_acdc_folds_are_balanced_by_group():
    for k, split in enumerate(all_folds("ACDC-cv5")):
        assert Counter(map(group, split.test)) == dict.fromkeys(range(5), 8)
        assert Counter(map(group, split.train)) == dict.fromkeys(range(5), 32)
        order = [group(one) for one in patients(split.train)]
        assert order == [(k + i) % 5 for i in range(80)]


def test_few_labels_of_acdc_favor_no_group_over_the_folds():
    for count in (1, 3, 7, 14):
        labeled = [group(one) for split in all_folds("ACDC-cv5") for one in patients(split.labeled(count))]
        assert Counter(labeled) == dict.fromkeys(range(5), count)


def test_brats_folds_are_balanced_by_grade():
    first = load_split("BraTS2019-cv5", 0)
    assert sum(map(make.is_lgg, first.train + first.test)) == 76
    for split in all_folds("BraTS2019-cv5"):
        assert sum(map(make.is_lgg, split.test)) in (15, 16)
        for n in range(1, len(split.train) + 1):
            expected = n * sum(map(make.is_lgg, split.train)) / len(split.train)
            assert abs(sum(map(make.is_lgg, split.labeled(n))) - expected) < 1


@pytest.mark.parametrize(
    ("case", "lgg"),
    [
        ("BraTS19_2013_1_1", True),
        ("BraTS19_2013_10_1", False),
        ("BraTS19_2013_2_1", False),
        ("BraTS19_TCIA10_109_1", True),
        ("BraTS19_TCIA01_131_1", False),
        ("BraTS19_TMC_09043_1", True),
        ("BraTS19_TMC_30014_1", False),
        ("BraTS19_CBICA_ALU_1", False),
    ],
)
def test_grades_are_the_folders_of_the_archive(case, lgg):
    assert make.is_lgg(case) == lgg


@pytest.mark.parametrize(("name", "counts"), [("Pancreas-cv5", (6, 12)), ("BraTS2019-cv5", (25, 50))])
def test_labeled_sets_nest_and_differ_between_folds(name, counts):
    few, many = counts
    folds = all_folds(name)
    for split in folds:
        assert set(split.labeled(few)) < set(split.labeled(many))
        assert set(split.unlabeled(many)) < set(split.unlabeled(few))
    assert len({frozenset(split.labeled(few)) for split in folds}) == 5


def test_pancreas_cv5_follows_from_its_rule():
    cases = scans(*(n for n in range(1, 83) if n not in (25, 70)))
    row = [cases[i] for i in np.random.default_rng([20160, 5, 0]).permutation(80)]
    for k, split in enumerate(all_folds("Pancreas-cv5")):
        rest = [case for case in cases if case not in split.test]
        assert split.test == tuple(sorted(row[k::5]))
        assert split.train == tuple(rest[i] for i in np.random.default_rng([20160, k, 0]).permutation(64))


def test_acdc_cv5_follows_from_its_rule():
    groups = [[f"patient{20 * g + n:03d}" for n in range(1, 21)] for g in range(5)]
    for k, split in enumerate(all_folds("ACDC-cv5")):
        for g, members in enumerate(groups):
            tested = [members[i] for i in np.random.default_rng([20170, 5, g]).permutation(20)[k::5]]
            assert [one for one in patients(split.test) if one in members] == sorted(tested)
            rest = [one for one in members if one not in patients(split.test)]
            order = [rest[i] for i in np.random.default_rng([20170, k, g]).permutation(16)]
            assert [one for one in patients(split.train) if one in members] == order


def test_the_generator_writes_the_committed_files():
    made = make.make(make.frozen())
    assert sorted(made) == sorted(SIZES)
    for name, text in made.items():
        assert (spec.SPLITS / f"{name}.json").read_bytes() == text.encode()


def test_the_generator_writes_them_from_the_published_lists_too(shared, tmp_path):
    command = [sys.executable, "-m", "data_prep.make_splits", "--lists", SHARED, "--out", tmp_path]
    subprocess.run(command, check=True, cwd=spec.SPLITS.parents[1])
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(SIZES)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (spec.SPLITS / path.name).read_bytes()


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(OSError, match=r"pancreas_mcnet_train\.txt"):
        make.published(tmp_path)
