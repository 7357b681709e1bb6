"""Correlation of positions against naive loops: propagation, rows, shapes, regions, confidence, memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from networks.blocks import strides
from ssl4mis import correlation as c
from ssl4mis.errors import UserError

MODES = {2: "bilinear", 3: "trilinear"}


def head(dims=3, stride=8, channels=(2, 4, 8, 16, 32), dropout=0.0, levels=None):
    torch.manual_seed(0)
    backbone = SimpleNamespace(spatial_dims=dims, encoder_channels=channels,
                               encoder_strides=levels or strides(dims, len(channels)))
    return c.CorrelationHead(backbone, stride, 6, 5, dropout)


def features(side=16, dims=3, channels=(2, 4, 8, 16, 32)):
    return [torch.randn(2, count, *[side // 2**level] * dims) for level, count in enumerate(channels)]


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_rows_sum_to_one_and_are_float32_under_autocast(dims):
    encoder = features(32, dims)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = head(dims)(encoder)
    assert matrix.shape == (2, 4**dims, 4**dims) and matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4**dims))
    assert (matrix.sum(1) - 1).abs().max() > 1e-3  # columns do not


def test_entries_are_a_softmax_of_scaled_products():
    made, x = head(), torch.randn(1, 6, 2, 3, 1)
    one, other = (conv(x)[0].flatten(1).detach() for conv in (made.one, made.other))
    expected = torch.empty(6, 6)
    for i in range(6):
        scores = torch.stack([one[:, i] @ other[:, j] for j in range(6)]) / 5**0.5
        expected[i] = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(made.compare(x)[0].detach(), expected)


@pytest.mark.parametrize(("stride", "levels", "cells"), [
    (1, (0, 1), (16, 16, 16)), (7, (2, 3), (4, 4, 4)), (8, (3, 4), (2, 2, 2)), (16, (4,), (1, 1, 1)),
    (99, (4,), (1, 1, 1)),
])
def test_the_deepest_level_that_is_fine_enough_and_the_one_below(stride, levels, cells):
    made = head(stride=stride)
    inputs = made.projection[0].in_channels
    assert inputs == sum((2, 4, 8, 16, 32)[level] for level in levels)
    assert made.grid((16, 16, 16)) == cells


def test_the_largest_axis_of_a_stride_counts():
    made = head(levels=((1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 2), (16, 16, 4)))
    assert made.grid((32, 16, 8)) == (4, 2, 4)


def test_a_stride_finer_than_the_network_is_refused():
    with pytest.raises(UserError, match="hp.corr_stride 1: expected at least 2"):
        head(stride=1, channels=(2, 4), levels=((2, 2, 2), (4, 4, 4)))


def test_memory_at_the_published_patches():
    for patch in ((112, 112, 80), (96, 96, 96)):
        head(stride=8).check_memory(6, patch, 1024)
        with pytest.raises(UserError, match="hp.corr_stride") as refusal:
            head(stride=4).check_memory(6, patch, 1024)
        assert "\n" not in str(refusal.value)
    assert 16 * 6 * 1960**2 / 2**20 == pytest.approx(351.7, abs=0.1)
    head(stride=8).check_memory(6, (112, 112, 80), 352)
    with pytest.raises(UserError, match="6 samples with 1960 positions need 352 MiB"):
        head(stride=8).check_memory(6, (112, 112, 80), 351)


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "space"), [
    ((4, 3), (9, 12)), ((2, 3, 4), (8, 6, 12)), ((8, 6, 12), (2, 3, 4)), ((1, 2, 3), (4, 4, 4)), ((5, 4), (1, 8)),
])
def test_enlarge_is_linear_interpolation_with_its_gradient(grid, space):
    x = torch.randn(2, 3, *grid, requires_grad=True)
    expected = F.interpolate(x, size=space, mode=MODES[len(grid)], align_corners=True)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, grad)[0]
    found = c.enlarge(x, space)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], wanted, rtol=1e-5, atol=3e-5)


def test_enlarge_is_float32_under_autocast():
    x = torch.randn(1, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = c.enlarge(x, (6, 8))
    assert torch.equal(under, c.enlarge(x, (6, 8))) and c.enlarge(x.bfloat16(), (6, 8)).dtype == torch.float32


def test_reduce():
    x = torch.randn(2, 3, 4, 6, 2)
    means = x.unflatten(4, (1, 2)).unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5, 7))
    torch.testing.assert_close(c.reduce(x, (2, 3, 1)), means)
    points = F.interpolate(x, size=(2, 3, 1), mode="trilinear", align_corners=True)
    torch.testing.assert_close(c.reduce(x, (2, 3, 1), "interp"), points, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("apply", ["col", "row"])
def test_propagation_is_the_double_sum(apply):
    grid, logits = (2, 3, 2), torch.randn(2, 3, 4, 6, 4, requires_grad=True)
    matrix = torch.randn(2, 12, 12).softmax(-1).requires_grad_()
    coarse, expected = c.reduce(logits.detach(), grid).flatten(2), torch.zeros(2, 3, 12)
    for i in range(12):
        for j in range(12):
            source, target = (i, j) if apply == "col" else (j, i)
            expected[:, :, target] += coarse[:, :, source] * matrix[:, i, j, None].detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = c.propagate(logits, matrix, grid, apply=apply)
    torch.testing.assert_close(found.flatten(2).detach(), expected)
    found.sum().backward()
    assert logits.grad is None and matrix.grad.abs().max() > 0


def test_positions_are_numbered_as_they_lie_in_memory():
    """A correlation that sends one position to another moves the logits of that cell, on a grid of unlike sides."""
    grid, logits = (2, 3, 4), torch.randn(1, 2, 4, 6, 8).to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(c.propagate(logits, torch.eye(24)[None], grid), c.reduce(logits, grid))
    matrix = torch.zeros(1, 24, 24)
    matrix[0, np.ravel_multi_index((1, 0, 2), grid), np.ravel_multi_index((0, 2, 3), grid)] = 1
    moved, source = c.propagate(logits, matrix, grid), c.reduce(logits, grid)
    assert torch.equal(moved[0, :, 0, 2, 3], source[0, :, 1, 0, 2]) and moved.count_nonzero() == 2


# --- rows and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["random", "shared", "uniform", "balanced"])
def test_rows_are_positions(sampling):
    torch.manual_seed(0)
    foreground = torch.rand(3, 20) < 0.2
    rows = torch.stack([c.sample_rows(sampling, 8, foreground) for _ in range(300)])
    assert rows.shape == (300, 3, 8) and rows.min() == 0
    assert rows.max() == (18 if sampling == "shared" else 19)
    assert (rows[:, :1] == rows).all() == (sampling == "shared")


def test_uniform_rows_are_evenly_spaced():
    rows = c.sample_rows("uniform", 5, torch.zeros(2, 20, dtype=torch.bool)).sort(1).values
    assert (rows.diff() == 4).all()


def test_balanced_rows():
    """One half among the foreground, all of it; without foreground all rows are random."""
    torch.manual_seed(0)
    foreground = torch.zeros(2, 50, dtype=torch.bool)
    foreground[0, [3, 17, 49]] = True
    rows = torch.stack([c.sample_rows("balanced", 9, foreground) for _ in range(200)])
    assert set(rows[:, 0, :4].flatten().tolist()) == {3, 17, 49}
    assert len(rows[:, 0, 4:].unique()) == len(rows[:, 1, :4].unique()) == 50
    one = torch.zeros(1, 4, dtype=torch.bool)
    assert len(c.sample_rows("balanced", 1, one)[0]) == 1


def naive_shape(row, grid, space, mode):
    row = row.reshape(grid)
    if row.max() == row.min():
        return np.zeros(space if mode == "soft_full" else grid, dtype=bool)
    if mode == "soft_full":
        row = F.interpolate(torch.tensor(row)[None, None], size=space, mode=MODES[len(grid)], align_corners=True)
        row = row[0, 0].numpy()
    return (row - row.min()) / (row.max() - row.min()) > 0.5


@pytest.mark.parametrize("mode", ["soft_full", "binary_coarse"])
@pytest.mark.parametrize(("grid", "space"), [((2, 3, 4), (8, 9, 8)), ((5, 4), (10, 12))])
def test_shapes_of_any_number_of_rows(mode, grid, space):
    torch.manual_seed(0)
    count = int(np.prod(grid))
    matrix = (3 * torch.randn(2, count, count)).softmax(-1)
    matrix[0, 1], matrix[1, 2] = 1 / count, 0.3
    rows = torch.randint(count, (2, 37))
    rows[:, :3] = torch.arange(3)
    chunks = list(c.shapes(matrix, rows, grid, space, mode))
    assert [chunk.shape[1] for chunk in chunks] == 37 // c.CHUNK * [c.CHUNK] + [37 % c.CHUNK]
    found = torch.cat(chunks, 1)
    assert found.shape == (2, 37, *(space if mode == "soft_full" else grid)) and found.dtype == torch.float32
    for sample in range(2):
        for index, row in enumerate(rows[sample]):
            assert np.array_equal(found[sample, index], naive_shape(matrix[sample, row].numpy(), grid, space, mode))
    assert not found[0, 1].any() and not found[1, 2].any(), "a constant row is a shape"


# --- regions ---------------------------------------------------------------------------------------------------------


def naive_regions(label, confident, allowed, shapes, tau, classes, order):
    """The loop of the paper, voxel by voxel set, of one sample; shapes (R, *space)."""
    new, mask = label.copy(), confident.copy()
    for shape in shapes:
        shape = shape & allowed
        agreed = shape & confident
        if not agreed.any() or np.float32(agreed.sum()) / np.float32(shape.sum()) < np.float32(tau):
            continue
        seen = new if order == "sequential" else label
        votes = [np.sum(seen[agreed] == k) for k in range(classes)]
        if np.float32(max(votes)) / np.float32(agreed.sum()) > np.float32(tau):
            new[shape], mask[shape] = np.argmax(votes), True
    return new, mask


def blobs(rng, space, coarse):
    grid = tuple(side // 2 for side in space)
    values = rng.random(grid)
    shape = values > rng.uniform(0.3, 0.95)
    if coarse:
        return shape
    return np.kron(shape, np.ones((2,) * len(space), bool)) ^ (rng.random(space) < 0.05)


def case(seed, space, classes, coarse):
    rng = np.random.default_rng(seed)
    label = (rng.random((2, *space)) ** 3 * classes).astype(np.int64)
    confident, allowed = rng.random((2, *space)) < 0.8, rng.random((2, *space)) < 0.9
    shapes = np.stack([[blobs(rng, space, coarse) for _ in range(20)] for _ in range(2)])
    shapes[:, 5] = False
    return label, confident, allowed, shapes


@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("space", "classes"), [((8, 8, 8), 2), ((8, 8, 8), 4), ((12, 16), 3)])
def test_regions_are_what_the_loop_makes(order, coarse, space, classes):
    changed = grown = 0
    for seed in range(12):
        label, confident, allowed, shapes = case(seed, space, classes, coarse)
        full = np.kron(shapes, np.ones((1, 1, *[2] * len(space)), bool)) if coarse else shapes
        tau = (0.5, 0.6, 0.7)[seed % 3]
        given = [torch.tensor(x) for x in (label, confident, allowed)]
        kept = [x.clone() for x in given]
        found, mask = c.propagate_regions(*given, torch.tensor(shapes).split(7, 1), torch.tensor(tau), classes, order)
        for sample in range(2):
            wanted = naive_regions(label[sample], confident[sample], allowed[sample], full[sample], tau, classes, order)
            assert np.array_equal(found[sample], wanted[0]) and np.array_equal(mask[sample], wanted[1])
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), "the input was changed"
        assert not (given[1] & ~mask).any(), "a confident voxel was lost"
        assert torch.equal(found[~given[2]], given[0][~given[2]]), "a label was changed where it must not"
        assert torch.equal(mask[~given[2]], given[1][~given[2]])
        changed, grown = changed + (found != given[0]).sum(), grown + (mask & ~given[1]).sum()
    assert changed and grown


def test_orders_differ():
    """Labels that an earlier shape overwrote can turn the vote of a later one."""
    label = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1]]).view(1, 8, 1)
    everywhere = torch.ones_like(label, dtype=torch.bool)
    shapes = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]]).bool().view(1, 2, 8, 1)
    results = [c.propagate_regions(label, everywhere, everywhere, [shapes], torch.tensor(0.55), 2, order)[0].flatten()
               for order in ("sequential", "parallel")]
    assert results[0].tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    assert results[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_ratios_at_the_threshold():
    """The share of confident voxels may equal tau, the share of the majority may not."""
    label, everywhere = torch.tensor([[[0, 0, 0, 1]]]), torch.ones(1, 1, 4, dtype=torch.bool)
    confident = torch.tensor([[[True, True, True, False]]])
    shape = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    three = c.propagate_regions(label, confident, everywhere, [shape], torch.tensor(0.75), 2)
    assert three[0].tolist() == [[[0, 0, 0, 0]]] and three[1].all()
    above = c.propagate_regions(label, confident, everywhere, [shape], torch.tensor(0.7500001), 2)
    assert torch.equal(above[0], label) and torch.equal(above[1], confident)
    majority = c.propagate_regions(label, everywhere, everywhere, [shape], torch.tensor(0.75), 2)
    assert torch.equal(majority[0], label)


# --- confidence ------------------------------------------------------------------------------------------------------


def test_class_confidence():
    confidence = torch.tensor([[0.9, 0.6, 0.7, 0.99, 0.5]])
    label, valid = torch.tensor([[0, 0, 2, 2, 2]]), torch.tensor([[1, 1, 1, 0, 1]]).bool()
    values = {name: c.class_confidence(confidence, label, valid, 4, name).item() for name in ("max", "mean", "q95")}
    assert values == pytest.approx({"max": (0.9 + 0.7) / 2, "mean": (0.75 + 0.6) / 2,
                                    "q95": (0.6 + 0.95 * 0.3 + 0.5 + 0.95 * 0.2) / 2})
    for name in values:
        assert c.class_confidence(confidence, label, torch.zeros_like(valid), 4, name).isnan()
