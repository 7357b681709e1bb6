"""The frozen case lists: disjoint, nested, checked, and made by the rules they state."""

import json

import numpy as np
import pytest

from data_prep import DataError, dataset, load_split, names, spec

SPLITS = sorted(path.stem for path in spec.SPLITS.glob("*.json"))


def all_folds(name):
    first = load_split(name, 0)
    return [load_split(name, fold) for fold in range(first.folds)]


@pytest.mark.parametrize("name", SPLITS)
def test_no_case_is_in_two_sets(name):
    for split in all_folds(name):
        for n in (1, 2, 8):
            labeled, unlabeled = split.labeled(n), split.unlabeled(n)
            assert len(labeled) == n * split.per_patient
            assert len({*labeled, *unlabeled, *split.test}) == len(labeled) + len(unlabeled) + len(split.test)
            assert labeled + unlabeled == split.train + split.extra


@pytest.mark.parametrize("name", SPLITS)
def test_labeled_sets_nest(name):
    for split in all_folds(name):
        assert set(split.labeled(4)) < set(split.labeled(8)) < set(split.labeled(min(16, split.patients)))


@pytest.mark.parametrize(("name", "total"), [("LA-cv5", 100), ("LA-mcf5", 100), ("phantom-cv5", 40)])
def test_folds_partition_the_cases(name, total):
    folds = all_folds(name)
    tested = [case for split in folds for case in split.test]
    assert len(tested) == len(set(tested)) == total
    for split in folds:
        assert {*split.train, *split.test} == set(tested)
    assert len({split.sha256 for split in folds}) == len(folds)


def test_published_la_lists_have_their_known_hashes():
    for name in ("LA-paper", "LA-mcf5"):
        split = load_split(name, 0)
        assert spec.ids_sha256(split.train).startswith("e88c3f0bae70edcc")
        assert spec.ids_sha256(split.test).startswith("e55b18069e27d6ea")
    assert load_split("LA-paper", 0).labeled(2) == ("06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU")


def test_mcf_folds_follow_from_the_fixed_list():
    paper, folds = load_split("LA-paper", 0), all_folds("LA-mcf5")
    for k in range(1, 5):
        assert folds[k].test == paper.train[20 * (k - 1) : 20 * k]
        assert folds[k].train == paper.test + tuple(case for case in paper.train if case not in folds[k].test)


def test_la_cv5_follows_from_its_rule():
    published = all_folds("LA-mcf5")
    cases = sorted((*published[0].train, *published[0].test))
    for k, split in enumerate(all_folds("LA-cv5")):
        assert split.test == published[k].test
        rest = [case for case in cases if case not in split.test]
        assert split.train == tuple(rest[i] for i in np.random.default_rng([20180, k]).permutation(80))


def test_la_cv5_labels_other_cases_in_every_fold():
    assert len({split.labeled(4) for split in all_folds("LA-cv5")}) == 5


def test_phantom_cv5_follows_from_its_rule():
    cases = [f"phantom_{i:03d}" for i in range(40)]
    for k, split in enumerate(all_folds("phantom-cv5")):
        assert split.test == tuple(cases[8 * k : 8 * k + 8])
        assert split.train == tuple(cases[8 * k + 8 :] + cases[: 8 * k])


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("LA-paper", "phantom-demo"):
        (tmp_path / f"{name}.json").write_text((spec.SPLITS / f"{name}.json").read_text())
    monkeypatch.setattr(spec, "SPLITS", tmp_path)
    return tmp_path


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content["folds"][0])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_tampered_list_is_refused(folder, part):
    path = folder / "LA-paper.json"
    rewrite(path, lambda fold: fold[part].reverse())
    with pytest.raises(DataError, match=f"{part} list of fold 0 has sha256 .* expected e") as error:
        load_split("LA-paper", 0)
    assert str(path) in one_line(error)


def test_a_case_listed_twice_is_refused(folder):
    def leak(fold):
        fold["test"][0] = fold["train"][0]
        fold["sha256_test"] = spec.ids_sha256(fold["test"])

    rewrite(folder / "LA-paper.json", leak)
    with pytest.raises(DataError, match="lists a case twice") as error:
        load_split("LA-paper", 0)
    one_line(error)


def test_cases_without_a_label_are_unlabeled_in_every_run(folder):
    def add(cases, fold):
        fold["extra"], fold["sha256_extra"] = cases, spec.ids_sha256(cases)

    plain = load_split("LA-paper", 0)
    rewrite(folder / "LA-paper.json", lambda fold: add(["free"], fold))
    split = load_split("LA-paper", 0)
    assert (split.train, split.extra, split.patients) == (plain.train, ("free",), 80)
    assert split.unlabeled(16) == (*plain.train[16:], "free") and split.unlabeled(80) == ("free",)
    assert split.sha256 != plain.sha256
    rewrite(folder / "LA-paper.json", lambda fold: add([plain.test[0]], fold))
    with pytest.raises(DataError, match="lists a case twice"):
        load_split("LA-paper", 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"folds": [{"train": []}]}', '{"folds": 3}'])
def test_a_broken_file_is_refused(folder, text):
    (folder / "LA-paper.json").write_text(text)
    with pytest.raises(DataError, match=r"LA-paper\.json") as error:
        load_split("LA-paper", 0)
    one_line(error)


@pytest.mark.parametrize("fold", [-1, 1, "0", 0.0])
def test_a_wrong_fold_is_refused(fold):
    with pytest.raises(DataError, match="expected 0 to 0") as error:
        load_split("LA-paper", fold)
    one_line(error)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(DataError, match="LA-cv5, LA-mcf5, LA-paper") as error:
        load_split("../spec", 0)
    one_line(error)


@pytest.mark.parametrize("n", [0, -1, 81])
def test_an_impossible_label_count_is_refused(n):
    for part in (load_split("LA-paper", 0).labeled, load_split("LA-paper", 0).unlabeled):
        with pytest.raises(DataError, match=f"labeled={n}, expected 1 to 80"):
            part(n)


def test_data_sets_are_found_in_any_case():
    assert [dataset(name.upper()).name for name in names()] == names()
    assert names()[:7] == ["LA", "Pancreas", "ACDC", "BraTS", "PROMISE12", "ISLES2022", "phantom"]


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'phantom'") as error:
        dataset("fantom")
    one_line(error)


@pytest.mark.parametrize("name", names())
def test_protocols_are_consistent(name):
    described = dataset(name)
    assert described.classes[0] == "background"
    for key, protocol in described.protocols.items():
        assert protocol.name == key
        assert len(protocol.patch) == len(protocol.stride) == described.dims(protocol)
        assert described.spatial_dims == len(described.spacing)
        assert all(
            size % 16 == 0 and 0 < step <= size for size, step in zip(protocol.patch, protocol.stride, strict=True)
        )
        split = load_split(protocol.split, 0)
        assert list(protocol.labeled) == sorted(protocol.labeled)
        assert protocol.labeled[-1] < split.patients


def test_data_without_folds_say_what_folds_take(tmp_path):
    with pytest.raises(DataError) as error:
        load_split("cv5", 0, tmp_path)
    assert str(error.value) == (f"{tmp_path / 'cv5.json'}: no such file, expected folds, which take at least two "
                                "patients with a label")
