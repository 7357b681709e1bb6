"""The kernels for CUDA devices, run by Triton's interpreter on the CPU, against the host's ways."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssl4mis import optional

ROOT = Path(__file__).resolve().parents[2]
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

START = """if True:
    import numpy as np, torch
    from ssl4mis import kernels
    from ssl4mis.distance import other_side
    from ssl4mis.ops import largest_component
    rng = np.random.default_rng({seed})
    for n in range({count}):
        shape = (rng.integers(1, 3), *rng.integers(1, (8, 40)[n % 2], 3 - n % 2))
        kernels.BLOCK = (16, 64, 512)[n % 3]
"""
COMPONENTS = """
        classes = (1, 2, 5, 255)[n % 4]
        label = (rng.integers(1, classes + 1, shape) * (rng.random(shape) < rng.random())).astype(np.uint8)
        if classes == 255:
            label[label > 0] |= 252
        label = torch.from_numpy(label)
        for connectivity in (1, 2, 3):
            found = kernels.largest_component(label, connectivity)
            assert torch.equal(found, largest_component(label, connectivity)), (label, connectivity)
"""
DISTANCES = """
        mask = torch.from_numpy(rng.random(shape) < rng.choice([0, 0.02, 0.5, 0.98, 1]))
        squares = kernels.signed_squares(mask)
        assert torch.equal((squares.sign() * squares.abs().sqrt()).float(), other_side(mask)), mask
"""


def interpreted(code, **values):
    """Exit status of a process in which Triton interprets; that is settled when Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code.format(**values)], cwd=ROOT, env=environment).returncode


@pytest.mark.slow
@with_triton
@pytest.mark.parametrize("seed", range(3))
def test_components(seed):
    assert interpreted(START + COMPONENTS, seed=seed, count=8) == 0


@pytest.mark.slow
@with_triton
def test_distances():
    assert interpreted(START + DISTANCES, seed=0, count=20) == 0


@pytest.mark.slow
@with_triton
def test_too_large_is_left_to_others(monkeypatch):
    from ssl4mis import kernels

    monkeypatch.setattr(kernels, "LIMIT", 100)
    for label in torch.zeros(1, 10, 10), torch.zeros(1, 1, 1, 1, 1):
        assert kernels.largest_component(label.to(torch.uint8), 1) is None
    for mask in torch.zeros(1, 10, 10), torch.zeros(1, 1, 10):
        assert kernels.signed_squares(mask.bool()) is None


def test_a_triton_that_fails_is_left_alone_after_a_warning(monkeypatch):
    def fail():
        raise RuntimeError("Failed to find\nC compiler")

    optional.cuda_kernels.cache_clear()
    monkeypatch.setattr(optional, "optional", lambda name: SimpleNamespace(try_out=fail))
    with pytest.warns(UserWarning, match=r"Triton fails \(RuntimeError: Failed to find C compiler\)"):
        assert optional.cuda_kernels() is None
    monkeypatch.setattr(optional, "optional", lambda name: None)
    optional.cuda_kernels.cache_clear()
    assert optional.cuda_kernels() is None
    optional.cuda_kernels.cache_clear()
