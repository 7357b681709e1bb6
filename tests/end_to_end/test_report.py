"""The report from the command: made from records alone, without torch, the same bytes in every process."""

import json

import nibabel
import numpy as np
import pytest
from commands import command
from unit.making import make_curve, make_peek, make_record

import data_prep
from ssl4mis import records

SPY = ("import runpy, sys; names = sys.argv[1].split(','); sys.argv = sys.argv[2:]\n"
       "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
       "except SystemExit as done: print('IMPORTED', done.code, [n for n in names if n in sys.modules])\n")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two methods on the phantom with everything a page can show, predictions included."""
    folder, split = tmp_path_factory.mktemp("results"), data_prep.load_split("phantom-demo", 0)
    dataset, root = data_prep.locate("phantom")
    store = dataset.open(root, dataset.protocols["demo"])
    (folder / "peeks").mkdir()
    for method, dice in (("supervised", 0.6), ("ua_mt", 0.8)):
        for seed in (0, 1):
            run = make_record(method, dice, dataset="phantom", protocol="demo", split="phantom-demo", labeled=4,
                              total=32, cases=split.test, classes=("chamber", "vessels"), spread=0.1, seed=seed,
                              curve=make_curve(), costs={}, calibration=True)  # fmt: skip
            records.write(run, folder / "records")
            (folder / "peeks" / f"{run['id']}.json").write_text(json.dumps(make_peek(run)))
            predictions = folder / "runs" / run["id"] / "predictions"
            predictions.mkdir(parents=True)
            for case in split.test:
                predicted = np.roll(store.label(case), 2, axis=0)
                nibabel.save(nibabel.Nifti1Image(predicted, np.eye(4)), predictions / f"{case}.nii.gz")
    return folder


def test_two_processes_write_the_same_bytes(results, tmp_path):
    found = []
    for seed in ("1", "2"):
        done = command("benchmarks/report.py", "--results", results, "--dataset", "phantom", "--labeled", "4",
                       "--out", tmp_path / seed, PYTHONHASHSEED=seed)  # fmt: skip
        assert done.returncode == 0, done.stderr
        paths = [tmp_path / seed / f"phantom-demo-4.{kind}" for kind in ("html", "md")]
        assert done.stdout.splitlines() == list(map(str, paths))
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
    text = found[0][0].decode()
    assert text.count("<img ") == 10 and text.count("<svg ") > 8  # five worst cases of two methods
    assert "This is what choosing the checkpoint on the test list would have bought." in text


def test_a_report_needs_no_torch(results, tmp_path):
    done = command("-c", SPY, "torch,monai", "benchmarks/report.py", "--results", results, "--out", tmp_path)
    assert "IMPORTED 0 []" in done.stdout, done.stdout + done.stderr


def test_help_loads_nothing():
    done = command("-c", SPY, "numpy,scipy,matplotlib,jinja2,pandas,torch", "benchmarks/report.py", "--help")
    assert "IMPORTED 0 []" in done.stdout and "--labeled" in done.stdout


def test_bad_words_are_one_line(results):
    done = command("benchmarks/report.py", "--results", results, "--dataset", "heart")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "dataset heart: no records that count, expected one of phantom\n"
    broken = command("benchmarks/report.py", "--results", results / "records")
    assert broken.returncode == 0 and "no records that count yet" in broken.stdout
