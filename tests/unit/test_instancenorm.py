"""networks.instancenorm against torch's instance norm in float64."""

import pytest
import torch
from torch import nn

from networks import batchnorm
from networks.base import channels_last
from networks.instancenorm import InstanceNorm2d, InstanceNorm3d

OURS = {2: InstanceNorm2d, 3: InstanceNorm3d}
TORCH = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SHAPES = [(1, 3, 5, 7), (2, 4, 8, 8), (3, 1, 9, 4), (2, 600, 2, 3),
          (1, 2, 3, 5, 7), (4, 16, 8, 8, 8), (2, 3, 1, 5, 1), (2, 8, 16, 16, 8)]


def tensor(shape, seed=0, mean=1.0, sd=3.0, dtype=torch.float32):
    """Samples of different means, so that a statistic over the batch shows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sd + mean
    x = x + sd * torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1))
    return x.to(dtype).contiguous(memory_format=channels_last(len(shape) - 2))


def pair(shape, affine, dtype=torch.float64):
    """Our layer and torch's with the same random weights."""
    dims, channels = len(shape) - 2, shape[1]
    ours, theirs = OURS[dims](channels, affine=affine), TORCH[dims](channels, affine=affine).to(dtype)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def forward_backward(layer, x, grad):
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(grad)
    return {"output": out.detach(), "input": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def close(got, expected, tolerance):
    """Largest difference relative to the largest value."""
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"{float(error):.2e}"


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, affine):
    ours, theirs = pair(shape, affine)
    x, grad = tensor(shape), tensor(shape, seed=2, mean=0.5, sd=1.0)
    for training in (True, False):  # both use the statistics of the sample
        ours.train(training).zero_grad(), theirs.train(training).zero_grad()
        got = forward_backward(ours, x, grad)
        expected = forward_backward(theirs, x.double().contiguous(), grad.double().contiguous())
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            close(got[name], value, 1e-5)
        assert got["output"].stride() == x.stride(), "the layout is lost"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_off_by_rounding_only(shape):
    ours, theirs = pair(shape, affine=True)
    x, grad = tensor(shape, dtype=torch.bfloat16), tensor(shape, seed=2, mean=0.5, sd=1.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward_backward(ours, x, grad)
    expected = forward_backward(theirs, x.double().contiguous(), grad.double().contiguous())
    assert got["output"].dtype == got["input"].dtype == torch.bfloat16
    assert got["weight"].dtype == got["bias"].dtype == torch.float32
    for name, value in expected.items():
        close(got[name], value, 2.0**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 5, 6, 7)], ids=str)
def test_other_paths_are_torch(shape, dtype):
    ours, theirs = pair(shape, affine=True, dtype=dtype)
    x = tensor(shape, dtype=dtype).contiguous()
    got, expected = (forward_backward(layer.to(dtype), x, torch.ones_like(x)) for layer in (ours, theirs))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_state_is_that_of_torch(dims, affine):
    ours, theirs = OURS[dims](3, affine=affine), TORCH[dims](3, affine=affine)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(ours, TORCH[dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_single_voxel_is_refused(dims):
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        OURS[dims](3)(tensor((2, 3, *[1] * dims)))


def test_relu_in_place_after_it():
    shape = (2, 4, 6, 6, 6)
    ours, theirs = pair(shape, affine=True)
    x, grad = tensor(shape), tensor(shape, seed=2)
    got = forward_backward(nn.Sequential(ours, nn.ReLU(inplace=True)), x, grad)
    expected = forward_backward(nn.Sequential(theirs, nn.ReLU(inplace=True)), x.double(), grad.double())
    for name, value in expected.items():
        close(got[name], value, 1e-5)


def test_a_gradient_in_another_layout():
    shape = (2, 4, 6, 6, 6)
    ours, theirs = pair(shape, affine=True)
    x, grad = tensor(shape), tensor(shape, seed=2).contiguous()
    close(forward_backward(ours, x, grad)["input"], forward_backward(theirs, x.double(), grad.double())["input"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 6, 5), (1, 4, 6, 5, 3)], ids=str)
def test_without_kernels(monkeypatch, shape, dtype):
    """torch's own gradient of one 2D sample is wrong where it comes in channels_last and the sample does not."""
    if dtype == torch.float32:
        monkeypatch.setattr(batchnorm, "_compiled", lambda: None)
    ours, theirs = pair(shape, affine=True)
    x, grad = tensor(shape, dtype=dtype), tensor(shape, seed=2, dtype=dtype)
    got = forward_backward(ours.to(dtype), x, grad)
    assert got["output"].stride() == x.stride()
    for name, value in forward_backward(theirs, x.double().contiguous(), grad.double().contiguous()).items():
        close(got[name], value, 1e-5)
