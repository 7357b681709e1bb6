"""torchrun: several processes train one run and leave what one process would leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl4mis import records

ROOT = Path(__file__).resolve().parents[2]
RUN = ("benchmarks/run.py", "--method", "mean_teacher", "--dataset", "phantom", "--labeled", "2", "--width", "2",
       "--network", "nnunet", "--iterations", "6", "--patch", "[32,32,16]", "--stride", "[32,32,16]", "--precision",
       "32-true", "--log_every", "1", "--save_every", "3", "--device", "cpu")  # fmt: skip
TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*words):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, text=True, capture_output=True,
                          timeout=300)


def test_two_processes_leave_one_record_that_is_the_one_of_one_process(tmp_path):
    done = start(*TOGETHER, *RUN, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("reading phantom") == done.stdout.count("Dice ") == 1
    assert start(*RUN, "--out", tmp_path / "one").returncode == 0
    (two,), (one,) = (records.read_all(tmp_path / name / "records") for name in ("two", "one"))
    assert two["environment"]["processes"] == 2 and one["environment"]["processes"] == 1
    assert two["id"] == one["id"] and [event["done"] for event in two["curve"]] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(two["curve"], one["curve"], strict=True):
        assert mine["terms"] == pytest.approx(other["terms"], rel=1e-3)
    assert [row["case"] for row in two["cases"]] == [row["case"] for row in one["cases"]]
    for mine, other in zip(two["cases"], one["cases"], strict=True):
        assert mine["dice"] == pytest.approx(other["dice"], abs=0.01)
    assert [row["case"] for row in two["calibration"]] == two["split"]["test"]
    assert len(list(tmp_path.glob("two/runs/*/predictions/*.nii.gz"))) == len(two["split"]["test"])


def test_compiled_networks_are_refused_before_training(tmp_path):
    done = start(*TOGETHER, *RUN, "--out", tmp_path, "--compile", "default")
    assert done.returncode != 0
    assert "compile default: expected none with 2 processes" in done.stderr
    assert not (tmp_path / "records").exists()
