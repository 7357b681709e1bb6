"""What every backbone owes, in 2D and 3D."""

import itertools

import pytest
import torch
from torch import nn

import networks
from networks.base import NetSpec, PatchError, channels_last, parameter_count

WIDTH, CHANNELS, CLASSES = 2, 2, 3
SIDE = 32


@pytest.fixture(params=itertools.product(networks.NAMES, (2, 3)), ids=lambda p: f"{p[0]}-{p[1]}D")
def kind(request):
    return request.param


def make(kind, **heads):
    torch.manual_seed(0)
    name, dims = kind
    return networks.Build(name, CLASSES, NetSpec(CHANNELS, patch(dims), WIDTH))(heads)


def patch(dims):
    return (2 * SIDE, SIDE, SIDE)[:dims]  # not a cube, so that swapped axes show


def image(net, batch=2):
    dims = net.backbone.spatial_dims
    x = torch.randn(batch, CHANNELS, *patch(dims), generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=channels_last(dims))


def layers(module):
    """Types of all layers in order, without their dimension."""
    return [type(m).__name__.replace("2d", "").replace("3d", "") for m in module.modules()]


def test_shapes(kind):
    net = make(kind)
    x = image(net)
    out, space = net(x), x.shape[2:]
    assert out.logits is out.heads["seg"] and out.logits.shape == (2, CLASSES, *space)
    assert out.logits.dtype == torch.float32
    assert out.features.decoder[0].shape[2:] == space
    for maps, channels in ((out.features.encoder, net.backbone.encoder_channels),
                           (out.features.decoder, net.backbone.decoder_channels)):
        assert [m.shape[1] for m in maps] == list(channels)
        sizes = [m.shape[2:].numel() for m in maps]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), "not fine to coarse"
    for features, strides in zip(out.features.encoder, net.backbone.encoder_strides, strict=True):
        assert tuple(features.shape[2:]) == tuple(side // s for side, s in zip(space, strides, strict=True))
    assert net.backbone.spatial_dims == kind[1] == len(space)


def test_every_parameter_gets_a_gradient(kind):
    net = make(kind)
    net(image(net)).logits.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_a_new_decoder_has_its_own_weights(kind):
    net = make(kind)
    first, second = net.backbone.decoder, net.backbone.new_decoder()
    assert [p.shape for p in first.parameters()] == [p.shape for p in second.parameters()]
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in second.parameters()}
    net.eval(), second.eval()
    skips = net.backbone.encode(image(net))
    mine, other = net.backbone.decode(skips), second(skips)
    assert [m.shape for m in mine] == [m.shape for m in other] and not torch.equal(mine[0], other[0])


def test_heads_come_out_at_input_size_in_float32(kind):
    levels = len(make(kind).backbone.decoder_channels)
    net = make(kind, seg=CLASSES, **{f"level{k}": (k + 1, k) for k in range(levels)})
    net.to(memory_format=channels_last(net.backbone.spatial_dims))
    x = image(net).to(memory_format=channels_last(net.backbone.spatial_dims))
    with torch.autocast("cpu", torch.bfloat16):
        heads = net(x).heads
    assert heads["seg"].shape == (2, CLASSES, *x.shape[2:])
    for level in range(levels):
        assert heads[f"level{level}"].shape == (2, level + 1, *x.shape[2:])
    assert {h.dtype for h in heads.values()} == {torch.float32}
    assert all(h.is_contiguous() for h in heads.values()), "losses sum over voxels of one class"


def test_a_patch_that_does_not_fit_is_refused_in_one_line(kind):
    net = make(kind)
    multiple = net.backbone.multiple
    assert len(multiple) == kind[1] and all(m >= 2 for m in multiple)
    with pytest.raises(PatchError) as error:
        net(torch.zeros(1, CHANNELS, *multiple[:-1], multiple[-1] + 1))
    message = str(error.value)
    assert str(list(multiple)) in message and str(multiple[-1] + 1) in message and "\n" not in message


def test_dropout_is_the_callers_choice(kind):
    """None is the network's own, () is none, rates are channel dropout after the decoder levels and nothing else."""
    name, dims = kind
    build = networks.Build(name, CLASSES, NetSpec(CHANNELS, patch(dims), WIDTH))

    def rates(dropout):
        found = [m for m in build(dropout=dropout).modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
        assert all(isinstance(m, nn.Dropout2d | nn.Dropout3d) for m in found) or dropout is None
        return sorted(m.p for m in found)

    levels = len(build().backbone.decoder_channels)
    assert rates(()) == []
    assert rates((0.1, 0.2, 0.3, 0.5)) == [0.1, 0.2, 0.3, 0.5][:levels]
    torch.manual_seed(0)
    net = build(dropout=(0.5,)).train()
    with torch.no_grad():
        maps = [net(image(net)).features.decoder for _ in range(8)]
    assert any((m[0].flatten(2) == 0).all(-1).any() for m in maps), "no channel of the finest level is ever dropped"


def test_eval_is_deterministic_and_dropout_is_not(kind):
    net = make(kind)
    x = image(net)
    dropouts = [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    with torch.no_grad():
        first, *others = [net(x).logits for _ in range(8)]  # few channels are often dropped alike
        assert all(torch.equal(first, other) for other in others) == (not dropouts)
        net.eval()
        assert torch.equal(net(x).logits, net(x).logits)
        logits = net(x).logits
        peak = max(1.0, logits.abs().max().item())
        torch.testing.assert_close(logits[1:], net(x[1:]).logits, atol=1e-5 * peak, rtol=0)


@pytest.mark.parametrize("name", networks.NAMES)
def test_2d_and_3d_are_one_structure(name):
    flat, solid = make((name, 2)), make((name, 3))
    assert layers(flat) == layers(solid)
    assert [k for k, _ in flat.named_parameters()] == [k for k, _ in solid.named_parameters()]
    assert flat.backbone.encoder_channels == solid.backbone.encoder_channels


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="nonet.*vnet"):
        networks.backbone("nonet", NetSpec(1, (16,) * 3, 2))


def test_vnet_is_the_published_one():
    """9,448,866 parameters: UA-MT's network with 2 classes."""
    with torch.device("meta"):
        assert parameter_count(networks.Build("vnet", 2, NetSpec(1, (112, 112, 80)))()) == 9_448_866


def test_coarse_heads_are_linear_upsampling():
    """A head's map on level 1 is that level's 1x1 convolution, twice the size."""
    net = make(("vnet", 2), aux=(1, 1)).eval()
    with torch.no_grad():
        out = net(image(net))
        small = net.heads["aux"].conv(out.features.decoder[1])
        expected = nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(out.heads["aux"], expected)
