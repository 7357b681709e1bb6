"""Layers that all backbones share."""

import pytest
import torch
from torch import nn

from networks.blocks import CONV, Conv3d, kaiming, xavier


@pytest.mark.parametrize("first", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [3, 7])
def test_gradients_in_half_precision_are_right_on_short_maps(first, kernel):
    """torch's own weight gradient is garbage there, and now and then ends the process."""
    torch.manual_seed(0)
    layer = Conv3d(8, 8, kernel, padding=kernel // 2).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 8, first, 8, 8).to(memory_format=torch.channels_last_3d)
    found = {}
    for half in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            layer(x).float().square().mean().backward()
        found[half] = layer.weight.grad.clone()
    assert (found[True] - found[False]).abs().max() < 0.02 * found[False].abs().max()


def test_long_maps_stay_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert Conv3d(2, 2, 3, padding=1)(torch.randn(1, 2, 3, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(("initialize", "expected"), [(kaiming, (2 / 72) ** 0.5), (xavier, (2 / (72 + 144)) ** 0.5)])
@pytest.mark.parametrize("conv", [CONV[2], nn.Conv2d])
def test_initial_weights(initialize, expected, conv):
    """8 inputs and 16 outputs through 3x3 weights: fan-in 72, fan-out 144."""
    torch.manual_seed(0)
    layer = nn.Sequential(conv(8, 16, 3))
    assert initialize(layer) is layer
    assert layer[0].weight.std().item() == pytest.approx(expected, rel=0.1)


def test_initial_weights_reach_all_convolutions_of_other_libraries():
    layers = nn.Sequential(nn.Conv3d(1, 1, 3), nn.ConvTranspose3d(1, 1, 2), nn.ConvTranspose2d(1, 1, 2))
    before = [layer.weight.clone() for layer in layers]
    kaiming(layers)
    assert not any(torch.equal(layer.weight, old) for layer, old in zip(layers, before, strict=True))
