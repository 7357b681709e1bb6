"""ENet against the release written out, its count of parameters, unpooling and dropout."""

from collections import Counter
from itertools import repeat

import pytest
import torch
from torch import nn
from torch.nn import functional as f

from networks import enet
from networks.base import NetSpec, SegNet, channels_last, parameter_count
from networks.blocks import CONVOLUTIONS

PATCHES = [(64, 32), (32, 16, 24)]
LAYERS = (*CONVOLUTIONS, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
CONV = {2: f.conv2d, 3: f.conv3d}
UP = {2: f.conv_transpose2d, 3: f.conv_transpose3d}
POOL = {2: f.max_pool2d, 3: f.max_pool3d}
UNPOOL = {2: f.max_unpool2d, 3: f.max_unpool3d}


def make(patch, width=4, channels=1, **spec):
    torch.manual_seed(0)
    return SegNet(enet.backbone(NetSpec(channels, patch, width, **spec)), {"seg": 3})


def image(patch, channels=1):
    return torch.randn(2, channels, *patch).to(memory_format=channels_last(len(patch)))


def trained(net):
    """The network in evaluation mode, with norms and slopes as of a trained one."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.bias)
        elif isinstance(layer, nn.PReLU):
            nn.init.uniform_(layer.weight, 0, 0.5)
    return net.eval()


class WrittenOut:
    """The network below its head by torch's functions, of layers in the order in which they were made."""

    def __init__(self, backbone):
        self.dims = backbone.spatial_dims
        self.layers = iter([layer for layer in backbone.modules() if isinstance(layer, LAYERS)])

    def conv(self, x, **how):
        return CONV[self.dims](x, next(self.layers).weight, **how)

    def transposed(self, x, **how):
        return UP[self.dims](x, next(self.layers).weight, **how)

    def norm(self, x):
        layer = next(self.layers)
        return f.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def prelu(self, x):
        return f.prelu(x, next(self.layers).weight)

    def path(self, x, steps, end):
        for step in steps:
            x = end(self.norm(step(x)))
        return x

    def regular(self, x, kind, end):
        steps = [lambda x: self.conv(x, padding=kind, dilation=kind)]
        if kind == "asymmetric":
            others = self.dims - 1
            steps = [lambda x: self.conv(x, padding=(2, *repeat(0, others))),
                     lambda x: self.conv(x, padding=(0, *repeat(2, others)))]
        return end(x + self.path(x, [self.conv, *steps, self.conv], end))

    def down(self, x):
        steps = [lambda x: self.conv(x, stride=2), lambda x: self.conv(x, padding=1), self.conv]
        found = self.path(x, steps, self.prelu)
        pooled, places = POOL[self.dims](x, 2, return_indices=True)
        zeros = torch.zeros_like(found[:, pooled.shape[1]:])
        return self.prelu(torch.cat([pooled, zeros], 1) + found), places

    def up(self, x, places):
        found = self.path(x, [self.conv, lambda x: self.transposed(x, stride=2), self.conv], f.relu)
        return f.relu(UNPOOL[self.dims](self.norm(self.conv(x)).contiguous(), places.contiguous(), 2) + found)

    def __call__(self, x):
        x = torch.cat([self.conv(x, stride=2, padding=1), POOL[self.dims](x, 3, 2, padding=1)], 1)
        x, first = self.down(self.prelu(self.norm(x)))
        for _ in range(4):
            x = self.regular(x, 1, self.prelu)
        x, second = self.down(x)
        for kind in (1, 2, "asymmetric", 4, 1, 8, "asymmetric", 16) * 2:
            x = self.regular(x, kind, self.prelu)
        x = self.up(x, second)
        x = self.regular(self.regular(x, 1, f.relu), 1, f.relu)
        x = self.regular(self.up(x, first), 1, f.relu)
        return self.transposed(x, stride=2, padding=1, output_padding=1)


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_it_is_the_release(patch):
    net = trained(make(patch)).backbone.double()
    x, reference = image(patch).double(), WrittenOut(net)
    with torch.no_grad():
        torch.testing.assert_close(net.decode(net.encode(x))[0], reference(x), atol=1e-10, rtol=0)
    assert next(reference.layers, None) is None


def test_as_many_parameters_as_released():
    """349,284 with one image channel and four classes, but for the last layer."""
    with torch.device("meta"):
        net = SegNet(enet.backbone(NetSpec(1, (256, 256))), {"seg": 4})
    ours, theirs = 16 * 16 * 9 + 16 * 4, 16 * 4 * 9
    assert parameter_count(net) - ours + theirs == 349_284
    assert net.backbone.encoder_channels == (16, 64, 128)
    assert net.heads["seg"].conv.bias is None


def test_kernels_in_3d():
    pair = [m.kernel_size for m in make(PATCHES[1]).backbone.stages[2][3].modules() if isinstance(m, nn.Conv3d)]
    assert pair == [(1, 1, 1), (5, 1, 1), (1, 5, 5), (1, 1, 1)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, "last"])
def test_unpooling_is_torchs_also_among_equals(dims, layout):
    torch.manual_seed(0)
    layout = channels_last(dims) if layout == "last" else layout
    skip = torch.randint(0, 3, (2, 3, *(8, 4, 6)[:dims])).float().to(memory_format=layout)
    x = torch.randn(2, 3, *(4, 2, 3)[:dims]).to(memory_format=layout).requires_grad_()
    weights = torch.randn_like(skip)
    places = POOL[dims](skip, 2, return_indices=True)[1]
    expected, got = UNPOOL[dims](x.contiguous(), places.contiguous(), 2), enet.unpool(x, skip)
    assert torch.equal(got, expected) and got.is_contiguous(memory_format=channels_last(dims))
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (got, expected)))


def test_unpooling_by_hand():
    skip = torch.tensor([[[[1.0, 2.0, 0.0, 0.0], [4.0, 3.0, 0.0, 5.0]]]])
    out = enet.unpool(torch.tensor([[[[7.0, 8.0]]]]), skip)
    assert out[0, 0].tolist() == [[0, 0, 0, 0], [7, 0, 0, 8]]


def test_a_decoder_unpools_by_the_features_that_it_gets():
    """Flipped features have their maxima elsewhere; larger ones have them in the same places."""
    net = trained(make((32, 16))).backbone
    with torch.no_grad():
        first, second, bottom = net.encode(image((32, 16)))
        maps, larger, other = (net.decode([skip, second, bottom]) for skip in (first, 2 * first, -first))
    assert torch.equal(maps[0], larger[0]) and torch.equal(maps[2], other[2])
    assert not torch.allclose(maps[1], other[1])


def test_its_own_dropout():
    net = make((64, 32)).backbone
    found = [m for m in net.modules() if isinstance(m, nn.Dropout2d) and m.p]
    assert Counter(m.p for m in found) == {0.01: 5, 0.1: 17 + 5}
    assert not any(m.p for m in make((64, 32), dropout=()).modules() if isinstance(m, nn.Dropout2d))


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_channels_dropped_at_a_level_are_missing_above(patch):
    net = make(patch, dropout=(0.0, 0.5)).backbone
    assert [layer.p for layer in net.decoder.dropout] == [0.0, 0.5, 0.0]
    net.decoder.dropout[1].p = 1.0
    assert [bool(m.any()) for m in net.decode(net.encode(image(patch)))] == [False, False, True]


@pytest.mark.parametrize(("channels", "first"), [(1, 4), (3, 4), (4, 5), (6, 7)])
def test_an_image_of_many_channels_leaves_one_to_the_convolution(channels, first):
    net = make((16, 16), channels=channels)
    assert net.backbone.encoder_channels[0] == net.backbone.decoder_channels[0] == first
    net(image((16, 16), channels)).logits.sum().backward()
    assert net.backbone.stages[0].conv.weight.grad.any()


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_half_precision_agrees(patch):
    """Also where dilated kernels are longer than the map."""
    net, x, outputs = make(patch, dropout=()).to(memory_format=channels_last(len(patch))), image(patch), []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs.append(net(x).logits)
    outputs[1].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert torch.cosine_similarity(*(out.detach().flatten() for out in outputs), dim=0) > 0.95
