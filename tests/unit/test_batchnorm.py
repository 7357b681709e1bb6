"""networks.batchnorm against torch's batch norm in float64."""

import pytest
import torch
from torch import nn

from networks import batchnorm
from networks.base import channels_last
from networks.batchnorm import BatchNorm2d, BatchNorm3d, _is_channels_last, channel_sums

OURS = {2: BatchNorm2d, 3: BatchNorm3d}
TORCH = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = [(1, 3, 5, 7), (2, 4, 8, 8), (3, 1, 9, 4), (4, 16, 3, 3), (2, 600, 2, 3),
          (1, 2, 3, 5, 7), (2, 16, 8, 8, 8), (3, 3, 5, 4, 2), (4, 8, 1, 3, 1), (2, 32, 2, 2, 2)]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tensor(shape, seed=0, mean=1.0, sd=3.0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sd + mean
    return x.to(dtype).contiguous(memory_format=channels_last(len(shape) - 2))


def pair(shape, dtype=torch.float64):
    """Our layer and torch's with the same random weights."""
    dims, channels = len(shape) - 2, shape[1]
    ours, theirs = OURS[dims](channels), TORCH[dims](channels).to(dtype)
    torch.manual_seed(1)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def forward_backward(call, x, grad, layer=None):
    """What a call gives and the gradients of its input and of a layer's weights, by default of the call's own."""
    layer, x = layer or call, x.detach().requires_grad_()
    out = call(x)
    out.backward(grad)
    return {"output": out.detach(), "input": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def close(got, expected, tolerance):
    """Largest difference relative to the largest value."""
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < tolerance, f"{float(error):.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape):
    ours, theirs = pair(shape)
    x, grad = tensor(shape), tensor(shape, seed=2, mean=0.5, sd=1.0)
    assert _is_channels_last(x) or shape[1] == 1
    for _ in range(2):  # twice, for the running statistics
        ours.zero_grad(), theirs.zero_grad()
        got = forward_backward(ours, x, grad)
        expected = forward_backward(theirs, x.double().contiguous(), grad.double().contiguous())
    for name, value in expected.items():
        close(got[name], value, 1e-5)
    for name in STATISTICS:
        close(getattr(ours, name), getattr(theirs, name).double(), 1e-5)
    assert got["output"].stride() == x.stride()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_off_by_rounding_only(shape):
    ours, theirs = pair(shape)
    x = tensor(shape, dtype=torch.bfloat16)
    grad = tensor(shape, seed=2, mean=0.5, sd=1.0, dtype=torch.bfloat16)
    got = forward_backward(ours, x, grad)
    expected = forward_backward(theirs, x.double().contiguous(), grad.double().contiguous())
    assert got["output"].dtype == got["input"].dtype == torch.bfloat16
    assert got["weight"].dtype == got["bias"].dtype == torch.float32
    error = (got["output"].double() - expected["output"]).abs()
    assert (error <= 2.0**-8 * expected["output"].abs() + 1e-5).all()  # half a unit in the last of 8 bits
    close(got["input"], expected["input"], 2.0**-7)  # a sum of two rounded tensors
    for name in ("weight", "bias"):
        close(got[name], expected[name], 1e-5)
    for name in STATISTICS:
        close(getattr(ours, name), getattr(theirs, name).double(), 1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 5, 6, 7)], ids=str)
@pytest.mark.parametrize("training, last", [(True, False), (False, False), (False, True)])
def test_other_paths_are_torch(shape, training, last):
    ours, theirs = pair(shape, torch.float32)
    ours.train(training), theirs.train(training)
    x = tensor(shape) if last else tensor(shape).contiguous()
    got, expected = forward_backward(ours, x, torch.ones_like(x)), forward_backward(theirs, x, torch.ones_like(x))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in STATISTICS)


def test_variance_of_a_large_tensor():
    """Where torch's own kernel sums one long float32 chain per channel."""
    shape = (2, 8, 64, 64, 32)
    x = tensor(shape)
    exact = x.double().var(dim=(0, 2, 3, 4))
    errors = []
    for layer in (BatchNorm3d(8, momentum=1.0), nn.BatchNorm3d(8, momentum=1.0)):
        with torch.no_grad():
            layer(x)
        errors.append(float(((layer.running_var.double() - exact) / exact).abs().max()))
    assert errors[0] < 1e-6
    if torch.get_num_threads() == 1:  # torch's own error depends on the number of threads
        assert errors[0] < errors[1]


@pytest.mark.parametrize("dims", [2, 3])
def test_state_is_that_of_torch(dims):
    ours, theirs = OURS[dims](3), TORCH[dims](3)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and isinstance(ours, TORCH[dims])
    ours.load_state_dict(theirs.state_dict())


def test_relu_in_place_after_it():
    shape = (2, 4, 6, 6, 6)
    ours, theirs = pair(shape)
    x, grad = tensor(shape), tensor(shape, seed=2)
    results = []
    for layer, values in ((ours, (x, grad)), (theirs, (x.double().contiguous(), grad.double().contiguous()))):
        values = values[0].requires_grad_(), values[1]
        nn.Sequential(layer, nn.ReLU(inplace=True))(values[0]).backward(values[1])
        results.append((values[0].grad, layer.weight.grad, layer.bias.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-5)


def test_a_gradient_in_another_layout():
    shape = (2, 4, 6, 6, 6)
    ours, theirs = pair(shape)
    x, grad = tensor(shape), tensor(shape, seed=2).contiguous()
    got, expected = forward_backward(ours, x, grad), forward_backward(theirs, x.double().contiguous(), grad.double())
    close(got["input"], expected["input"], 1e-5)


def test_no_gradient_is_asked_for():
    layer = BatchNorm2d(4)
    with torch.no_grad():
        assert not layer(tensor((2, 4, 8, 8))).requires_grad
    assert layer.num_batches_tracked == 1


# --- the ReLU behind it, and where there are no kernels ---------------------------------------------------------------


ACTIVATIONS = [nn.ReLU(inplace=True), nn.LeakyReLU(0.01, inplace=True), nn.LeakyReLU(0.3)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 9, 4), (2, 4, 8, 8), (2, 16, 8, 8, 8), (3, 3, 5, 4, 2)], ids=str)
def test_an_activation_taken_along(shape, activation):
    ours, theirs = pair(shape)
    x, grad = tensor(shape), tensor(shape, seed=2)
    got = forward_backward(lambda x: ours(x, activation), x, grad, ours)
    expected = forward_backward(lambda x: activation(theirs(x)), x.double().contiguous(), grad.double(), theirs)
    assert (got["output"] < 0).any() == isinstance(activation, nn.LeakyReLU)
    for name, value in expected.items():
        close(got[name], value, 1e-5)
    for layer in (ours, theirs):
        layer.eval()
    close(ours(x, activation), activation(theirs(x.double())), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_matter(dtype):
    shape, results = (2, 8, 40, 64, 32), []
    x, grad = tensor(shape, dtype=dtype), tensor(shape, seed=2, dtype=dtype)
    threads = torch.get_num_threads()
    for count in (1, 3, 2):
        layer = BatchNorm3d(8)
        torch.set_num_threads(count)
        try:
            given = forward_backward(lambda x, layer=layer: layer(x, ACTIVATIONS[0]), x, grad, layer)
        finally:
            torch.set_num_threads(threads)
        results.append({**given, "mean": layer.running_mean, "variance": layer.running_var})
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_statistics_far_from_zero():
    """A sum of squares less a squared mean would leave nothing of the variance."""
    x = tensor((2, 8, 32, 32, 16), mean=3000.0, sd=0.5)
    layer = BatchNorm3d(8, momentum=1.0)
    with torch.no_grad():
        layer(x)
    exact = x.double().var(dim=(0, 2, 3, 4))
    assert ((layer.running_var.double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16, 4, 6, 8)], ids=str)
def test_without_kernels_it_is_exact_too(monkeypatch, shape, dtype):
    """float16 and float64 have none, and without numba there are none at all."""
    if dtype == torch.float32:
        monkeypatch.setattr(batchnorm, "_compiled", lambda: None)
    ours, theirs = pair(shape)
    x, grad = tensor(shape, dtype=dtype), tensor(shape, seed=2, dtype=dtype)
    ours.to(torch.promote_types(dtype, torch.float32))
    got = forward_backward(lambda x: ours(x, ACTIVATIONS[0]), x, grad, ours)
    expected = forward_backward(lambda x: ACTIVATIONS[0](theirs(x)), x.double(), grad.double(), theirs)
    assert got["output"].stride() == x.stride() and got["output"].dtype == dtype
    for name, value in expected.items():
        close(got[name], value, 2e-3 if dtype == torch.float16 else 1e-5)


def test_a_compiled_network_has_torchs_own(monkeypatch):
    """Inductor takes it apart itself, and could not look into the kernels."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    shape = (2, 4, 8, 8)
    ours, theirs = pair(shape, torch.float32)
    x = tensor(shape)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_channels(shape, dtype):
    for x in (tensor(shape, dtype=dtype), tensor(shape, dtype=dtype).contiguous()):
        close(channel_sums(x), x.double().sum((0, *range(2, x.ndim))), 1e-5)
