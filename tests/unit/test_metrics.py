"""Metrics: values by hand, laws, and other tools as oracles; all of it compiled and by SciPy."""

import importlib.util
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_closing, binary_erosion, distance_transform_edt, gaussian_filter

from ssl4mis import metrics

SHARED = Path(__file__).resolve().parents[3] / "shared"
DISTANCES = [f"{name}_{unit}" for name in ("hd95", "hd95_max", "asd", "assd") for unit in ("voxel", "mm")]
KEYS = {"dice", "jaccard", *DISTANCES, "empty_prediction", "empty_truth", "diagonal_voxel", "diagonal_mm"}


@pytest.fixture(scope="module", params=["compiled", "scipy"], autouse=True)
def way(request):
    """Every test of this file runs in both ways."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "scipy":
            patch.setattr(metrics, "_compiled", lambda: None)
        else:
            pytest.importorskip("numba", reason="numba is not installed")
            assert metrics._compiled() is not None
        yield request.param


def points(shape, *indices):
    mask = np.zeros(shape, bool)
    mask[tuple(np.transpose(indices))] = True
    return mask


def box(shape, start, stop):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 1
    return mask


def ball(shape, center, radius):
    grid = np.indices(shape).reshape(len(shape), *shape)
    return sum((g - c) ** 2 for g, c in zip(grid, center, strict=True)) <= radius**2


def blob(shape, seed, level=0.0):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return noise > level * noise.std()


# Values by hand


def test_two_voxels_two_mm_apart():
    row = metrics.score(points((9, 9), (4, 2)), points((9, 9), (4, 6)), (3.0, 0.5))
    assert row.keys() == KEYS
    assert row["dice"] == row["jaccard"] == 0
    assert all(row[key] == (4 if key.endswith("voxel") else 2) for key in DISTANCES)
    assert row["empty_prediction"] is False and row["empty_truth"] is False
    assert row["diagonal_voxel"] == pytest.approx(9 * 2**0.5)
    assert row["diagonal_mm"] == pytest.approx((27**2 + 4.5**2) ** 0.5)


def test_shifted_square():
    truth, pred = box((12, 12), (2, 2), (6, 6)), box((12, 12), (3, 2), (7, 6))
    row = metrics.score(pred, truth, (2, 2))
    assert row["dice"] == pytest.approx(2 * 12 / 32) and row["jaccard"] == pytest.approx(12 / 20)
    # Of the 12 surface pixels of each square, 4 of the far side and 2 of the near side are one pixel off.
    assert sorted(metrics.surface_distances(pred, truth, (1, 1))[0]) == [0] * 6 + [1] * 6
    assert row["asd_voxel"] == row["assd_voxel"] == 0.5 and row["asd_mm"] == row["assd_mm"] == 1
    assert row["hd95_voxel"] == row["hd95_max_voxel"] == 1 and row["hd95_mm"] == row["hd95_max_mm"] == 2


def test_shifted_cube_anisotropic():
    truth, pred = box((8, 9, 10), (1, 1, 1), (4, 4, 4)), box((8, 9, 10), (4, 1, 1), (7, 4, 4))
    row = metrics.score(pred, truth, (5, 1, 1))
    assert row["dice"] == 0
    # 26 surface voxels each, in planes of 9, 8 (the center is inside) and 9 that are 1, 2 and 3 slices off.
    assert row["asd_voxel"] == pytest.approx((9 * 1 + 8 * 2 + 9 * 3) / 26)
    assert row["asd_mm"] == row["assd_mm"] == pytest.approx(5 * row["asd_voxel"])
    assert (row["hd95_voxel"], row["hd95_mm"]) == (3, 15)


def test_anisotropic_spacing_changes_the_nearest_voxel():
    pred, truth = points((5, 5), (0, 0)), points((5, 5), (2, 0), (0, 3))
    row = metrics.score(pred, truth, (4, 1))
    assert row["asd_voxel"] == 2 and row["asd_mm"] == 3  # two rows of 4 mm are farther than three columns of 1 mm
    assert row["assd_voxel"] == pytest.approx(7 / 3) and row["assd_mm"] == pytest.approx((3 + 3 + 8) / 3)


def test_ball_of_known_volume():
    small, large = ball((41,) * 3, (20,) * 3, 10), ball((41,) * 3, (20,) * 3, 14)
    volume = 4 / 3 * np.pi
    row = metrics.score(small, large, (0.5,) * 3)
    assert small.sum() == pytest.approx(volume * 10**3, rel=0.02)
    assert row["dice"] == pytest.approx(2 * 10**3 / (10**3 + 14**3), abs=0.01)
    assert row["jaccard"] == pytest.approx(10**3 / 14**3, abs=0.01)
    assert row["assd_mm"] == pytest.approx(2, abs=0.15) and row["hd95_mm"] == pytest.approx(2, abs=0.3)


def test_percentile_pools_both_lists():
    """One stray voxel among 1 + 1 surface voxels against 1: pooled and maximum definitions differ."""
    pred, truth = points((1, 30), (0, 0), (0, 20)), points((1, 30), (0, 0))
    row = metrics.score(pred, truth, (1, 1))
    assert row["hd95_voxel"] == pytest.approx(np.percentile([0, 20, 0], 95)) == pytest.approx(18)
    assert row["hd95_max_voxel"] == pytest.approx(19)
    assert row["asd_voxel"] == 10 and metrics.score(truth, pred, (1, 1))["asd_voxel"] == 0
    assert row["assd_voxel"] == pytest.approx(20 / 3)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (5, 4, 6), (3, 4, 5, 3)])
def test_border_voxels_are_surface(shape):
    full = np.ones(shape, bool)
    inside = np.ones(tuple(n - 2 for n in shape), bool)
    forward, back = metrics.surface_distances(full, np.pad(inside, 1), (1,) * len(shape))
    assert forward.size == full.size - inside.size and forward.min() == 1
    assert back.size == np.count_nonzero(inside ^ binary_erosion(inside))
    row = metrics.score(full, full, (1.5,) * len(shape))
    assert row["dice"] == row["jaccard"] == 1 and all(row[key] == 0 for key in DISTANCES)


# Empty masks and wrong input


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("pred, truth, overlap, distance", [(0, 0, 1, 0.0), (0, 1, 0, np.nan), (1, 0, 0, np.nan)])
def test_empty_masks(pred, truth, overlap, distance, spacing):
    shape = (4, 5, 6)
    pred, truth = np.full(shape, pred, np.uint8), np.full(shape, truth, np.uint8)
    row = metrics.score(pred, truth, spacing)
    assert row.keys() == KEYS and row["dice"] == row["jaccard"] == overlap
    np.testing.assert_equal([row[key] for key in DISTANCES], [distance] * len(DISTANCES))
    assert (row["empty_prediction"], row["empty_truth"]) == (not pred.any(), not truth.any())
    assert row["diagonal_voxel"] == pytest.approx(77**0.5)
    assert row["diagonal_mm"] == pytest.approx(np.linalg.norm(np.multiply(shape, spacing)))
    assert metrics.dice(pred, truth) == metrics.jaccard(pred, truth) == overlap
    lists = metrics.surface_distances(pred, truth, spacing)
    assert [d.size > 0 for d in lists] == [pred.any(), truth.any()] and all(np.isnan(d).all() for d in lists)


ONE = np.ones((2, 3), np.uint8)


@pytest.mark.parametrize(
    "pred, truth, spacing, words",
    [
        (ONE, ONE[:1], (1, 1), "shape"),
        (ONE[0, 0], ONE[0, 0], (), "shape"),
        (ONE * 2, ONE, (1, 1), "prediction contains the value 2"),
        (ONE, ONE * 0.5, (1, 1), "truth contains the value 0.5"),
        (ONE, ONE * np.nan, (1, 1), "truth contains the value nan"),
        (ONE.astype(int) * -1, ONE, (1, 1), "prediction contains the value -1"),
        (ONE, ONE, (1, 1, 1), "expected 2 positive numbers"),
        (ONE, ONE, 1.0, "expected 2 positive numbers"),
        (ONE, ONE, None, "expected 2 positive numbers"),
        (ONE, ONE, (1, 0), "expected 2 positive numbers"),
        (ONE, ONE, (1, -1), "expected 2 positive numbers"),
        (ONE, ONE, (1, np.nan), "expected 2 positive numbers"),
        (ONE, ONE, (1, np.inf), "expected 2 positive numbers"),
        (ONE, ONE, (1, "wide"), "expected 2 positive numbers"),
    ],
)
def test_errors_are_one_clear_line(pred, truth, spacing, words):
    for function in (metrics.score, metrics.surface_distances):
        with pytest.raises(ValueError, match=words) as error:
            function(pred, truth, spacing)
        assert "\n" not in str(error.value)


def test_input_is_left_alone():
    pred, truth = blob((9, 8, 7), 0).astype(np.uint8), blob((9, 8, 7), 1)
    before = pred.copy(), truth.copy()
    for array in (pred, truth):
        array.flags.writeable = False
    metrics.score(pred, truth, (1, 1, 2))
    np.testing.assert_array_equal(pred, before[0])
    np.testing.assert_array_equal(truth, before[1])


def test_needs_no_torch():
    code = "import sys, ssl4mis.metrics; sys.exit(any(m in sys.modules for m in ('torch', 'medpy', 'monai', 'numba')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(metrics.__file__).parents[1]).returncode == 0


WITHOUT = {
    "numba": "sys.modules['numba'] = None",
    "a place for its cache": "from numba.core.caching import CacheImpl; CacheImpl._locator_classes = []",
}


@pytest.mark.parametrize("missing", WITHOUT)
def test_scipy_takes_over_without(missing):
    code = f"""if True:
        import sys
        {WITHOUT[missing]}
        import numpy as np
        from ssl4mis import metrics
        row = metrics.score(np.eye(9, k=2), np.eye(9), (1, 1))
        sys.exit(metrics._compiled() is not None or row["asd_voxel"] != 2**0.5)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(metrics.__file__).parents[1]).returncode == 0


def test_threads_at_once_and_again():
    cases = [(blob((30, 28, 26), n), blob((30, 28, 26), n, 0.5), (1, 2, 1 + n % 2)) for n in range(8)]
    expected = [metrics.score(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda case: metrics.score(*case), cases * 5)) == expected * 5


def test_memory_of_a_large_scan():
    """Two objects in opposite corners of a CT: their box is the whole scan, the worst case."""
    shape = (512, 512, 240)
    pred, truth = np.zeros((2, *shape), np.uint8)
    pred[10:60, 10:60, 5:40] = truth[450:500, 440:490, 190:230] = 1
    tracemalloc.start()
    row = metrics.score(pred, truth, (0.8, 0.8, 1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row["asd_mm"] > 400 and peak < 6 * pred.size


# Laws on random masks


@st.composite
def pairs(draw, empty=False):
    dims = draw(st.sampled_from([2, 3]))
    shape = draw(hnp.array_shapes(min_dims=dims, max_dims=dims, max_side=18 - 4 * dims))
    if draw(st.booleans()):
        masks = draw(hnp.arrays(bool, (2, *shape)))
    else:  # compact objects, which have an inside
        masks = np.stack([blob(shape, draw(st.integers(0, 999)), draw(st.floats(-1, 1))) for _ in range(2)])
    if not empty:
        for mask in masks:
            mask.flat[draw(st.integers(0, mask.size - 1))] = True
    one = st.floats(0.25, 8)
    spacing = draw(st.one_of(one.map(lambda s: (s,) * len(shape)), st.tuples(*[one] * len(shape))))
    return masks[0], masks[1], spacing


@settings(max_examples=60, deadline=None)
@given(pairs(empty=True))
def test_laws(example):
    pred, truth, spacing = example
    row, swapped = metrics.score(pred, truth, spacing), metrics.score(truth, pred, spacing)
    for key in KEYS - {"asd_voxel", "asd_mm", "empty_prediction", "empty_truth"}:
        assert row[key] == pytest.approx(swapped[key], rel=1e-12, nan_ok=True), key
    assert row["dice"] == pytest.approx(2 * row["jaccard"] / (1 + row["jaccard"]))
    assert (row["dice"], row["jaccard"]) == (metrics.dice(pred, truth), metrics.jaccard(pred, truth))
    if pred.any() and truth.any():
        lists = metrics.surface_distances(pred, truth, spacing)
        sizes = [d.size for d in lists]
        pooled = np.dot(sizes, [row["asd_mm"], swapped["asd_mm"]]) / sum(sizes)
        assert row["assd_mm"] == pytest.approx(pooled)
        farthest = max(d.max() for d in lists)
        assert max(row["hd95_mm"], row["hd95_max_mm"]) <= farthest * (1 + 1e-9) and farthest < row["diagonal_mm"]
        assert min(spacing) * row["assd_voxel"] <= row["assd_mm"] * (1 + 1e-9)
        assert row["assd_mm"] <= max(spacing) * row["assd_voxel"] * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(pairs(), st.integers(0, 3), st.data())
def test_background_and_axis_order_do_not_matter(example, width, data):
    pred, truth, spacing = example
    order = data.draw(st.permutations(range(pred.ndim)))
    row = metrics.score(pred, truth, spacing)
    moved = [np.flip(np.pad(m, width).transpose(order), axis=0) for m in (pred, truth)]
    other = metrics.score(*moved, [spacing[a] for a in order])
    for key in ("dice", "jaccard", *DISTANCES):
        assert row[key] == pytest.approx(other[key], rel=1e-12, abs=1e-12), key


# Both ways against each other, and against other tools


PARTS = ("box", "plane", "voxel", "noise", "speckles", "all")


def part(kind, shape, rng):
    if kind in ("noise", "speckles"):
        return rng.random(shape) < (0.4 if kind == "noise" else 0.01)
    start, last = np.sort(rng.integers(0, shape, (2, len(shape))), axis=0)
    if kind == "plane":
        axis = rng.integers(len(shape))
        last[axis] = start[axis]
    if kind == "voxel":
        last = start
    return box(shape, start * (kind != "all"), shape if kind == "all" else last + 1) > 0


@st.composite
def scenes(draw):
    """Pairs of none to three parts each, which touch the borders or lie far apart; a row has up to three words."""
    dims = draw(st.sampled_from([2, 3]))
    row = draw(st.sampled_from([9, 31, 32, 33, 63, 64, 65, 127, 128, 129]))
    shape = draw(st.permutations([row, *(draw(st.integers(1, 14)) for _ in range(dims - 1))]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kinds = draw(st.tuples(*[st.lists(st.sampled_from(PARTS), max_size=3)] * 2))
    masks = (np.any([np.zeros(shape, bool), *(part(kind, shape, rng) for kind in some)], axis=0) for some in kinds)
    spacing = draw(st.sampled_from([(1, 1, 1), (0.625, 0.625, 0.625), (5, 1, 0.3), (0.7, 0.8, 3), (2, 2, 1)]))
    return *masks, spacing[:dims]


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_fuzz(way, example):
    if way != "compiled":
        pytest.skip("both ways are run at once")
    row, lists = metrics.score(*example), metrics.surface_distances(*example)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_compiled", lambda: None)
        other, others = metrics.score(*example), metrics.surface_distances(*example)
    np.testing.assert_equal(*({key: value for key, value in r.items() if "mm" not in key} for r in (row, other)))
    for ours, theirs in zip((*lists, list(row.values())), (*others, list(other.values())), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    if not (row["empty_prediction"] or row["empty_truth"]):
        agrees_with_medpy(*example)


def oracle(start, goal, spacing):
    start, goal = (mask ^ binary_erosion(mask) for mask in (start, goal))
    return distance_transform_edt(~goal, sampling=spacing)[start]


@pytest.mark.parametrize("shape", [(40,), (3, 64), (65, 5), (2, 3, 130), (12, 70, 9), (70, 4, 33), (5, 6, 7, 8)])
def test_lists_are_those_of_scipy_in_c_order(shape):
    spacings = [(1.0,) * len(shape), (0.5,) * len(shape), np.linspace(0.7, 2.3, len(shape))]
    for pred, truth in [(blob(shape, 1), blob(shape, 2)), (blob(shape, 3, 1.0), blob(shape, 4, -1.0))]:
        for spacing in spacings:
            there, back = metrics.surface_distances(pred, truth, spacing)
            np.testing.assert_allclose(there, oracle(pred, truth, spacing), rtol=1e-12)
            np.testing.assert_allclose(back, oracle(truth, pred, spacing), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 2, n) for n in (64, 181, 192, 193, 255, 256, 257, 300)]
                         + [(n, 2, 2) for n in (181, 253, 254, 255, 256, 257, 300)]
                         + [(2, n, 2) for n in (181, 255, 256, 257, 300)]
                         + [(150, 150, n) for n in (144, 146, 147)]
                         + [(65534, 2, 1), (65535, 1, 2), (65536, 2, 2), (70000, 2), (2, 70000)])
def test_corner_to_corner(shape):
    """Boxes on both sides of every change to wider numbers; the second object is nearer along one axis only."""
    far = np.subtract(shape, 1)
    pred = points(shape, (0,) * len(shape))
    for truth in (points(shape, far), points(shape, far, far * (np.arange(len(shape)) != np.argmax(far)))):
        goals = np.argwhere(truth)
        for spacing in ((1, 1, 1), (1, 1.5, 2)):
            expected = np.linalg.norm(goals * spacing[: len(shape)], axis=1)
            there, back = metrics.surface_distances(pred, truth, spacing[: len(shape)])
            np.testing.assert_allclose(there, [expected.min()], rtol=1e-14)
            np.testing.assert_allclose(back, expected, rtol=1e-14)


def test_layout_and_type_of_the_arrays_do_not_matter():
    pred, truth = blob((20, 17, 35), 0), blob((20, 17, 35), 1)
    expected = metrics.score(pred, truth, (1, 1, 2))
    for kind in (np.uint8, np.int8, np.int64, np.uint16, np.float32):
        assert metrics.score(pred.astype(kind), truth, (1, 1, 2)) == expected
    fortran = np.asfortranarray(pred)
    cut = np.zeros((40, 18, 36), np.uint8)
    cut[::2, 1:, :35] = truth
    assert metrics.score(fortran, cut[::2, 1:, :35], (1, 1, 2)) == expected


def agrees_with_medpy(pred, truth, spacing):
    medpy = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed")
    pred, truth = np.asarray(pred), np.asarray(truth)
    row = metrics.score(pred, truth, spacing)
    expected = {"dice": medpy.dc(pred, truth), "jaccard": medpy.jc(pred, truth)}
    for unit, scale in (("voxel", None), ("mm", spacing)):
        for name in ("hd95", "asd", "assd"):
            expected[f"{name}_{unit}"] = getattr(medpy, name)(pred, truth, voxelspacing=scale)
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key


@settings(max_examples=80, deadline=None)
@given(pairs())
def test_medpy_on_random_masks(example):
    agrees_with_medpy(*example)


SHAPE = (24, 20, 16)
KNOWN = {
    "touching borders": (box(SHAPE, (0, 0, 0), (9, 20, 7)), box(SHAPE, (0, 2, 0), (12, 20, 16))),
    "whole image": (np.ones(SHAPE, bool), ball(SHAPE, (12, 10, 8), 6)),
    "opposite corners": (points(SHAPE, (0, 0, 0)), points(SHAPE, (23, 19, 15))),
    "single voxel in a ball": (points(SHAPE, (12, 10, 8)), ball(SHAPE, (12, 10, 8), 6)),
    "identical": (blob(SHAPE, 3), blob(SHAPE, 3)),
    "stray voxel": (ball(SHAPE, (6, 6, 6), 4) | points(SHAPE, (23, 19, 15)), ball(SHAPE, (7, 6, 6), 4)),
    "hollow": (ball(SHAPE, (12, 10, 8), 7) & ~ball(SHAPE, (12, 10, 8), 4), ball(SHAPE, (12, 10, 8), 7)),
    "one slice": (ball(SHAPE, (12, 10, 8), 7) & box(SHAPE, (0, 0, 8), (24, 20, 9)), ball(SHAPE, (12, 10, 8), 7)),
    "checkerboard": (np.indices(SHAPE).sum(0) % 2 == 0, np.indices(SHAPE).sum(0) % 2 == 1),
    "ragged": (ball(SHAPE, (12, 10, 8), 6) ^ blob(SHAPE, 4, 1.5), ball(SHAPE, (12, 10, 8), 7) & ~blob(SHAPE, 5, 1.5)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("spacing", [(0.625,) * 3, (1.4, 1.5, 8.0)])
def test_medpy_on_known_problems(name, spacing):
    pred, truth = KNOWN[name]
    agrees_with_medpy(np.asarray(pred, bool), truth, spacing)


@pytest.mark.filterwarnings("ignore")
def test_monai_takes_the_larger_percentile_and_the_same_means():
    monai = pytest.importorskip("monai.metrics", reason="monai is not installed")
    torch = pytest.importorskip("torch")
    for pred, truth in KNOWN.values():
        tensors = [torch.from_numpy(np.asarray(m, np.float32))[None, None] for m in (pred, truth)]
        for spacing in ((0.625,) * 3, (1.4, 1.5, 8.0)):
            row = metrics.score(pred, truth, spacing)
            for unit, scale in (("voxel", None), ("mm", list(spacing))):
                options = {"include_background": True, "spacing": scale}
                expected = {
                    "hd95_max": monai.compute_hausdorff_distance(*tensors, percentile=95, **options),
                    "asd": monai.compute_average_surface_distance(*tensors, **options),
                    "assd": monai.compute_average_surface_distance(*tensors, symmetric=True, **options),
                }
                for key, value in expected.items():  # float32
                    assert row[f"{key}_{unit}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), key


@pytest.fixture(scope="module")
def real_label():
    data, reader = os.environ.get("SSL4MIS_DATA"), SHARED / "scans.py"
    prepared = sorted(Path(data).rglob("mri_norm2.h5")) if data else []
    packed = sorted((SHARED / "la").glob("*.npz"))
    if prepared:
        h5py = pytest.importorskip("h5py")
        with h5py.File(prepared[0]) as file:
            return file["label"][:]
    if not packed or not reader.is_file():
        pytest.skip("no left atrium scans: set SSL4MIS_DATA to the folder of the data sets")
    spec = importlib.util.spec_from_file_location("scans", reader)
    scans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scans)
    return scans.unpack(packed[0])[1]


def test_medpy_on_a_real_left_atrium(real_label):
    noise = gaussian_filter(np.random.default_rng(0).standard_normal(real_label.shape), 3)
    pred = binary_closing(np.roll(real_label, (1, -2, 1), (0, 1, 2)) > 0, iterations=2)
    pred = (pred & (noise > -2 * noise.std())) | (noise > 4.5 * noise.std())
    assert 0.5 < metrics.dice(pred, real_label) < 1
    agrees_with_medpy(pred, real_label, (0.625,) * 3)
