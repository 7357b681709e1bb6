"""The generator: any patch, a known number of weights, overlapping cells; and statistics that stay."""

import copy
import math

import pytest
import torch
from torch import nn

from networks.blocks import BATCH_NORM, CONV
from networks.generator import Generator, statistics_kept


def generator(patch, **settings):
    torch.manual_seed(0)
    return Generator(**{"channels": 1, "patch": patch, "width": 2, "noise": 5} | settings)


@pytest.mark.parametrize(("patch", "grid"), [((256, 256), (16, 16)), ((112, 112, 80), (7, 7, 5)), ((96,) * 3, (6,) * 3),
                                             ((33, 16), (3, 1)), ((1, 17, 5), (1, 2, 1))])
def test_it_begins_with_a_16th_of_the_patch(patch, grid):
    made = generator(patch, width=1)
    assert made.grid == grid and made.first.out_features == 8 * math.prod(grid)


@pytest.mark.parametrize("patch", [(32, 32), (20, 33), (7, 40), (16, 16, 16), (20, 12, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_patch(patch, channels):
    images = generator(patch, channels=channels)(torch.randn(3, 5))
    assert images.shape == (3, channels, *patch) and images.dtype == torch.float32
    assert images.abs().max() < 1
    assert (images[0] - images[1]).abs().max() > 1e-3, "other noise, another image"
    assert images.flatten(2).std(2).min() > 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_number_of_weights(dims):
    """Width 2: 16, 8, 4 and 2 channels and one image channel; two weights per norm's channel, one bias at the end."""
    made = generator((32,) * dims)
    pairs = 16 * 8 + 8 * 4 + 4 * 2 + 2 * 1
    expected = 5 * 16 * 2**dims + 3**dims * pairs + 2 * (16 + 8 + 4 + 2) + 1
    assert sum(p.numel() for p in made.parameters()) == expected


def test_what_goes_beyond_the_patch_is_cut_off():
    noise, large, small = torch.randn(3, 5), generator((32, 48)), generator((20, 33))
    assert torch.equal(large(noise)[..., :20, :33], small(noise))


def test_cells_of_the_grid_overlap():
    """The last of 2 x 2 cells, at pixel (16, 16), changes: it reaches 15 pixels around it, so there are no seams."""
    made = generator((32, 32)).eval()
    seen = []
    made.first.register_forward_hook(lambda layer, noise, coarse: coarse + seen[0])
    images = []
    for change in (0, 1):
        step = torch.zeros(16, 2, 2)
        step[:, 1, 1] = 9 * change
        seen[:] = [step.flatten()]
        images.append(made(torch.ones(1, 5))[0, 0])
    moved = images[0] != images[1]
    assert moved[1].any() and moved[:, 1].any() and moved[31].any() and moved[:, 31].any()
    assert not moved[0].any() and not moved[:, 0].any()


def test_it_computes_in_float32_in_mixed_precision():
    noise, made = torch.randn(2, 5), generator((16, 16, 16))
    expected = made(noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(noise), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_all_its_weights_learn(dims):
    made = generator((32,) * dims)
    made(torch.randn(4, 5)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, "channels_last"])
def test_statistics_stay_and_gradients_are_the_usual_ones(dims, layout):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims] if layout == "channels_last" else layout
    torch.manual_seed(0)
    net = nn.Sequential(CONV[dims](1, 3, 3), BATCH_NORM[dims](3), nn.ReLU()).to(memory_format=layout)
    twin, image = copy.deepcopy(net), torch.randn(2, 1, *(6,) * dims)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with statistics_kept(net):
        out = net(image)
    for made in (out, twin(image)):
        made.square().sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert not torch.equal(twin[1].running_mean, before["1.running_mean"]) and twin[1].num_batches_tracked == 1
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_a_network_without_statistics_has_none_to_keep():
    net = nn.Linear(2, 3)
    with statistics_kept(net):
        assert net(torch.ones(1, 2)).shape == (1, 3)
