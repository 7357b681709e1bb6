"""Sliding-window inference with a tiny stored network against stored windows, scores and labels."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssl4mis.inference import sliding_window, window_starts

RTOL, ATOL = 1e-5, 1e-6
FOREGROUND = ("sliding_window_dtc", "sliding_window_bcp")  # the score of the foreground in all channels, cut at 0.5
FILES = ("sliding_window_uamt", "sliding_window_ssl4mis", "sliding_window_mcf", *FOREGROUND)


def tiny(data, prefix):
    """Softmax of a 3x3x3 convolution plus a linear function of the voxel's place in the patch.

    A network with one channel z has a sigmoid in the file: the softmax of (0, z).
    """
    weight, bias, position = (torch.tensor(data[f"{prefix}_{part}"]) for part in ("weight", "bias", "position"))

    def predict(x):
        logits = F.conv3d(x, weight, bias, padding=1)
        for axis, size in enumerate(x.shape[2:]):
            shape = [1] * x.ndim
            shape[2 + axis] = size
            place = (torch.arange(size) / (size - 1) - 0.5).view(shape)
            logits = logits + position[:, axis].view(1, -1, 1, 1, 1) * place
        if len(weight) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits.softmax(1)

    return predict


def windows(data):
    """Patch and stride of a file."""
    xy, z = int(data["stride_xy"]), int(data["stride_z"])
    return tuple(data["patch_size"].tolist()), (xy, xy, z)


@pytest.mark.parametrize("name", FILES)
def test_window_starts(golden, name):
    data = golden(name)
    patch, stride = windows(data)
    padded = [max(sides) for sides in zip(data["image"].shape, patch, strict=True)]
    np.testing.assert_array_equal(window_starts(padded, patch, stride), data["window_starts"])


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", FILES)
def test_scores_and_labels(golden, name, batch):
    data = golden(name)
    networks = [tiny(data, prefix) for prefix in ("net", "net2") if f"{prefix}_weight" in data]
    image = torch.tensor(data["image"])[None]
    score = sliding_window(lambda x: sum(net(x) for net in networks) / len(networks), image, *windows(data), batch)
    assert len(score) == data["num_classes"]
    if "score_map" in data:
        expected = data["score_map"]
        stored = score[1].expand(expected.shape) if name in FOREGROUND else score
        np.testing.assert_allclose(stored, expected, RTOL, ATOL)
    np.testing.assert_array_equal(score.argmax(0), data["label_map"])
