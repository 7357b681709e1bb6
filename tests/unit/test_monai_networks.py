"""The backbones made of MONAI's blocks against MONAI's own networks, and what is theirs alone."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import networks
from networks import borrowed
from networks.base import NetSpec, PatchError, channels_last, parameter_count

CHANNELS, CLASSES, WIDTH = 2, 3, 4
NAMES = ("attention_unet", "segresnet", "swin_unetr", "unetr")
PATCHES = {"attention_unet": (48, 16, 32), "segresnet": (24, 16, 32), "swin_unetr": (32, 64, 32), "unetr": (48, 16, 32)}
NEEDS_EINOPS = ("swin_unetr", "unetr")  # MONAI's networks do, ours do not


def make(name, dims, width=WIDTH, patch=None):
    torch.manual_seed(0)
    return networks.Build(name, CLASSES, NetSpec(CHANNELS, patch or PATCHES[name][:dims], width))()


def image(patch, batch=2):
    x = torch.randn(batch, CHANNELS, *patch, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=channels_last(len(patch)))


def monai(name, dims):
    """MONAI's network, with random norms and statistics."""
    from monai.networks import nets

    common = {"spatial_dims": dims, "in_channels": CHANNELS, "out_channels": CLASSES}
    net = {
        "attention_unet": lambda: nets.AttentionUnet(
            **common, channels=[WIDTH * 2**n for n in range(5)], strides=[2] * 4),
        "segresnet": lambda: nets.SegResNet(
            **common, init_filters=WIDTH, norm=("group", {"num_groups": math.gcd(WIDTH, 8)})),
        "swin_unetr": lambda: nets.SwinUNETR(**common, feature_size=12),
        "unetr": lambda: nets.UNETR(**common, img_size=PATCHES[name][:dims], feature_size=WIDTH,
                                    hidden_size=24 * WIDTH, mlp_dim=96 * WIDTH, num_heads=6),
    }[name]()  # fmt: skip
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for key, buffer in net.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2) if "var" in key else buffer.normal_()
    return net


def attention_unet(net, theirs):
    first, layer, head = theirs.model
    yield net.backbone.stages[0], first
    for ours, stage in zip(net.backbone.stages[1:], reversed(net.backbone.decoder.stages), strict=True):
        yield from ((stage.up, layer.upconv), (stage.gate, layer.attention), (stage.merge, layer.merge))
        block, layer = layer.submodule if isinstance(layer.submodule, nn.Sequential) else (layer.submodule, None)
        yield ours, block
    yield net.heads["seg"].conv, head.conv


def segresnet(net, theirs):
    (first, *blocks), *stages = net.backbone.stages
    yield first, theirs.convInit
    yield nn.ModuleList(blocks), nn.ModuleList(theirs.down_layers[0][1:])
    yield from zip(stages, theirs.down_layers[1:], strict=True)
    for stage, up, (block,) in zip(net.backbone.decoder.stages, theirs.up_samples, theirs.up_layers, strict=True):
        yield from ((stage.up, up), (stage.block, block))
    yield from ((stage.end[0], theirs.conv_final[0]), (net.heads["seg"].conv, theirs.conv_final[2].conv))


def swin_unetr(net, theirs):
    ours, swin = net.backbone, theirs.swinViT
    yield ours.embed, swin.patch_embed.proj
    yield from zip(ours.layers, (*swin.layers1, *swin.layers2, *swin.layers3, *swin.layers4), strict=True)
    yield from zip(ours.skips, (theirs.encoder1, theirs.encoder2, theirs.encoder3, theirs.encoder4, nn.Identity(),
                                theirs.encoder10), strict=True)
    yield from zip(ours.decoder.stages, (getattr(theirs, f"decoder{n}") for n in (5, 4, 3, 2, 1)), strict=True)
    yield net.heads["seg"].conv, theirs.out.conv.conv


def unetr(net, theirs):
    ours, embedding = net.backbone, theirs.vit.patch_embedding
    positions = embedding.position_embeddings.detach().transpose(1, 2)
    ours.positions.data = positions.reshape(ours.positions.shape)
    yield from ((ours.embed, embedding.patch_embeddings), (ours.norm, theirs.vit.norm))
    for layer, block in zip(ours.layers, theirs.vit.blocks, strict=True):
        yield from ((layer.norm1, block.norm1), (layer.norm2, block.norm2), (layer.qkv, block.attn.qkv),
                    (layer.out, block.attn.out_proj), (layer.mlp[0], block.mlp.linear1),
                    (layer.mlp[2], block.mlp.linear2))
    yield from zip(ours.skips, (getattr(theirs, f"encoder{n}") for n in (1, 2, 3, 4)), strict=True)
    yield from zip(ours.decoder.stages, (getattr(theirs, f"decoder{n}") for n in (5, 4, 3, 2)), strict=True)
    yield net.heads["seg"].conv, theirs.out.conv.conv


@pytest.fixture(params=[(name, dims) for name in NAMES for dims in (2, 3)], ids=lambda p: f"{p[0]}-{p[1]}D")
def twins(request, monkeypatch):
    """Our network and MONAI's with the same weights."""
    name, dims = request.param
    if name in NEEDS_EINOPS:
        pytest.importorskip("einops", reason="MONAI's network needs einops")
    monkeypatch.setattr("networks.unetr.LAYERS", 12)  # MONAI's UNETR has no other depth
    ours, theirs = make(name, dims), monai(name, dims)
    for mine, other in globals()[name](ours, theirs):
        mine.load_state_dict(other.state_dict())
    return ours, theirs, PATCHES[name][:dims]


def test_same_output_and_gradient_as_monai(twins):
    """In float64, as norms over the few voxels of the coarsest map amplify rounding."""
    ours, theirs, patch = twins
    ours.double().to(memory_format=channels_last(len(patch))), theirs.double()
    x = image(patch, batch=1).double().requires_grad_()
    batch_norms = any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in theirs.modules())
    for training in (True, False) if batch_norms else (False,):
        ours.train(training), theirs.train(training)
        features = ours.backbone.decode(ours.encode(x))
        got, expected = ours.heads["seg"].conv(features[0]), theirs(x)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
        mine, other = (torch.autograd.grad(out.square().mean(), x)[0] for out in (got, expected))
        torch.testing.assert_close(mine, other, atol=1e-9 * float(other.abs().max()), rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, expected.float(), atol=1e-5, rtol=0)


def test_as_many_parameters_as_monai(twins):
    ours, theirs, _ = twins
    unused = sum(p.numel() for key, p in theirs.named_parameters() if "norm_cross_attn" in key)
    assert parameter_count(ours) == parameter_count(theirs) - unused


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_gradients_are_finite(name, dims):
    patch = (96, 32, 32)[:dims]  # torch 2.13's weight gradients are random where the first axis of a map is 2 long
    net = make(name, dims, patch=patch).to(memory_format=channels_last(dims))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(image(patch))
    out.logits.square().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_below_the_multiple_is_refused(name, dims):
    with pytest.raises(PatchError, match=r"patch \[4, 4"):
        make(name, dims, patch=(4,) * dims)


@pytest.mark.parametrize("name", NAMES)
def test_no_norm_is_torchs_own(name):
    """Its CPU kernels are inexact in channels_last or leave it."""
    assert not {type(layer) for layer in make(name, 3).modules()} & set(borrowed.EXACT)


def test_group_norm_is_exact_in_channels_last():
    torch.manual_seed(0)
    layer, x = borrowed.GroupNorm(2, 8), torch.randn(1, 8, 64, 64, 32)
    assert close(layer, x) < 2e-6 < 2e-5 < close(nn.GroupNorm(2, 8), x)
    last = x.to(memory_format=torch.channels_last_3d)
    assert layer(last).stride() == last.stride() and layer(x).stride() == x.stride()


def close(layer, x):
    """Largest error of a norm in channels_last."""
    expected = layer.double()(x.double())
    return float((layer.float()(x.to(memory_format=torch.channels_last_3d)) - expected).detach().abs().max())


def test_attention_unet_takes_twice_the_channels_per_level():
    assert make("attention_unet", 3, 16).backbone.encoder_channels == (16, 32, 64, 128, 256)


@pytest.mark.parametrize(("width", "groups"), [(2, 2), (12, 4), (16, 8)])
def test_segresnet_groups_divide_the_width(width, groups):
    norms = [m for m in make("segresnet", 3, width).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {groups}


@pytest.mark.parametrize(("width", "channels"), [(2, 12), (8, 24), (16, 48), (20, 60)])
def test_swin_unetr_channels_are_multiples_of_12(width, channels):
    with torch.device("meta"):
        assert make("swin_unetr", 3, width).backbone.decoder_channels[0] == channels


def test_swin_unetr_is_the_published_one_at_width_16():
    """62,186,708 parameters: MONAI's `SwinUNETR(feature_size=48)` with one channel and two classes."""
    with torch.device("meta"):
        assert parameter_count(networks.Build("swin_unetr", 2, NetSpec(1, (96,) * 3))()) == 62_186_708


@pytest.mark.parametrize("dims", [2, 3])
def test_swin_unetr_learns_from_the_smallest_patch(dims):
    """Its coarsest map is a single voxel, which torch's instance norm refuses."""
    net = make("swin_unetr", dims, 2, (32,) * dims)
    net(image((32,) * dims, batch=1)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_unetr_at_width_16():
    with torch.device("meta"):
        net = make("unetr", 3, 16, (96,) * 3).backbone
    assert len(net.layers) == 8 and net.layers[0].qkv.weight.shape == (3 * 384, 384)
    assert net.layers[0].mlp[0].out_features == 1536 and net.positions.shape == (1, 384, 6, 6, 6)


def test_unetr_interpolates_positions_for_another_size():
    net = make("unetr", 2, patch=(32, 16)).eval()
    assert net(image((64, 16))).logits.shape == (2, CLASSES, 64, 16)
    net.backbone.positions.data = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1).expand_as(net.backbone.positions).clone()
    wide = net.backbone.positions_on(torch.Size([4, 1]))
    torch.testing.assert_close(wide[0, 5, :, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
    assert net.backbone.positions_on(torch.Size([2, 1])) is net.backbone.positions


def test_unetr_reads_the_layers_3_5_and_7():
    """A skip does not depend on the layers after its own."""
    net = make("unetr", 2).backbone.eval()
    x = image(PATCHES["unetr"][:2])
    with torch.no_grad():
        before = net.encode(x)
        for last, changed in ((7, [4]), (6, [3, 4]), (5, [3, 4]), (4, [2, 3, 4]), (2, [1, 2, 3, 4])):
            weight = net.layers[last].out.weight
            weight += 1
            after = net.encode(x)
            weight -= 1
            assert [n for n, pair in enumerate(zip(before, after, strict=True)) if not torch.allclose(*pair)] == changed


def test_monai_is_imported_only_for_its_networks():
    code = ("import sys, networks, networks.base; from networks.base import NetSpec;"
            "networks.backbone('vnet', NetSpec(1, (16, 16), 2)); sys.exit('monai' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
