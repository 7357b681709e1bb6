"""Calibration against numbers worked out by hand, and against laws."""

import math

import numpy as np
import pytest
import torch

from ssl4mis.calibration import BINS, LEAST, calibration


def two_classes(*p):
    """Probabilities (2, n) of which the second class has p."""
    p = torch.tensor(p)
    return torch.stack([1 - p, p])


def test_one_bin_by_hand():
    """Four voxels that are 0.75 sure, of which two are right: accuracy 0.5."""
    found = calibration(two_classes(0.75, 0.75, 0.25, 0.25), torch.tensor([1, 0, 0, 1], dtype=torch.uint8))
    assert found["ece"] == pytest.approx(0.25)
    assert found["nll"] == pytest.approx(-(2 * math.log(0.75) + 2 * math.log(0.25)) / 4)


def test_two_bins_by_hand():
    """Bins count by their voxels: three at 0.6 with one right, one at 0.9 that is right."""
    found = calibration(two_classes(0.6, 0.6, 0.6, 0.9), torch.tensor([1, 0, 0, 1]))
    assert found["ece"] == pytest.approx((3 * abs(1 / 3 - 0.6) + abs(1 - 0.9)) / 4)


def test_errors_of_opposite_sign_cancel_within_a_bin_only():
    """0.61 that is right and 0.65 that is wrong lie in one bin; 0.95 that is right does not."""
    found = calibration(two_classes(0.61, 0.65), torch.tensor([1, 0]))
    assert found["ece"] == pytest.approx(abs((1 - 0.61) + (0 - 0.65)) / 2, abs=1e-6)
    apart = calibration(two_classes(0.61, 0.95), torch.tensor([0, 1]))
    assert apart["ece"] == pytest.approx((0.61 + 0.05) / 2, abs=1e-6)


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_not_infinite():
    truth = torch.tensor([[0, 1], [2, 1]])
    sure = torch.nn.functional.one_hot(truth, 3).movedim(-1, 0).float()
    assert calibration(sure, truth) == {"ece": 0, "nll": 0}
    wrong = calibration(sure.roll(1, 0), truth)
    assert wrong["ece"] == 1 and wrong["nll"] == pytest.approx(-math.log(LEAST))


def test_the_definition_in_numpy():
    """Guo et al., equation 3, written as a loop over bins, in 3D with four classes."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.4] * 4, size=(9, 8, 7)).astype(np.float32)
    truth = rng.integers(0, 4, (9, 8, 7)).astype(np.uint8)
    confidence, right = p.max(-1).ravel(), (p.argmax(-1) == truth).ravel()
    error = 0.0
    for index in range(BINS):
        inside = (confidence > index / BINS) & (confidence <= (index + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean(dtype=np.float64))
    likely = np.take_along_axis(p, truth[..., None].astype(int), -1)
    found = calibration(torch.from_numpy(p).movedim(-1, 0), torch.from_numpy(truth))
    assert found["ece"] == pytest.approx(error, rel=1e-6)
    assert found["nll"] == pytest.approx(-np.log(likely, dtype=np.float64).mean(), rel=1e-5)


def test_drawing_truth_from_the_probabilities_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=generator)
    truth = (torch.rand(200_000, generator=generator) < p).long()
    assert calibration(torch.stack([1 - p, p]), truth)["ece"] < 0.01
    over = torch.where(p > 0.5, 0.5 + p / 2, p / 2)  # more sure than it should be
    assert calibration(torch.stack([1 - over, over]), truth)["ece"] > 0.1
