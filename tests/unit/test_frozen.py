"""Frozen copies predict what the networks predict, folded, rectified and in one call per convolution."""

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, channels_last
from networks.frozen import _Convolution, frozen

CPU = torch.device("cpu")


def trained(module):
    """The module with batch-norm statistics and weights as of a trained one, in evaluation mode."""
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            if layer.track_running_stats:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.normal_(layer.bias)
    return module.eval()


def network(name, dims, channels=1):
    side = 32 if name in ("swin_unetr", "unet") else 16
    torch.manual_seed(0)
    spec = NetSpec(channels, (side,) * dims, 8, (1.0,) * dims)
    return trained(networks.Build(name, 3, spec)()), torch.randn(2, channels, *spec.patch)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", networks.NAMES)
def test_a_frozen_network_predicts_the_same(name, dims):
    net, image = network(name, dims)
    with torch.inference_mode():
        expected, found = net(image).logits, frozen(net, dims, CPU)(image).logits
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_vnet_is_nothing_but_calls_of_onednn(channels):
    """Convolutions with batch norm and ReLU become one call each; maps stay in channels_last from the first one on."""
    net, image = network("vnet", 3, channels)
    made = frozen(net, 3, CPU)
    kinds = {type(m) for m in made.modules() if not list(m.children()) and m is not made.branches}
    assert kinds == {_Convolution, nn.Identity, nn.Dropout3d}
    rectified = [m for m in made.modules() if isinstance(m, _Convolution) and m.activation == "relu"]
    assert len(rectified) == sum(isinstance(m, nn.ReLU) for m in net.modules())
    with torch.inference_mode():
        maps = made(image).features
    assert all(m.is_contiguous(memory_format=channels_last(3)) for m in (*maps.encoder, *maps.decoder))


def test_the_original_is_left_alone():
    net, image = network("vnet", 3)
    net.train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with torch.inference_mode():
        frozen(net, 3, CPU)(image)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_in_bfloat16_the_error_is_that_of_the_type():
    net, image = network("vnet", 3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, found = net.float()(image).logits, frozen(net, 3, CPU, torch.bfloat16)(image).logits
    with torch.inference_mode():
        exact = net(image).logits
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).abs().max() / exact.std() < 2 * (expected - exact).abs().max() / exact.std()


class Backwards(nn.Module):
    """Its layers are not called in the order in which they stand."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv3d(2, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.conv(self.relu(x))


def batch_norm(**options):
    return nn.BatchNorm3d(4, **options)


@pytest.mark.parametrize("chain", [
    nn.Sequential(nn.Conv3d(2, 4, 3, stride=2, bias=False), batch_norm(), nn.ReLU()),
    nn.Sequential(nn.Conv3d(2, 4, 3, padding=2, dilation=2, groups=2), batch_norm(affine=False), nn.ReLU()),
    nn.Sequential(nn.ConvTranspose3d(2, 4, 3, stride=2, output_padding=1), batch_norm(), nn.LeakyReLU()),
    nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), batch_norm()),
    nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), batch_norm(), nn.ReLU()),
    nn.Sequential(nn.Conv3d(2, 4, 3, padding="same"), batch_norm(), nn.ReLU()),
    nn.Sequential(nn.Conv3d(2, 4, 3), batch_norm(track_running_stats=False), nn.ReLU()),
    nn.Sequential(nn.Conv3d(2, 4, 3), nn.Dropout3d(0.5), batch_norm(), nn.Sequential(nn.ReLU(), nn.Conv3d(4, 4, 1))),
    Backwards(),
], ids=range(9))
def test_layers_in_any_order(chain):
    """Only what follows each other in a chain is joined: a ReLU before batch norm, or in no order, stays."""
    chain, x = trained(chain), torch.randn(2, 2, 9, 8, 7)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(chain, 3, CPU)(x), chain(x), rtol=1e-4, atol=1e-5)
