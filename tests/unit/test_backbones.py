"""Where the borrowed backbones drop, how their weights begin and what they refuse: what no stored output shows."""

import math

import pytest
import torch
from torch import nn

from networks import backbone
from networks.base import NetSpec, PatchError

PATCHES = [(32, 32), (32, 32, 32)]


def drops(dropout, name, patch):
    """Features of a network in train mode, in which whatever can be dropped is, and of the same without dropout."""
    torch.manual_seed(0)
    net, image = backbone(name, NetSpec(1, patch, 4, dropout=dropout)).train(), torch.randn(2, 1, *patch)
    found = [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    features = []
    for rate in (1.0, 0.0):
        for layer in found:
            layer.p = rate
        with torch.no_grad():
            skips = net.encode(image)
            features.append((skips, net.decode(skips)))
    return features


def silent(maps):
    return [not m.any() for m in maps]


@pytest.mark.parametrize("patch", PATCHES, ids=len)
@pytest.mark.parametrize(("name", "bottom"), [("unet", True), ("resvnet", False)])
def test_its_own_dropout_is_before_the_head_and_perhaps_at_the_bottom(name, bottom, patch):
    (skips, maps), _ = drops(None, name, patch)
    assert silent(skips) == [False] * 4 + [bottom]
    assert silent(maps) == [True] + [False] * 3


@pytest.mark.parametrize("patch", PATCHES, ids=len)
@pytest.mark.parametrize("name", ["unet", "resvnet", "nnunet"])
def test_what_a_level_drops_is_missing_in_the_next_one(name, patch):
    (skips, maps), (_, whole) = drops((0.0, 0.5), name, patch)
    assert silent(skips) == [False] * len(skips)
    assert silent(maps) == [False, True] + [False] * (len(maps) - 2)
    assert not torch.equal(maps[0], whole[0])
    assert all(torch.equal(*pair) for pair in zip(maps[2:], whole[2:], strict=True))


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_the_unets_own_dropout_takes_single_values(patch):
    net = backbone("unet", NetSpec(1, patch, 16)).train()
    assert [type(m) for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p] == [nn.Dropout] * 2
    constant = net.dropout(torch.ones(1, 64, *patch))
    assert 0.25 < (constant == 0).float().mean() < 0.35
    assert not (constant == 0).flatten(2).all(-1).any()


@pytest.mark.parametrize("name, gain", [("unet", 2), ("resvnet", 2), ("nnunet", 2 / 1.0001)])
@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_convolutions_begin_he_normal(name, gain, patch):
    net = backbone(name, NetSpec(1, patch, 16))
    for module in (net, net.new_decoder()):
        ratios = []
        for layer in module.modules():
            if isinstance(layer, nn.modules.conv._ConvNd) and layer.weight.numel() >= 4000:
                fan = layer.weight[0].numel()  # also for transposed convolutions, as the authors have it
                ratios.append(layer.weight.std().item() / math.sqrt(gain / fan))
                assert layer.weight.abs().max() > 2 * layer.weight.std(), "not normal"
        assert len(ratios) > 5 and all(0.95 < ratio < 1.05 for ratio in ratios)


def test_the_nnunets_biases_begin_at_zero():
    net = backbone("nnunet", NetSpec(1, (32, 32)))
    assert not any(layer.bias.any() for layer in net.modules() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("patch", [(16, 16), (16, 16, 16)], ids=len)
def test_a_single_voxel_at_the_unets_bottom_is_refused_in_one_line(patch):
    with pytest.raises(PatchError, match="patch .*UNet needs a side of at least 32") as error:
        backbone("unet", NetSpec(1, patch))
    assert "\n" not in str(error.value)
    backbone("unet", NetSpec(1, (32, *patch[1:])))
