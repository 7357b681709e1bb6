"""SSL4MIS's nnU-Net, which has one fixed plan, against stored outputs."""

import re

import numpy as np
import pytest
import torch

from networks.base import NetSpec, SegNet, channels_last
from networks.nnunet import NNUNet, Plan

STRIDES = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
KERNELS = ((1, 3, 3),) * 2 + ((3, 3, 3),) * 5
MOST_CHANNELS = 320


def ours(name: str, levels: int) -> str:
    """The name of a parameter of theirs in our network; their decoder counts its levels from coarse to fine."""
    head, conv = "heads.{}.conv.weight", {"conv": 0, "instnorm": 1}
    if match := re.fullmatch(r"seg_outputs\.(\d+)\.weight", name):
        level = levels - 1 - int(match[1])
        return head.format(f"aux{level}" if level else "seg")
    if match := re.fullmatch(r"tu\.(\d+)\.weight", name):
        return f"backbone.decoder.stages.{2 * int(match[1])}.weight"
    match = re.fullmatch(r"conv_blocks_(\w+)\.(\d+)(?:\.(\d+))?\.blocks\.(\d+)\.(conv|instnorm)\.(\w+)", name)
    part, stage, first, second, layer, kind = match.groups()
    stages = f"stages.{stage}" if part == "context" else f"decoder.stages.{2 * int(stage) + 1}"
    return f"backbone.{stages}.{3 * (int(first or 0) + int(second)) + conv[layer]}.{kind}"


@pytest.fixture(params=["contiguous", "channels_last"])
def stored(request, golden):
    """The file, the network with its weights and the images, in one memory layout."""
    data = golden("net_nnunet")
    images, classes, base = torch.tensor(data["images"]), int(data["n_classes"]), int(data["base_num_features"])
    channels = tuple(min(base * 2**level, MOST_CHANNELS) for level in range(len(KERNELS)))
    spec = NetSpec(images.shape[1], tuple(images.shape[2:]), base)
    heads = {f"aux{level}" if level else "seg": (classes, level) for level in range(len(STRIDES))}
    net = SegNet(NNUNet(spec, Plan(STRIDES, KERNELS, channels)), heads)
    weights = {ours(str(name), len(STRIDES)): torch.tensor(data[f"param/{name}"]) for name in data["state_dict_names"]}
    assert len(weights) == len(data["state_dict_names"])
    net.load_state_dict(weights)
    if request.param == "channels_last":
        net, images = (x.to(memory_format=channels_last(images.ndim - 2)) for x in (net, images))
    return data, net, images


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs(stored, training):
    """There is neither dropout nor a running statistic: both modes give the stored map."""
    data, net, images = stored
    with torch.no_grad():
        logits = net.train(training)(images).logits
    np.testing.assert_allclose(logits, data["logits_eval"], 1e-4, 1e-4)
