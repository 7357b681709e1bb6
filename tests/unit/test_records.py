"""Run records: written once, strict, readable line by line, refused when broken."""

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from ssl4mis import records
from ssl4mis.errors import UserError

DISTANCES = [f"{name}_{unit}" for name in ("hd95", "hd95_max", "asd", "assd") for unit in ("voxel", "mm")]


def make(dice=(0.5, 0.75), seed=0):
    cases = [f"case{number}" for number in range(len(dice))]
    rows = [
        {"case": case, "class": "organ", "dice": value, "jaccard": value / 2, **dict.fromkeys(DISTANCES, 2.0),
         "empty_prediction": False, "empty_truth": False, "diagonal_voxel": 50.0, "diagonal_mm": 100.0}
        for case, value in zip(cases, dice, strict=True)
    ]  # fmt: skip
    return {
        "schema": 1, "id": f"LA-lite-1-vnet-ua_mt-f0-s{seed}-0123abcd",
        "spec": {"method": "ua_mt", "dataset": "LA", "protocol": "lite", "labeled": 1, "fold": 0, "seed": seed,
                 "network": "vnet", "labeled_batch": 2, "unlabeled_batch": 2,
                 "iterations": 10, "precision": "32-true", "hp": {"decay": 0.99}},
        "hp_hash": "0123abcd",
        "split": {"name": "LA-paper", "fold": 0, "folds": 1, "sha256": "ab" * 32, "labeled": ["x"],
                  "unlabeled": ["y"], "test": cases},
        "selection": "last", "evaluation": {"postprocess": "none"}, "classes": ["background", "organ"], "cases": rows,
        "timing": {"train_seconds": 3600.0, "evaluate_seconds": 0.0, "iterations_per_second": 2.5},
        "memory": {"peak_mib": 10.0}, "device": {"type": "cpu", "name": "test"},
        "code": {"version": "0", "commit": None, "dirty": False}, "environment": {},
        "curve": [{"step": 1, "loss": 2.0}],
    }  # fmt: skip


def test_write_and_read_give_the_same_record(tmp_path):
    path = records.write(make(), tmp_path / "records")
    assert path == tmp_path / "records" / "LA-lite-1-vnet-ua_mt-f0-s0-0123abcd.json"
    assert records.read(path) == make()
    assert [item.name for item in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_calibration_and_costs_are_read_where_they_are_there(tmp_path):
    record = make()
    record["calibration"] = [{"case": f"case{n}", "ece": 0.1, "nll": 0.2} for n in range(2)]
    record["costs"] = {"parameters": 10, "forward_passes": None, "backward_passes": 4.5}
    assert records.read(records.write(record, tmp_path)) == record


def test_rows_take_one_line_each(tmp_path):
    lines = records.write(make(), tmp_path).read_text().splitlines()
    for name in ("case0", "case1"):
        (line,) = [line for line in lines if f'"case": "{name}"' in line]
        assert json.loads(line.rstrip(","))["diagonal_mm"] == 100
    assert records.write(make(), tmp_path).read_bytes().endswith(b"}\n")


def test_written_once(tmp_path):
    path = records.write(make(), tmp_path)
    before = path.read_bytes()
    shuffled = make()
    shuffled["spec"] = dict(reversed(shuffled["spec"].items()))
    assert records.write(dict(reversed(shuffled.items())), tmp_path) == path
    with pytest.raises(FileExistsError, match="other content") as error:
        records.write(make(dice=(0.5, 0.5)), tmp_path)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_written_once_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(records.os, "link", refuse)
    path = records.write(make(), tmp_path)
    assert records.write(make(), tmp_path) == path
    with pytest.raises(FileExistsError):
        records.write(make(dice=(0.5, 0.5)), tmp_path)
    assert records.read(path) == make()


def test_nan_becomes_null_and_array_scalars_become_numbers(tmp_path):
    record = make()
    record["cases"][0] |= dict.fromkeys(DISTANCES, float("nan")) | {"empty_prediction": np.bool_(True)}
    record["cases"][1]["dice"] = np.float32(0.25)
    record["curve"][0]["loss"] = np.float64("nan")
    record["evaluation"]["patch"] = (np.int64(4), 5)
    found = records.read(records.write(record, tmp_path))
    assert found["cases"][0]["hd95_mm"] is None and found["cases"][0]["empty_prediction"] is True
    assert found["cases"][1]["dice"] == 0.25
    assert found["curve"] == [{"step": 1, "loss": None}]
    assert found["evaluation"]["patch"] == [4, 5]


def test_infinity_is_refused_by_name(tmp_path):
    record = make()
    record["curve"][0]["loss"] = float("inf")
    with pytest.raises(ValueError, match=f"record {record['id']}: .*strict JSON"):
        records.write(record, tmp_path)
    assert not list(tmp_path.iterdir())


def drop(*path):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


def put(value, *path):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


BROKEN = {
    "lacks 'timing'": drop("timing"),
    "spec lacks 'method'": drop("spec", "method"),
    "cases[1] lacks 'asd_mm'": drop("cases", 1, "asd_mm"),
    "schema is 2, expected 1": put(2, "schema"),
    "spec.seed is '0', expected int": put("0", "spec", "seed"),
    "spec.patch is None, expected list": put(None, "spec", "patch"),
    "spec.dataset is '../x', expected a name": put("../x", "spec", "dataset"),
    "split.test[0] is '/x', expected a name": put("/x", "split", "test", 0),
    "split.per_patient is 0, expected at least 1": put(0, "split", "per_patient"),
    "classes[1] is [], expected a name": put([], "classes", 1),
    "memory.peak_mib is 'much', expected float": put("much", "memory", "peak_mib"),
    "code.version is [], expected str": put([], "code", "version"),
    "calibration is True, expected list": put(True, "calibration"),
    "curve[0] is None, expected a JSON object": put(None, "curve", 0),
    "curve[0].terms.a is 'x', expected float": put({"terms": {"a": "x"}}, "curve", 0),
    "split.folds is True": put(True, "split", "folds"),
    "id '../x'": put("../x", "id"),
    "expected equal and below": put(1, "split", "fold"),
    "cases[0].dice is 95.0, expected a number from 0 to 1": put(95.0, "cases", 0, "dice"),
    "cases[0].dice is None": put(None, "cases", 0, "dice"),
    "cases[0].hd95_mm is None, expected null exactly where one mask is empty": put(None, "cases", 0, "hd95_mm"),
    "cases[0].hd95_voxel is 2.0, expected null": put(True, "cases", 0, "empty_truth"),
    "cases[0].asd_mm is -1.0": put(-1.0, "cases", 0, "asd_mm"),
    "cases holds 2 rows, expected exactly one": put("other", "cases", 0, "case"),
    "cases holds 1 rows": drop("cases", 0),
    "costs lacks 'parameters'": put({}, "costs"),
    "costs.forward_passes is 'many', expected float": put(
        {"parameters": 1, "forward_passes": "many", "backward_passes": None}, "costs"),
    "calibration[0].nll is None, expected float": put([{"case": "case0", "ece": 0.1, "nll": None}], "calibration"),
    "calibration holds 1 rows, expected exactly one": put([{"case": "case0", "ece": 0.1, "nll": 0.1}], "calibration"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_records_are_refused_on_write_and_on_read(message, tmp_path):
    record = make()
    path = tmp_path / f"{record['id']}.json"
    BROKEN[message](record)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        records.write(record, tmp_path / "out")
    assert "\n" not in str(error.value)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        records.read_all(tmp_path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": NaN}', "[" * 10**5, "[" * 30 + "]" * 30, '{"id": 1e999}',
                                  '{"id": "\\ud800"}', '{"id": ' + "9" * 30 + "}", "9" * 5000])  # fmt: skip
def test_a_file_that_is_no_record_is_named(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        records.read(path)
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_broken_files_are_named_and_the_others_read(tmp_path, capsys):
    paths = [records.write(make(seed=seed), tmp_path) for seed in range(4)]
    paths[1].write_text("{")
    paths[3].write_bytes(b"\xff")
    (tmp_path / "folder.json").mkdir()
    broken = records.Broken()
    assert [record["spec"]["seed"] for record in records.read_all(tmp_path, broken)] == [0, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(broken) == len(said) == 3
    assert sorted(line.partition(".json")[0] for line in said) == sorted(
        str(path.with_suffix("")) for path in (paths[1], paths[3], tmp_path / "folder"))
    with pytest.raises(UserError):
        records.read_all(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("name", ["fsync", "replace", "link"])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, name, number):
    def refuse(*words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, refuse)
    if name == "link":  # and no rename either
        monkeypatch.setattr(os, "replace", refuse)
    writes = [] if name == "replace" else [lambda: records.write(make(), tmp_path / "records")]
    for write in [*writes, *([lambda: records.write_text(tmp_path / "table.csv", "x")] if name != "link" else [])]:
        with pytest.raises(UserError, match=rf"(json|csv): cannot be written \({os.strerror(number)}\)") as error:
            write()
        assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_is_none_is_seen_in_time(tmp_path):
    records.check_folder(tmp_path / "new" / "records" / "x.json")
    records.check_folder(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "records"):
        with pytest.raises(UserError, match="cannot be written"):
            records.check_folder(folder / "x.json")


def test_what_is_too_deep_to_be_written_again_is_refused(tmp_path):
    record = make()
    path = records.write(record, tmp_path)
    deep = []
    for _ in range(400):
        deep = [deep]
    record["spec"]["hp"] = {"a": deep}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="more than 20 deep"):
        records.read(path)


def test_the_file_name_is_the_id(tmp_path):
    path = records.write(make(), tmp_path)
    with pytest.raises(ValueError, match="expected the name of the file"):
        records.read(path.rename(tmp_path / "other.json"))


def test_read_all_is_sorted_by_id_and_empty_for_an_absent_folder(tmp_path):
    for seed in (2, 0, 1):
        records.write(make(seed=seed), tmp_path)
    assert [record["spec"]["seed"] for record in records.read_all(tmp_path)] == [0, 1, 2]
    assert records.read_all(tmp_path / "absent") == []


def test_digest_is_the_known_sha256_whatever_the_order():
    # printf '{"a":1,"b":[1.5,null]}' | sha256sum
    assert records.digest({"b": (1.5, None), "a": 1}) == records.digest({"a": 1, "b": [1.5, None]}) == "993a7a2c"
    assert records.digest({"a": 1}, length=12).startswith(records.digest({"a": 1}))
    assert records.digest({"a": 1}) != records.digest({"a": 2})
    with pytest.raises(ValueError, match="strict JSON"):
        records.digest({"a": object()})


def test_tables_need_neither_torch_nor_plots():
    code = (
        "import sys; from ssl4mis import records, selection, leaderboard, report;"
        "print([name for name in ('torch', 'matplotlib', 'pandas', 'scipy', 'jinja2', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
