"""The rules by which an nnU-Net follows from patch and spacing, on cases worked out by hand."""

import pytest
import torch

from networks import backbone
from networks.base import NetSpec, PatchError
from networks.nnunet import plan

ALL, FLAT = (2, 2, 2), (1, 2, 2)


def sides(patch, strides):
    """Voxels per axis on the coarsest level."""
    for stride in strides:
        assert all(side % step == 0 for side, step in zip(patch, stride, strict=True)), "padding would be needed"
        patch = tuple(side // step for side, step in zip(patch, stride, strict=True))
    return patch


@pytest.mark.parametrize(("patch", "spacing", "strides", "thin", "coarsest"), [
    ((112, 112, 80), None, [ALL] * 4, 0, (7, 7, 5)),
    ((112, 112, 80), (0.625,) * 3, [ALL] * 4, 0, (7, 7, 5)),
    ((96, 96, 96), None, [ALL] * 4, 0, (6, 6, 6)),
    ((64, 64, 32), None, [*[ALL] * 3, (2, 2, 1)], 0, (4, 4, 4)),  # the short axis stops at 4
    ((64, 32, 32), None, [ALL] * 3, 0, (8, 4, 4)),  # one axis alone is not halved from 8
    ((96, 32, 32), None, [*[ALL] * 3, (2, 1, 1)], 0, (6, 4, 4)),  # but from 12
    ((16, 16, 16), None, [ALL] * 2, 0, (4, 4, 4)),
    ((100, 64, 64), None, [ALL, ALL, FLAT, FLAT], 0, (25, 4, 4)),  # no odd side is halved
    ((256, 256), None, [(2, 2)] * 6, 0, (4, 4)),
    ((64, 32), None, [(2, 2)] * 3, 0, (8, 4)),
    ((256, 256), (3.0, 1.0), [(1, 2), *[(2, 2)] * 5], 1, (8, 4)),
    # thin slices: nothing happens across them until the spacing in the plane has come within a factor of 2
    ((16, 128, 128), (10.0, 1.0, 1.0), [FLAT, FLAT, FLAT, ALL, ALL], 3, (4, 4, 4)),
    ((32, 64, 64), (3.0, 1.0, 1.0), [FLAT, ALL, ALL, ALL], 1, (4, 4, 4)),
    ((32, 64, 64), (2.0, 1.0, 1.0), [FLAT, ALL, ALL, ALL], 1, (4, 4, 4)),  # twice is not within
    ((32, 64, 64), (1.99, 1.0, 1.0), [ALL, ALL, ALL, FLAT], 0, (4, 4, 4)),
    # the plan that SSL4MIS fixed
    ((16, 256, 256), (4.0, 1.0, 1.0), [FLAT, FLAT, ALL, ALL, FLAT, FLAT], 2, (4, 4, 4)),
], ids=str)
def test_strides_and_kernels(patch, spacing, strides, thin, coarsest):
    """`thin` levels have a kernel of 1 along the first axis."""
    made = plan(patch, spacing, 16)
    assert list(made.strides) == strides and sides(patch, made.strides) == coarsest
    rest = (3,) * (len(patch) - 1)
    assert list(made.kernels) == [(1, *rest)] * thin + [(3, *rest)] * (len(strides) + 1 - thin)


def test_an_axis_that_stays_thin_has_kernel_3_at_the_bottom_only():
    made = plan((8, 32, 32), (100.0, 1.0, 1.0), 16)
    assert made.strides == (FLAT,) * 3
    assert made.kernels == ((1, 3, 3),) * 3 + ((3, 3, 3),)


def test_channels_double_up_to_twenty_widths():
    assert plan((256, 256), None, 16).channels == (16, 32, 64, 128, 256, 320, 320)
    assert plan((112, 112, 80), None, 32).channels == (32, 64, 128, 256, 512)
    assert plan((256, 256), None, 2).channels == (2, 4, 8, 16, 32, 40, 40)


@pytest.mark.parametrize("patch", [(7, 7, 7), (8, 4, 4), (15, 65), (6, 6)], ids=str)
def test_a_patch_with_nothing_to_halve_is_refused_in_one_line(patch):
    with pytest.raises(PatchError, match="patch .*NNUNet") as error:
        backbone("nnunet", NetSpec(1, patch))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("patch", "spacing", "multiple", "strides"), [
    ((32, 64, 64), (3.0, 1.0, 1.0), (8, 16, 16), ((1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16))),
    ((64, 32), None, (8, 8), ((1, 1), (2, 2), (4, 4), (8, 8))),
])
def test_the_network_has_the_planned_shape(patch, spacing, multiple, strides):
    net = backbone("nnunet", NetSpec(1, patch, 2, spacing)).eval()
    assert net.multiple == multiple and net.encoder_strides == strides and not net.head_bias
    with torch.no_grad():
        skips = net.encode(torch.randn(1, 1, *patch))
        maps = net.decode(skips)
    for level, (features, stride) in enumerate(zip(skips, strides, strict=True)):
        assert features.shape[2:] == tuple(side // step for side, step in zip(patch, stride, strict=True))
        assert level == len(maps) or maps[level].shape == features.shape
