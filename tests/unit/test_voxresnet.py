"""VoxResNet against the release written out, its count of parameters, its ways up and what it refuses."""

import pytest
import torch
from torch.nn import functional as f

from networks import voxresnet
from networks.base import NetSpec, PatchError, SegNet, channels_last, parameter_count

PATCHES = [(16, 32), (16, 32, 24)]


def make(patch, width=1, channels=2, **spec):
    torch.manual_seed(0)
    return SegNet(voxresnet.backbone(NetSpec(channels, patch, width, **spec)), {"seg": 3})


def image(patch, batch=2):
    return torch.randn(batch, 2, *patch).to(memory_format=channels_last(len(patch)))


def written_out(weights, x):
    """The map below the head, by torch's functions; `weights` in the order in which layers are used."""
    dims = x.ndim - 2
    conv, pool = (f.conv2d, f.max_pool2d) if dims == 2 else (f.conv3d, f.max_pool3d)

    def block(x):
        for _ in range(2):
            x = conv(f.relu(f.instance_norm(x)), next(weights), padding=1)
        return x

    def up(x):
        return f.interpolate(x, scale_factor=2, mode="bilinear" if dims == 2 else "trilinear", align_corners=True)

    first = pool(conv(x, next(weights), next(weights), padding=1), 2)
    x = first + block(first)
    second = pool(x + block(x), 2)
    x = second + block(second)
    x = pool(x + block(x), 2)
    for _ in range(2):
        x = x + block(x)
    for skip in (second, first):
        x = block(torch.cat([skip, up(x)], 1))
    return up(x)


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_it_is_the_release(patch):
    net = make(patch).double()
    x = image(patch).double()
    maps = net.backbone.decode(net.backbone.encode(x))
    torch.testing.assert_close(maps[0], written_out(iter(net.backbone.parameters()), x), atol=1e-10, rtol=0)


def test_as_many_parameters_as_released():
    with torch.device("meta"):
        net = SegNet(voxresnet.backbone(NetSpec(1, (112, 112, 80))), {"seg": 2})
    assert parameter_count(net) == 1_992_578 and net.backbone.encoder_channels == (64, 64, 64)


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_features_begin_at_half_size_and_the_decoders_at_full_size(patch):
    net = make(patch).backbone
    skips = net.encode(image(patch))
    for maps, divisors in ((skips, (2, 4, 8)), (net.decode(skips), (1, 2, 4))):
        assert [tuple(m.shape[2:]) for m in maps] == [tuple(side // d for side in patch) for d in divisors]


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_channels_dropped_at_a_level_are_missing_above(patch):
    net = make(patch, dropout=(0.0, 0.5)).backbone
    assert [layer.p for layer in net.decoder.dropout] == [0.0, 0.5, 0.0]
    net.decoder.dropout[1].p = 1.0
    assert [bool(m.any()) for m in net.decode(net.encode(image(patch)))] == [False, False, True]


@pytest.mark.parametrize("patch", PATCHES, ids=len)
def test_ways_up(patch):
    net = make(patch).backbone
    skips = net.encode(image(patch))
    decoders = {way: net.new_decoder(way) for way in net.upsamplings}
    shapes = {way: [m.shape for m in decoder(skips)] for way, decoder in decoders.items()}
    assert list(shapes) == ["linear", "transposed", "nearest"] and len(set(map(str, shapes.values()))) == 1
    count = {way: parameter_count(decoder) for way, decoder in decoders.items()}
    assert count["linear"] == count["nearest"] == count["transposed"] - 3 * (4 * 4 * 2**len(patch) + 4)
    made = make(patch, upsampling="nearest").backbone
    for decoder in (made.decoder, made.new_decoder()):
        top = decoder(skips)[:2]
        torch.testing.assert_close(top[0], f.interpolate(top[1], scale_factor=2))
    with pytest.raises(KeyError):
        net.new_decoder("cubic")


def test_linear_upsampling_keeps_the_corners():
    up = voxresnet.double(2, 1, "linear")
    assert torch.allclose(up(torch.tensor([[[[0.0, 3.0]]]]))[0, 0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))


@pytest.mark.parametrize("patch", [(8, 8), (8, 8, 8)], ids=len)
def test_a_single_voxel_at_the_bottom_is_refused_in_one_line(patch):
    with pytest.raises(PatchError, match="patch .*VoxResNet needs a side of at least 16") as error:
        make(patch)
    assert "\n" not in str(error.value)
    make((16, *patch[1:]))(image((16, *patch[1:]), batch=1)).logits.sum().backward()
