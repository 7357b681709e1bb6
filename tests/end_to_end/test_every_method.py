"""Every method from the user's command to a record: 2D and 3D, 2 and 4 classes, each of the suite's own networks."""

import itertools
import sys
from pathlib import Path

import pytest

from ssl4mis import records, registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import run  # noqa: E402

OWN = ("vnet", "unet", "nnunet")
WORLDS = ("phantom-2d2c", "phantom-2d4c", "phantom-3d2c", "phantom-3d4c")
# Every method sees every world and every network, every network sees every world. Each method keeps one of its four
# runs, the others are left for later.
RUNS = [pytest.param(method, world, OWN[(row + column) % len(OWN)], marks=[] if column == row % len(WORLDS)
                     else pytest.mark.long)
        for (row, method), (column, world) in itertools.product(enumerate(registry.names()), enumerate(WORLDS))]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dataset", "network"), RUNS)
def test_a_run_of_two_steps_ends_as_a_record(method, dataset, network, tmp_path):
    patch = "[32,32,16]" if "3d" in dataset else "[32,32]"
    words = ["--method", method, "--dataset", dataset, "--network", network, "--patch", patch, "--stride", patch,
             "--width", "2", "--iterations", "2", "--labeled", "28", "--log_every", "1", "--device", "cpu"]
    assert run.main([*words, "--out", str(tmp_path)]) == 0
    (record,) = records.read_all(tmp_path / "records")
    assert (record["spec"]["dataset"], record["spec"]["network"]) == (dataset, network)
    assert [event["done"] for event in record["curve"]] == [1, 2]
    classes = 4 if dataset.endswith("4c") else 2
    assert len(record["cases"]) == 8 * (classes - 1)
