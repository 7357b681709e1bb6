"""Layers that all backbones share."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks.base import channels_last
from networks.blocks import BATCH_NORM, CONV, INSTANCE_NORM, UP, Conv2d, Conv3d, Layers, kaiming, xavier


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


class Steps(TorchDispatchMode):
    """Collects the strides of the convolutions with kernels of one pixel that are called."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call is torch.ops.aten.convolution.default and args[1].shape[2:] == (1, 1):
            self.found.append(tuple(args[3]))
        return call(*args, **kwargs or {})


@pytest.mark.parametrize(("kernel", "stride", "expected"), [(1, 2, [(1, 1)]), (1, (1, 3), [(1, 1)]), (1, 1, [(1, 1)]),
                                                            (3, 2, [])])
def test_no_single_pixels_are_left_out_by_a_convolution(kernel, stride, expected):
    """oneDNN's gradient of such weights writes beyond its memory, which ends the process later; values are the same."""
    torch.manual_seed(0)
    layer, plain = (make(4, 6, kernel, stride, padding=kernel // 2, bias=False, dtype=torch.float64)
                    for make in (Conv2d, nn.Conv2d))
    plain.load_state_dict(layer.state_dict())
    image = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    outs = []
    for each in (layer, plain):
        x = image.clone().requires_grad_()
        with Steps() as steps:
            out = each(x)
        out.square().sum().backward()
        outs.append((out, x.grad, each.weight.grad))
        if each is layer:
            assert steps.found == expected
    for mine, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(mine, theirs)


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


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", [BATCH_NORM, INSTANCE_NORM])
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)], ids=str)
def test_layers_are_a_sequence(dims, norm, activation):
    """Norm and ReLU as one give what they give one after the other, forwards and backwards."""
    torch.manual_seed(0)
    parts = [CONV[dims](2, 4, 3, padding=1), norm[dims](4), activation, norm[dims](4), nn.Identity(), nn.ReLU()]
    chains, found = (Layers(*parts), nn.Sequential(*parts)), []
    x = torch.randn(3, 2, *[6] * dims).to(memory_format=channels_last(dims))
    for chain in chains:
        chain.zero_grad()
        image = x.clone().requires_grad_()
        out = chain(image)
        out.square().sum().backward()
        found.append([out.detach(), image.grad, *(p.grad for p in chain.parameters())])
    assert list(chains[0].state_dict()) == list(chains[1].state_dict())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_transposed_convolution(dims, last, half):
    """torch's, but that the gradient of the bias is summed in another order."""
    torch.manual_seed(0)
    plain = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    ours, theirs = UP[dims](6, 4, 2, stride=2), plain(6, 4, 2, stride=2)
    theirs.load_state_dict(ours.state_dict())
    kind = channels_last(dims) if last else torch.contiguous_format
    x, found = torch.randn(3, 6, *[5] * dims).to(memory_format=kind), []
    for layer in (ours, theirs):
        layer.to(memory_format=kind)
        image = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(image)
        (out.float() ** 3).sum().backward()
        found.append([out.detach(), image.grad, layer.weight.grad, layer.bias.grad])
    assert isinstance(ours, plain) and all(torch.equal(*pair) for pair in zip(*(f[:-1] for f in found), strict=True))
    torch.testing.assert_close(found[0][-1], found[1][-1], rtol=2e-2 if half else 1e-5, atol=1e-4)
    assert torch.equal(ours.requires_grad_(False)(x), theirs.requires_grad_(False)(x))
