"""Swin-Unet against the release written out, its count of parameters, windows, padding and stochastic depth."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as f

from networks import swin_unet
from networks.base import NetSpec, SegNet, channels_last, parameter_count
from networks.swin_unet import StochasticDepth, window_side

PATCHES = [(112, 32), (48, 32, 16)]  # maps of 7 and 3, which are odd
WINDOWS = {(112, 32): [(7, 8), (7, 4), (7, 2), (4, 1)], (48, 32, 16): [(6, 8, 4), (6, 4, 2), (3, 2, 1), (2, 1, 1)]}


def make(patch, width=1, channels=2, **spec):
    torch.manual_seed(0)
    return SegNet(swin_unet.backbone(NetSpec(channels, patch, width, **spec)), {"seg": 3})


def image(patch, batch=2):
    return torch.randn(batch, 2, *patch).to(memory_format=channels_last(len(patch)))


def attended(layer, x, window, shifted):
    """Attention of all tokens (B, *space, C) of which those see each other that share a window and were neighbors."""
    space, heads = x.shape[1:-1], layer.num_heads
    shift = [size // 2 if shifted and side > size else 0 for side, size in zip(space, window, strict=True)]
    seen, place = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.long)
    at = torch.cartesian_prod(*map(torch.arange, space)).view(-1, len(space))
    for axis, (side, size, step) in enumerate(zip(space, window, shift, strict=True)):
        moved, wrapped = (at[:, axis] - step) % side, at[:, axis] < step
        seen = seen & (moved[:, None] // size == moved // size) & (wrapped[:, None] == wrapped)
        place = place * (2 * size - 1) + (moved[:, None] - moved + size - 1).clamp(0, 2 * size - 2)
    query, key, value = layer.qkv(x).flatten(1, -2).unflatten(-1, (3, heads, -1)).unbind(2)
    scores = torch.einsum("bnhc,bmhc->bhnm", query, key) / math.sqrt(query.shape[-1])
    scores = scores + layer.relative_position_bias_table[place].movedim(-1, 0)
    mixed = torch.einsum("bhnm,bmhc->bnhc", scores.masked_fill(~seen, -math.inf).softmax(-1), value)
    return layer.proj(mixed.flatten(2)).view_as(x)


def attention(layer, x, window):
    assert len(layer.blocks) == 2
    for block, shifted in zip(layer.blocks, (False, True), strict=True):
        x = x + attended(block.attn, block.norm1(x), window, shifted)
        x = x + block.mlp.linear2(f.gelu(block.mlp.linear1(block.norm2(x))))
    return x


def merged(layer, x):
    """Corners of 2x2 tokens side by side, the first axis fastest in 2D and slowest in 3D, as MONAI has it."""
    dims = x.ndim - 2
    x = f.pad(x, (0, 0, *(side % 2 for side in x.shape[-2:0:-1] for side in (0, side))))
    corners = [tuple(int(bit) for bit in f"{n:0{dims}b}") for n in range(2**dims)]
    corners = [corner[::-1] for corner in corners] if dims == 2 else corners
    parts = [x[:, *(slice(start, None, 2) for start in corner)] for corner in corners]
    return layer.reduction(layer.norm(torch.cat(parts, -1)))


def expanded(layer, x, factor, space):
    """Tokens to factor**dims tokens each, cut to a size."""
    dims = x.ndim - 2
    values = layer.linear(x)
    channels = values.shape[-1] // factor**dims
    out = values.new_empty(len(x), *(side * factor for side in x.shape[1:-1]), channels)
    for index in range(factor**dims):
        starts = [index // factor**(dims - 1 - axis) % factor for axis in range(dims)]
        part = values[..., index * channels:(index + 1) * channels]
        out[:, *(slice(start, None, factor) for start in starts)] = part
    return layer.norm(out[:, *(slice(side) for side in space)])


def written_out(net, x, windows):
    conv, norm = net.stages[0]
    skips = [norm[0](conv(x).movedim(1, -1))]
    for stage, window in zip(net.stages[1:3], windows, strict=False):
        skips.append(merged(stage[1], attention(stage[0], skips[-1], window)))
    last = net.stages[3]
    x = merged(last[1], attention(last[0], skips[-1], windows[2]))
    x = last[3](attention(last[2], x, windows[3]))
    for stage, skip, window in zip(net.decoder.stages, reversed(skips), reversed(windows[:3]), strict=False):
        x = torch.cat([expanded(stage.expand, x, 2, skip.shape[1:-1]), skip], -1)
        x = attention(stage.attention, stage.merge(x), window)
    norm, expand = net.decoder.stages[3]
    return expanded(expand, norm(x), 4, [4 * side for side in x.shape[1:-1]]).movedim(-1, 1)


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_it_is_the_release(patch):
    net = make(patch).backbone.double().eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = image(patch, batch=1).double()
    with torch.no_grad():
        expected = written_out(net, x, WINDOWS[patch])
        torch.testing.assert_close(net.decode(net.encode(x))[0], expected, atol=1e-9, rtol=0)


def test_as_many_parameters_as_released():
    """27,165,348 with one image channel and four classes, in windows of 7 everywhere."""
    with torch.device("meta"):
        net = SegNet(swin_unet.backbone(NetSpec(1, (224, 224))), {"seg": 4})
    assert parameter_count(net) == 27_165_348
    tables = [m.relative_position_bias_table for m in net.modules() if hasattr(m, "relative_position_bias_table")]
    assert {len(table) for table in tables} == {13 * 13}
    assert net.backbone.encoder_channels == (96, 192, 384, 768) and net.heads["seg"].conv.bias is None


def test_windows():
    expected = {1: 1, 3: 3, 7: 7, 8: 8, 10: 5, 12: 6, 14: 7, 16: 8, 20: 5, 24: 6, 28: 7, 32: 8, 40: 8, 44: 5, 56: 7,
                64: 8, 13: 7, 17: 6}
    assert {side: window_side(side) for side in expected} == expected


@pytest.mark.parametrize("patch", [(16, 16), (16, 48, 32)], ids=len)
def test_any_multiple_of_16_will_do(patch):
    """Also a map of one token, and one image."""
    net = make(patch)
    out = net(image(patch, batch=1))
    rounded_up = [[-(-side // (4 * 2**level)) for side in patch] for level in range(4)]
    assert [list(m.shape[2:]) for m in out.features.encoder] == rounded_up
    assert out.logits.shape[2:] == patch
    out.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_larger_image_will_do():
    net = make((32, 32)).eval()
    assert net(image((64, 48))).logits.shape[2:] == (64, 48)


def test_what_comes_out_is_in_channels_last():
    out = make((32, 32, 32))(image((32, 32, 32))).features
    assert all(m.is_contiguous(memory_format=torch.channels_last_3d) for m in (*out.encoder, *out.decoder))


def test_stochastic_depth_rises_linearly_and_mirrors():
    net = make((32, 32)).backbone
    rates = [[m.p for m in part.modules() if isinstance(m, StochasticDepth)] for part in (net.stages, net.decoder)]
    steps = [0.2 * n / 7 for n in range(8)]
    assert rates[0] == pytest.approx(steps) and rates[1] == pytest.approx([*steps[4:6], *steps[2:4], *steps[:2]])
    for module in (make((32, 32), dropout=()), make((32, 32), dropout=(0.5,))):
        assert not any(m.p for m in module.modules() if isinstance(m, StochasticDepth))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.2), torch.rand(10_000, 2, 3) + 1
    factors = (layer(x) / x).flatten(1)
    kept = factors[:, 0] > 0
    assert torch.allclose(factors, kept[:, None] * torch.tensor(1.25)) and 0.78 < kept.float().mean() < 0.82
    assert layer.eval()(x) is x and StochasticDepth(0.0)(x) is x


def test_linear_layers_begin_small():
    net = make((32, 32), width=4).backbone
    for module in (net, net.new_decoder()):
        layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
        assert all(0.019 < m.weight.std() < 0.021 for m in layers if m.weight.numel() > 5000)
        assert not any(m.bias.any() for m in layers if m.bias is not None)


@pytest.mark.parametrize("patch", [(32, 32), (32, 32, 32)], ids=len)
def test_channels_dropped_at_a_level_are_missing_above(patch):
    net = make(patch, dropout=(0.0, 0.0, 0.5)).backbone
    assert [layer.p for layer in net.decoder.dropout] == [0.0, 0.0, 0.5, 0.0]
    net.decoder.dropout[2].p = 1.0
    assert [bool(m.any()) for m in net.decode(net.encode(image(patch)))] == [True, True, False, True]
