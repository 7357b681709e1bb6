"""Fixtures that all tests share."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors of tests are tiny, and workers run side by side

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import `archives`


def pytest_addoption(parser):
    parser.addoption("--method", action="append", default=[],
                     help="run tests/contract on this method only, a name or package.module:Class (repeatable)")


@pytest.fixture
def golden():
    """golden(name) -> the arrays of one reference file by key; the test is skipped where the file is absent."""
    folder = Path(os.environ.get("SSL4MIS_GOLDENS") or Path(__file__).resolve().parents[2] / "shared" / "goldens")

    def load(name: str) -> dict[str, np.ndarray]:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no reference file {name}.npz: set SSL4MIS_GOLDENS to the folder of reference files")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    return load
